"""Label transfer: cell types for the user's cells, compared with baselines."""
