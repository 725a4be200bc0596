"""Build a model from settings, genes and batches, without the cells."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import scvi
import torch
from pydantic import ValidationError

from census_scvi.config.run_names import BATCH, LABELS, PROTEIN_NAMES, PROTEINS
from census_scvi.model.families import SCANVI, SCVI, TOTALVI, family_of
from census_scvi.model.settings import ModelSection

# scvi-tools warns about batches and labels with fewer cells than this.
_FEWEST_CELLS = 3
# Largest number in the arguments of a model: it limits the memory for a damaged or hostile description.
_LARGEST = 100_000
# Init argument of TOTALVI: whether the prior of the protein background is set from the cells.
EMPIRICAL_PRIOR = "empirical_protein_background_prior"
# scvi-tools sets the prior from the cells if there are more proteins.
_PROTEINS_OF_A_PRIOR = 10


@dataclass(frozen=True)
class Labels:
    """The labels of the cells of a SCANVI model.

    Attributes
    ----------
    classes
        The labels, in the order of the codes.
    unlabeled_category
        Label of the cells without a known label; its code is after those of the classes.
    """

    classes: list[str]
    unlabeled_category: str


@dataclass(frozen=True)
class Proteins:
    """The proteins of a TOTALVI model.

    Attributes
    ----------
    names
        Names, in the order of the columns.
    missing
        For each batch, the proteins that were not measured in it; batches without missing proteins may be absent.
    """

    names: list[str]
    missing: Mapping[str, list[str]]

    def measured(self, batches: list[str]) -> npt.NDArray[np.bool_]:
        """Bool (batches, proteins): whether the protein was measured in the batch."""
        return np.array([[name not in self.missing.get(batch, ()) for name in self.names] for batch in batches])


def init_arguments(settings: ModelSection) -> dict[str, Any]:
    """Init arguments of the model's class in scvi-tools for the `model` section."""
    values = settings.model_dump()
    of_settings = {name: values[setting] for name, setting in family_of(settings.kind).settings.items()}
    return of_settings | settings.arguments


def check_arguments(arguments: dict[str, Any], kind: str = SCVI) -> None:
    """ValueError, in one line, if arguments of this kind are missing or unknown, or their types or ranges are wrong."""
    family = family_of(kind)
    if missing := sorted(family.settings.keys() - arguments.keys()):
        raise ValueError(f"its arguments lack {', '.join(missing)}")
    settings = {setting: arguments[name] for name, setting in family.settings.items()}
    if unknown := sorted(arguments.keys() - family.settings.keys() - known_arguments(kind)):
        raise ValueError(f"{unknown[0][:40]!r} is not an argument of {kind} in scvi-tools {scvi.__version__}")
    if (largest := _largest(arguments)) > _LARGEST:
        raise ValueError(f"its arguments have the number {largest:,}, expected at most {_LARGEST:,}")
    try:
        ModelSection.model_validate(settings)
    except ValidationError as error:
        name, message = error.errors()[0]["loc"][0], error.errors()[0]["msg"]
        found = next(argument for argument, setting in family.settings.items() if setting == name)
        raise ValueError(f"the argument {found} is {repr(arguments[found])[:40]}: {message}") from None


def _largest(value: Any) -> float:
    """The largest number in an argument, also in one that is a dictionary or a list."""
    if isinstance(value, dict | list):
        return max(map(_largest, value.values() if isinstance(value, dict) else value), default=0)
    return value if isinstance(value, int | float) else 0


def known_arguments(kind: str) -> set[str]:
    """Names of all init arguments of a kind of model, including those that it passes to its module."""
    family = family_of(kind)
    owners = [family.model_class, family.module_class, *([scvi.module.VAE] if kind == SCANVI else [])]
    return {name for owner in owners for name in inspect.signature(owner.__init__).parameters}


def least_parameters(arguments: dict[str, Any], n_genes: int, n_batches: int, kind: str = SCVI) -> int:
    """Minimum number of parameters with these arguments: the weights, without biases and norms."""
    n_hidden, n_latent = (int(arguments[name]) for name in ("n_hidden", "n_latent"))
    layers = [int(arguments[name]) for name, setting in family_of(kind).settings.items() if setting == "n_layers"]
    between = sum(n_layers - 1 for n_layers in (layers * 2)[:2]) * n_hidden**2  # encoder and decoder
    return 2 * (n_genes * n_hidden + n_latent * n_hidden) + between + n_batches * n_hidden


