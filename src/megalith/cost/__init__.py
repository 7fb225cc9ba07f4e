"""Floor 1: one arithmetic. Model + profile + batch gives bytes, FLOPs, seconds, joules and money."""
