"""What settings are made of: sections and marks, the YAML file, messages; the list of commands; random streams."""
