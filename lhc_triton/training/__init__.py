"""Training: data, the coarse and the fine stage, checkpoints."""
