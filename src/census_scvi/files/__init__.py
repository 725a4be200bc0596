"""Paths and URLs, atomic writes, locks, and JSON of limited size."""
