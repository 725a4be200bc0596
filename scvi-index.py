#!/usr/bin/env python3
"""Build an index for the nearest of all embedded cells, and publish it with the embedding."""

import sys

try:
    from census_scvi.cli import main
except ModuleNotFoundError as error:
    print(f"error: {error}; run ./scvi-init.sh, then . .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main("index"))
