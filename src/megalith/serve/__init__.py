"""Floor 7: the OpenAI-compatible server. Knows HTTP and the engine's protocol; never imports torch."""
