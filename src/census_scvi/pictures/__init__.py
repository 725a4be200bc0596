"""Pictures of maps of cells and of the quality of an annotation."""
