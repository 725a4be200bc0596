"""Types of settings: names, columns, filters, paths and URLs."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from census_scvi.config import run_names
from census_scvi.config.obs_filter import parse_filter
from census_scvi.config.section import Kind
from census_scvi.files.paths import expand

Precision = Literal["float32", "bfloat16"]


def _file_name(name: str) -> str:
    if problem := run_names.unfit_name(name):
        raise PydanticCustomError("file_name", "{problem}", {"problem": problem})
    return name


def expanded(path: str) -> str:
    """Expand home folders and environment variables in a path."""
    try:
        return expand(path)
    except ValueError as error:
        raise PydanticCustomError("path", "{problem}", {"problem": str(error)}) from None


def _member_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise PydanticCustomError(
            "member_name", "expected letters, digits, _ . and -, beginning with a letter or a digit"
        )
    return name


def _path(path: str) -> str:
    if "://" in path:
        raise PydanticCustomError("local_path", "expected a path on this machine, not a URL")
    return path


def _obs_filter(text: str) -> str:
    try:
        parse_filter(text)
    except ValueError as error:
        raise PydanticCustomError("obs_filter", "{problem}", {"problem": str(error)}) from None
    return text


def _distinct(names: list[str]) -> list[str]:
    if twice := [name for name in names if names.count(name) > 1]:
        raise PydanticCustomError("twice", "names {name} twice; name it once", {"name": repr(twice[0])})
    return names


def _protein_place(value: object) -> object:
    if value is False or value in ("false", "no"):
        return NO_PROTEINS
    if isinstance(value, str) and value not in (FEATURES, NO_PROTEINS) and not re.fullmatch("obsm/.+", value):
        raise PydanticCustomError("protein_place", "expected obsm/<name>, features or none")
    return value


# Place of proteins that are features of type Antibody Capture, next to genes; and the value if proteins are not used.
FEATURES, NO_PROTEINS = "features", "none"

Name = Annotated[str, Field(min_length=1)]
ObsFilter = Annotated[str, AfterValidator(_obs_filter), Kind("value filter")]
Columns = Annotated[list[Name], AfterValidator(_distinct), Kind("list of obs columns")]
PathName = Annotated[Name, AfterValidator(expanded), Kind("path or URL")]
LocalPath = Annotated[PathName, AfterValidator(_path), Kind("path")]
FileName = Annotated[str, AfterValidator(_file_name), Kind("file name")]
MemberName = Annotated[str, AfterValidator(_member_name), Kind("name")]
ProteinPlace = Annotated[str, BeforeValidator(_protein_place), Kind("obsm/<name>, features or none")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
