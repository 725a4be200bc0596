"""Cells of types that the reference lacks."""
