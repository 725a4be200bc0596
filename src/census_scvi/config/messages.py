"""Validation errors in one line: file, key, value found, value expected, and the most similar valid name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from census_scvi.config.section import Expected, mark_of, members

_LONGEST = 80
_ITEM = "[]"
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "path_type": "a path",
    "is_instance_of": "a path",
    "string_too_short": "text that is not empty",
    "bool_type": "true or false",
    "list_type": "a list such as [a, b]",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
}


def describe_errors(error: ValidationError, model: type[BaseModel], origin: Callable[[str], str]) -> str:
    """Describe all validation errors in one line, in the order of pydantic; one error per key.

    Parameters
    ----------
    error
        Error of pydantic.
    model
        The model that was validated; suggestions for a misspelt name come from its keys.
    origin
        Returns the source that sets a dotted key: a file, or the command line.
    """
    lines: dict[str, str] = {}
    for detail in error.errors():
        key, field = _place(model, detail["loc"])
        line = _describe(dict(detail), key, field, model)
        named = line.partition(" ")[0]  # if several settings cause the error: the one that the message begins with
        lines.setdefault(key, f"{origin(named if named.startswith(key) else key)}: {line}")
    return "; ".join(lines.values())


def _is_within(name: str, key: str) -> bool:
    """Whether two dotted keys are equal, or one is in the section of the other."""
    return name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.")


def suggestion(name: str, known: list[str]) -> str:
    """`; did you mean X?` with the most similar known name other than `name`; "" if none is similar."""
    close = difflib.get_close_matches(name, [other for other in known if other != name], n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def as_written(key: str) -> str:
    """A key for a message; in quotes if it contains characters that names of settings do not have, such as spaces."""
    return key if re.fullmatch(r"[\w.\[\]<>-]+", key) else shown(key)


def shown(value: Any) -> str:
    """A value for a message: at most 80 characters, and `null` for None."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _describe(detail: dict[str, Any], key: str, field: FieldInfo | None, model: type[BaseModel]) -> str:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return (
            f"{as_written(key)} is not a setting{_dotted(detail, model) or _nearest(key, list(setting_names(model)))}"
        )
    if kind == "value_error":
        text = str(detail["ctx"]["error"])
        return f"{key} {text}" if text.startswith("is ") else text if text.startswith(key) else f"{key}: {text}"
    if kind == "missing":
        return f"{key} is missing"
    found = shown(detail["input"])
    mark = mark_of(field, Expected) if field else None
    if expected := mark.words if mark else _EXPECTED.get(kind):
        return f"{key} is {found}, expected {expected}"
    return f"{key} is {found}: {detail['msg'].removeprefix('Input ')}"


def _dotted(detail: dict[str, Any], model: type[BaseModel]) -> str:
    """How to write a dotted key such as `census.uri: x` in a file; dotted keys are for the command line only."""
    written = str(detail["loc"][-1])
    section, _, leaf = written.partition(".")
    names = list(setting_names(model))
    sections = {name.rpartition(".")[0] for name in names}
    if not leaf or not any(_is_within(written, name) for name in names if name not in sections):
        return ""
    return f"; in a file, write it as {section}: {{{leaf.replace('.', ': {')}: ...}}" + "}" * leaf.count(".")


def _nearest(key: str, known: list[str]) -> str:
    """`; did you mean X?` with the most similar known name; numbers of list items are ignored."""
    number = re.search(r"\[\d+\]", key)
    if number:
        return _nearest(key.replace(number[0], _ITEM), known).replace(_ITEM, number[0])
    known = [name for name in known if name != key]
    section, _, leaf = key.rpartition(".")
    deepest_first = sorted(known, key=lambda name: -name.count("."))  # of equal names, the one in a section remains
    by_leaf = {name.rpartition(".")[2]: name for name in deepest_first}
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    if close := difflib.get_close_matches(key, siblings, n=1, cutoff=0.9):  # a typing error
        return f"; did you mean {close[0]}?"
    if leaf in by_leaf:  # right name, wrong section
        return f"; did you mean {by_leaf[leaf]}?"
    if near := suggestion(key, known):
        return near
    close = difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.8)
    return f"; did you mean {by_leaf[close[0]]}?" if close else ""


def setting_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted name of a setting or section of a model; `[]` stands for the number of a list item."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in members(field.annotation):
            inner, item = (get_args(kind)[0], _ITEM) if get_origin(kind) is list else (kind, "")
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from setting_names(inner, f"{prefix}{name}{item}.")


def _place(model: type[BaseModel], location: tuple[str | int, ...]) -> tuple[str, FieldInfo | None]:
    """Dotted key of an error, with list items counted from 1, and the setting that contains it.

    The location in pydantic may continue after the setting with the branch of a union, which is not part of the file.
    """
    key, field, current = "", None, Any
    kinds: list[Any] = [model]
    for part in location:
        fields = {name: each for kind in kinds if _is_model(kind) for name, each in kind.model_fields.items()}
        items = [get_args(kind)[0] for kind in kinds if get_origin(kind) is list]
        values = [get_args(kind)[1] for kind in kinds if get_origin(kind) is dict]
        if isinstance(part, int):
            if not items:
                break
            key, current = f"{key}[{part + 1}]", items[0]
        elif part in fields:
            field = fields[part]
            key, current = f"{key}.{part}", field.annotation
        elif any(_is_model(kind) and kind.__name__ == part for kind in kinds):
            continue
        elif values and part != "[key]":
            key, current = f"{key}.{part}", values[0]
        else:
            if fields:  # the first name that is not a setting
                key = f"{key}.{part}"
            break
        kinds = list(members(current))
    return key.removeprefix("."), field


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
