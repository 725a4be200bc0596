"""From YAML text and command-line overrides to a plain mapping."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from census_scvi.errors import UserError


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number, 2025-11-08 as text and refuses a key written twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the name and kind are PyYAML's)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


# YAML 1.1, which PyYAML speaks, takes 1e-4 for a string: the mantissa would need a dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key} is set twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str) -> Any:
    """Plain Python objects from YAML text."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def read_yaml(path: Path, expected: str = "sections such as census, hvg and model") -> dict[str, Any]:
    """The mapping in a YAML file; UserError when it is missing, malformed or not a mapping of what is expected."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a YAML of {expected}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected {expected}, found {type(values).__name__}")
    return values


def apply_overrides(values: dict[str, Any], overrides: tuple[str, ...] | list[str]) -> set[str]:
    """Set `section.key=value` in place; returns the dotted keys that were set."""
    for override in overrides:
        key, separator, text = override.partition("=")
        path = key.split(".")
        if not separator or not all(path):
            raise UserError(f"command line: {override!r} is not a setting; expected section.key=value")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            raise UserError(f"command line: {override!r}: the value is not valid YAML; quote it") from None
        _set(values, path, value)
    return {override.partition("=")[0] for override in overrides}


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[path[-1]] = value
