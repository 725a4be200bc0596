"""Identities of a stage's inputs. Inputs and settings determine the result of a stage.

This module has no slow imports, so that a finished stage is reported immediately.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from census_scvi.annotation.results.places import MODEL_FILES, model_folder, reference_source
from census_scvi.config.run_names import DESCRIPTION, PROVENANCE, SURGERY, WEIGHTS
from census_scvi.config.stages import Stage
from census_scvi.errors import UserError
from census_scvi.files.uri import tiledb_place, without_credentials
from census_scvi.model.source import Kind, Source
from census_scvi.query.places import query_identity, query_source
from census_scvi.releases.places import identities_of, places_of
from census_scvi.report.named import embeddings_of
from census_scvi.settings import Config
from census_scvi.workspace import Artifacts, Workspace
from census_scvi.workspace.identity import file_identity

if TYPE_CHECKING:
    from census_scvi.census.open import Census

Inputs = dict[str, Any]
_NAMING = {"uri", "version", "organism"}


def inputs_of(stage: Stage, config: Config, census: Census | None = None) -> Inputs:
    """Identities of all inputs of a stage, by name.

    Raises
    ------
    UserError
        An earlier stage has not run, or a file is missing or was changed.
    """
    if stage.name == "map-query":
        # Only a Census that the config names is included: the model's Census is part of the model's identity.
        named = config.census.model_dump(mode="json", include=config.census.model_fields_set & _NAMING)
        found: Inputs = {"query.file": query_identity(query_source(config.query)), "census": named}
        if config.query.vectors is not None:
            return found | {"embedding": _latent(config.query.embedding or config.output.directory)}
        return found | {"model": _model(config.query.model or config.output.directory)}
    if stage.name == "annotate":
        return _annotated(config)
    if stage.name == "compare-releases":
        return _compared(config)
    found = {}
    if stage.name == "import-embedding":
        found |= _imported(config)
    artifacts, workspace = config.artifacts, Workspace(config.directory)
    reads = stage.reads
    if stage.name == "publish" and imported_embedding(config) is not None:
        reads = {"create-latent-update": reads["create-latent-update"]}
    for earlier, names in reads.items():
        found |= workspace.require(earlier, [getattr(artifacts, name) for name in names])
    if stage.name in ("prepare", "train") and config.fine_tune.model is not None:
        found["fine_tune.model"] = _model(config.fine_tune.model)
    if census is not None:
        found["census"] = census.identity
        if stage.name == "evaluate":
            found |= {
                f"embedding {name}": _embedding(place, census)
                for name, place in embeddings_of(config.evaluate, config.directory).items()
            }
    return found


def imported_embedding(config: Config) -> str | None:
    """Name of the model whose embedding was imported to the run directory; None: it was computed here."""
    record = Workspace(config.directory).record("create-latent-update") or {}
    return str(record["imported"]["method"]) if "imported" in record else None


def _annotated(config: Config) -> Inputs:
    """The query, and what it is annotated with: a file, a Census or a trained classifier."""
    settings, found = config.annotate, {"query.file": query_identity(query_source(config.query))}
    folder = model_folder(config.query, settings)
    if settings.action == "interpret" or (settings.action, settings.method) == ("predict", "scnym"):
        found |= {name: file_identity(folder / name) for name in MODEL_FILES if (folder / name).exists()}
    source = reference_source(config.query, settings)
    if source is None:
        return found | {"census": config.census.model_dump(mode="json", include=_NAMING)}
    return found | {"annotate.reference.file": query_identity(source)}


def _imported(config: Config) -> Inputs:
    """The vectors and their soma_joinids; of a SOMA array, its location."""
    settings = config.import_embedding
    if settings.vectors is None or not settings.is_file:
        return {"import_embedding.vectors": without_credentials(settings.vectors)}
    return {
        f"import_embedding.{name}": file_identity(Path(place))
        for name, place in (("vectors", settings.vectors), ("joinids", settings.joinids))
        if place is not None and Path(place).is_file()
    }


def _compared(config: Config) -> Inputs:
    """Both releases, and the cells whose labels both predict, with the settings of the prediction."""
    found: Inputs = dict(identities_of(places_of(config.compare_releases, config.directory)))
    if config.query.file is None:
        return found
    of_query = {
        key: value for key, value in config.of_stage("map-query").items() if key.startswith(("query.", "annotate."))
    }
    return found | of_query | {"query.file": query_identity(query_source(config.query))}


def _latent(place: str) -> Any:
    """Identity of the embedding in a run directory; None if it has none, or the place is none."""
    run = Source.at(place).run
    record = Workspace(run).record("create-latent-update") if run else None
    return None if record is None else record["outputs"][Artifacts.latent]


def _embedding(place: str, census: Census) -> Any:
    """Identity of a user's embedding; None if it cannot be read."""
    from census_scvi.census.embedding import is_array, publication_of, published_uri

    try:
        if Source.at(place).run:
            return _latent(place)
        if "/" not in place:
            uri = published_uri(census.experiment.uri, place)
        elif not is_array(uri := tiledb_place(place, "embedding")):
            uri = published_uri(uri, "scvi")
        return None if uri is None else {"uri": without_credentials(uri), "publication": publication_of(uri)}
    except UserError:
        return None


def _model(place: str) -> Any:
    """Identity of a model; for a URL, the URL itself."""
    source = Source.at(place)
    if source.path is None:
        return without_credentials(place)
    if source.kind is Kind.RUN and (record := Workspace(source.path).record("train")):
        return {name: identity for name, identity in record["outputs"].items() if name.endswith(WEIGHTS)}
    if (source.path / SURGERY).exists():
        return file_identity(source.path / SURGERY)
    marks = {Kind.PUBLISHED: PROVENANCE, Kind.MODEL: DESCRIPTION}
    return file_identity(source.path / marks[source.kind]) if source.kind in marks else str(source.path)
