"""Base class of the sections of settings, and marks of settings."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo

Mark = TypeVar("Mark")


@dataclass(frozen=True, init=False)
class Changes:
    """Mark of a setting: the stages whose result it changes, if they differ from those of its section.

    Example: `Annotated[int, Changes("train")]`. `Changes()` marks a setting that does not change any result.
    """

    stages: tuple[str, ...]

    def __init__(self, *stages: str) -> None:
        object.__setattr__(self, "stages", stages)


@dataclass(frozen=True)
class Expected:
    """Mark of a setting: the expected value in words for messages, if the type does not describe it well."""

    words: str


@dataclass(frozen=True)
class Kind:
    """Mark of a type of settings: its name in the documentation, for example `path or URL`."""

    words: str


@dataclass(frozen=True)
class Usual:
    """Mark of a setting that most users need; help and documentation list it first."""


USUAL = Usual()


class Section(BaseModel):
    """A section of the configuration file, without unknown keys and silent conversions.

    Attributes
    ----------
    changes
        Stages whose result the settings of the section change, unless a setting is marked with `Changes`. It has no
        default, so every section must define it.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    changes: ClassVar[tuple[str, ...]]

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, values: Any) -> Any:
        return {} if values is None else values  # `census:` with nothing below it is YAML for null


def settings_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo, type[Section]]]:
    """Yield every setting in a section and its subsections: dotted name, field, and the section that contains it."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from settings_of(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field, section


def stages_changed(section: type[Section]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every setting in a section and its subsections: dotted name, and the stages whose result it changes."""
    for name, field, inner in settings_of(section):
        mark = mark_of(field, Changes)
        yield name, inner.changes if mark is None else mark.stages


def mark_of(field: FieldInfo, kind: type[Mark]) -> Mark | None:
    """The mark of a setting of this kind; None if it has none."""
    return next((mark for mark in field.metadata if isinstance(mark, kind)), None)


def members(annotation: Any) -> Iterator[Any]:
    """Types of a union, without their annotations."""
    if get_origin(annotation) is Annotated:
        yield from members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from members(member)
    else:
        yield annotation
