"""Output of a running command, and how it is stopped."""
