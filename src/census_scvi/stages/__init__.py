"""The commands: one module each, with the work and the plan for --dry-run."""
