"""Command annotate: annotates a user's cells with the labels of a file or of a slice of the Census."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from census_scvi.annotation.annotate_query import Sources, annotate_joined, open_sources
from census_scvi.annotation.cost import effort
from census_scvi.annotation.labelled.labels import column_of, read_labels
from census_scvi.annotation.methods import EMBEDDED, MODEL
from census_scvi.annotation.protocol import Annotated
from census_scvi.annotation.results.columns import results_of, spread_values
from census_scvi.annotation.results.places import (
    annotate_results,
    has_model,
    model_folder,
    reference_source,
    require_one_column,
    same_source,
)
from census_scvi.annotation.scnym.trained import Trained, annotate_trained, explain, predict_trained, train_joined
from census_scvi.counts.formats.copy_cells import copy_with_results
from census_scvi.errors import UserError
from census_scvi.files.atomic import write_json
from census_scvi.files.json_values import json_values
from census_scvi.files.uri import without_credentials
from census_scvi.query.alignment import TooFewGenes
from census_scvi.query.cells import QueryCells
from census_scvi.query.places import query_size, query_source
from census_scvi.report.annotation import Reported, reported, write_annotation_report
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
                notes.append(f"reference: {n_reference:,} cells with {_numbers_of_labels(sources)}")
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


def _numbers_of_labels(sources: Sources) -> str:
    labels = sources.reference.labels
    numbers = {name: len({label for label in found if label is not None}) for name, found in labels.items()}
    return ", ".join(f"{n} labels" + f" of {name}" * (len(numbers) > 1) for name, n in numbers.items())


def _results(config: Config) -> ResultFiles:
    return annotate_results(config.query, config.annotate)


# --- inputs


def _labels(config: Config) -> list[str]:
    """Names of the labels, which the columns of the results begin with."""
    labels = config.query.labels
    if config.annotate.method == MODEL:
        raise UserError(
            f"annotate.method {MODEL} is the classifier of the model in query.model, which needs no labelled cells; use"
            " scvi-map-query.py"
        )
    if not labels:
        raise UserError("query.labels is []; name the columns of labels to predict, for example [cell_type]")
    if _uses_model(config):
        require_one_column(config.query)
    return labels


@contextmanager
def _query(config: Config) -> Iterator[tuple[QueryCells, str]]:
    with QueryCells(query_source(config.query), config.query.values) as query:
        yield query, query.find_counts(config.query.counts, setting=_COUNTS)


@contextmanager
def _sources(config: Config, query: QueryCells, place: str) -> Iterator[Sources]:
    settings = config.annotate
    of_reference = settings.reference
    if settings.method == EMBEDDED:  # the model has its own genes
        of_reference = of_reference.model_copy(update={"n_top_genes": None})
    with open_sources(
        query,
        place,
        _labels(config),
        of_reference,
        config.census,
        reference=reference_source(config.query, settings),
        same_file=same_source(config.query, settings),
        split_labels=config.query.split_labels,
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
    page, report = target.with_suffix(".html").name, task.place.report.name
    with _query(config) as (query, place):
        obs, n_cells = query.obs, len(query)
        if _uses_model(config):
            trained = Trained.load(model_folder(config.query, config.annotate))
            found = annotate_trained(
                trained,
                query,
                labels[0],
                counts=place,
                min_share=config.query.min_share,
                batch_key=config.query.batch_key,
            )
            annotated, rows = [found], np.arange(n_cells)
            shown = [Reported(labels[0], found.annotation, ad.AnnData(obs=obs.copy()), hierarchy=found.hierarchy)]
        else:
            with _sources(config, query, place) as sources:
                joined = sources.join(config.query.batch_key, config.query.min_share)
            annotated = annotate_joined(joined, config.annotate, config.seed, config.query.model)
            rows = joined.query_rows
            shown = [reported(each, joined) for each in annotated]
    reference = _reference_name(config)
    results = results_of(
        annotated, rows, obs.index, quality=FACTS, more={"reference": reference}, key_added=config.annotate.key_added
    )
    facts = {"file": str(source), "reference": reference, "method": config.annotate.method, "cells": n_cells}
    write_annotation_report(task.run.path(page), shown, facts=facts, seed=config.seed)
    obsm = {EMBEDDING: spread_values(annotated[0].annotation.embedding, rows, n_cells)} | results.obsm
    copy_with_results(source, task.run.path(target.name), obs.assign(**results.obs), obsm, results.uns)
    task.commit([target.name, page, report], {"cells": n_cells, "annotated": len(rows)})
    _say(annotated)
    log.info("wrote %s, %s, %s", target, target.with_name(page), target.with_name(report))


def _say(annotated: Sequence[Annotated]) -> None:
    for each in annotated:
        annotation = each.annotation
        found = pd.Series(annotation.labels[~annotation.unknown]).value_counts()
        log.info(
            "%s: %d of %d labels found (%s), %.1f%% of the cells unknown",
            each.labels,
            len(found),
            len(annotation.classes),
            ", ".join(f"{name} {number:,}" for name, number in found.head(5).items()),
            100 * annotation.unknown.mean(),
        )


# --- train and interpret


def _train(task: Task) -> None:
    config, settings = task.config, task.config.annotate
    folder = model_folder(config.query, settings)
    with _query(config) as (query, place), _sources(config, query, place) as sources:
        joined = sources.join(config.query.batch_key, config.query.min_share)
        cost = effort(settings, len(joined.cells), joined.cells.n_reference, trainings=1)
        trained = train_joined(
            joined,
            _labels(config)[0],
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
    column = (config.annotate.reference.labels or [trained.labels])[0]
    if column in query.obs:
        own = read_labels(column_of(query.obs, column, query.name, "query.labels"), f"obs[{column!r}]")
        return np.array([name or other for name, other in zip(own, found, strict=True)], dtype=object)
    return found
