#!/usr/bin/env python3
"""Make a run directory from the embedding of any model: vectors and soma_joinids."""

import sys

try:
    from census_scvi.cli import main
except ModuleNotFoundError as error:
    print(f"error: {error}; run ./scvi-init.sh, then . .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main("import-embedding"))
