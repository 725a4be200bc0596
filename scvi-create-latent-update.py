#!/usr/bin/env python3
"""Embed every cell of the Census and write latent.npy and final_scvi_optimized/."""

import sys

try:
    from census_scvi.cli import main
except ModuleNotFoundError as error:
    print(f"error: {error}; run ./scvi-init.sh, then . .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main("create-latent-update"))
