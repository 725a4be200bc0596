"""The training step of scvi-tools' VAE in less work."""
