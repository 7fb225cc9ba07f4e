"""Floor 0: units, errors, clock, random numbers, strict configuration. Imports nothing of ours."""