def skeleton(
    genes: list[str],
    batches: list[str],
    labels: Labels | None = None,
    proteins: Proteins | None = None,
    *,
    sizes: Sequence[int] | None = None,
) -> ad.AnnData:
    """A few empty cells of each batch: scvi-tools' registry needs no more information about the real cells.

    Parameters
    ----------
    genes, batches
        feature_ids, and labels of the batches.
    labels, proteins
        Labels of SCANVI, and proteins of TOTALVI.
    sizes
        Number of cells of each batch; None: three or more, so that each label has three as well.

    Returns
    -------
    AnnData with var names `genes`, the categorical obs column `batch` with categories `batches` and float32 CSR zeros;
    with the obs column `labels`, which has every class, and with `obsm["protein_expression"]`, float32, which is 0 for
    the proteins that were not measured in the batch, and 1 for the others.
    """
    n_labels = len(labels.classes) + 1 if labels else 1
    n_each = sizes or _FEWEST_CELLS * -(-n_labels // len(batches))
    obs = pd.DataFrame({BATCH: pd.Categorical(np.repeat(batches, n_each), categories=batches)})
    obs.index = obs.index.astype(str)
    if labels:
        every = [*labels.classes, labels.unlabeled_category]
        obs[LABELS] = pd.Categorical(np.resize(np.array(every, dtype=object), len(obs)), categories=every)
    counts = sp.csr_matrix((len(obs), len(genes))).astype(np.float32)
    cells = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=pd.Index(genes, name="feature_id")))
    if proteins:
        measured = proteins.measured(batches).astype(np.float32)
        cells.obsm[PROTEINS] = np.repeat(measured, n_each, axis=0)
        cells.uns[PROTEIN_NAMES] = np.array(proteins.names, dtype=object)
    return cells


def build_model(
    genes: list[str],
    batches: list[str],
    arguments: dict[str, Any],
    *,
    n_cells: int | None = None,
    kind: str = SCVI,
    labels: Labels | None = None,
    proteins: Proteins | None = None,
) -> scvi.model.SCVI:
    """An untrained model with the same registry as if it had been set up with the cells themselves.

    The prior of the protein background of TOTALVI does not depend on cells here; see `set_protein_priors`.

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
    labels
        Labels, for SCANVI.
    proteins
        Proteins, for TOTALVI.
    """
    model_class = family_of(kind).model_class
    adata = skeleton(genes, batches, labels, proteins)
    own = {} if kind != TOTALVI else {EMPIRICAL_PRIOR: False}
    with quiet("scvi"), warnings.catch_warnings():
        _ignore_setup_warnings()
        model_class.setup_anndata(adata, batch_key=BATCH, **_setup_arguments(labels, proteins))
        model: scvi.model.SCVI = model_class(adata, **arguments | own)
    if own:  # a model that extends this one takes the prior of the new batches from their cells
        model.init_params_["non_kwargs"][EMPIRICAL_PRIOR] = arguments.get(EMPIRICAL_PRIOR)
    if n_cells is not None:
        counts = model.adata_manager.registry["field_registries"]["X"]
        counts["summary_stats"]["n_cells"] = counts["state_registry"]["n_obs"] = n_cells
    return model


def _setup_arguments(labels: Labels | None, proteins: Proteins | None) -> dict[str, str]:
    """Arguments of `setup_anndata` for labels and proteins."""
    arguments: dict[str, str] = {}
    if labels:
        arguments |= {"labels_key": LABELS, "unlabeled_category": labels.unlabeled_category}
    if proteins:
        arguments |= {"protein_expression_obsm_key": PROTEINS, "protein_names_uns_key": PROTEIN_NAMES}
    return arguments


def set_protein_priors(model: scvi.model.TOTALVI, cells: ad.AnnData) -> None:
    """Set the initial prior of the protein background of a TOTALVI model from cells, as scvi-tools does.

    Nothing is done for a model without this prior (10 proteins or fewer, or `empirical_protein_background_prior`).

    Parameters
    ----------
    model
        An untrained model of `build_model`.
    cells
        Some cells of each batch, as in `skeleton`, with their counts of proteins; scvi-tools uses 100 per batch.
    """
    chosen = model.init_params_["non_kwargs"][EMPIRICAL_PRIOR]
    if not (model.summary_stats.n_proteins > _PROTEINS_OF_A_PRIOR if chosen is None else chosen):
        return
    with without_training():
        model._validate_anndata(cells)  # before scvi-tools turns every warning into an error, such as on small batches
        mean, scale = model._get_totalvi_protein_priors(cells)  # public API has it only with all cells in memory
    module = model.module
    module.background_pro_alpha.data = torch.from_numpy(mean.astype(np.float32))
    module.background_pro_log_beta.data = torch.from_numpy(scale.astype(np.float32)).log()


def _ignore_setup_warnings() -> None:
    """Ignore scvi-tools' advice on MuData, and its warnings about missing proteins and empty cells of a skeleton."""
    for message in (
        "We recommend using setup_mudata",
        "Some proteins have all 0 counts",
        "This dataset has some empty",
    ):
        warnings.filterwarnings("ignore", message=message)


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
        _ignore_setup_warnings()
        yield
