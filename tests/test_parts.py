"""Parts of a stage's work: whoever does them, in whatever order, the result is that of one process."""

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import Run, forked
from test_counts import Killed, cells_of

from census_scvi.census import stream
from census_scvi.census.cells import select_cells
from census_scvi.census.genes import locate_genes, read_genes
from census_scvi.census.open import open_census
from census_scvi.census.stream import consecutive
from census_scvi.counts import file_order, prepared_store
from census_scvi.counts.prepared_store import PreparedStore
from census_scvi.counts.writer import H5adWriter
from census_scvi.errors import UserError
from census_scvi.files.parts import WHOLE, Part, begun, parts
from census_scvi.model.encode import Latent
from census_scvi.model.latent_store import LatentStore, join_latent
from census_scvi.settings import load_config
from census_scvi.stages import create_latent_update, prepared_cells
from census_scvi.workspace import StageRun, Workspace

N_CELLS, RUN, N_LATENT = 700, 32, 3


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Killer:
    """Ends the work at its n-th step."""

    def __init__(self, nth: int | None) -> None:
        self.left = nth

    def step(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed


def prepared(folder: Path, n_cells: int, n_parts: int) -> PreparedStore:
    writer = partial(H5adWriter, var=pd.DataFrame(index=[f"g{i}" for i in range(50)]))
    return PreparedStore(folder / "x.h5ad", consecutive(0, n_cells, RUN), 0, writer, n_parts)


def prepare(folder: Path, n_cells: int, part: Part, kill_at: int | None = None) -> None:
    """A part of the prepared cells; runs in a process of its own, too."""
    file_order.POOL_RUNS, prepared_store.PART_POOLS = 2, 2
    obs, counts = cells_of(n_cells)
    store, killer = prepared(folder, n_cells, part.of), Killer(kill_at)
    missing = store.missing(part)

    def runs() -> Iterator[sp.csr_matrix]:
        for pool in missing:
            for start, stop in pool.runs:
                killer.step()
                yield counts[start:stop]

    list(store.fill(runs(), (obs.iloc[pool.cells()] for pool in missing), part))


def latent_runs(n_cells: int, part: Part) -> list[tuple[int, int]]:
    return list(part.take(consecutive(0, n_cells, RUN)))


def embed(folder: Path, n_cells: int, part: Part, kill_at: int | None = None) -> None:
    """A part of the latent."""
    killer, runs = Killer(kill_at), latent_runs(n_cells, part)
    store = LatentStore(folder, sum(stop - start for start, stop in runs), N_LATENT, part)
    values = np.random.default_rng(0).random((n_cells, 2 * N_LATENT + 1), np.float32)
    for start, stop in runs:
        if start - runs[0][0] < store.cells_done:
            continue
        killer.step()
        rows = values[start:stop]
        latent = Latent(rows[:, :N_LATENT], rows[:, N_LATENT:-1], rows[:, -1])
        store.append(latent, np.arange(start, stop, dtype=np.uint64))


def join(folder: Path, n_cells: int, n_parts: int) -> None:
    sizes = [sum(stop - start for start, stop in latent_runs(n_cells, part)) for part in parts(n_parts)]
    prepared(folder, n_cells, n_parts).join()
    join_latent(folder, sizes, N_LATENT)


def results(folder: Path) -> dict[str, str]:
    names = ("x.h5ad", "latent.npy", "variance.npy", "library_size.npy", "latent-hash.npy", "progress.json")
    return {name: digest(folder / name) for name in names}


@given(n_items=st.integers(0, 50), n_parts=st.integers(1, 20))
def test_each_item_is_of_one_part(n_items: int, n_parts: int) -> None:
    shares = [part.take(range(n_items)) for part in parts(n_parts)]
    assert [item for share in shares for item in share] == list(range(n_items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len({part.name("latent.npy") for part in parts(n_parts)}) == n_parts
    assert WHOLE.name("latent.npy") == "latent.npy"
    for number in (0, n_parts + 1):
        with pytest.raises(ValueError, match=f"part {number} of {n_parts} does not exist; expected 1 to {n_parts}"):
            Part(number, n_parts)


@settings(max_examples=30)
@given(data=st.data(), n_parts=st.integers(1, 6), n_cells=st.integers(1, N_CELLS))
def test_parts_in_any_order_killed_and_resumed_are_the_work_of_one(
    data: st.DataObject, n_parts: int, n_cells: int
) -> None:
    kills = st.lists(st.one_of(st.none(), st.integers(0, 8)), max_size=3)
    order = data.draw(st.permutations(parts(n_parts)))
    with TemporaryDirectory() as one, TemporaryDirectory() as other, pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_order, "POOL_RUNS", 2)
        patch.setattr(prepared_store, "PART_POOLS", 2)
        for work in (prepare, embed):
            work(Path(one), n_cells, WHOLE)
            for part in order:
                for kill in data.draw(kills):
                    try:
                        work(Path(other), n_cells, part, kill)
                    except Killed:
                        continue
            for part in order[::-1]:
                work(Path(other), n_cells, part)
        for folder, number in ((one, 1), (other, n_parts), (other, n_parts)):
            join(Path(folder), n_cells, number)
        assert results(Path(one)) == results(Path(other))
        assert not list(Path(other).glob("*-of-*"))


def test_processes_of_their_own_do_parts_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_order, "POOL_RUNS", 2)
    monkeypatch.setattr(prepared_store, "PART_POOLS", 2)
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    for work in (prepare, embed):
        work(alone, N_CELLS, WHOLE)
    with multiprocessing.get_context("forkserver").Pool(2) as pool:  # whose server has imported the libraries
        tasks = [(work, part) for part in parts(3) for work in (prepare, embed)]
        for done in [pool.apply_async(work, (together, N_CELLS, part)) for work, part in tasks[::-1]]:
            done.get()
    join(alone, N_CELLS, 1)
    join(together, N_CELLS, 3)
    assert results(alone) == results(together)


def test_parts_that_are_not_done_are_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_order, "POOL_RUNS", 2)
    monkeypatch.setattr(prepared_store, "PART_POOLS", 2)
    for part in (Part(1, 3), Part(3, 3)):
        prepare(tmp_path, N_CELLS, part)
        embed(tmp_path, N_CELLS, part)
    with pytest.raises(UserError, match=r"2 of 6 portions of x.h5ad are missing .*; finish their parts before"):
        prepared(tmp_path, N_CELLS, 3).join()
    with pytest.raises(Killed):
        embed(tmp_path, N_CELLS, Part(2, 3), 2)
    with pytest.raises(UserError, match=r"part 2 of 3 in .* has 64 of 2[0-9]+ cells; finish it before the parts are"):
        join_latent(tmp_path, [224, 224, 252], N_LATENT)


