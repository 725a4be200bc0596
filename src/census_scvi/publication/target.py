"""The Experiment that an embedding is published to: checks of write access and of matching cells."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import pandas as pd
import tiledbsoma

from census_scvi.census.embedding import publication_of, published_uri
from census_scvi.census.open import MEASUREMENT, Census
from census_scvi.census.storage import soma_context
from census_scvi.errors import UserError
from census_scvi.files.lock import directory_lock
from census_scvi.files.uri import local_path, tiledb_place
from census_scvi.publication import own_array
from census_scvi.publication.obsm import check_target
from census_scvi.publication.settings import PublishSection

_IDENTIFYING = ("dataset_id", "observation_joinid", "donor_id", "assay")


def experiment_uri(settings: PublishSection, census: Census) -> str:
    """The Experiment to publish to, or of an array of its own that of the Census.

    UserError if none is given and the Census is not on a local disk.
    """
    if not settings.in_obsm:
        return str(census.experiment.uri)
    if settings.experiment_uri:
        return tiledb_place(settings.experiment_uri, "publish.experiment_uri")
    uri = census.identity["uri"]
    if local_path(uri) is None:
        raise UserError(
            f"publish.experiment_uri is not set, and the Census {uri} is not on a local disk;"
            " set it to an Experiment that you may write to"
        )
    return str(census.experiment.uri)


def target_lock(experiment_uri: str) -> AbstractContextManager[None]:
    """Lock against other publishers if the target is on a local disk."""
    path = local_path(experiment_uri)
    if path is None or not path.is_dir():
        return nullcontext()
    return directory_lock(path / ".scvi-publish.lock", "scvi-publish.py")


def require_free(settings: PublishSection, census: Census, experiment_uri: str, publication: str) -> None:
    """UserError unless the Experiment has the embedded cells and the name is free or may be replaced."""
    published_uri(experiment_uri, settings.name)  # UserError if it is not an Experiment
    with tiledbsoma.Experiment.open(experiment_uri, context=soma_context(experiment_uri)) as experiment:
        n_cells = int(experiment.obs.count)
    if n_cells != census.identity["cells"]:
        raise UserError(
            f"{experiment_uri} has {n_cells:,} cells, the Census of this run {census.identity['cells']:,}:"
            " soma_joinids are valid within one Census only; set publish.experiment_uri to an Experiment of that Census"
        )
    check_target(experiment_uri, settings.name, publication, replace=settings.replace)


def require_same_cells(experiment_uri: str, joinids: npt.NDArray[np.int64], obs: pd.DataFrame) -> None:
    """UserError if the same soma_joinids refer to other cells in the Experiment; obs has a row for each."""
    with tiledbsoma.Experiment.open(experiment_uri, context=soma_context(experiment_uri)) as experiment:
        names = [name for name in _IDENTIFYING if name in experiment.obs.schema.names and name in obs]
        found = experiment.obs.read(coords=(joinids.tolist(),), column_names=["soma_joinid", *names]).concat()
    theirs = found.to_pandas().set_index("soma_joinid").reindex(joinids)[names].astype(str).to_numpy()
    differing = (theirs != obs[names].astype(str).to_numpy()).any(axis=1)
    if differing.any():
        raise UserError(
            f"{experiment_uri} belongs to another build of the Census: {int(differing.sum()):,} of"
            f" {len(differing):,} cells"
            f" with the same soma_joinid are different cells there ({', '.join(names)}), the first"
            f" {joinids[differing][0]}; set publish.experiment_uri to the Experiment that was embedded"
        )


def n_rows(census: Census) -> int:
    """Number of rows of an embedding of a Census: one per possible soma_joinid."""
    return int(census.experiment.ms[MEASUREMENT].X["raw"].shape[0])


def require_published(settings: PublishSection, experiment_uri: str, publication: str) -> None:
    """UserError if the publication of a finished run no longer exists."""
    if settings.array_uri is not None and not own_array.is_of(settings.array_uri, publication):
        raise UserError(
            f"this run published {publication} as {settings.array_uri}, which is no longer there; --force publishes it"
            " again"
        )
    if not settings.in_obsm:
        return
    uri = published_uri(experiment_uri, settings.name)
    if uri is None or publication_of(uri) != publication:
        raise UserError(
            f"this run published {publication} as obsm[{settings.name!r}] of {experiment_uri}, which has"
            f" {'no embedding of that name' if uri is None else 'another publication'} now; --force publishes it again"
        )
