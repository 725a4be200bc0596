"""Command map-query: adds embedding, UMAP and predicted labels to a user's .h5ad."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from census_scvi.annotation.cost import Effort, effort
from census_scvi.annotation.methods import MODEL
from census_scvi.annotation.results.columns import EMPTY, PREDICTION
from census_scvi.atlas import EMBEDDING, OWN_EMBEDDING, PROTEIN_REPORT, SURGERY_FACTS, Atlas
from census_scvi.config.obs_filter import in_section
from census_scvi.counts.formats.copy_cells import copy_with_results
from census_scvi.files.atomic import remove, write_json
from census_scvi.files.json_values import json_values
from census_scvi.model.published import load_described
from census_scvi.neighbors.index import EXACT_CELLS
from census_scvi.neighbors.umap_map import UmapMap
from census_scvi.pictures.umap import draw_on_reference
from census_scvi.query.alignment import TooFewGenes
from census_scvi.query.batches import required_batches
from census_scvi.query.cells import QueryCells
from census_scvi.query.places import (
    adapted_folder,
    companion_files,
    named_after,
    quality_picture,
    query_results,
    query_size,
    query_source,
)
from census_scvi.query.surgery.adapt import Reference, plan_surgery
from census_scvi.query.surgery.adapted import work_of
from census_scvi.query.surgery.pace import plans_of_comparison, surgery_seconds
from census_scvi.query.surgery.settings import COMPARE, JOINT, NONE, SurgeryTraining
from census_scvi.report.surgery import write_comparison_report
from census_scvi.settings import Config
from census_scvi.stages.plan import Plan
from census_scvi.stages.protocol import Task

log = logging.getLogger(__name__)

MAP = "X_umap"
_COUNTS = "query.counts="  # setting for the location of the raw counts, for messages
# Constants for --dry-run, measured on two cores. Memory: of the imports, and per cell of query or reference.
# Time: fixed; embedded and annotated cells/s; the index of a large reference; the UMAP.
_BASE_MEMORY, _BYTES_A_CELL = 1.0e9, 1500.0
_FIXED_SECONDS, _CELLS_A_SECOND, _INDEX_SECONDS, _MAP_SECONDS = 12.0, 1500.0, 40.0, 50.0
# Methods on counts: bytes and seconds per cell with counts; seconds of the trainings of each method, one for the query,
# and with labels one more for each of three held-out parts.
_BYTES_OF_COUNTS, _SECONDS_OF_COUNTS = 15_000.0, 0.0007
_TRAINING_SECONDS = {"consensus": 25.0, "joint": 25.0, "scanvi": 160.0, "scnym": 600.0}


def run(task: Task) -> None:
    """Embed the cells, predict their labels, and write the .h5ad, pictures and a report next to it."""
    config, settings, run = task.config, task.config.query, task.run
    source, target = query_source(config.query), query_results(config.query, config.directory).target
    run.start()
    with (
        in_section("query"),
        Atlas.open(
            None if settings.vectors else settings.model or config.directory,
            census=_census(config),
            embedding=_embedding(config),
            organism=config.census.organism if "organism" in config.census.model_fields_set else None,
            tiledb=config.census.tiledb,
        ) as reference,
        ExitStack() as stack,
    ):
        with QueryCells(source, settings.values) as cells:
            atlas = reference
            if settings.surgery != NONE:
                folder = adapted_folder(target)
                work = work_of(folder)
                if settings.surgery == COMPARE:
                    _compare(reference, cells, config, run.path(named_after(target, "surgery", ".html").name), work)
                    work = work / JOINT  # continues with the joint training of the comparison
                atlas = stack.enter_context(_adapted(reference, cells, config, folder=run.path(folder.name), work=work))
            mapped = predict(atlas, cells, config, run.path(target.with_suffix(".html").name))
        for labels in settings.labels:
            log.info("%s", _summary(mapped, labels))
            if mapped.uns[PREDICTION][labels].get("held_out"):
                figure = atlas.quality(mapped, labels)
                figure.savefig(run.path(quality_picture(target, labels).name), dpi=110, format="png")
        if settings.umap_cells:
            _place(atlas, mapped, config, run.path(target.with_suffix(".png").name))
    report = _report(mapped, settings.labels) | ({"surgery": atlas.surgery} if atlas.surgery else {})
    write_json(run.path(target.with_suffix(".json").name), json_values(report))
    kept = ("scvi_alignment", PROTEIN_REPORT, PREDICTION, "scvi_model", SURGERY_FACTS)
    uns = {name: mapped.uns[name] for name in kept if name in mapped.uns}
    copy_with_results(source, run.path(target.name), mapped.obs, mapped.obsm, uns)
    written = [path for path in (target, *companion_files(config.query, target)) if run.path(path.name).exists()]
    task.commit([path.name for path in written], {"cells": mapped.n_obs})
    if settings.surgery != NONE:
        remove(work_of(adapted_folder(target)))
    log.info("wrote %s", ", ".join(map(str, written)))


def _compare(atlas: Atlas, cells: QueryCells, config: Config, report: Path, work: Path) -> None:
    """Compare the ways to map the cells, and write the report."""
    settings = config.query
    labels = settings.labels[0] if settings.labels and config.annotate.method != MODEL else None
    with _settings_named(config):
        compared = atlas.compare_mappings(
            cells,
            settings.batch_key or [],
            labels=labels,
            truth=labels if labels in cells.obs else None,
            obs_filter=settings.obs_filter,
            training=settings.surgery_training,
            max_cells=settings.reference_cells,
            folder=work,
            accelerator=config.train.accelerator,
            **_arguments(config, cells),
        )
    facts = {
        "cells": f"{len(cells):,} of {cells.name}",
        "batches": f"{'+'.join(settings.batch_key or [])}: {', '.join(_batch_sizes(cells, config))}",
        "model": settings.model or f"{config.directory}/",
        "training": settings.surgery_training.model_dump(exclude_defaults=True) or "default settings",
        "labels": labels or "none",
    }
    write_comparison_report(report, compared, facts=facts, seed=config.seed)
    log.info("comparison of the ways to map: %s", compared.recommendation)


def _batch_sizes(cells: QueryCells, config: Config) -> list[str]:
    labels = required_batches(cells.obs, config.query.batch_key or [], "query.batch_key")
    sizes = pd.Series(labels).value_counts(sort=False)
    return [f"{label} ({n:,} cells)" for label, n in sizes.items()]


def _adapted(atlas: Atlas, cells: QueryCells, config: Config, *, folder: Path, work: Path) -> Atlas:
    """The atlas with the model adapted by `query.surgery`."""
    settings = config.query
    with _settings_named(config):
        return atlas.adapt(
            cells,
            settings.batch_key or [],
            mode=JOINT if settings.surgery == COMPARE else settings.surgery,
            training=_training(config),
            folder=folder,
            work=work,
            accelerator=config.train.accelerator,
            **_arguments(config, cells),
        )


def _training(config: Config) -> SurgeryTraining:
    """Settings of the training; those of `compare` may have an order, which joint training does not use."""
    return config.query.surgery_training.model_copy(update={"order": None} if config.query.surgery == COMPARE else {})


def predict(atlas: Atlas, cells: QueryCells, config: Config, report: Path | None = None) -> ad.AnnData:
    """Result of `Atlas.predict` for the cells, with its reports unless `report` is None."""
    settings, arguments = config.query, _arguments(config, cells)
    chosen = _effort(config, len(cells))
    if chosen.note:
        log.warning("%s", chosen.note)
    with _settings_named(config):
        return atlas.predict(
            cells if settings.vectors is None else _with_vectors(cells, settings.vectors),
            settings.labels,
            split_labels=settings.split_labels,
            obs_filter=settings.obs_filter,
            method=chosen.method,
            **chosen.of_method,
            batch_key=settings.batch_key,
            baseline_cells=settings.baseline_cells,
            max_cells=settings.reference_cells,
            report=report,
            **arguments,
        )


def _with_vectors(cells: QueryCells, name: str) -> ad.AnnData:
    """The cells with the vectors that the user gives, and without counts."""
    return ad.AnnData(obs=cells.obs.copy(), obsm={OWN_EMBEDDING: cells.vectors(name)})


def _arguments(config: Config, cells: QueryCells) -> dict[str, Any]:
    """Arguments that the methods of `Atlas` for a user's cells share."""
    if config.query.vectors is not None:
        return {"seed": config.seed}
    return {
        "seed": config.seed,
        "counts": cells.find_counts(config.query.counts, setting=_COUNTS),
        "min_share": _min_share(config)[1],
        "proteins": config.query.proteins,
    }


