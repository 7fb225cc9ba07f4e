"""Floor 5: plans and their predictions: fit, search, explain."""
