"""prepare in parts: genes and cells are those of one process, whoever reads which part, and whoever is killed."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiledbsoma
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import Run, forked

from census_scvi.census import stream
from census_scvi.census.genes import read_genes
from census_scvi.census.hvg import select
from census_scvi.census.hvg.tally import GeneTally
from census_scvi.cli import main
from census_scvi.counts import file_order, prepared_store
from census_scvi.files.parts import Part
from census_scvi.settings import Config
from census_scvi.stages import workers

DO_PART, DO_JOIN = workers.do_part, workers.do_join


def small_tiles(kept: int = 0) -> None:
    """The demo's 1,500 cells are one row of tiles: rows of 50 cells make parts, pools and portions of them."""
    stream.X_TILE = select.X_TILE = 50
    file_order.POOL_RUNS, prepared_store.PART_POOLS = 2, 2
    if kept:  # so few of the largest counts that some must be read again
        select.n_kept = lambda n_batches, n_genes: kept


def kill(step: str) -> None:
    """End the process, like kill -9, when it has counted some cells for the genes, or written some."""

    def ended(original, *values, **named):  # type: ignore[no-untyped-def]  # whatever the original takes
        result = original(*values, **named)
        os.kill(os.getpid(), signal.SIGKILL)
        return result

    holder, name = {
        "tally": (GeneTally, "add"),
        "select": (select.Fit, "select"),
        "write": (prepared_store.H5adWriter, "append"),
        "join": (prepared_store, "_read"),
    }[step]
    setattr(holder, name, partial_method(ended, getattr(holder, name)))


def partial_method(function, original):  # type: ignore[no-untyped-def]  # a method or a function
    return lambda *values, **named: function(original, *values, **named)


def in_process(config: Path, arguments: tuple[str, ...], killed: str | None, kept: int) -> None:
    small_tiles(kept)
    if killed:
        kill(killed)
    raise SystemExit(main("prepare", ["--config", str(config), *arguments]))


def prepared(run: Run, part: str | None = None, *, killed: str | None = None, kept: int = 0) -> int:
    """The command, or a part of it, in a process of its own; returns its exit code."""
    arguments = ("--part", part) if part else ()
    return forked(in_process, run.config, arguments, killed, kept).returncode


def digest(run: Run) -> str:
    files = [run.path(name).read_bytes() for name in ("anndata_model.h5ad", "hv_genes.pkl")]
    return hashlib.sha256(b"".join(files)).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed"), demo_census, hvg={"hvg_batch": ["donor_id"]})
    assert prepared(run) == 0
    return run


@pytest.fixture
def run(demo_census: str, tmp_path: Path, undisturbed: Run) -> Iterator[Run]:
    """A run in which nothing is prepared; afterwards it has what an undisturbed one has."""
    run = Run(tmp_path, demo_census, hvg={"hvg_batch": ["donor_id"]})
    yield run
    assert digest(run) == digest(undisturbed)
    counts, expected = run.record("prepare")["counts"], undisturbed.record("prepare")["counts"]
    assert counts == expected
    assert not list(run.path(".partial").iterdir())


def test_seven_parts_from_the_last_to_the_first_of_which_two_are_killed(run: Run) -> None:
    for number in range(7, 0, -1):
        killed = "tally" if number in (2, 5) else None
        assert prepared(run, f"{number}/7", killed=killed) == (-signal.SIGKILL if killed else 0)
    assert not run.path(".partial/prepare/hv_genes.pkl").exists()
    assert prepared(run, "5/7") == 0
    assert prepared(run, "2/7", killed="select") == -signal.SIGKILL
    assert prepared(run, "2/7") == 0  # all are read: it selects the genes, and writes its cells
    assert run.path(".partial/prepare/hv_genes.pkl").exists()
    for number in (4, 3, 6):
        killed = "write" if number == 3 else None
        assert prepared(run, f"{number}/7", killed=killed) == (-signal.SIGKILL if killed else 0)
    assert not run.path("hv_genes.pkl").exists()
    assert prepared(run, killed="join") == -signal.SIGKILL
    assert prepared(run) == 0  # what is missing, and the join
    assert run.record("prepare")["parts"] == 7
    assert prepared(run, "3/7") == 0  # is done


def test_counts_that_are_read_again(run: Run) -> None:
    """One large count is kept for each gene and batch, so that the clipped sums of many are not known."""
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            assert list(pool.map(lambda n: prepared(run, f"{n}/3", kept=1), (1, 2, 3))) == [0, 0, 0]
    assert run.path(".partial/prepare/selection/fit.npz").exists()
    assert prepared(run, kept=1) == 0


def test_the_engine_of_the_census_library_selects_in_one_process(demo_census: str, tmp_path: Path) -> None:
    run = Run(tmp_path, demo_census, hvg={"engine": "census"})
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda number: prepared(run, f"{number}/2"), (1, 2))) == [0, 0]
    assert not list(run.path(".partial/prepare/selection").glob("tally*"))
    assert all(run.path(f".partial/prepare/part-0000{number}-of-00002.done").exists() for number in (1, 2))
    assert prepared(run) == 0
    assert len(read_genes(run.path("hv_genes.pkl"))) == 200


