"""Two releases of an embedding, compared: their cells, positions, neighbors, settings and predictions."""
