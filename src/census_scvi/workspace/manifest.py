"""Schema of the manifest: the required keys of each record."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from census_scvi.config.messages import shown

Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Identity(_Part):
    size: Count
    sha256: list[str]


class _Fingerprint(_Part):
    config: dict[str, Any]
    inputs: dict[str, Any]


class _Hardware(_Part):
    cores: int
    gpus: list[str] = []


class _Census(_Part):
    uri: str
    version: str | None
    schema_: str | None = Field(alias="schema")
    created_on: str | None
    organism: str
    cells: Count


class _Record(_Part):
    artifacts: list[str]
    fingerprint: _Fingerprint
    config: dict[str, Any]
    outputs: dict[str, _Identity]
    counts: dict[str, Any]
    seed: int
    seconds: float
    packages: dict[str, str]
    hardware: _Hardware


class _OfCensus(_Record):
    census: _Census


class _PreparedCounts(_Part):
    cells: Count
    genes: Count
    batches: Count


class _Prepared(_OfCensus):
    counts: _PreparedCounts  # type: ignore[assignment]


class _TrainedCounts(_Part):
    parameters: Count
    epochs: Count
    training_cells: Count
    validation_cells: Count


class _Trained(_Record):
    artifacts: Annotated[list[str], Field(min_length=1)]
    counts: _TrainedCounts  # type: ignore[assignment]
    final_metrics: dict[str, float]
    learning_curves: dict[str, list[float]]


class _EmbeddedCounts(_Part):
    cells: Count
    n_latent: Count


class _Embedded(_OfCensus):
    counts: _EmbeddedCounts  # type: ignore[assignment]


class _Publication(_Record):
    publication: str


_RECORDS: dict[str, type[_Record]] = {
    "prepare": _Prepared,
    "train": _Trained,
    "create-latent-update": _Embedded,
    "publish": _Publication,
}


def incomplete(record: Any, stage: str | None = None) -> str | None:
    """Describe the missing parts of a record; None if it is complete.

    Parameters
    ----------
    record
        Record of a finished or committing stage.
    stage
        Also require the keys that are specific to this stage; None: only those common to all stages.
    """
    try:
        _RECORDS.get(stage or "", _Record).model_validate(record)
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"]))
        if detail["type"] == "missing":
            return f"{place} is missing"
        return f"{place} is {shown(detail['input'])}: {detail['msg'].removeprefix('Input ')}"
    return None
