"""The model: build it, save and load it in its safe form, encode cells."""
