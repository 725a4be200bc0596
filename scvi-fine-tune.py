#!/usr/bin/env python3
"""Train a model further on the cells of a newer Census that it has not seen."""

import sys

try:
    from census_scvi.cli import main
except ModuleNotFoundError as error:
    print(f"error: {error}; run ./scvi-init.sh, then . .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main("fine-tune"))
