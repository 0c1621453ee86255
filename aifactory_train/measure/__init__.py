"""The clocks of benchmarks: timed calls on all ranks, the control plane between them, energy and health meanwhile."""
