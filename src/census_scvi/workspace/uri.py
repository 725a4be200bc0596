"""Where things lie: on a disk of this machine, or elsewhere."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlparse


def local_path(uri: str) -> Path | None:
    """The path of a local URI; None for another."""
    parts = urlparse(uri)
    if parts.scheme not in ("", "file"):
        return None
    return Path(parts.path)
