"""Nested settings as dotted keys, and the digest of any values."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping as dotted keys; an empty mapping stays a value, so that it differs from an absent one."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def digest(values: Any) -> str:
    """SHA-256 of any JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
