"""Schema of the record of a publication: types and ranges of the values that are used."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from census_scvi.config.renamed import translate_recorded_config

Text = Annotated[str, Field(min_length=1)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    """A part of the record; other keys are allowed and ignored."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Array(_Part):
    uri: str | None
    precision: Literal["float32", "bfloat16"]
    sha256: Digest


class _Embedding(_Part):
    array: _Array | None = None
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    experiment_uri: str | None
    n_cells: Count
    n_features: Annotated[int, Field(ge=1)]
    sha256: Digest


class _Census(_Part):
    uri: str | None
    version: Text | None
    schema_: str | None = Field(alias="schema")
    created_on: str | None
    organism: Annotated[str, Field(pattern="^[A-Za-z0-9_.-]+$")]
    cells: Count


class _Model(_Part):
    genes: Annotated[list[Text], Field(min_length=1)]
    n_proteins: Count = 0
    sha256: Digest
    uri: str | None


class _Gate(_Part):
    name: Text
    value: Finite | None
    side: Literal["at most", "at least"]
    bound: Finite
    detail: str
    stops: bool
    passed: bool
    waived: Text = "-"


class _Gates(_Part):
    gates: list[_Gate]


class _UsedCensus(_Part):
    obs_query: Text | None


class _UsedLabels(_Part):
    batch_key: Annotated[list[Text], Field(min_length=1)]


class _UsedGates(_Part):
    max_difference: Annotated[Finite, Field(gt=0.0)]


class _Config(_Part):
    census: _UsedCensus
    anndata: _UsedLabels
    gates: _UsedGates


def _translated(config: Any) -> Any:
    return translate_recorded_config(config) if isinstance(config, dict) else config


class _File(_Part):
    size: Count
    sha256: Annotated[list[Digest], Field(min_length=1)]


class _Record(_Part):
    format: Literal[1]
    publication: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    published_on: Text
    published_by: str
    embedding: _Embedding
    census: _Census
    model: _Model | None
    config: Annotated[_Config, BeforeValidator(_translated)]
    gates: _Gates
    cells_sha256: Digest
    files: Annotated[dict[Text, _File], Field(max_length=1000)]


def check_record(record: dict[str, Any]) -> None:
    """ValueError, in one line, if a value is missing, has another type or is out of range."""
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None


def first_problem(error: ValidationError) -> str:
    """The first problem that pydantic found, in words, with the beginning of the value."""
    detail = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, detail["loc"])) or "it"
    if detail["type"] == "missing":
        return f"{where} is missing"
    return f"{where} is {repr(detail['input'])[:40]}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"
