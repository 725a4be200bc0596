"""The base class of every section of settings, and the marks that a setting bears."""

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
    """Mark of a setting: the stages whose result it changes, where they are not those of its section.

    `Annotated[int, Changes("train")]`; `Changes()` marks a setting that changes how a stage works, not its result.
    """

    stages: tuple[str, ...]

    def __init__(self, *stages: str) -> None:
        object.__setattr__(self, "stages", stages)


@dataclass(frozen=True)
class Expected:
    """Mark of a setting: what messages say is expected, where its type does not say it well."""

    words: str


@dataclass(frozen=True)
class Kind:
    """Mark of a type of settings: what the documents call it, e.g. `path or URL`."""

    words: str


@dataclass(frozen=True)
class Usual:
    """Mark of a setting that most users look at; help and documents list it first."""


USUAL = Usual()


class Section(BaseModel):
    """A section of the file: no unknown keys, no silent conversions.

    Attributes
    ----------
    changes
        Stages whose result the settings of the section change, unless a setting is marked with `Changes`. There is no
        default: whoever adds a section says it.
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
    """Every setting below a section: its dotted name, the field, and the section that it is in."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from settings_of(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field, section


def stages_changed(section: type[Section]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every dotted setting below a section, and the stages whose result it changes."""
    for name, field, inner in settings_of(section):
        mark = mark_of(field, Changes)
        yield name, inner.changes if mark is None else mark.stages


def mark_of(field: FieldInfo, kind: type[Mark]) -> Mark | None:
    """The mark of a kind that a setting bears, if it does."""
    return next((mark for mark in field.metadata if isinstance(mark, kind)), None)


def members(annotation: Any) -> Iterator[Any]:
    """The types of a union, without what annotates them."""
    if get_origin(annotation) is Annotated:
        yield from members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from members(member)
    else:
        yield annotation
