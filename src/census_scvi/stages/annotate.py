"""Command annotate: annotates a user's cells with the labels of a file or of a slice of the Census."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from census_scvi.annotation.annotate_query import Sources, annotate_joined, open_sources
from census_scvi.annotation.cost import effort
from census_scvi.annotation.labelled.joined import query_batches
from census_scvi.annotation.labelled.labels import column_of, read_labels
from census_scvi.annotation.ontology import build_hierarchy
from census_scvi.annotation.protocol import Annotation
from census_scvi.annotation.results.columns import annotation_columns, probability_table, scnym_columns, spread_values
from census_scvi.annotation.results.places import (
    annotate_results,
    has_model,
    model_folder,
    reference_source,
    same_source,
)
from census_scvi.annotation.scnym.trained import Trained, as_annotation, explain, predict_trained, train_joined
from census_scvi.counts.formats.copy_cells import copy_with_results
from census_scvi.errors import UserError
from census_scvi.files.atomic import write_json
from census_scvi.files.json_values import json_values
from census_scvi.files.uri import without_credentials
from census_scvi.query.alignment import TooFewGenes
from census_scvi.query.cells import QueryCells
from census_scvi.query.places import query_size, query_source
from census_scvi.report.annotation import cells_with_counts, write_annotation_report
from census_scvi.settings import Config
from census_scvi.stages.plan import Plan
from census_scvi.stages.protocol import Task
from census_scvi.workspace.result_files import ResultFiles

log = logging.getLogger(__name__)

EMBEDDING, FACTS = "X_annotation", "annotation"
_COUNTS, _MIN_SHARE = "query.counts=", "query.min_share"
# For --dry-run, measured on two cores: memory of the imports, per cell, and per cell of the embedding of a query.
_BASE_MEMORY, _BYTES_A_CELL, _BYTES_ON_DISK = 1.2e9, 60_000.0, 1000.0


def run(task: Task) -> None:
    """Do the action of the settings: annotate the cells, train a classifier, or explain one of its labels."""
    task.run.start()
    try:
        {"predict": _predict, "train": _train, "interpret": _interpret}[task.config.annotate.action](task)
    except TooFewGenes as error:
        raise error.named(_MIN_SHARE) from None


def plan(config: Config) -> Plan:
    """Plan of the command: cells of query and reference, training and its cost."""
    settings, source = config.annotate, query_source(config.query)
    trained = _uses_model(config)
    with _query(config) as (query, place):
        n_cells, n_reference, n_genes, notes = len(query), 0, len(query.var(place)), []
        if not trained and settings.action != "interpret":
            with _sources(config, query, place) as sources:
                n_cells, n_reference = len(sources.rows), len(sources.reference)
                types = len(set(sources.reference.labels.tolist()))
                notes.append(f"reference: {n_reference:,} cells with {types} labels")
                notes += sources.reference.notes
    trainings = 0 if trained else 1 if settings.action == "train" else 4
    cost = effort(settings, n_cells + n_reference, n_reference, trainings=trainings)
    notes.append(f"method {cost.method}: about {cost.cpu_seconds:,.0f} CPU-seconds without a GPU")
    return Plan(
        "annotate",
        reads=[f"{source}: {config.query.values} from {place}", _reference_name(config)],
        writes=[str(_results(config).target), str(_results(config).report)],
        cells=n_cells + n_reference,
        genes=n_genes,
        memory=_BASE_MEMORY + _BYTES_A_CELL * (n_cells + n_reference),
        disk=query_size(source) + _BYTES_ON_DISK * n_cells,
        seconds=cost.cpu_seconds,
        notes=[*notes, cost.note] if cost.note else notes,
    )


def _results(config: Config) -> ResultFiles:
    return annotate_results(config.query, config.annotate)


# --- inputs


def _labels(config: Config) -> str:
    """Name of the labels, which the columns of the results begin with."""
    if len(config.query.labels) != 1:
        raise UserError(
            f"query.labels is {config.query.labels}; annotate predicts one column of labels, for example [cell_type]"
        )
    return config.query.labels[0]


@contextmanager
def _query(config: Config) -> Iterator[tuple[QueryCells, str]]:
    with QueryCells(query_source(config.query), config.query.values) as query:
        yield query, query.find_counts(config.query.counts, setting=_COUNTS)


@contextmanager
def _sources(config: Config, query: QueryCells, place: str) -> Iterator[Sources]:
    settings = config.annotate
    with open_sources(
        query,
        place,
        _labels(config),
        settings.reference,
        config.census,
        reference=reference_source(config.query, settings),
        same_file=same_source(config.query, settings),
        seed=config.seed,
    ) as sources:
        yield sources


def _reference_name(config: Config) -> str:
    if _uses_model(config):
        return f"{model_folder(config.query, config.annotate)}/: a trained classifier"
    source = reference_source(config.query, config.annotate)
    if source is not None:
        return f"{source}: labelled cells"
    return f"{without_credentials(config.census.uri) or f'Census {config.census.version}'}: labelled cells"


def _uses_model(config: Config) -> bool:
    """Whether a saved classifier is used instead of labelled cells."""
    settings = config.annotate
    if settings.action == "interpret":
        return True
    return (
        settings.action == "predict" and settings.method == "scnym" and has_model(model_folder(config.query, settings))
    )


# --- predict


def _predict(task: Task) -> None:
    config = task.config
    labels, source = _labels(config), query_source(config.query)
    target = task.place.target
    page = target.with_suffix(".html").name
    with _query(config) as (query, place):
        obs, n_cells = query.obs, len(query)
        if _uses_model(config):
            trained = Trained.load(model_folder(config.query, config.annotate))
            found = predict_trained(trained, query, counts=place, min_share=config.query.min_share)
            batch = query_batches(query, keys) if (keys := config.query.batch_key) else None
            annotation, rows = as_annotation(trained, found, batch), np.arange(n_cells)
            terms: Mapping[str, str] = {}
            cells, reference = ad.AnnData(obs=obs.copy()), None
        else:
            with _sources(config, query, place) as sources:
                joined = sources.join(config.query.batch_key, config.query.min_share)
            annotation = annotate_joined(joined, config.annotate, config.seed, config.query.model)
            rows, terms = joined.query_rows, joined.terms
            symbols = dict(zip(joined.cells.genes, joined.symbols, strict=True))
            cells, reference = cells_with_counts(joined.cells, labels, joined.labels, symbols)
    hierarchy = build_hierarchy(annotation.classes, terms)
    columns = annotation_columns(annotation, labels, rows, n_cells, hierarchy)
    obsm = {EMBEDDING: spread_values(annotation.embedding, rows, n_cells)}
    uns: dict[str, Any] = {FACTS: {labels: _facts(annotation, config)}}
    if key := config.annotate.key_added:
        columns |= scnym_columns(annotation.labels, annotation.probability, key, rows, n_cells)
        uns[f"{key}_probabilities"] = probability_table(annotation.classes, annotation.probability, rows, obs.index)
        obsm[f"X_{key.lower()}"] = obsm[EMBEDDING]
    record = write_annotation_report(
        task.run.path(page),
        labels,
        annotation,
        cells,
        reference,
        hierarchy=hierarchy,
        facts={
            "file": str(source),
            "reference": _reference_name(config),
            "method": config.annotate.method,
            "cells": n_cells,
        },
        seed=config.seed,
    )
    copy_with_results(source, task.run.path(target.name), obs.assign(**columns), obsm, uns)
    report = task.place.report.name
    task.commit([target.name, page, report], {"cells": n_cells, "annotated": len(rows)})
    _say(annotation, labels, record)
    log.info("wrote %s, %s, %s", target, target.with_name(page), target.with_name(report))


def _facts(annotation: Annotation, config: Config) -> dict[str, Any]:
    """What uns tells about the annotation."""
    accuracy = {str(name): float(row["accuracy"]) for name, row in annotation.validation.iterrows()}
    return {
        "classes": annotation.classes,
        "method": config.annotate.method,
        "reference": _reference_name(config),
        "held_out_accuracy": accuracy,
        "warnings": annotation.warnings,
    }


def _say(annotation: Annotation, labels: str, record: dict[str, Any]) -> None:
    found = pd.Series(annotation.labels[~annotation.unknown]).value_counts()
    log.info(
        "%s: %d of %d labels found (%s), %.1f%% of the cells unknown",
        labels,
        len(found),
        len(annotation.classes),
        ", ".join(f"{name} {number:,}" for name, number in found.head(5).items()),
        100 * annotation.unknown.mean(),
    )
    accuracy = {str(name): row["accuracy"] for name, row in annotation.validation.iterrows()}
    if accuracy:
        log.info("accuracy on held-out reference cells: %s", ", ".join(f"{k} {v:.1%}" for k, v in accuracy.items()))


# --- train and interpret


def _train(task: Task) -> None:
    config, settings = task.config, task.config.annotate
    folder = model_folder(config.query, settings)
    with _query(config) as (query, place), _sources(config, query, place) as sources:
        joined = sources.join(config.query.batch_key, config.query.min_share)
        cost = effort(settings, len(joined.cells), joined.cells.n_reference, trainings=1)
        trained = train_joined(
            joined,
            _labels(config),
            sources.reference.organism,
            preset=settings.preset,
            overrides=cost.arguments,
            seed=config.seed,
            folder=folder,
        )
    files = task.run.path(task.place.target.name).parent
    trained.save(files)
    report = {"labels": trained.labels, "classes": trained.classifier.classes, "genes": len(trained.classifier.genes)}
    write_json(files / task.place.report.name, json_values(report | {"notes": joined.notes}))
    names = sorted(path.name for path in files.iterdir() if path.suffix in (".json", ".safetensors"))
    task.commit(names, {"cells": len(joined.cells), "classes": len(trained.classifier.classes)})
    log.info("wrote the classifier to %s; annotate without `train` uses it", folder)


def _interpret(task: Task) -> None:
    config, settings = task.config, task.config.annotate
    trained = Trained.load(model_folder(config.query, settings))
    target = str(settings.target)
    with _query(config) as (query, place):
        found = explain(
            trained,
            query,
            _known_or_predicted(config, trained, query, place),
            target,
            settings.source,
            counts=place,
            min_share=config.query.min_share,
            seed=config.seed,
        )
    table = found.top(len(found.saliency))
    table.insert(0, "symbol", [trained.symbols.get(gene, gene) for gene in table.index])
    path = task.place.target
    table.to_csv(task.run.path(path.name), index_label="gene")
    picture = path.with_suffix(".png").name
    found.draw(symbols=dict(trained.symbols)).savefig(task.run.path(picture), dpi=110, format="png")
    top = table["symbol"].head(20).tolist()
    report = {"target": target, "source": settings.source, "genes": top, "completeness": found.completeness}
    write_json(task.run.path(task.place.report.name), json_values(report))
    task.commit([path.name, picture, task.place.report.name], {"genes": len(table)})
    log.info("%s: %s; wrote %s", target, ", ".join(top[:10]), path)


def _known_or_predicted(config: Config, trained: Trained, query: QueryCells, place: str) -> Any:
    """Label of each cell: the file's own where it has one, else the classifier's."""
    found = predict_trained(trained, query, counts=place, min_share=config.query.min_share).labels
    column = config.annotate.reference.labels or trained.labels
    if column in query.obs:
        own = read_labels(column_of(query.obs, column, query.name, "query.labels"), f"obs[{column!r}]")
        return np.array([name or other for name, other in zip(own, found, strict=True)], dtype=object)
    return found