def test_what_a_part_has_begun_is_something_to_resume(tmp_path: Path) -> None:
    assert not begun(tmp_path / "progress.json")
    (tmp_path / "progress-00002-of-00003.json").touch()
    assert begun(tmp_path / "progress.json")
    assert not begun(tmp_path / "progress.jsonl")


def embed_part(config_file: Path, number: int, of: int) -> None:
    """What a process that does a part of create-latent-update runs."""
    job_of(config_file, lambda job: job.embed(Part(number, of)))


def job_of(config_file: Path, work: Callable[[Any], Any]) -> Any:
    stream.X_TILE = 256  # so that so few cells have several parts
    config = load_config(config_file)
    artifacts = config.artifacts
    stage = StageRun(stage="create-latent-update", fingerprint={}, workspace=Workspace(config.directory))
    stage.staging.mkdir(parents=True, exist_ok=True)
    with open_census(config.census) as census:
        cells = select_cells(census, config.census.obs_query, config.anndata.batch_key)
        genes = locate_genes(census, read_genes(config.directory / artifacts.genes), 1.0)
        return work(create_latent_update._Embedding(config, stage, census, cells, genes, artifacts))


def test_parts_of_the_embedding_are_what_the_stage_writes(
    finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "X_TILE", 256)
    run = Run.given(tmp_path, yaml.safe_load(finished_run.config.read_text()), finished_run.directory)
    for number in (2, 1):
        assert forked(embed_part, run.config, number, 2).returncode == 0
    staging = run.path(".partial/create-latent-update")
    records = {path.name: json.loads(path.read_text()) for path in staging.glob("progress-*.json")}
    assert records == {"progress-00001-of-00002.json": {"cells": 512}, "progress-00002-of-00002.json": {"cells": 988}}
    written = job_of(run.config, lambda job: job.finish(2))
    assert {"latent.npy", "latent-idx.npy", "latent-hash.npy", "final_scvi_optimized"} == set(written)
    for name in ("latent.npy", "latent-idx.npy", "latent-hash.npy", "final_scvi_optimized/adata.h5ad"):
        assert digest(staging / name) == digest(finished_run.path(name)), name


def test_parts_of_the_prepared_cells_are_what_one_process_writes(
    finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "X_TILE", 128)
    monkeypatch.setattr(file_order, "POOL_RUNS", 2)
    monkeypatch.setattr(prepared_store, "PART_POOLS", 1)
    config = load_config(finished_run.config)
    genes = read_genes(finished_run.path("hv_genes.pkl"))
    with open_census(config.census) as census:
        cells = select_cells(census, config.training_filter, config.anndata.batch_key)
        for name, n_parts in (("one", 1), ("several", 3)):
            (tmp_path / name).mkdir()
            for part in parts(n_parts)[::-1]:
                prepared_cells.write_cells(census, cells, genes, config, tmp_path / name / "x.h5ad", part)
            assert len(list((tmp_path / name).glob("part-*.h5ad"))) > 4
            prepared_cells.join_cells(census, cells, genes, config, tmp_path / name / "x.h5ad", n_parts)
    assert digest(tmp_path / "one" / "x.h5ad") == digest(tmp_path / "several" / "x.h5ad")
