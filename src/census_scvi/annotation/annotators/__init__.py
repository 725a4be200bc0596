"""Annotators: methods that predict labels of cells from labels of other cells, one per file, and what they share."""
