"""Highly variable genes (seurat_v3) in one pass over the counts."""
