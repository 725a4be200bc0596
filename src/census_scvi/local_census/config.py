"""The YAML that says how .h5ad files become a Census: every key, typed and documented once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from census_scvi.census.schema import ORGANISMS, SETTABLE_COLUMNS
from census_scvi.config.file import read_yaml, typed
from census_scvi.config.messages import as_written, shown, suggestion
from census_scvi.config.yaml_file import Plain
from census_scvi.errors import UserError
from census_scvi.files.paths import expand, expand_argument
from census_scvi.files.uri import local_path


def _organism(value: object) -> object:
    name = value.strip().lower().replace(" ", "_") if isinstance(value, str) else value
    if name not in list(ORGANISMS):  # which a list, without a hash, can be compared with
        raise ValueError(f"is {shown(value)}, expected one of {', '.join(ORGANISMS)}")
    return name


def _census_columns(value: object) -> object:
    for name in value if isinstance(value, dict) else ():
        if name not in SETTABLE_COLUMNS:
            hint = suggestion(str(name), list(SETTABLE_COLUMNS)) or f"; there are {', '.join(SETTABLE_COLUMNS)}"
            raise ValueError(f"{name} is not a column of the Census that a file can fill{hint}")
    return value


def _as_text(value: object) -> object:
    """Labels such as 1 (a donor) or 8.5 are text in the Census; is_primary_data is true or false."""
    if isinstance(value, dict):
        numbers = {name: str(label) for name, label in value.items() if type(label) in (int, float)}
        value = {**value, **numbers}
        if isinstance(primary := value.get(_PRIMARY), str):
            value[_PRIMARY] = typed(Plain(primary), bool)
    return value


def _expanded(value: object) -> object:
    return expand(value) if isinstance(value, str) else value


def _local(value: object) -> object:
    if not isinstance(value, str):
        return value
    if (path := local_path(value)) is None:
        raise ValueError(f"is {value!r}, expected a local folder; build it there and copy it")
    return path


PathName = Annotated[Path, BeforeValidator(_expanded)]
_PRIMARY = "is_primary_data"
OrganismName = Annotated[str, BeforeValidator(_organism)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GenesConfig(_Section):
    """How genes get their Ensembl ids."""

    map: dict[OrganismName, PathName] = Field(default_factory=dict)
    """TSV of ensembl_id, symbol and optionally length and type, by organism; finds ids by symbol and names genes."""

    min_recognised: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Least share of a file's genes that are recognised as its organism's; a file with fewer is refused."""

    without_id: Literal["drop", "keep"] = "drop"
    """Genes without an Ensembl id: leave them out, or keep them under their symbol."""


class DatasetColumn(_Section):
    """The obs column of a file whose values are the datasets in it."""

    column: str


class DatasetConfig(_Section):
    """One .h5ad file."""

    file: PathName
    """The .h5ad file with raw counts."""

    dataset_id: str | DatasetColumn | None = None
    """Name of the dataset, or {column: name of an obs column} for several in one file; default: the file's name."""

    title: str | None = None
    """What a person reads; default: the dataset_id."""

    organism: OrganismName
    """homo_sapiens or mus_musculus."""

    counts: str | None = None
    """Where the raw counts are: X, raw or layers/<name>; null: found, and refused where several may be."""

    gene_id: str | None = None
    """Where Ensembl ids or symbols are: index (of var) or a var column; null: where most genes are recognised."""

    obs: Annotated[dict[str, str], BeforeValidator(_census_columns)] = Field(default_factory=dict)
    """Census column: column of the file. A column with a Census name is taken without being listed."""

    values: Annotated[dict[str, bool | str], BeforeValidator(_census_columns), BeforeValidator(_as_text)] = Field(
        default_factory=dict
    )
    """Census column: the value of every cell of this file."""

    @model_validator(mode="after")
    def _one_origin(self) -> DatasetConfig:
        both = sorted(set(self.obs) & set(self.values))
        if both:
            raise ValueError(f"{both[0]} is set in obs and in values; keep one")
        if "observation_joinid" in self.values:
            raise ValueError("observation_joinid differs from cell to cell; it can only come from an obs column")
        for name, value in self.values.items():
            if isinstance(value, bool) != (name == _PRIMARY):
                expected = "true or false" if name == _PRIMARY else "text (put it in quotes)"
                raise ValueError(f"values.{name} is {value!r}, expected {expected}")
        return self


