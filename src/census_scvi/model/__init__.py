"""The model: builds, saves and loads it in its safe form, encodes cells."""
