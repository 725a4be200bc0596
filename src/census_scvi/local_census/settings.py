"""The YAML that says how .h5ad files become a Census: every key, typed and documented once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from census_scvi.census.schema import ORGANISMS, SETTABLE_COLUMNS
from census_scvi.config.file import COMMAND_LINE, read_settings, typed
from census_scvi.config.messages import describe_errors, shown, suggestion
from census_scvi.config.section import Expected, Section
from census_scvi.config.types import ProteinPlace, expanded
from census_scvi.config.yaml_file import Plain
from census_scvi.errors import UserError
from census_scvi.files.paths import expand_argument
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


def _path(value: object) -> object:
    return Path(expanded(value)) if isinstance(value, str) else value


def _local(value: object) -> object:
    if not isinstance(value, str):
        return value
    if (path := local_path(expanded(value))) is None:
        raise ValueError(f"is {value!r}, expected a local folder; build it there and copy it")
    return path


FilePath = Annotated[Path, BeforeValidator(_path)]
_PRIMARY = "is_primary_data"
OrganismName = Annotated[str, BeforeValidator(_organism)]


class GenesConfig(Section):
    """How genes get their Ensembl ids."""

    map: dict[OrganismName, FilePath] = Field(default_factory=dict)
    """TSV of ensembl_id, symbol and optionally length and type, by organism; finds ids by symbol and names genes."""

    min_recognised: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Least share of a file's genes that are recognised as its organism's; a file with fewer is refused."""

    without_id: Literal["drop", "keep"] = "drop"
    """Genes without an Ensembl id: drop them, or keep them under their symbol."""


class DatasetColumn(Section):
    """The obs column of a file whose values are the datasets in it."""

    column: str


class DatasetConfig(Section):
    """One .h5ad file."""

    file: FilePath
    """The .h5ad file with raw counts."""

    dataset_id: Annotated[
        str | DatasetColumn | None, Expected("a name in quotes or {column: name of an obs column}")
    ] = None
    """Name of the dataset, or {column: name of an obs column} for several in one file; default: the file's name."""

    title: str | None = None
    """What a person reads; default: the dataset_id."""

    organism: OrganismName
    """homo_sapiens, mus_musculus, macaca_mulatta, callithrix_jacchus or pan_troglodytes."""

    counts: str | None = None
    """Where the raw counts are: X, raw or layers/<name>; null: found, and refused where several may be."""

    proteins: ProteinPlace | None = None
    """Protein counts: obsm/<name>, features (type Antibody Capture) or none (excluded); null: found."""

    gene_id: str | None = None
    """Where Ensembl ids or symbols are: index (of var) or a var column; null: where most genes are recognised."""

    obs: Annotated[dict[str, str], BeforeValidator(_census_columns)] = Field(default_factory=dict)
    """Census column: column of the file. A column with a Census name is taken without being listed."""

    values: Annotated[dict[str, str | bool], BeforeValidator(_census_columns), BeforeValidator(_as_text)] = Field(
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


class BuildConfig(Section):
    """A Census to be built."""

    uri: Annotated[Path, BeforeValidator(_local)]
    """Folder of the new Census."""

    data: FilePath = Path()
    """Folder in which the files of `datasets` and `genes.map` lie."""

    genes: GenesConfig = GenesConfig()
    """How genes get their Ensembl ids."""

    datasets: Annotated[
        list[DatasetConfig], Field(min_length=1), Expected("a list of one dataset or more, each with - in front")
    ]
    """The files, in the order of the Census."""


def load_build_config(
    path: str | Path, *, data: str | Path | None = None, overrides: Sequence[str] = ()
) -> BuildConfig:
    """Read and check the YAML of a build.

    `uri` and `data` are relative to the YAML file, `file` and `genes.map` to `data`; the result has absolute paths.
    The argument `data` replaces the key, and `overrides` (`key=value`) others, relative to the working directory.
    Raises UserError, in one line, for whatever is wrong with the YAML; whether the files exist is not looked at.
    """
    path = Path(expand_argument(path, "CONFIG.yaml"))
    data = None if data is None else expand_argument(data, "--data")
    written = read_settings(path, overrides, expected="the keys uri and datasets")
    try:
        config = BuildConfig.model_validate(typed(written.values, BuildConfig))
    except ValidationError as error:
        raise UserError(describe_errors(error, BuildConfig, written.origin)) from None
    here = {
        key: Path.cwd() if written.origin(key) == COMMAND_LINE else path.absolute().parent for key in ("uri", "data")
    }
    folder = _join(here["data"], config.data) if data is None else _join(Path.cwd(), Path(data))
    maps = {organism: _join(folder, file) for organism, file in config.genes.map.items()}
    return config.model_copy(
        update={
            "uri": _join(here["uri"], config.uri),
            "data": folder,
            "genes": config.genes.model_copy(update={"map": maps}),
            "datasets": [d.model_copy(update={"file": _join(folder, d.file)}) for d in config.datasets],
        }
    )


def _join(folder: Path, path: Path) -> Path:
    return Path(os.path.normpath(folder / path))
