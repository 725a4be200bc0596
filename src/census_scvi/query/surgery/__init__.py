"""Surgery (scArches): extend a reference model by the batches of a query, train only their weights, and check it."""
