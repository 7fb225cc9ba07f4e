"""Floor 0: what a model, a device, a workload and a plan are. Data only; no arithmetic beyond counting."""