class BuildConfig(_Section):
    """A Census to be built."""

    uri: Annotated[Path, BeforeValidator(_local), BeforeValidator(_expanded)]
    """Folder of the new Census."""

    data: PathName = Path()
    """Folder in which the files of `datasets` and `genes.map` lie."""

    genes: GenesConfig = GenesConfig()
    """How genes get their Ensembl ids."""

    datasets: list[DatasetConfig] = Field(min_length=1)
    """The files, in the order of the Census."""


def load_build_config(path: str | Path, *, data: str | Path | None = None) -> BuildConfig:
    """Read and check the YAML of a build.

    `uri` and `data` are relative to the YAML file, `file` and `genes.map` to `data`; the result has absolute paths.
    The argument `data` replaces the key, relative to the working directory. Raises UserError, in one line, for
    whatever is wrong with the YAML; whether the files exist is not looked at.
    """
    path = Path(expand_argument(path, "CONFIG.yaml"))
    data = None if data is None else expand_argument(data, "--data")
    try:
        config = BuildConfig.model_validate(typed(read_yaml(path, "the keys uri and datasets"), BuildConfig))
    except ValidationError as error:
        problems: dict[tuple[str, ...], str] = {}
        for detail in error.errors():
            problems.setdefault(_names(detail["loc"]), _explain(dict(detail)))
        raise UserError(f"{path}: " + "; ".join(list(problems.values())[:3])) from None
    here = path.absolute().parent
    folder = _join(here, config.data) if data is None else _join(Path.cwd(), Path(data))
    maps = {organism: _join(folder, file) for organism, file in config.genes.map.items()}
    return config.model_copy(
        update={
            "uri": _join(here, config.uri),
            "data": folder,
            "genes": config.genes.model_copy(update={"map": maps}),
            "datasets": [d.model_copy(update={"file": _join(folder, d.file)}) for d in config.datasets],
        }
    )


def _join(folder: Path, path: Path) -> Path:
    return Path(os.path.normpath(folder / path))


_EXPECTED = {
    "list_type": "a list (one item a file, each with - in front)",
    "dict_type": "keys with values",
    "model_type": "keys with values",
    "path_type": "a path",
    "string_type": "text (put it in quotes)",
    "bool_type": "true, false or text (put it in quotes)",
    "too_short": "one dataset or more",
}
_SECTIONS: dict[str, type[BaseModel]] = {"genes": GenesConfig, "datasets": DatasetConfig, "dataset_id": DatasetColumn}


def _explain(detail: dict[str, Any]) -> str:
    """One problem that pydantic found: the key, what was found, the nearest right name."""
    names = _names(detail["loc"])
    key = ".".join(names).replace(".[", "[")
    match detail["type"]:
        case "extra_forbidden":
            section = next((_SECTIONS[n] for n in reversed(names[:-1]) if n in _SECTIONS), BuildConfig)
            known = list(section.model_fields)
            hint = suggestion(str(names[-1]), known) or f"; there are {', '.join(known)}"
            return f"{as_written(key)} is not a setting{hint}"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            text = str(detail["ctx"]["error"])
            return f"{key} {text}" if text.startswith("is ") else f"{key}: {text}"
    if names[-1] == "dataset_id":
        return f"{key} is {shown(detail['input'])}, expected a name in quotes or {{column: name of an obs column}}"
    expected = _EXPECTED.get(detail["type"], detail["msg"].removeprefix("Input should be "))
    return f"{key} is {shown(detail['input'])}, expected {expected}"


def _names(location: tuple[str | int, ...]) -> tuple[str, ...]:
    """The keys of a place in the YAML, without the branch of a union that pydantic appends; items counted from 1."""
    names = [f"[{part + 1}]" if isinstance(part, int) else part for part in location]
    return tuple(name for name in names if name not in ("str", "bool", "DatasetColumn", "[key]"))
