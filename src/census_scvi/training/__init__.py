"""Training: fit, callbacks, checkpoints; fast/ is the exact fast step."""
