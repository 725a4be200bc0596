"""Stage create-latent-update: embeds all cells of `obs_query` with the trained encoder."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scvi
import torch

from census_scvi.census.cells import Cells, select_cells, soma_filter
from census_scvi.census.genes import locate_genes, read_genes
from census_scvi.census.open import Census, open_census
from census_scvi.census.proteins import read_protein_names, stream_proteins
from census_scvi.census.selected_once import selected_once
from census_scvi.census.stream import Block, consecutive, stream_blocks, stream_obs, tile_runs
from census_scvi.config.random_streams import Stream, draw, generator
from census_scvi.config.run_names import PROGRESS, SELECTION
from census_scvi.config.stages import STAGES
from census_scvi.counts.row_hash import count_hashes
from census_scvi.errors import UserError
from census_scvi.files.atomic import write_json
from census_scvi.files.json_file import read_json
from census_scvi.files.parts import WHOLE, Part, parts
from census_scvi.model.encode import Encoder, Latent, extend_batches, labels_with, reference_latent
from census_scvi.model.families import family_of
from census_scvi.model.latent_store import LatentStore, join_latent
from census_scvi.model.minified import MinifiedBlock, save_minified
from census_scvi.model.safe import ModelDescription, load_safe, read_description
from census_scvi.settings import Config
from census_scvi.stages.inputs import inputs_of
from census_scvi.stages.plan import Plan
from census_scvi.stages.protocol import Task
from census_scvi.terminal.progress import progress_bar
from census_scvi.training.threads import half_of_the_threads
from census_scvi.workspace import Artifacts, StageRun
from census_scvi.workspace.staged_parts import number_of_parts

log = logging.getLogger(__name__)

_CHECKED = "checked.json"
_PROVEN_CELLS = 256
_TOLERANCE = 1e-5
# Constants for --dry-run, checked by benchmarks/stages.py. Memory: of the imports, and per non-zero of a block.
# Time: fixed, and per cell of the minified model.
_BASE_MEMORY, _BYTES_A_NONZERO, _FIXED_SECONDS, _MINIFIED_SECONDS = 1.05e9, 125.0, 1.5, 7e-6
_SAMPLE_BLOCKS = 4
# Bytes per cell while the cells are selected; between 0.5 and 5 million cells (benchmarks/many_cells.py).
_BYTES_A_CELL = 54.0


def run(task: Task) -> None:
    """Embed all cells of `obs_query`; write latent, soma_joinids, count hashes and optionally the minified model."""
    n_parts = number_of_parts(task.run)
    job = _job(task, n_parts)
    joined = n_parts > 1 and task.run.path(PROGRESS).exists()  # a killed run had joined the parts
    for part in [] if joined else parts(n_parts):
        job.embed(part)
    written = job.finish(n_parts)
    census, artifacts = task.census, task.artifacts
    details = {"census": census.identity, "trained_batches": job.trained_batches}
    task.commit(written, job.counts(), **details, parts=n_parts)
    log.info("wrote %s: %s cells x %d", task.directory / artifacts.latent, f"{job.n_cells:,}", job.n_latent)


def run_part(task: Task, part: Part) -> bool:
    """Embed the cells of a part, to files of its own in staging; a killed part resumes. True: the part is done."""
    _job(task, part.of).embed(part)
    return True


def _job(task: Task, n_parts: int) -> _Embedding:
    """Check model, genes and cells, and begin."""
    config, artifacts, census = task.config, task.artifacts, task.census
    description = _fitting_description(config, artifacts)
    gene_joinids = locate_genes(census, description.genes, config.genes.min_share, "genes.min_share")
    soma_filter(census, config.census.obs_query, "census.obs_query")
    protein_columns = _protein_columns(census, config, description)
    task.run.start()

    def select() -> Cells:
        return select_cells(census, config.census.obs_query, config.anndata.batch_key)

    cells = select() if n_parts == 1 else selected_once(task.run.path(SELECTION), select)
    log.info("%s cells in %d batches", f"{len(cells):,}", len(cells.batches))
    return _Embedding(config, task.run, census, cells, gene_joinids, artifacts, protein_columns)


def _fitting_description(config: Config, artifacts: Artifacts) -> ModelDescription:
    """Description of the model; UserError if the genes or the config differ from those of the training."""
    description = read_description(config.directory / artifacts.model)
    path = config.directory / artifacts.genes
    genes = read_genes(path)
    if description.organism != config.census.organism:
        raise UserError(
            f"the model in {config.directory / artifacts.model} was trained on {description.organism},"
            f" but census.organism is {config.census.organism}; use the config of the training"
        )
    if description.batch_key != config.anndata.batch_key:
        raise UserError(
            f"the model was trained with anndata.batch_key {description.batch_key}, the config has"
            f" {config.anndata.batch_key}; use the config of the training"
        )
    if genes != description.genes:
        shared = len(set(genes) & set(description.genes))
        raise UserError(
            f"{path} lists {len(genes):,} genes such as {genes[0]!r}, the model has {len(description.genes):,} such as"
            f" {description.genes[0]!r}; {shared:,} are shared, but all must be equal and in the same order"
        )
    return description


def _protein_columns(census: Census, config: Config, description: ModelDescription) -> npt.NDArray[np.int64] | None:
    """Position of each protein of the model in the measurement of the Census, -1 if it is not there; None: no proteins.

    UserError if the Census has none of them.
    """
    if not description.proteins:
        return None
    measurement = str(config.anndata.protein_measurement)
    columns = pd.Index(read_protein_names(census, measurement)).get_indexer(description.proteins)
    missing = [name for name, column in zip(description.proteins, columns, strict=True) if column < 0]
    if len(missing) == len(columns):
        raise UserError(f"ms[{measurement!r}] of the Census has none of the model's proteins, such as {missing[0]!r}")
    if missing:
        log.warning("proteins that the Census does not have count as not measured: %s", ", ".join(missing))
    return columns.astype(np.int64)


class _Embedding:
    """One run of the stage: encode the remaining cells, then write the artifacts."""

    def __init__(
        self,
        config: Config,
        stage: StageRun,
        census: Census,
        cells: Cells,
        gene_joinids: npt.NDArray[np.int64],
        artifacts: Artifacts,
        protein_columns: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._config, self._stage, self._census, self._cells = config, stage, census, cells
        self._gene_joinids, self._protein_columns, self._artifacts = gene_joinids, protein_columns, artifacts
        self._trained, self._description = load_safe(config.directory / artifacts.model)
        self._labels = labels_with(self._description.batches, cells.batches)
        self._codes = _codes_in(self._labels, cells)
        self.n_latent, self.n_cells = int(self._trained.module.n_latent), len(cells)
        self.trained_batches = self._description.batches

    def embed(self, part: Part = WHOLE) -> None:
        """Encode the remaining cells of a part; different processes may encode different parts."""
        every = _blocks(self._cells, self._config.latent.block_size, part)
        if not every:  # fewer rows of tiles than parts
            return
        store = LatentStore(self._stage.staging, _size(every), self.n_latent, part)
        done, total = store.cells_done, store.n_cells
        if done:
            log.info("%s of %s cells were embedded before", f"{done:,}", f"{total:,}")
        if done == total:
            return
        # The extended model takes as much memory again. Most encoders do not use the batch, so they do not need it.
        sees_batch = self._description.arguments["encode_covariates"]
        model = _on_device(self._extended() if sees_batch else self._trained, self._config, part)
        encode = Encoder(model, n_cells=self.n_cells)
        remaining = [block for block in every if block[0] - every[0][0] >= done]
        blocks = stream_blocks(self._census, self._cells.joinids, self._gene_joinids, blocks=remaining)
        with progress_bar(total, "embed", done=done) as bar, half_of_the_threads():
            for block, proteins in zip(blocks, self._proteins(remaining), strict=True):
                rows = slice(block.start, block.start + block.counts.shape[0])
                latent = encode(block.counts, self._codes[rows], proteins)
                if block.start == remaining[0][0]:
                    checked = {"difference": self._prove(block, proteins, latent)}
                    write_json(self._stage.path(part.name(_CHECKED)), checked)
                store.append(latent, count_hashes(block.counts, proteins))
                bar.update(len(latent.mean))

    def _proteins(self, blocks: list[tuple[int, int]]) -> Iterator[npt.NDArray[np.float32] | None]:
        """Counts of the model's proteins of the cells of each block; None for a model without proteins."""
        columns = self._protein_columns
        if columns is None:
            yield from itertools.repeat(None, len(blocks))
            return
        measurement, groups = str(self._config.anndata.protein_measurement), (np.arange(*block) for block in blocks)
        for counts in stream_proteins(self._census, measurement, self._cells.joinids, groups):
            yield np.where(columns >= 0, counts[:, columns], np.float32(0))

    def _prove(self, block: Block, proteins: npt.NDArray[np.float32] | None, latent: Latent) -> float:
        """Largest difference from scvi-tools' latent on cells of a block; RuntimeError if it exceeds rounding."""
        codes = self._codes[block.start : block.start + block.counts.shape[0]]
        rows = np.arange(len(codes))
        if self._description.arguments["encode_covariates"]:
            # scvi-tools initializes untrained batches with random weights, so they cannot be compared.
            rows = rows[codes < len(self._description.batches)]
        rows = rows[:_PROVEN_CELLS]
        if not len(rows):
            log.warning("no cell of the first block is from a trained batch: no comparison with scvi-tools")
            return 0.0
        labels = np.asarray(self._labels, dtype=object)[codes[rows]]
        accelerator = "gpu" if self._trained.module.device.type == "cuda" else "cpu"
        genes, counts = self._description.genes, block.counts[rows]
        mean, variance = reference_latent(
            self._trained, genes, counts, labels, None if proteins is None else proteins[rows], accelerator=accelerator
        )
        difference = float(max(np.abs(mean - latent.mean[rows]).max(), np.abs(variance - latent.variance[rows]).max()))
        if not difference <= _TOLERANCE:
            raise RuntimeError(f"the latent differs from scvi-tools' own by {difference}, more than {_TOLERANCE}")
        log.info("equal to scvi-tools' load_query_data on %d cells (largest difference %.1e)", len(rows), difference)
        return difference

    def finish(self, n_parts: int = 1) -> list[str]:
        """Join the parts and write the artifacts to staging; return their names."""
        names = self._artifacts
        sizes = [_size(_blocks(self._cells, self._config.latent.block_size, part)) for part in parts(n_parts)]
        store = join_latent(self._stage.staging, sizes, self.n_latent)
        np.save(self._stage.path(names.latent_joinids), self._cells.joinids)
        written = [names.latent, names.latent_joinids, names.latent_hashes]
        if (chosen := self._minified_cells()) is not None:
            folder = self._stage.path(names.minified)
            uns = {"trained_batches": np.array(self._description.batches, dtype=object)}
            save_minified(self._extended(), self._description, self._minified_blocks(chosen, store), folder, uns)
            written.append(names.minified)
        return written

    def _extended(self) -> scvi.model.SCVI:
        """The model, extended to all batches of the cells, on the CPU."""
        self._trained.to_device("cpu")
        return extend_batches(self._trained, self._description.genes, self._labels)

    def _minified_cells(self) -> npt.NDArray[np.int64] | None:
        settings, total = self._config.latent, len(self._cells)
        if settings.minified == "none":
            return None
        if family_of(self._description.model).latent_keys is None:
            log.info("%s is not written: scvi-tools has no minified form of this model", self._artifacts.minified)
            return None
        size = total if settings.minified == "all" else settings.sample_size
        return draw(total, size, generator(self._config.seed, Stream.MINIFIED_CELLS))

    def _minified_blocks(self, chosen: npt.NDArray[np.int64], store: LatentStore) -> Iterator[MinifiedBlock]:
        size = self._config.latent.block_size
        groups = (chosen[start : start + size] for start in range(0, len(chosen), size))
        for rows, obs in stream_obs(self._census, self._cells.joinids, groups):
            obs.index = pd.Index(rows.astype(str))
            yield obs, self._codes[rows], store.read(rows)

    def counts(self) -> dict[str, Any]:
        """Counts for the manifest."""
        trained = self._codes < len(self._description.batches)
        return {
            "cells": len(self._cells),
            "genes": len(self._gene_joinids),
            "genes_missing": int((self._gene_joinids < 0).sum()),
            "n_latent": self.n_latent,
            "cells_of_untrained_batches": int((~trained).sum()),
            "untrained_batches": self._labels[len(self._description.batches) :],
            "largest_difference_to_scvi_tools": self._largest_difference(),
        }

    def _largest_difference(self) -> float | None:
        """Of the comparisons with scvi-tools in all parts and runs; None if a run before this version made them."""
        stem, _, ending = _CHECKED.partition(".")
        found = [read_json(path)["difference"] for path in self._stage.staging.glob(f"{stem}*.{ending}")]
        return max(found, default=None)


