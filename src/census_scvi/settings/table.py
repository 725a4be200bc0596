"""Tables of the settings for documentation and help: name, type, default, meaning; usual settings first.

`python -m census_scvi.settings.table docs/settings.md` updates the tables in that file.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from census_scvi.config.section import Changes, Kind, Section, Usual, mark_of, settings_of

_WORDS: dict[Any, str] = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}
FIRST_HEADING = "## Usual settings\n"
_HEADING = "| setting | type | default | meaning |\n|---|---|---|---|\n"
_LEAST_WIDTH, _MOST_WIDTH = 60, 120


def tables(config: type[Section]) -> str:
    """Markdown tables of the usual settings and of all others."""
    rows = [(name, field, _row(name, field)) for name, field, _ in settings_of(config)]
    usual = [row for _, field, row in rows if mark_of(field, Usual)]
    expert = [row for _, field, row in rows if not mark_of(field, Usual)]
    return (
        f"{FIRST_HEADING}\n{_HEADING}{_lines(usual)}\n"
        f"## Expert settings\n\nDefaults suit most uses.\n\n{_HEADING}{_lines(expert)}"
    )


def with_tables(document: str, config: type[Section]) -> str:
    """The document with its last part, the tables, replaced by current ones."""
    return document.partition(FIRST_HEADING)[0] + tables(config)


def _lines(rows: Iterable[str]) -> str:
    return "".join(f"{row}\n" for row in rows)


def _row(name: str, field: FieldInfo) -> str:
    default = json.dumps(field.get_default(call_default_factory=True))
    return f"| `{name}` | {kind_of(field)} | `{default}` | {_meaning(field)} |"


def _meaning(field: FieldInfo) -> str:
    return " ".join(str(field.description).split())


def help_of_stage(config: type[Section], stage: str) -> str:
    """Usual settings of a stage and their meaning, for `--help`, wrapped to the width of the terminal."""
    width = min(max(shutil.get_terminal_size().columns, _LEAST_WIDTH), _MOST_WIDTH)
    usual = [
        (name, _meaning(field))
        for name, field, section in settings_of(config)
        if mark_of(field, Usual) and _concerns(field, section, stage)
    ]
    indent = max(len(name) for name, _ in usual) + 4
    lines = [
        textwrap.fill(f"  {name:<{indent - 2}}{meaning}", width, subsequent_indent=" " * indent)
        for name, meaning in usual
    ]
    return "\n".join(["usual settings of this command:", *lines, "  all settings: docs/settings.md"])


def _concerns(field: FieldInfo, section: type[Section], stage: str) -> bool:
    """Whether a setting belongs to a stage; a setting without stages belongs to all."""
    mark = mark_of(field, Changes)
    stages = mark.stages if mark and mark.stages else section.changes
    return not stages or stage in stages


def kind_of(field: FieldInfo) -> str:
    """Description of the type of a setting."""
    return _joined(list(dict.fromkeys(_kinds(field.annotation, field.metadata))), "or")


def _kinds(annotation: Any, marks: Iterable[Any] = ()) -> Iterator[str]:
    named = [mark.words for mark in marks if isinstance(mark, Kind)]
    if named:  # the last one is from the outermost alias
        yield named[-1]
    elif get_origin(annotation) is Annotated:
        yield from _kinds(get_args(annotation)[0], annotation.__metadata__)
    elif get_origin(annotation) is Literal:
        yield from (f"`{value}`" for value in get_args(annotation))
    elif get_origin(annotation) is list:
        yield f"list of {_joined(list(_kinds(get_args(annotation)[0])), 'or')}s"
    elif get_origin(annotation) is dict:
        yield "keys with values"
    elif annotation in _WORDS:
        yield _WORDS[annotation] + _limits(marks)
    else:
        for member in get_args(annotation):
            yield from _kinds(member)


def _limits(marks: Iterable[Any]) -> str:
    words = {"ge": "{} or more", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
    limits = [
        words[name].format(_number(getattr(mark, name))) for name in words for mark in marks if hasattr(mark, name)
    ]
    return f", {_joined(limits, 'and')}" if limits else ""


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _joined(words: list[str], last: str) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def main() -> None:
    """Update the tables in the file given as first argument."""
    from census_scvi.settings.config import Config

    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text(encoding="utf-8"), Config), encoding="utf-8")


if __name__ == "__main__":
    main()
