"""Paths as a person writes them: `~`, `~user`, `$NAME` and `${NAME}` as in a shell, `$$` is a dollar sign.

One rule for every file, argument and setting that names a place. The path itself may be a URL: variables are filled in
there as well, `~` stands for a home folder at the beginning only.
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
    """The path with home folders and environment variables filled in.

    Where a variable is not set and a file or folder of the name as written is there, that is meant.

    Raises
    ------
    ValueError
        A variable is not set or empty, or there is no such user.
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
        return found[0]  # a file or folder whose name holds a dollar sign
    if not re.fullmatch(r"[A-Za-z_]\w*", name or "") or found[0].count("{") != found[0].count("}"):
        raise ValueError(f"{found[0]} is not an environment variable; write ${{NAME}}")
    value = os.environ.get(name)
    if not value:
        state = "not set" if value is None else "empty"
        raise ValueError(f"the environment variable {name} is {state}; set it, or write $$ for a dollar sign")
    return value


def expand_argument(path: Any, name: str) -> str:
    """The path of an argument, as `expand` gives it; UserError that names the argument."""
    try:
        return expand(os.fspath(path))
    except ValueError as error:
        raise UserError(f"{name} is {str(path)!r}: {error}") from None
