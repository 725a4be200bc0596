"""Stage publish: the gates, then the embedding in the Experiment, the model and how both were made."""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import sys
import uuid
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiledbsoma
from tqdm import tqdm

from census_scvi.census.cells import Cells, require_columns, select_cells
from census_scvi.census.embedding import (
    EmbeddingDraft,
    EmbeddingHash,
    check_target,
    publication_of,
    published_uri,
    stale_cells,
)
from census_scvi.census.genes import locate_genes
from census_scvi.census.open import Census, open_census
from census_scvi.census.summary import append_summary
from census_scvi.config import Config
from census_scvi.errors import UserError
from census_scvi.model.facts import built_facts
from census_scvi.model.published import PROVENANCE, copy_to, write_published
from census_scvi.model.safe import DESCRIPTION, WEIGHTS, load_safe
from census_scvi.quality.gates import Gate, stopped_by
from census_scvi.stages import qa
from census_scvi.stages.plan import Plan
from census_scvi.stages.sample import Sample, draw_rows, read_sample
from census_scvi.workspace import Artifacts, StageRun, Workspace, provenance
from census_scvi.workspace.atomic import write_json
from census_scvi.workspace.identity import Identity
from census_scvi.workspace.lock import directory_lock
from census_scvi.workspace.uri import local_path, without_credentials

log = logging.getLogger(__name__)

STAGE = "publish"
KEYS = ("census", "anndata.batch_key", "genes", "model", "gates", "publish", "seed")
PROGRESS = "progress.json"
_MEASUREMENT = "RNA"
_BLOCK_CELLS = 2**16
_EARLIER = ("prepare", "train", "create-latent-update")
# For --dry-run: the imports; the sample, read and embedded.
_BASE_MEMORY, _SAMPLE_BYTES, _CELLS_A_SECOND = 1.0e9, 20_000.0, 100_000.0


def run(config: Config, *, force: bool = False) -> None:
    """Measure the gates, write `qa.json`, and where none stops it publish; a killed run goes on."""
    artifacts = Artifacts.of(config)
    with Workspace(config.directory).locked(STAGE) as workspace, open_census(config.census) as census:
        inputs = _inputs(workspace, artifacts) | {"census": census.identity}
        stage = workspace.begin(STAGE, config, KEYS, inputs, force=force, progress=PROGRESS)
        require_columns(census, [config.gates.label], "gates.label")
        experiment_uri = _experiment_uri(config, census)
        if stage.done:
            _require_published(config, workspace, experiment_uri)
            log.info("%s is done for these settings in %s; --force does it again", STAGE, config.directory)
            return
        with _target_lock(experiment_uri):
            progress = _Progress(stage.path(PROGRESS))
            _check_target(config, census, experiment_uri, progress.publication)
            job = _Publishing(config, workspace, stage, census, experiment_uri, progress)
            job.prepare(artifacts)
            job.publish()
            stage.commit([artifacts.published], job.counts(), publication=progress.publication)
        log.info("published %s as obsm[%r] of %s", artifacts.latent, config.publish.name, experiment_uri)


def _require_published(config: Config, workspace: Workspace, experiment_uri: str) -> None:
    """UserError where what a finished run published is there no longer."""
    uri = published_uri(experiment_uri, config.publish.name)
    expected = (workspace.record(STAGE) or {}).get("publication")
    if uri is None or publication_of(uri) != expected:
        raise UserError(
            f"this run published {expected} as obsm[{config.publish.name!r}] of {experiment_uri}, which holds"
            f" {'nothing of that name' if uri is None else 'another publication'} now; --force publishes it again"
        )


def _inputs(workspace: Workspace, artifacts: Artifacts) -> dict[str, Any]:
    latent = [artifacts.latent, artifacts.latent_joinids, artifacts.latent_hashes]
    return (
        workspace.require("prepare", [artifacts.genes, artifacts.prepared])
        | workspace.require("train", [f"{artifacts.model}/{WEIGHTS}", f"{artifacts.model}/{DESCRIPTION}"])
        | workspace.require("create-latent-update", latent)
    )


def _experiment_uri(config: Config, census: Census) -> str:
    if config.publish.experiment_uri:
        return config.publish.experiment_uri
    uri = census.identity["uri"]
    if local_path(uri) is None:
        raise UserError(
            f"publish.experiment_uri is not set, and the Census {uri} is not on a local disk;"
            " set it to an Experiment that you may write to"
        )
    return str(census.experiment.uri)


