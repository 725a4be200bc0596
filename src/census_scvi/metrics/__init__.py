"""Pure functions, arrays in, numbers out: integration and biology of an embedding."""