@contextmanager
def _settings_named(config: Config) -> Iterator[None]:
    """Let an error about missing genes name the setting of the config."""
    try:
        yield
    except TooFewGenes as error:
        raise error.named(_min_share(config)[0]) from None


def _effort(config: Config, n_cells: int) -> Effort:
    """Method and its arguments, within the budget."""
    n_reference = config.query.baseline_cells
    return effort(config.annotate, n_cells + n_reference, n_reference)


def _census(config: Config) -> str | None:
    """URI or version of the Census in the config; None if the config names none: the model's Census is used."""
    named = config.census.model_fields_set & {"uri", "version"} or config.query.vectors
    return config.census.uri or config.census.version if named else None


def _embedding(config: Config) -> str | None:
    """Embedding of the reference cells; None: that of the model."""
    if config.query.vectors is None:
        return config.query.embedding
    return config.query.embedding or str(config.directory)


def _min_share(config: Config) -> tuple[str, float]:
    """Name and value of the effective setting: query.min_share, or genes.min_share if only that is set."""
    set_for_census = "min_share" in config.genes.model_fields_set and "min_share" not in config.query.model_fields_set
    section = "genes" if set_for_census else "query"
    return f"{section}.min_share", getattr(config, section).min_share


def _summary(mapped: ad.AnnData, labels: str) -> str:
    quality = mapped.uns[PREDICTION][labels]
    unknown = mapped.obs[f"{labels}_unknown"].to_numpy()
    found = mapped.obs[f"{labels}_predicted"].nunique() - bool(unknown.any())
    words = f"{labels}: {found} of {len(quality['classes'])} labels found, {unknown.mean():.1%} of the cells unknown"
    if empty := int(mapped.obs[EMPTY].sum()):
        words += f", {empty:,} cells without counts among them"
    if quality["far"]:
        return f"{words}; cells of some batches are far from the reference: check their labels with marker genes"
    if np.isnan(quality["left_out_found"]):
        return words
    return (
        f"{words} (tested by excluding one label of the reference: {quality['left_out_found']:.0%} of its cells were"
        f" unknown, and {1 - quality['known_kept']:.0%} of the cells of known labels)"
    )


