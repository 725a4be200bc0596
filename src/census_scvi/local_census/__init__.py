"""Builds a local Census from .h5ad files or simulated cells; the Census API can read it."""
