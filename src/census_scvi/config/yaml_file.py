"""YAML with the core schema of YAML 1.2; every plain scalar is kept as it was written.

PyYAML follows YAML 1.1, where `010` is 8, `12:30:45` is 45045 and `no` is false. Here a plain scalar stays text until
its setting is known: for a label, `010` stays text; for a number, it is 10. See
https://yaml.org/spec/1.2.2/#103-core-schema.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

# A configuration has at most a few hundred values and five levels. Much larger numbers are a mistake, or an attempt to
# exhaust the memory: a few lines of aliases can stand for a billion values.
MAX_DEPTH, MAX_VALUES = 50, 100_000

_PLAIN = "plain"
_TAG = "tag:yaml.org,2002:"
_TYPES = {"null": type(None), "bool": bool, "int": int, "float": float}
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)")


class YamlError(Exception):
    """Error in a YAML text; `line` is the line number (from 1, None if unknown), which the message does not contain."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True)
class Plain:
    """A scalar without quotes, as it was written."""

    text: str

    @property
    def value(self) -> bool | int | float | str | None:
        """The value according to the core schema of YAML 1.2."""
        if self.text in _CONSTANTS:
            return _CONSTANTS[self.text]
        if _INT.fullmatch(self.text):
            base = {"0o": 8, "0x": 16}.get(self.text[:2], 10)
            try:
                return int(self.text, base)
            except ValueError:  # thousands of digits, which Python refuses to convert
                return self.text
        if _FLOAT.fullmatch(self.text):
            return float(self.text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf"))
        return self.text


def parse_yaml(text: str) -> Any:
    """Parse YAML text to dicts with str keys, lists, str (quoted scalars) and `Plain` (unquoted scalars).

    Raises
    ------
    YamlError
        The text is not YAML, sets a key twice, is nested deeper than 50 levels, or uses a feature that a configuration
        does not need: keys that are not scalars, tags of other types, an anchor within itself, or aliases for more than
        100,000 values.
    """
    try:
        _check_depth(text)
        return _Builder().build(_Loader(text).get_single_node())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"a character that YAML does not allow (U+{ord(_character(error)):04X})", line) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(_in_words(error), mark.line + 1 if mark else None) from None


class _Loader(yaml.BaseLoader):
    """Marks plain scalars, without deriving a type from their form."""

    def resolve(self, kind: type[yaml.Node], value: str, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return _PLAIN
        return str(super().resolve(kind, value, implicit))


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else None
            raise YamlError(f"lists or mappings are nested more than {MAX_DEPTH} deep", line)


class _Builder:
    """Builds values from YAML nodes, with limits of their number and depth."""

    def __init__(self) -> None:
        self._values = 0
        self._open: list[yaml.Node] = []

    def build(self, node: yaml.Node | None) -> Any:
        if node is None:  # an empty text
            return Plain("")
        self._values += 1
        line = node.start_mark.line + 1
        if any(node is outer for outer in self._open):
            raise YamlError("an anchor is used within itself", line)
        if self._values > MAX_VALUES or len(self._open) > MAX_DEPTH:
            raise YamlError(f"aliases stand for more than {MAX_VALUES:,} values, or {MAX_DEPTH} levels", line)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self._open.append(node)
        if node.tag not in (f"{_TAG}seq", f"{_TAG}map"):
            raise _unknown_tag(node)
        values = self._mapping(node) if isinstance(node, yaml.MappingNode) else [self.build(n) for n in node.value]
        self._open.pop()
        return values

    def _scalar(self, node: yaml.ScalarNode) -> Plain | str:
        if node.tag == _PLAIN:
            return Plain(node.value)
        if node.tag == f"{_TAG}str":
            return str(node.value)
        wanted = _TYPES.get(node.tag.removeprefix(_TAG))
        if wanted is None or not isinstance(Plain(node.value).value, wanted):
            raise _unknown_tag(node)
        return Plain(node.value)

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: list[dict[str, Any]] = []
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise YamlError(
                    "a key is a list or a mapping itself; was a template such as {{ name }} left unfilled?"
                    " (text that begins with { or [ needs quotes)",
                    line,
                )
            if key.value in own:
                raise YamlError(f"{key.value} is set twice", line)
            if key.tag == _PLAIN and key.value == "<<":
                merged += self._merged(value)
            else:
                own[key.value] = self.build(value)
        result: dict[str, Any] = {}
        for values in reversed(merged):  # the first of several mappings has priority
            result |= values
        return result | own

    def _merged(self, node: yaml.Node) -> list[dict[str, Any]]:
        values = self.build(node)
        values = values if isinstance(values, list) else [values]
        if not all(isinstance(mapping, dict) for mapping in values):
            raise YamlError("<< merges a mapping, or a list of mappings: <<: *name", node.start_mark.line + 1)
        return values


def _unknown_tag(node: yaml.Node) -> YamlError:
    return YamlError(f"{node.tag.replace(_TAG, '!!')} {_shown(node)} cannot be read; write the value without a tag",
                     node.start_mark.line + 1)  # fmt: skip


def _shown(node: yaml.Node) -> str:
    return repr(node.value[:40]) if isinstance(node, yaml.ScalarNode) else "with a list or mapping"


def _character(error: yaml.reader.ReaderError) -> str:
    return chr(error.character) if isinstance(error.character, int) else str(error.character)


def _in_words(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or str(error)
    if r"'\t'" in problem or "'\t'" in problem:
        return "a tab; indent with spaces"
    return problem
