"""A local Census, as the real API reads it: from .h5ad files, or from any other source of cells."""