def _place(atlas: Atlas, mapped: ad.AnnData, config: Config, picture: Path) -> None:
    """Compute a UMAP of the reference, place the cells on it, and save the picture."""
    settings = config.query
    labels = settings.labels[0] if settings.labels else "cell_type"
    reference = atlas.reference(settings.obs_filter, [labels], settings.umap_cells, config.seed)
    log.info("placing %s cells on a UMAP of %s", f"{mapped.n_obs:,}", f"{reference.n_obs:,}")
    umap = UmapMap(reference.obsm[EMBEDDING], seed=config.seed)
    mapped.obsm[MAP] = umap.place(mapped.obsm[OWN_EMBEDDING])
    named = mapped.obs[f"{labels}_predicted"] if settings.labels else pd.Series("your cells", mapped.obs_names)
    figure = draw_on_reference(umap.positions, reference.obs[labels], mapped.obsm[MAP], named, labels.replace("_", " "))
    figure.savefig(picture, dpi=110, format="png")


def _report(mapped: ad.AnnData, labels: list[str]) -> dict[str, Any]:
    """Content of the report: gene alignment, quality of the predictions, and number of cells per label."""
    return {
        "cells": mapped.n_obs,
        **({"alignment": mapped.uns["scvi_alignment"]} if "scvi_alignment" in mapped.uns else {}),
        **({"proteins": mapped.uns[PROTEIN_REPORT]} if PROTEIN_REPORT in mapped.uns else {}),
        "predictions": {
            name: {
                **mapped.uns[PREDICTION][name],
                "cells": {str(k): int(n) for k, n in mapped.obs[f"{name}_predicted"].value_counts().items() if n},
                "mean_probability": float(mapped.obs[f"{name}_probability"].mean()),
            }
            for name in labels
        },
    }


