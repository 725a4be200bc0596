"""Validation errors in one line: the file, the key, what was found, what was expected, the nearest right name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Set
from typing import Any

from pydantic import BaseModel, ValidationError

_LONGEST = 80
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "bool_type": "true or false",
    "list_type": "a list such as [a, b]",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
}


def describe_errors(
    error: ValidationError, model: type[BaseModel], source: str, overridden: Set[str] = frozenset()
) -> str:
    """One line for all that is wrong, the first problem first.

    Parameters
    ----------
    error
        What pydantic found.
    model
        The model that was validated; its keys are what a misspelt name is compared with.
    source
        File the values came from.
    overridden
        Dotted keys that came from the command line instead.
    """
    lines: dict[str, str] = {}
    for detail in error.errors():
        names = [part for part in detail["loc"] if isinstance(part, str)]
        key = ".".join(_known_path(model, names))
        where = "command line" if any(_is_within(name, key) for name in overridden) else source
        lines.setdefault(key, f"{where}: {_describe(dict(detail), key, model)}")
    return "; ".join(lines.values())


def _is_within(name: str, key: str) -> bool:
    """Whether one dotted key is the other, or lies in its section."""
    return name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.")


def suggestion(name: str, known: list[str]) -> str:
    """`; did you mean X?` for the nearest known name that is not the one that was written, or nothing."""
    close = difflib.get_close_matches(name, [other for other in known if other != name], n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def as_written(key: str) -> str:
    """A key for a message: in quotes where it holds spaces or other characters that the names of settings do not."""
    return key if re.fullmatch(r"[\w.\[\]<>-]+", key) else shown(key)


def shown(value: Any) -> str:
    """A value for a message: short, and null where it is None."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _describe(detail: dict[str, Any], key: str, model: type[BaseModel]) -> str:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return (
            f"{as_written(key)} is not a setting{_dotted(detail, model) or _nearest(key, list(setting_names(model)))}"
        )
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    if kind == "missing":
        return f"{key} is missing"
    found = shown(detail["input"])
    if key == "train.devices":
        return f"{key} is {found}, expected a number of devices, a list of device indices such as [0, 1], or auto"
    if kind in _EXPECTED:
        return f"{key} is {found}, expected {_EXPECTED[kind]}"
    return f"{key} is {found}: {detail['msg'].removeprefix('Input ')}"


def _dotted(detail: dict[str, Any], model: type[BaseModel]) -> str:
    """The way to write `census.uri: x`, a dotted key that only the command line has."""
    written = str(detail["loc"][-1])
    section, _, leaf = written.partition(".")
    names = list(setting_names(model))
    sections = {name.rpartition(".")[0] for name in names}
    if not leaf or not any(_is_within(written, name) for name in names if name not in sections):
        return ""
    return f"; in a file, write it as {section}: {{{leaf.replace('.', ': {')}: ...}}" + "}" * leaf.count(".")


def _nearest(key: str, known: list[str]) -> str:
    known = [name for name in known if name != key]
    section, _, leaf = key.rpartition(".")
    by_leaf = {name.rpartition(".")[2]: name for name in known}
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    if close := difflib.get_close_matches(key, siblings, n=1, cutoff=0.9):  # a slip of the pen
        return f"; did you mean {close[0]}?"
    if leaf in by_leaf:  # right name, wrong section
        return f"; did you mean {by_leaf[leaf]}?"
    if near := suggestion(key, known):
        return near
    close = difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.8)
    return f"; did you mean {by_leaf[close[0]]}?" if close else ""


def setting_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted setting name of a model, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_names(field.annotation, f"{prefix}{name}.")


def _known_path(model: type[BaseModel], names: list[str]) -> list[str]:
    """The names that are settings (pydantic appends the branch of a union it tried), plus the first unknown one."""
    path: list[str] = []
    current: type[BaseModel] | None = model
    for name in names:
        if current is None:
            break
        path.append(name)
        field = current.model_fields.get(name)
        annotation = field.annotation if field else None
        current = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return path
