#!/usr/bin/env python3
"""Select the cells and genes to train on and write them to anndata_model.h5ad and hv_genes.pkl."""

import sys

try:
    from census_scvi.cli import main
except ModuleNotFoundError as error:
    print(f"error: {error}; run ./scvi-init.sh, then . .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main("prepare"))
