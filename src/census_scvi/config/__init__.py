"""Settings: sections and marks, the YAML file, error messages; the list of stages; random streams."""
