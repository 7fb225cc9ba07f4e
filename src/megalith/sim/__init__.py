"""Floor 4: the simulator. The policies of floor 2 on a clock that jumps; no torch, no wall clock, no threads."""
