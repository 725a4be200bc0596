"""Reads a Census: opens it, selects cells, streams counts, chooses genes."""
