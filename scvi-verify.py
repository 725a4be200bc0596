#!/usr/bin/env python3
"""Prove that a published embedding is the one that its model gives of its cells."""

import sys

try:
    from census_scvi.stages.verify import main
except ModuleNotFoundError as error:
    print(f"error: {error}; run ./scvi-init.sh, then . .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
