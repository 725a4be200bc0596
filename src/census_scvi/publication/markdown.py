"""Escaping of values in a Markdown document: any content is rendered as text, never as markup."""

from __future__ import annotations

import json
import re
from typing import Any

from markupsafe import Markup

from census_scvi.terminal.printing import on_one_line

_MARKUP = re.compile(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_]))")
_AT_START = re.compile(r"^(\d*)([#:.)+=-])(?=[#=+\s-]|$)")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def text(value: Any) -> Any:
    """Value on one line, with all Markdown and HTML characters escaped; `Markup` stays as it is."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    escaped = _MARKUP.sub(r"\\\1", on_one_line(value))
    escaped = _AT_START.sub(r"\1\\\2", escaped)
    return re.sub("[&<>]", lambda found: _HTML[found[0]], escaped)


def paragraphs(value: str) -> Markup:
    """Like `text`, but keeps the empty lines between paragraphs."""
    return Markup("\n\n".join(str(text(part)) for part in re.split(r"\n\s*\n", value) if part.strip()))


def code(value: Any) -> Markup:
    """Value as inline code, also valid in a table."""
    shown = on_one_line(str(value)).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return Markup(f"{fence}{pad}{shown}{pad}{fence}")


def literal(value: str) -> Markup:
    """Value as a Python string literal, for a code block."""
    return Markup(json.dumps(on_one_line(value), ensure_ascii=False).replace("`", "\\x60"))