def _target_lock(experiment_uri: str) -> AbstractContextManager[None]:
    """One publisher at a time where the target is on a disk."""
    path = local_path(experiment_uri)
    if path is None or not path.is_dir():
        return nullcontext()
    return directory_lock(path / ".scvi-publish.lock", "scvi-publish.py")


def _check_target(config: Config, census: Census, experiment_uri: str, publication: str) -> None:
    """The Experiment holds the cells that the embedding is of, and the name is free or may be replaced."""
    published_uri(experiment_uri, config.publish.name)  # says so where it is no Experiment
    with tiledbsoma.Experiment.open(experiment_uri) as experiment:
        n_cells = int(experiment.obs.count)
    if n_cells != census.identity["cells"]:
        raise UserError(
            f"{experiment_uri} has {n_cells:,} cells, the Census of this run {census.identity['cells']:,}:"
            " soma_joinids hold within one Census only; set publish.experiment_uri to an Experiment of that Census"
        )
    latent = np.load(config.directory / Artifacts.of(config).latent, mmap_mode="r")
    shape = (_n_rows(census), int(latent.shape[1]))
    check_target(experiment_uri, config.publish.name, shape, publication, replace=config.publish.replace)


def _require_same_cells(experiment_uri: str, sample: Sample) -> None:
    """UserError where the Experiment means other cells by the same soma_joinids."""
    with tiledbsoma.Experiment.open(experiment_uri) as experiment:
        names = [name for name in _IDENTIFYING if name in experiment.obs.schema.names and name in sample.obs]
        obs = experiment.obs.read(coords=(sample.joinids.tolist(),), column_names=["soma_joinid", *names]).concat()
    theirs = obs.to_pandas().set_index("soma_joinid").reindex(sample.joinids)[names].astype(str).to_numpy()
    differing = (theirs != sample.obs[names].astype(str).to_numpy()).any(axis=1)
    if differing.any():
        raise UserError(
            f"{experiment_uri} is of another build of the Census: {int(differing.sum()):,} of {len(differing):,} cells"
            f" with the same soma_joinid are others there ({', '.join(names)}), the first"
            f" {sample.joinids[differing][0]}; set publish.experiment_uri to the Experiment that was embedded"
        )


_IDENTIFYING = ("dataset_id", "observation_joinid", "donor_id", "assay")


