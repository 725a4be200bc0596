"""Writes a local Census that the real API reads: from .h5ad files, or simulated cells."""
