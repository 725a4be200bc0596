"""The result of an annotation: columns of obs, groups of cells, marker genes, and the files that are written."""