def _blocks(cells: Cells, block_size: int, part: Part = WHOLE) -> list[tuple[int, int]]:
    """Positions (first, last + 1) of blocks of up to `block_size` cells, in whole rows of tiles if the size allows.

    Together, the parts have the same blocks as the whole. No two parts have cells in the same row of tiles.
    """
    runs = part.take(tile_runs(cells.joinids, block_size))
    return [block for run in runs for block in consecutive(*run, block_size)]


def _size(blocks: list[tuple[int, int]]) -> int:
    return sum(last - first for first, last in blocks)


def _codes_in(labels: list[str], cells: Cells) -> npt.NDArray[np.int32]:
    """Code of each cell's batch: its index in `labels`."""
    position = {label: code for code, label in enumerate(labels)}
    return np.array([position[label] for label in cells.batches], dtype=np.int32)[cells.batch_codes]


def _on_device(model: scvi.model.SCVI, config: Config, part: Part = WHOLE) -> scvi.model.SCVI:
    """The model on a GPU if there is one; parts take the GPUs in turn."""
    if config.train.accelerator != "cpu" and torch.cuda.is_available():
        model.to_device(f"cuda:{(part.number - 1) % torch.cuda.device_count()}")
    return model


def plan(config: Config) -> Plan:
    """Plan of the stage: number of cells from the Census, time from some blocks that are read and encoded."""
    artifacts = config.artifacts
    inputs_of(STAGES["create-latent-update"], config)
    description = _fitting_description(config, artifacts)
    with open_census(config.census) as census:
        gene_joinids = locate_genes(census, description.genes, config.genes.min_share, "genes.min_share")
        cells = select_cells(census, config.census.obs_query, config.anndata.batch_key)
        model, _ = load_safe(config.directory / artifacts.model)
        encode = Encoder(_on_device(model, config), n_cells=len(cells))
        # The first block includes opening and compilation. After it, reading and encoding overlap as in a real run.
        size = min(config.latent.block_size, -(-len(cells) // _SAMPLE_BLOCKS))
        sample = _blocks(cells, size)[-_SAMPLE_BLOCKS:]
        started, n_sampled = time.monotonic(), 0
        with half_of_the_threads():
            for block in stream_blocks(census, cells.joinids, gene_joinids, blocks=sample):
                n_cells = block.counts.shape[0]
                proteins = np.zeros((n_cells, len(description.proteins)), np.float32) if description.proteins else None
                encode(block.counts, np.zeros(n_cells, np.int32), proteins)
                if block.start == sample[0][0]:
                    started = time.monotonic()
                else:
                    n_sampled += block.counts.shape[0]
        seconds = (time.monotonic() - started) / max(n_sampled, 1) * len(cells)
    minified = {"all": len(cells), "sample": min(config.latent.sample_size, len(cells)), "none": 0}
    n_latent = int(model.module.n_latent)
    nonzeros = block.counts.nnz / block.counts.shape[0]
    workers = config.cluster.workers
    return Plan(
        "create-latent-update",
        reads=[
            f"{census.identity['uri']} ({config.census.organism}), cells {config.census.obs_query or 'all'}",
            str(config.directory / artifacts.genes),
            f"{config.directory / artifacts.model}/",
        ],
        writes=[
            str(config.directory / artifacts.latent),
            str(config.directory / artifacts.latent_joinids),
            str(config.directory / artifacts.latent_hashes),
            *([f"{config.directory / artifacts.minified}/"] if config.latent.minified != "none" else []),
        ],
        cells=len(cells),
        genes=len(description.genes),
        # Processes share the selected cells.
        memory=_BYTES_A_CELL * len(cells)
        + workers
        * (_BASE_MEMORY + 4.0 * len(cells) + config.latent.block_size * (nonzeros * _BYTES_A_NONZERO + 8 * n_latent)),
        disk=len(cells) * (8.0 * n_latent + 20) + minified[config.latent.minified] * (8.0 * n_latent + 120),
        seconds=_FIXED_SECONDS + seconds / workers + _MINIFIED_SECONDS * minified[config.latent.minified],
        notes=[f"{workers} processes, if the machine has cores for all (cluster.workers)"] if workers > 1 else [],
    )
