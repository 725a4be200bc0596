"""Expand paths from users: `~`, `~user`, `$NAME` and `${NAME}` as in a shell; `$$` is a dollar sign.

The same rules apply to every file, argument and setting that contains a location. The path may be a URL: variables are
expanded there, too. `~` is a home folder only at the beginning.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from census_scvi.errors import UserError

_HOME = re.compile(r"~[^/]*")
_VARIABLE = re.compile(r"\$(?:\$|\{(?P<braced>[^}]*)\}?|(?P<bare>[A-Za-z_]\w*))")


def expand(path: str) -> str:
    """Expand home folders and environment variables in a path.

    If a variable is not set, but a file or folder has the name as it is written, the name stays unchanged.

    Raises
    ------
    ValueError
        A variable is not set, empty or malformed, or a user does not exist.
    """
    written = _HOME.match(path)
    if written is None:
        return _VARIABLE.sub(_value, path)
    try:
        home = str(Path(written[0]).expanduser())
    except RuntimeError:
        name = written[0]
        raise ValueError(f"there is no user {name[1:]!r}; for a folder of that name write ./{name}") from None
    rest = _VARIABLE.sub(_value, path[written.end() :])
    return home.rstrip("/") + rest or "/"


def _value(found: re.Match[str]) -> str:
    if found[0] == "$$":
        return "$"
    name = found["bare"] or found["braced"]
    end = found.string.find("/", found.end())
    written = found.string if end < 0 else found.string[:end]
    if name not in os.environ and os.path.lexists(written.removeprefix("file://")):
        return found[0]  # a file or folder whose name contains a dollar sign
    if not re.fullmatch(r"[A-Za-z_]\w*", name or "") or found[0].count("{") != found[0].count("}"):
        raise ValueError(f"{found[0]} is not an environment variable; write ${{NAME}}")
    value = os.environ.get(name)
    if not value:
        state = "not set" if value is None else "empty"
        raise ValueError(f"the environment variable {name} is {state}; set it, or write $$ for a dollar sign")
    return value


def expand_argument(path: Any, name: str) -> str:
    """Expand the path of an argument (see `expand`); UserError with the name of the argument."""
    try:
        return expand(os.fspath(path))
    except ValueError as error:
        raise UserError(f"{name} is {str(path)!r}: {error}") from None
