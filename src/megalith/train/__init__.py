"""Training: models of Megalith's own that learn from data. The first is the load forecaster."""