class _Progress:
    """What a killed run leaves for the next: the publication, and how many cells of it are written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.publication: str = values.get("publication", uuid.uuid4().hex)
        self.cells: int = values.get("cells", 0)

    def save(self, cells: int) -> None:
        """Note that so many cells are written."""
        self.cells = cells
        write_json(self._path, {"publication": self.publication, "cells": cells})


class _Publishing:
    """The work of one run: what is published, then putting it in place."""

    def __init__(
        self,
        config: Config,
        workspace: Workspace,
        stage: StageRun,
        census: Census,
        experiment_uri: str,
        progress: _Progress,
    ) -> None:
        self._config, self._workspace, self._stage, self._census = config, workspace, stage, census
        self._experiment_uri, self._progress = experiment_uri, progress
        artifacts = Artifacts.of(config)
        self._latent = np.load(config.directory / artifacts.latent, mmap_mode="r")
        self._joinids = np.load(config.directory / artifacts.latent_joinids)
        self._folder = stage.path(artifacts.published)

    def prepare(self, artifacts: Artifacts) -> None:
        """Measure the gates and make the folder that is published beside the embedding."""
        if self._stage.resumed:
            log.info("going on with publication %s, whose gates are measured", self._progress.publication)
            return
        config = self._config
        model, description = load_safe(config.directory / artifacts.model)
        gene_joinids = locate_genes(self._census, description.genes, 0.0)
        cells = select_cells(self._census, config.census.obs_query, config.anndata.batch_key)
        rows = draw_rows(len(cells), config.gates.sample_size, config.seed)
        log.info("reading %s of %s cells anew", f"{len(rows):,}", f"{len(cells):,}")
        sample = read_sample(self._census, cells, rows, description.genes, gene_joinids)
        _require_same_cells(self._experiment_uri, sample)
        found = qa.measure(config, cells, gene_joinids, model, description, sample)
        self._judge(found, artifacts)
        record = self._provenance(found, cells, built_facts(model, description.genes))
        write_published(
            self._folder,
            model,
            description,
            sample.counts,
            sample.obs,
            np.asarray(self._latent[sample.rows]),
            record,
        )
        self._progress.save(0)  # from here on there is something to go on with

    def _judge(self, found: list[Gate], artifacts: Artifacts) -> None:
        """Show the gates and write them down; UserError where one stops publishing."""
        waived = self._config.gates.reasons
        log.info("gates:\n%s", qa.table(found, waived))
        write_json(self._config.directory / artifacts.qa, qa.record(found, waived))
        if failed := stopped_by(found, waived):
            words = "; ".join(f"{gate.name}: {gate.detail}" for gate in failed)
            raise UserError(
                f"{len(failed)} gate(s) stop publishing: {words}. Mend the cause, or name the gate with a reason in"
                f" gates.waived; all gates are in {self._config.directory / artifacts.qa}"
            )

    def _provenance(self, found: list[Gate], cells: Cells, facts: dict[str, Any]) -> dict[str, Any]:
        config = self._config
        digest = EmbeddingHash()
        for start in range(0, len(self._joinids), _BLOCK_CELLS):
            some = slice(start, start + _BLOCK_CELLS)
            digest.update(self._joinids[some], self._latent[some])
        records = {stage: self._workspace.record(stage) or {} for stage in _EARLIER}
        model = self._stage.fingerprint["inputs"][f"{Artifacts.of(config).model}/{WEIGHTS}"]
        record = {
            "publication": self._progress.publication,
            "published_on": datetime.now(UTC).isoformat(timespec="seconds"),
            "published_by": _user(),
            "title": config.publish.title,
            "description": config.publish.description,
            "license": config.publish.license,
            "doi": config.publish.doi,
            "contact": config.publish.contact.model_dump(),
            "embedding": {
                "name": config.publish.name,
                "experiment_uri": self._experiment_uri,
                "n_cells": len(self._joinids),
                "n_features": int(self._latent.shape[1]),
                "sha256": digest.hexdigest(),
            },
            "census": self._census.identity,
            "cells_sha256": _sha256(self._joinids),
            "batches": len(cells.batches),
            "genes_sha256": hashlib.sha256("\n".join(facts["genes"]).encode()).hexdigest(),
            "model": {**facts, "sha256": _whole(model), "uri": _model_uri(config)},
            "config": config.model_dump(mode="json"),
            "stages": {
                stage: {name: value for name, value in record.items() if name not in ("config", "fingerprint")}
                for stage, record in records.items()
            },
            "gates": qa.record(found, config.gates.reasons),
            "code": provenance.code_state(),
            "packages": provenance.package_versions(),
            "hardware": provenance.hardware(),
            "seed": config.seed,
        }
        return dict(without_credentials(record))

    def publish(self) -> None:
        """Write the cells, the model and the summary, and let readers see them."""
        record = json.loads((self._folder / PROVENANCE).read_text(encoding="utf-8"))
        name, shape = self._config.publish.name, (_n_rows(self._census), int(self._latent.shape[1]))
        try:
            draft = EmbeddingDraft(
                self._experiment_uri, name, shape, self._progress.publication, replace=self._config.publish.replace
            )
            if not draft.done:
                self._refuse_stale(name)
                if self._config.publish.model_uri:  # first, since it may be refused
                    copy_to(self._folder, self._config.publish.model_uri, replace=self._config.publish.replace)
                self._write(draft)
                append_summary(self._experiment_uri, _summary_row(record), record)
                draft.publish(_info(record))
        except tiledbsoma.SOMAError as error:
            raise UserError(
                f"{self._experiment_uri} cannot be written ({str(error).splitlines()[0]}); readers see what was there"
                " before; run the same command again to go on"
            ) from error

    def _refuse_stale(self, name: str) -> None:
        live = published_uri(self._experiment_uri, name)
        if live is not None and len(stale := stale_cells(live, self._joinids)):
            raise UserError(
                f"obsm[{name!r}] holds {len(stale):,} cells that the new embedding has not (the first with soma_joinid"
                f" {stale[0]}); embed them too, or set publish.name to another name"
            )

    def _write(self, draft: EmbeddingDraft) -> None:
        total, hidden = len(self._joinids), not sys.stderr.isatty()
        done = self._progress.cells
        with tqdm(total=total, initial=done, desc="publish", unit=" cells", unit_scale=True, disable=hidden) as bar:
            for start in range(done, total, _BLOCK_CELLS):
                stop = min(start + _BLOCK_CELLS, total)
                draft.write(self._joinids[start:stop], np.asarray(self._latent[start:stop]))
                self._progress.save(stop)
                bar.update(stop - start)

    def counts(self) -> dict[str, Any]:
        """What the manifest records."""
        return {"cells": len(self._joinids), "n_latent": int(self._latent.shape[1])}


def _model_uri(config: Config) -> str:
    return config.publish.model_uri or str((config.directory / Artifacts.of(config).published).absolute())


def _n_rows(census: Census) -> int:
    """Rows of an embedding of a Census: one for each soma_joinid there can be."""
    return int(census.experiment.ms[_MEASUREMENT].X["raw"].shape[0])


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a process whose user has no name, as in some containers
        return "unknown"


def _sha256(joinids: npt.NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(joinids, "<i8").tobytes()).hexdigest()


def _whole(identity: Identity) -> str:
    """One digest for a file: its only block's, or one of the digests of its blocks."""
    blocks = identity["sha256"]
    return str(blocks[0]) if len(blocks) == 1 else hashlib.sha256("".join(blocks).encode()).hexdigest()


