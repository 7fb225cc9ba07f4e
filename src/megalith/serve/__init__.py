"""Floor 7: the OpenAI-compatible server."""
