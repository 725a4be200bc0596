"""The user's cells: match their genes and embed them. The cells of the Census: embedding, counts and expression."""
