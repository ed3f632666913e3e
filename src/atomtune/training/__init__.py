"""Training: options, preparation, objective, loop, checkpoints."""
