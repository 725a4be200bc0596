"""Stage publish: measures the gates, then publishes the embedding, the model and their provenance."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import scvi
import tiledbsoma

from census_scvi.census.cells import Cells, require_columns, select_cells
from census_scvi.census.datasets import describe_data
from census_scvi.census.genes import locate_genes
from census_scvi.census.open import open_census
from census_scvi.census.slices import read_obs_of
from census_scvi.config.run_names import PROGRESS, PROVENANCE
from census_scvi.config.stages import STAGES
from census_scvi.errors import UserError
from census_scvi.files.atomic import write_json
from census_scvi.files.readahead import read_ahead
from census_scvi.files.uri import without_credentials
from census_scvi.model.facts import built_facts
from census_scvi.model.families import family_of
from census_scvi.model.safe import ModelDescription, load_safe
from census_scvi.publication import measure_gates, target, without_model
from census_scvi.publication.drift import drift_gates
from census_scvi.publication.folder import copy_to, write_published
from census_scvi.publication.gates import NO_MODEL, NOT_APPLICABLE, Gate, stopped_by
from census_scvi.publication.index_copy import publish_index
from census_scvi.publication.obsm import EmbeddingDraft
from census_scvi.publication.own_array import ArrayDraft, check_place, contribution_problems
from census_scvi.publication.predictive_checks import check_predictions
from census_scvi.publication.record import embedding_info, evaluation_of, publication_record, summary_row
from census_scvi.publication.sample import draw_rows, read_sample
from census_scvi.publication.summary import append_summary
from census_scvi.settings import Config
from census_scvi.stages.inputs import imported_embedding, inputs_of
from census_scvi.stages.plan import Plan
from census_scvi.stages.protocol import Task
from census_scvi.terminal.progress import progress_bar
from census_scvi.training.recorded_split import recorded_split
from census_scvi.workspace.identity import Identity

log = logging.getLogger(__name__)

_BLOCK_CELLS = 2**16
# Names of what is written, in the record of progress.
_OBSM, _ARRAY = "cells", "cells of the array"
# Blocks that are written at the same time: TileDB writes a block on one or two cores.
_WRITERS = min(12, os.cpu_count() or 1)
# Constants for --dry-run, measured on publications of 200,000 and 6,000 cells. Memory: of the imports, per gene and
# sampled cell (embedding and PCA), and per value of the blocks that are written at the same time. Time: fixed, per
# sampled cell that is read again, per gene and cell whose counts are generated, and written cells/s.
_BASE_MEMORY, _BYTES_A_GENE, _BYTES_A_VALUE, _FIXED_SECONDS, _SAMPLE_SECONDS = 0.85e9, 80.0, 57.0, 3.0, 0.005
_PREDICTED_SECONDS, _CELLS_A_SECOND = 1.5e-6, 80_000.0
# Bytes per cell, pages of memory-mapped files included; between 0.5 and 5 million cells (benchmarks/many_cells.py).
_BYTES_A_CELL = 193.0


def run(task: Task) -> None:
    """Measure the gates, write `qa.json`, and publish unless a gate stops it; a killed run resumes."""
    config, artifacts, census = task.config, task.artifacts, task.census
    require_columns(census, [config.gates.label], "gates.label")
    experiment_uri = target.experiment_uri(config.publish, census)
    with target.target_lock(experiment_uri) if config.publish.in_obsm else nullcontext():
        progress = _Progress(task.run.path(PROGRESS), resumes=task.run.resumed)
        if config.publish.in_obsm:
            target.require_free(config.publish, census, experiment_uri, progress.publication)
        if config.publish.array_uri is not None:
            check_place(config.publish.array_uri, progress.publication, replace=config.publish.replace)
        task.run.start()
        job = _Publishing(task, experiment_uri, progress)
        job.prepare()
        job.publish()
        task.commit([artifacts.published], job.counts(), publication=progress.publication, array=job.array)
    if config.publish.in_obsm:
        log.info("published %s as obsm[%r] of %s", artifacts.latent, config.publish.name, experiment_uri)
    if config.publish.array_uri is not None:
        log.info("published %s as %s", artifacts.latent, without_credentials(config.publish.array_uri))
    publish_index(task.directory, artifacts)


class _Progress:
    """State from which a killed run resumes: id of the publication, and number of written cells by kind of draft."""

    def __init__(self, path: Path, *, resumes: bool) -> None:
        self._path = path
        values = json.loads(path.read_text(encoding="utf-8")) if resumes else {}
        self.publication: str = values.get("publication", uuid.uuid4().hex)
        self.cells: dict[str, int] = {name: values.get(name, 0) for name in (_OBSM, _ARRAY)}

    def save(self, draft: str, cells: int) -> None:
        """Record the number of written cells."""
        self.cells[draft] = cells
        write_json(self._path, {"publication": self.publication, **self.cells})


class _Publishing:
    """One run of the stage: prepare the publication, then publish it."""

    def __init__(self, task: Task, experiment_uri: str, progress: _Progress) -> None:
        self._config, self._workspace, self._stage, self._census = task.config, task.place, task.run, task.census
        self._experiment_uri, self._progress = experiment_uri, progress
        config, artifacts, stage = task.config, task.artifacts, task.run
        self._artifacts = artifacts
        self._latent = np.load(config.directory / artifacts.latent, mmap_mode="r")
        self._joinids = np.load(config.directory / artifacts.latent_joinids)
        self._folder = stage.path(artifacts.published)
        self.n_latent, self.array = int(self._latent.shape[1]), ""
        self._imported = imported_embedding(config)

    def prepare(self) -> None:
        """Measure the gates and write the folder that is published with the embedding."""
        if self._stage.resumed:
            log.info("continuing publication %s, whose gates are measured", self._progress.publication)
            return
        config, artifacts = self._config, self._artifacts
        if self._imported is not None:
            self._prepare_without_model(self._imported)
            return
        model, description = load_safe(config.directory / artifacts.model)
        gene_joinids = locate_genes(self._census, description.genes, 0.0)
        cells = select_cells(self._census, config.census.obs_query, config.anndata.batch_key)
        rows = draw_rows(len(cells), config.gates.sample_size, config.seed)
        log.info("reading %s of %s cells again", f"{len(rows):,}", f"{len(cells):,}")
        measurement = config.anndata.protein_measurement
        sample = read_sample(
            self._census, cells, rows, description.genes, gene_joinids, description.proteins, measurement
        )
        target.require_same_cells(self._experiment_uri, sample.joinids, sample.obs)
        found = measure_gates.measure(
            config.directory,
            artifacts,
            config.gates,
            config.model,
            cells,
            gene_joinids,
            model,
            description,
            sample,
            min_share=config.genes.min_share,
            seed=config.seed,
        )
        found += drift_gates(
            config.comparison_folder, self._stage.fingerprint["inputs"][artifacts.latent], config.gates
        )
        self._judge(found)
        record = self._record(
            found,
            cells,
            family_of(description.model).title,
            stages=STAGES["publish"].reads,
            model=built_facts(model, description.genes),
            predictions=self._predictions(model, description),
            weights=self._stage.fingerprint["inputs"][artifacts.weights],
        )
        write_published(
            self._folder,
            model,
            description,
            sample,
            np.asarray(self._latent[sample.rows]),
            record,
        )
        self._progress.save(_OBSM, 0)  # from here on the stage can resume

    def _predictions(self, model: scvi.model.SCVI, description: ModelDescription) -> dict[str, Any] | None:
        """Posterior predictive checks; None: not wanted."""
        n_cells, trained = self._config.publish.predictive_cells, self._workspace.whole_record("train")
        if not n_cells or trained is None:
            return None
        log.info("posterior predictive checks of up to %s cells for training and for validation", f"{n_cells:,}")
        prepared = self._config.directory / self._artifacts.prepared
        data = recorded_split(prepared, trained, proteins=bool(description.proteins))
        try:
            return check_predictions(model, description, data, n_cells, self._config.gates.label, self._config.seed)
        finally:
            data.cells.close()

    def _prepare_without_model(self, method: str) -> None:
        """`prepare` for an embedding that was imported."""
        config, artifacts = self._config, self._artifacts
        cells = select_cells(self._census, config.census.obs_query, config.anndata.batch_key)
        rows = draw_rows(len(cells), config.gates.sample_size, config.seed)
        joinids = cells.joinids[rows]
        obs = read_obs_of(self._census, joinids, None)
        target.require_same_cells(self._experiment_uri, joinids, obs)
        latent = self._stage.fingerprint["inputs"][artifacts.latent]
        found = without_model.measure(config.directory, artifacts, config.gates, cells)
        found += drift_gates(config.comparison_folder, latent, config.gates)
        log.info("gates of the model are %s", NO_MODEL)
        self._judge(found, NOT_APPLICABLE)
        record = self._record(found, cells, method, stages=["create-latent-update"], not_applicable=NOT_APPLICABLE)
        without_model.write_folder(self._folder, record)
        self._progress.save(_OBSM, 0)

    def _record(
        self,
        found: list[Gate],
        cells: Cells,
        method: str,
        *,
        stages: Iterable[str],
        not_applicable: Sequence[str] = (),
        model: dict[str, Any] | None = None,
        predictions: dict[str, Any] | None = None,
        weights: Identity | None = None,
    ) -> dict[str, Any]:
        """The provenance: gates, title of the method, records of the stages, facts of the model and its weights."""
        config, artifacts = self._config, self._artifacts
        return publication_record(
            config.publish,
            self._progress.publication,
            config=config.model_dump(mode="json"),
            folder=config.directory / artifacts.published,
            experiment_uri=self._experiment_uri,
            census=self._census.identity,
            joinids=self._joinids,
            latent=self._latent,
            n_batches=len(cells.batches),
            method=method,
            model=model,
            predictions=predictions,
            weights=weights,
            stages={stage: self._workspace.whole_record(stage) or {} for stage in stages},
            gates=measure_gates.record(found, config.gates.reasons, not_applicable),
            data=describe_data(self._census),
            evaluation=evaluation_of(config.evaluation_folder, self._stage.fingerprint["inputs"][artifacts.latent]),
        )

    def _judge(self, found: list[Gate], not_applicable: Sequence[str] = ()) -> None:
        """Log the gates and write `qa.json`; UserError if a gate stops publishing."""
        waived = self._config.gates.reasons
        log.info("gates:\n%s", measure_gates.table(found, waived))
        qa = measure_gates.record(found, waived, not_applicable)
        write_json(self._config.directory / self._artifacts.qa, qa)
        if failed := stopped_by(found, waived):
            words = "; ".join(f"{gate.name}: {gate.detail}" for gate in failed)
            raise UserError(
                f"{len(failed)} gate(s) stop publishing: {words}. Fix the cause, or give a reason for the gate in"
                f" gates.waived; all gates are in {self._config.directory / self._artifacts.qa}"
            )

    def publish(self) -> None:
        """Write the model, the embedding and the summary, then show the embedding to readers."""
        settings = self._config.publish
        record = json.loads((self._folder / PROVENANCE).read_text(encoding="utf-8"))
        info, shape = embedding_info(record), (target.n_rows(self._census), self.n_latent)
        try:
            own = None
            if settings.array_uri is not None:
                own = ArrayDraft(
                    settings.array_uri,
                    shape,
                    self._progress.publication,
                    settings.precision,
                    replace=settings.replace,
                )
                self.array = own.uri
                for problem in contribution_problems(info):
                    log.warning("CELLxGENE's contribution tool would refuse the array: %s", problem)
            draft = None
            if settings.in_obsm:
                draft = EmbeddingDraft(
                    self._experiment_uri, settings.name, shape, self._progress.publication, replace=settings.replace
                )
                self.array = draft.uri
            drafts = {name: each for name, each in ((_OBSM, draft), (_ARRAY, own)) if each and not each.done}
            if drafts and settings.model_uri:  # first, since it may fail
                copy_to(self._folder, settings.model_uri, replace=settings.replace)
            for name, each in drafts.items():
                self._write(name, each)
            if own is not None:
                own.publish(info, record["seal"])
            if draft is not None and not draft.done:
                append_summary(self._experiment_uri, summary_row(record), record)
                draft.publish(info)
                if draft.replaces:
                    log.info(
                        "the replaced array stays for its readers; delete it when nobody reads it: %s", draft.replaces
                    )
        except tiledbsoma.SOMAError as error:
            where = self._experiment_uri if settings.in_obsm else without_credentials(str(settings.array_uri))
            raise UserError(
                f"{where} cannot be written ({str(error).splitlines()[0]}); readers see the earlier state;"
                " run the same command again to continue"
            ) from error

    def _write(self, name: str, draft: EmbeddingDraft | ArrayDraft) -> None:
        total = len(self._joinids)
        done = 0 if draft.empty else self._progress.cells[name]

        def write(start: int) -> int:
            block = slice(start, min(start + _BLOCK_CELLS, total))
            draft.write(self._joinids[block], np.asarray(self._latent[block]))
            return block.stop

        with progress_bar(total, "publish", done=done) as bar:
            # In order, so that all cells before the recorded one are written; others are written again after a kill.
            for written in read_ahead(write, range(done, total, _BLOCK_CELLS), workers=_WRITERS):
                self._progress.save(name, written)
                bar.update(written - bar.n)

    def counts(self) -> dict[str, Any]:
        """Counts for the manifest."""
        return {"cells": len(self._joinids), "n_latent": self.n_latent}


def plan(config: Config) -> Plan:
    """Plan of the stage: size from the embedding, time from typical rates."""
    artifacts = config.artifacts
    inputs_of(STAGES["publish"], config)
    latent = np.load(config.directory / artifacts.latent, mmap_mode="r")
    with open_census(config.census) as census:
        experiment_uri = target.experiment_uri(config.publish, census)
    n_cells, n_latent = latent.shape
    model = None if imported_embedding(config) else config.directory / artifacts.model
    genes = 0 if model is None else len(load_safe(model)[1].genes)
    sampled = _BYTES_A_GENE * config.gates.sample_size * genes
    written = _BYTES_A_VALUE * n_latent * min(n_cells, _WRITERS * _BLOCK_CELLS)
    return Plan(
        "publish",
        reads=[
            *(str(config.directory / name) for name in (artifacts.latent, artifacts.latent_joinids)),
            *([] if model is None else [str(model)]),
        ],
        writes=[
            *(
                [f"obsm[{config.publish.name!r}] and scvi_summary in {experiment_uri}"]
                if config.publish.in_obsm
                else []
            ),
            *([f"{config.publish.array_uri}/"] if config.publish.array_uri else []),
            f"{config.directory / artifacts.published}/",
            *([f"{config.publish.model_uri}/"] if config.publish.model_uri else []),
            str(config.directory / artifacts.qa),
        ],
        cells=n_cells,
        genes=genes,
        memory=_BASE_MEMORY + _BYTES_A_CELL * n_cells + max(sampled, written),
        disk=n_cells * n_latent * 3.7,
        seconds=_FIXED_SECONDS
        + _SAMPLE_SECONDS * config.gates.sample_size
        + _PREDICTED_SECONDS * genes * 2 * config.publish.predictive_cells
        + n_cells / _CELLS_A_SECOND,
        notes=[f"{config.gates.sample_size:,} cells are read again"],
    )
