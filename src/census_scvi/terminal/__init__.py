"""What the user sees while a command runs, and how it is stopped."""
