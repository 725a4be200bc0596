"""The user's cells: matching their genes, embedding them, expected expression."""
