"""Labelled cells: their labels, a sample of them, a file or a slice of a Census, and what they share with a query."""
