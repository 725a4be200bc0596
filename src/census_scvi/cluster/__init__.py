"""Parts of a stage in several processes on this machine."""
