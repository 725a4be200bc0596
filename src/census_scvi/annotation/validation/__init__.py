"""Held-out parts of a reference: what is measured and calibrated on them."""
