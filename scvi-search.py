#!/usr/bin/env python3
"""Try settings on the prepared cells, and write search/: table, report and the winner's config."""

import sys

try:
    from census_scvi.cli import main
except ModuleNotFoundError as error:
    print(f"error: {error}; run ./scvi-init.sh, then . .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main("search"))
