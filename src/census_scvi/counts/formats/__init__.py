"""Files of cells in every format that is read: .h5ad, zarr, 10x .h5, 10x folder, Loom, CSV and TSV."""
