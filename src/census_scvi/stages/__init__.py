"""A file for each command: what it runs, and what --dry-run says."""
