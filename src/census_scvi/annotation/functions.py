"""Functions in scanpy's style: train, predict and interpret; an AnnData in, columns of it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import anndata as ad
import numpy as np
from pydantic import ValidationError

from census_scvi.annotation.annotate_query import Sources, annotate_joined, open_sources
from census_scvi.annotation.labelled.labels import column_of, read_labels
from census_scvi.annotation.protocol import Annotation
from census_scvi.annotation.results.columns import add_results, results_of
from census_scvi.annotation.scnym.interpret import Attribution
from census_scvi.annotation.scnym.trained import Trained, annotate_trained, explain, train_joined
from census_scvi.annotation.settings import AnnotateSection
from census_scvi.census.settings import CensusSection, census_named
from census_scvi.config.messages import describe_errors
from census_scvi.errors import UserError
from census_scvi.files.paths import expand_argument
from census_scvi.query.cells import COUNTS, QueryCells
from census_scvi.query.mapping import MIN_SHARE

Reference: TypeAlias = "ad.AnnData | str | Path"


def train(
    adata: ad.AnnData,
    groupby: str = "cell_type",
    out_path: str | Path | None = None,
    *,
    reference: Reference | None = None,
    census: str | None = None,
    obs_filter: str | None = None,
    cells_per_type: int | None = None,
    n_top_genes: int | None = 2_000,
    reference_batch_key: str | Sequence[str] | None = None,
    domain_groupby: str | Sequence[str] | None = None,
    preset: str = "no_new_identity",
    overrides: Mapping[str, Any] | None = None,
    counts: str | None = None,
    values: str = COUNTS,
    min_share: float = MIN_SHARE,
    organism: str = "homo_sapiens",
    seed: int = 0,
) -> Trained:
    """Train a classifier by scNym's method.

    Parameters
    ----------
    adata
        Cells to annotate; without `reference` and `census`, those with a label in `obs[groupby]` are learned from, and
        those with "Unlabeled" or no label are the target. It is not changed.
    groupby
        obs column of the labels, of `adata` or of the reference.
    out_path
        Folder to save the classifier, its TensorBoard log and, during training, a checkpoint; None: nothing is saved.
    reference
        Labelled cells: an AnnData, or a file of any format.
    census
        Census with labelled cells: a URI, or a release such as `stable`.
    obs_filter, cells_per_type, n_top_genes, reference_batch_key
        Which labelled cells to use, how many of each label at most, and how many genes: the most variable ones of the
        labelled cells (None: all that both have); obs columns of the labelled cells whose combinations are their
        studies, each of which is held out once (None: dataset_id or donor_id).
    domain_groupby
        obs columns of `adata` whose combinations are its domains, for the adversary; None: the target is one domain.
    preset, overrides
        `no_new_identity`, `new_identity_discovery` or `supervised`, and hyper-parameters that replace its own.
    counts, values
        Place of the counts in `adata` (None: searched), and what it holds: `counts` or `log_normalized`.
    min_share
        Required share of the reference's genes.
    organism
        Organism, if the genes have no Ensembl ids.
    seed
        Seed of everything that is random.

    Returns
    -------
    The classifier, for `predict` and `interpret`.

    Raises
    ------
    UserError
        Cells, labels or hyper-parameters cannot be used.
    """
    settings = _settings(
        obs_filter=obs_filter,
        cells_per_type=cells_per_type,
        n_top_genes=n_top_genes,
        batch_key=_columns(reference_batch_key),
    )
    folder = None if out_path is None else Path(expand_argument(out_path, "out_path"))
    with _opened(
        adata, groupby, settings, reference, census, counts=counts, values=values, organism=organism, seed=seed,
        all_labelled=True,
    ) as sources:  # fmt: skip
        trained = train_joined(
            sources.join(_columns(domain_groupby), min_share),
            groupby,
            sources.reference.organism,
            preset=preset,
            overrides=overrides,
            seed=seed,
            folder=folder,
            where="overrides",
        )
    if folder is not None:
        trained.save(folder)
    return trained


def predict(
    adata: ad.AnnData,
    groupby: str = "cell_type",
    *,
    reference: Reference | None = None,
    census: str | None = None,
    obs_filter: str | None = None,
    cells_per_type: int | None = None,
    n_top_genes: int | None = 2_000,
    reference_batch_key: str | Sequence[str] | None = None,
    trained_model: Trained | str | Path | None = None,
    method: str = "consensus",
    preset: str = "no_new_identity",
    overrides: Mapping[str, Any] | None = None,
    batch_key: str | Sequence[str] | None = None,
    key_added: str = "annotation",
    counts: str | None = None,
    values: str = COUNTS,
    min_share: float = MIN_SHARE,
    organism: str = "homo_sapiens",
    seed: int = 0,
) -> Annotation:
    """Annotate cells.

    Parameters
    ----------
    adata
        Cells to annotate; without `reference`, `census` and `trained_model`, those with a label in `obs[groupby]` are
        learned from and the others are annotated.
    groupby
        obs column of the labels, of `adata` or of the reference.
    trained_model
        Result of `train`, or its folder; None: `method` is fitted to the labelled cells and `adata`.
    method
        `consensus`, `fast` or a single method; docs/annotation.md compares them.
    batch_key
        obs columns of `adata` whose combinations are its technical batches; None: not known.
    key_added
        Name of the results.
    reference, census, obs_filter, cells_per_type, n_top_genes, reference_batch_key, preset, overrides
        As for `train`.
    counts, values, min_share, organism, seed
        As for `train`.

    Returns
    -------
    The annotation. `adata` gets the most probable label in `obs[key]` and its probability in `obs[key +
    "_confidence"]`; `obs[key + "_predicted"]`, in which cells of types that the reference lacks are "unknown", and the
    other columns of `annotation_columns`; the probabilities in `uns[key + "_probabilities"]`, and a joint embedding in
    `obsm["X_" + key.lower()]`.

    Raises
    ------
    UserError
        Cells, labels or the trained model cannot be used.
    """
    if trained_model is not None:
        trained = _trained(trained_model)
        with QueryCells(adata, values) as query:
            place = query.find_counts(counts)
            found = annotate_trained(
                trained, query, key_added, counts=place, min_share=min_share, batch_key=_columns(batch_key)
            )
        rows = np.arange(adata.n_obs)
    else:
        settings = _settings(
            method=method,
            preset=preset,
            overrides=overrides,
            obs_filter=obs_filter,
            cells_per_type=cells_per_type,
            n_top_genes=n_top_genes,
            batch_key=_columns(reference_batch_key),
        )
        with _opened(
            adata, groupby, settings, reference, census, counts=counts, values=values, organism=organism, seed=seed
        ) as sources:
            joined = sources.join(_columns(batch_key), min_share)
        (found,), rows = annotate_joined(joined, settings, seed), joined.query_rows
    add_results(adata, results_of([replace(found, labels=key_added)], rows, adata.obs_names, key_added=key_added))
    return found.annotation


def interpret(
    adata: ad.AnnData,
    groupby: str,
    target: str,
    source: str = "all",
    *,
    trained_model: Trained | str | Path,
    n_cells: int = 300,
    counts: str | None = None,
    values: str = COUNTS,
    min_share: float = MIN_SHARE,
    seed: int = 0,
) -> Attribution:
    """Genes by which a classifier recognises a label: expected gradients.

    Parameters
    ----------
    adata
        Cells; it is not changed.
    groupby
        obs column of the labels of `adata`, known or predicted.
    target, source
        The label to explain, and the label with which it is compared; `all`: all others.
    trained_model
        Result of `train`, or its folder.
    n_cells
        Maximum number of cells to explain.
    counts, values, min_share, seed
        As for `train`.

    Returns
    -------
    `saliency` has the genes, the most important first, `gradients` the contributions in each cell, `top` a table and
    `draw` a picture.

    Raises
    ------
    UserError
        The label does not exist, or the cells or the trained model cannot be used.
    """
    trained = _trained(trained_model)
    with QueryCells(adata, values) as query:
        place = query.find_counts(counts)
        labels = read_labels(column_of(adata.obs, groupby, query.name, "groupby="), f"obs[{groupby!r}]")
        return explain(
            trained, query, labels, target, source, counts=place, min_share=min_share, n_cells=n_cells, seed=seed
        )


@contextmanager
def _opened(
    adata: ad.AnnData,
    groupby: str,
    settings: AnnotateSection,
    reference: Reference | None,
    census: str | None,
    *,
    counts: str | None,
    values: str,
    organism: str,
    seed: int,
    all_labelled: bool = False,
) -> Iterator[Sources]:
    if reference is not None and census is not None:
        raise UserError("reference and census are both given; the labelled cells are either in a file or in a Census")
    if not isinstance(groupby, str):
        raise UserError(
            f"groupby is {groupby!r}; expected one column of labels: call the function once for each column"
        )
    if not isinstance(adata, ad.AnnData):
        raise UserError(f"adata is a {type(adata).__name__}; expected an AnnData (a file: anndata.read_h5ad)")
    same = reference is adata or (reference is None and census is None)
    section = CensusSection(organism=organism)
    if census is not None:
        section = census_named(expand_argument(census, "census"), organism)
    with (
        QueryCells(adata, values) as query,
        open_sources(
            query,
            query.find_counts(counts),
            [groupby],
            settings.reference,
            section,
            reference=reference,
            same_file=same,
            all_labelled=all_labelled,
            seed=seed,
        ) as sources,
    ):
        yield sources


def _settings(**arguments: Any) -> AnnotateSection:
    """Checked arguments as settings."""
    of_reference = {name: arguments.pop(name) for name in ("obs_filter", "cells_per_type", "n_top_genes", "batch_key")}
    values = {name: value for name, value in arguments.items() if value is not None} | {"reference": of_reference}
    try:
        return AnnotateSection.model_validate(values)
    except ValidationError as error:
        raise UserError(describe_errors(error, AnnotateSection, lambda _: "arguments")) from None


def _columns(names: str | Sequence[str] | None) -> list[str] | None:
    return [names] if isinstance(names, str) else None if names is None else list(names)


def _trained(model: Trained | str | Path) -> Trained:
    return model if isinstance(model, Trained) else Trained.load(Path(expand_argument(model, "trained_model")))
