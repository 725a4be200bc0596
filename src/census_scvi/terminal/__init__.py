"""Output of a running command, and signals that stop it."""
