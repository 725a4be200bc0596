"""One file per command: its work, and its --dry-run."""
