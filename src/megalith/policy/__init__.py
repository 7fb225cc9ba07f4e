"""Floor 2: pure decisions. State in, decision out; no clock, no I/O, no torch. Engine and simulator run the same."""
