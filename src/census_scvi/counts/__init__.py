"""Counts on disk: reads and writes .h5ad files, orders cells, makes minibatches."""