def _info(record: dict[str, Any]) -> dict[str, Any]:
    """The metadata that the Census API expects of an embedding."""
    census, embedding = record["census"], record["embedding"]
    return {
        "id": record["publication"],
        "embedding_name": embedding["name"],
        "title": record["title"],
        "description": record["description"],
        "primary_contact": record["contact"],
        "additional_contacts": [],
        "DOI": record["doi"],
        "additional_information": f"license: {record['license']}" if record["license"] else "",
        "model_link": record["model"]["uri"],
        "data_type": "obs_embedding",
        "census_version": census["version"] or census["created_on"] or "",
        "experiment_name": census["organism"],
        "measurement_name": _MEASUREMENT,
        "n_embeddings": embedding["n_cells"],
        "n_features": embedding["n_features"],
        "submission_date": record["published_on"][:10],
    }


def _summary_row(record: dict[str, Any]) -> dict[str, Any]:
    census, embedding = record["census"], record["embedding"]
    return {
        "publication": record["publication"],
        "embedding_name": embedding["name"],
        "embedding_sha256": embedding["sha256"],
        "n_cells": embedding["n_cells"],
        "n_features": embedding["n_features"],
        "published_on": record["published_on"],
        "published_by": record["published_by"],
        "model_sha256": record["model"]["sha256"],
        "model_uri": record["model"]["uri"],
        "census_uri": census["uri"],
        "census_version": census["version"],
        "census_schema": census["schema"],
        "census_created_on": census["created_on"],
        "census_cells": census["cells"],
    }


def plan(config: Config) -> Plan:
    """Size from the embedding; the time of reading the sample is not known beforehand."""
    artifacts = Artifacts.of(config)
    _inputs(Workspace(config.directory), artifacts)
    latent = np.load(config.directory / artifacts.latent, mmap_mode="r")
    with open_census(config.census) as census:
        experiment_uri = _experiment_uri(config, census)
    n_cells, n_latent = latent.shape
    genes = len(load_safe(config.directory / artifacts.model)[1].genes)
    return Plan(
        STAGE,
        reads=[str(config.directory / name) for name in (artifacts.latent, artifacts.latent_joinids, artifacts.model)],
        writes=[
            f"obsm[{config.publish.name!r}] and scvi_summary in {experiment_uri}",
            f"{config.directory / artifacts.published}/",
            str(config.directory / artifacts.qa),
        ],
        cells=n_cells,
        genes=genes,
        memory=_BASE_MEMORY + 24.0 * n_cells + config.gates.sample_size * (_SAMPLE_BYTES + 4.0 * genes),
        disk=n_cells * n_latent * 4.5,
        seconds=10.0 + n_cells / _CELLS_A_SECOND,
        notes=[f"{config.gates.sample_size:,} cells are read anew"],
    )
