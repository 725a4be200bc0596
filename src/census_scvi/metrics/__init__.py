"""Metrics of an embedding (batch integration and biology) as pure functions from arrays to numbers."""