def test_parts_of_all_genes_need_no_selection(demo_census: str, tmp_path: Path) -> None:
    run = Run(tmp_path, demo_census, hvg={"top_n_hvg": 1_000_000})
    assert prepared(run, "1/2") == 0
    assert not list(run.path(".partial/prepare/selection").glob("tally*"))
    assert run.path(".partial/prepare/part-00001-of-00002.done").exists()
    assert prepared(run) == 0


def part_of_small_tiles(run_stage: workers.RunStage, name: str, config: Config, part: Part) -> int:
    """A part; the second is killed once while it counts, the third once while it writes."""
    small_tiles()
    flag = config.directory.parent / f"killed-{part.number}"
    counted = bool(list(config.directory.glob(f".partial/prepare/selection/{part.name('tally.npz')}")))
    if not flag.exists() and (part.number == 2 or (part.number == 3 and counted)):
        flag.touch()
        kill("tally" if part.number == 2 else "write")
    return DO_PART(run_stage, name, config, part)


def join_of_small_tiles(run_stage: workers.RunStage, name: str, config: Config) -> int:
    small_tiles()
    return DO_JOIN(run_stage, name, config)


@pytest.fixture
def workers_of_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 50 cells here and in the processes of workers."""
    for holder in (stream, select):
        monkeypatch.setattr(holder, "X_TILE", 50)
    monkeypatch.setattr(file_order, "POOL_RUNS", 2)
    monkeypatch.setattr(prepared_store, "PART_POOLS", 2)
    monkeypatch.setattr(workers, "do_part", part_of_small_tiles)
    monkeypatch.setattr(workers, "do_join", join_of_small_tiles)


@pytest.mark.usefixtures("workers_of_small_tiles")
def test_three_workers_of_which_two_are_killed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prepare", "cluster.workers=3", "cluster.parts_per_worker=2") == 0
    said = capsys.readouterr().err
    assert "part 2 of 6 is done again: killed by signal 9" in said
    assert "part 3 of 6 is done again: killed by signal 9" in said
    assert run.record("prepare")["parts"] == 6


@pytest.mark.slow
@pytest.mark.usefixtures("workers_of_small_tiles")
def test_workers_publish_what_one_process_publishes(demo_census: str, tmp_path: Path) -> None:
    published = []
    for name, more in (("one", ()), ("workers", ("cluster.workers=2", "cluster.parts_per_worker=2"))):
        uri = shutil.copytree(demo_census, tmp_path / f"census of {name}")
        run = Run(tmp_path / name, str(uri), gates={"sample_size": 100}, latent={"block_size": 100})
        for stage in ("prepare", "train", "create-latent-update", "publish"):
            assert run(stage, *more) == 0, stage
        with tiledbsoma.Experiment.open(f"{uri}/census_data/homo_sapiens") as experiment:
            published.append(experiment.ms["RNA"].obsm["scvi"].read().tables().concat().to_pandas())
        assert run.record("create-latent-update")["parts"] == (4 if more else 1)
    assert len(published[0]) == 1500 * 4
    pd.testing.assert_frame_equal(*published)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    n_cells=st.integers(1, 60),
    n_parts=st.integers(1, 5),
    kept=st.integers(1, 9),
    data=st.data(),
)
def test_merged_tallies_are_that_of_all_cells(
    seed: int, n_cells: int, n_parts: int, kept: int, data: st.DataObject
) -> None:
    generator = np.random.default_rng(seed)
    counts = generator.negative_binomial(0.3, 0.01, size=(n_cells, 5)).astype(np.float32)
    of_cell = generator.integers(0, 3, n_cells).astype(np.int32)
    part_of = generator.integers(0, n_parts, n_cells)

    def tally(cells: np.ndarray, batches: np.ndarray) -> GeneTally:
        found = GeneTally(len(batches), 5, kept=kept)
        cell, gene = np.nonzero(counts[cells])
        local = np.searchsorted(batches, of_cell[cells]).astype(np.int32)
        found.add(local[cell], gene.astype(np.int64), counts[cells][cell, gene])
        return found

    whole, merged = tally(np.arange(n_cells), np.arange(3)), GeneTally(3, 5, kept=kept)
    for number in data.draw(st.permutations(range(n_parts))):
        cells = np.flatnonzero(part_of == number)
        batches = np.unique(of_cell[cells])
        merged.merge(tally(cells, batches), batches)
    for name in ("sums", "squares", "cells"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))
    np.testing.assert_array_equal(np.sort(merged.largest), np.sort(whole.largest))
    clip = generator.uniform(0, 60, (3, 5))
    for ours, theirs in zip(merged.clipped(clip), whole.clipped(clip), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    merged.add(np.zeros(1, np.int32), np.zeros(1, np.int64), np.full(1, 1e6, np.float32))  # goes on as a tally
    assert 1e6 in merged.largest[0, 0]


def test_a_damaged_tally(demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, demo_census)
    assert run("prepare", "--part", "1/2") == 0
    (file,) = run.path(".partial/prepare/selection").glob("tally*")
    file.write_bytes(file.read_bytes()[:-100])
    capsys.readouterr()
    assert run("prepare") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert f"{file} is damaged" in line
    assert "--force without --part" in line
    assert run("prepare", "--force") == 0
