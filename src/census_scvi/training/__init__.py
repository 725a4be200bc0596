"""Training: fit, callbacks, checkpoints; fast/ has the fast implementation of the training step."""
