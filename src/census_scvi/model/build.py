"""Build a model from settings, genes and batches, without the cells."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
from pydantic import ValidationError

from census_scvi.model.families import SCVI, family_of
from census_scvi.model.settings import ModelSection

# scvi-tools warns about batches with fewer cells than this.
_CELLS_A_BATCH = 3


def init_arguments(settings: ModelSection, kind: str = SCVI) -> dict[str, Any]:
    """Init arguments of a kind of model (see `families`) for the `model` section."""
    return settings.model_dump(include=set(family_of(kind).arguments))


def check_arguments(arguments: dict[str, Any], kind: str = SCVI) -> None:
    """ValueError, in one line, if names, types or ranges differ from those of `init_arguments`."""
    known = family_of(kind).arguments
    if unknown := sorted(arguments.keys() - known):
        raise ValueError(f"{unknown[0][:40]!r} is not a model argument of this version")
    if missing := sorted(known - arguments.keys()):
        raise ValueError(f"its arguments lack {', '.join(missing)}")
    try:
        ModelSection.model_validate(arguments)
    except ValidationError as error:
        name, message = error.errors()[0]["loc"][0], error.errors()[0]["msg"]
        raise ValueError(f"the argument {name} is {repr(arguments[str(name)])[:40]}: {message}") from None


def least_parameters(arguments: dict[str, Any], n_genes: int, n_batches: int) -> int:
    """Minimum number of parameters with these arguments: the weights, without biases and norms."""
    n_hidden, n_latent, n_layers = (int(arguments[name]) for name in ("n_hidden", "n_latent", "n_layers"))
    between = (n_layers - 1) * n_hidden**2
    return 2 * (n_genes * n_hidden + between + n_latent * n_hidden) + n_batches * n_hidden


def skeleton(genes: list[str], batches: list[str]) -> ad.AnnData:
    """A few empty cells of each batch: scvi-tools' registry needs no more information about the real cells.

    Returns
    -------
    AnnData with var names `genes`, the categorical obs column `batch` with categories `batches` and float32 CSR zeros.
    """
    labels = pd.Categorical(np.repeat(batches, _CELLS_A_BATCH), categories=batches)
    counts = sp.csr_matrix((len(labels), len(genes))).astype(np.float32)
    obs = pd.DataFrame({"batch": labels}, index=[str(i) for i in range(len(labels))])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=pd.Index(genes, name="feature_id")))


def build_model(
    genes: list[str], batches: list[str], arguments: dict[str, Any], *, n_cells: int | None = None, kind: str = SCVI
) -> scvi.model.SCVI:
    """An untrained model with the same registry as if it had been set up with the cells themselves.

    Parameters
    ----------
    genes
        feature_ids, in the order of the columns.
    batches
        Batch labels, in the order of the codes.
    arguments
        Init arguments of the model's class.
    n_cells
        Number of cells to write into the registry; None: that of the skeleton.
    kind
        Kind of model, as in `families`.
    """
    model_class = family_of(kind).model_class
    adata = skeleton(genes, batches)
    with quiet("scvi"):
        model_class.setup_anndata(adata, batch_key="batch")
        model: scvi.model.SCVI = model_class(adata, **arguments)
    if n_cells is not None:
        counts = model.adata_manager.registry["field_registries"]["X"]
        counts["summary_stats"]["n_cells"] = counts["state_registry"]["n_obs"] = n_cells
    return model


@contextmanager
def quiet(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Silence the log messages of a library below a level."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def without_training() -> Iterator[None]:
    """Silence scvi-tools' messages about batches with few cells, for cells that are not used for training."""
    with quiet("scvi"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has fewer than 3 cells", category=UserWarning)
        yield