def plan(config: Config) -> Plan:
    """Plan of the command: number of cells from the file, time for two cores; of a surgery, from a few steps."""
    source, target = query_source(config.query), query_results(config.query, config.directory).target
    settings = config.query
    with QueryCells(source, settings.values) as cells:
        n_cells, n_genes = len(cells), 0
        if settings.vectors is None:
            place = cells.find_counts(settings.counts, setting=_COUNTS)
            n_genes, what = len(cells.var(place)), f"raw counts from {place}"
        else:
            what = f"{cells.vectors(settings.vectors).shape[1]} dimensions from obsm[{settings.vectors!r}]"
        surgery = _planned_surgery(config, cells)
    reads_counts = settings.baseline_cells and settings.labels and settings.vectors is None
    with_counts = (n_cells + settings.baseline_cells) * bool(reads_counts)
    return Plan(
        "map-query",
        reads=[
            f"{source}: {what}",
            _embedding(config) or settings.model or f"{config.directory}/",
            f"{_census(config) or 'the Census of the model'}: embedding and labels of up to"
            f" {settings.reference_cells:,} cells",
        ],
        writes=[str(path) for path in (target, *companion_files(config.query, target))],
        cells=n_cells,
        genes=n_genes,
        memory=_BASE_MEMORY
        + _BYTES_A_CELL * (n_cells + settings.reference_cells)
        + _BYTES_OF_COUNTS * with_counts
        + surgery.memory,
        disk=query_size(source) + 300.0 * n_cells + surgery.disk,
        seconds=_FIXED_SECONDS
        + n_cells / _CELLS_A_SECOND
        + _SECONDS_OF_COUNTS * with_counts
        + _TRAINING_SECONDS.get(_effort(config, n_cells).method, 0.0) * bool(with_counts)
        + _INDEX_SECONDS * (settings.reference_cells > EXACT_CELLS)
        + _MAP_SECONDS * bool(settings.umap_cells)
        + surgery.seconds,
        notes=surgery.notes,
    )


@dataclass(frozen=True)
class _Surgery:
    """What `query.surgery` will do, in words, and its seconds and bytes."""

    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: float = 0.0
    disk: float = 0.0


def _planned_surgery(config: Config, cells: QueryCells) -> _Surgery:
    """What `query.surgery` will do; UserError if it will be refused."""
    settings = config.query
    if settings.surgery == NONE:
        return _Surgery()
    model, description = load_described(settings.model or str(config.directory))
    reference, training = Reference(model, description), settings.surgery_training
    labels = list(required_batches(cells.obs, settings.batch_key or [], "query.batch_key"))
    mode = JOINT if settings.surgery == COMPARE else settings.surgery
    planned, reason = plan_surgery(reference, labels, mode, training)
    if reason:
        return _Surgery([f"surgery {settings.surgery} will not be done: {reason}"])
    plans = plans_of_comparison(reference, labels, planned) if settings.surgery == COMPARE else [planned]
    number, trainings = len(planned.batches), sum(len(plan.groups()) for plan in plans)
    weights = 4.0 * sum(parameter.numel() for parameter in model.module.parameters())
    done = [
        f"surgery {settings.surgery}: {number} batch{'es' * (number > 1)} ({len(cells):,} cells),"
        f" {trainings} training{'s' * (trainings > 1)} for up to {training.max_epochs} epochs"
        + " or as many steps" * (settings.surgery == COMPARE and trainings > 3)
        + "; a killed surgery continues when map-query is run again",
        "the time of the surgery is estimated from a few steps on this machine, with simulated cells",
    ]
    return _Surgery(
        done,
        seconds=surgery_seconds(reference, labels, plans, config.train.accelerator),
        memory=weights * (3 + max(len(plan.groups()) for plan in plans)),
        # Each model twice, in the safe form and as model.pt: the work, and the result.
        disk=2 * weights * (trainings + len(planned.groups())),
    )
