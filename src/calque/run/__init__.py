"""What every run has: files, checkpoints, spilled values, progress, workers."""
