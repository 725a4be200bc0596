"""Fast implementation of the training step of scvi-tools' VAE."""
