"""Read JSON from untrusted sources, with limits of size and depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# A record of 60,000 genes and 30,000 batches has about 6 MB. Parsed JSON needs up to thirty times its size in memory.
MOST_BYTES = 2**25
_MOST_LEVELS = 50


def read_json(path: Path) -> Any:
    """Read the values of a JSON file.

    Raises
    ------
    ValueError
        The file is not a regular file, not JSON, larger than 32 MiB, or nested deeper than 50 levels; in one line.
    """
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"it has {size:,} bytes; at most {MOST_BYTES:,} are read")
    if not path.is_file():
        raise ValueError("it is no file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"it is nested deeper than {_MOST_LEVELS} levels") from None
    level = [values]
    for _ in range(_MOST_LEVELS):
        level = [inner for value in level for inner in _inner(value)]
        if not level:
            return values
    raise ValueError(f"it is nested deeper than {_MOST_LEVELS} levels")


def _inner(value: Any) -> list[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in values if isinstance(inner, dict | list)]
