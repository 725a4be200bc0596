"""Paths and URLs, files that are written whole or not at all, locks, JSON of limited size."""
