#!/usr/bin/env python3
"""Compare a release with an earlier one (compare_releases.old): comparison.json and report.html."""

import sys

try:
    from census_scvi.cli import main
except ModuleNotFoundError as error:
    print(f"error: {error}; run ./scvi-init.sh, then . .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main("compare-releases"))
