"""Nearest neighbors, UMAP maps and clusters of an embedding."""
