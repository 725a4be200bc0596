"""The counts on disk: coded past the HDF5 library and the same to every reader; shuffled once; minibatches of them."""

import hashlib
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from census_scvi.census import stream
from census_scvi.counts import file_order, kept_cells, order, prepared_store
from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.counts.file_order import pools
from census_scvi.counts.inflate import limits, narrow
from census_scvi.counts.kept_cells import EveryCell, bytes_in_memory
from census_scvi.counts.loader import MinibatchLoader
from census_scvi.counts.minibatch import DenseMinibatches, Minibatch, SparseCounts, densify, sparse_minibatch
from census_scvi.counts.prepared_store import PreparedStore
from census_scvi.counts.reader import PreparedCells
from census_scvi.counts.row_hash import row_hashes
from census_scvi.counts.vector import Vector, VectorWriter
from census_scvi.counts.writer import H5adWriter
from census_scvi.errors import UserError

LARGEST = {"small": 9, "above uint8": 1_000, "above uint16": 100_000}


def cells_of(n_cells: int, n_genes: int = 50, *, largest: int = 9, seed: int = 0) -> tuple[pd.DataFrame, sp.csr_matrix]:
    generator = np.random.default_rng(seed)
    detected = generator.random((n_cells, n_genes)) < 0.2
    counts = sp.csr_matrix(
        np.where(detected, generator.integers(1, largest + 1, (n_cells, n_genes)), 0), dtype=np.float32
    )
    batch = pd.Categorical.from_codes(generator.integers(0, 3, n_cells), list("abc"))
    return pd.DataFrame({"batch": batch}, index=[str(i) for i in range(n_cells)]), counts


def write(path: Path, n_cells: int, **options: int) -> sp.csr_matrix:
    obs, counts = cells_of(n_cells, **options)
    with H5adWriter(path, pd.DataFrame(index=[f"g{i}" for i in range(counts.shape[1])])) as file:
        file.append(obs, counts=counts)
    return counts


# --- vectors


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    chunk=st.integers(1, 16),
    compression=st.sampled_from(["gzip", "none"]),
    noisy=st.booleans(),
    dtype=st.sampled_from([np.int32, np.float32]),
    data=st.data(),
)
def test_a_vector_is_what_h5py_reads_and_any_range_of_it_is_right(
    sizes: list[int], chunk: int, compression: str, noisy: bool, dtype: type, data: st.DataObject
) -> None:
    values = np.random.default_rng(sum(sizes)).integers(-(2**31), 2**31, sum(sizes)).astype(np.int32).view(dtype)
    with TemporaryDirectory() as folder, h5py.File(Path(folder) / "x.h5", "w") as file, ThreadPoolExecutor(2) as pool:
        written = VectorWriter(file, "x", dtype, chunk=chunk, compression=compression, pool=pool, random_low_byte=noisy)
        for part in np.split(values, np.cumsum(sizes)[:-1]):
            written.append(part)
        written.finish()
        file.flush()
        assert file["x"][:].tobytes() == values.tobytes()
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(values))] * 2)))
        out = np.empty(last - first, dtype)
        vector = Vector(file["x"])
        vector.read_into(first, last, out)
        vector.close()
        assert out.tobytes() == values[first:last].tobytes()


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    chunk=st.integers(1, 16),
    width=st.one_of(st.none(), st.integers(1, 20)),
    dtype=st.sampled_from([bool, np.int8, np.int16, np.float32, np.int64, np.float64]),
)
def test_rows_of_any_dtype_are_what_h5py_reads(sizes: list[int], chunk: int, width: int | None, dtype: type) -> None:
    """obs columns and latent dimensions are stored so."""
    shape = (sum(sizes),) if width is None else (sum(sizes), width)
    values = np.random.default_rng(sum(sizes)).integers(-100, 100, shape).astype(dtype)
    with TemporaryDirectory() as folder, h5py.File(Path(folder) / "x.h5", "w") as file, ThreadPoolExecutor(2) as pool:
        written = VectorWriter(file, "x", dtype, chunk=chunk, compression="gzip", pool=pool, width=width)
        for part in np.split(values, np.cumsum(sizes)[:-1]):
            written.append(part)
        written.finish()
        file.flush()
        assert file["x"].dtype == dtype
        assert np.array_equal(file["x"][:], values)


@pytest.mark.parametrize(
    "filters", [{"compression": "lzf"}, {"compression": "gzip"}, {"chunks": None}, {"dtype": ">i4"}]
)
def test_a_vector_that_another_program_wrote_is_read_too(filters: dict, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", data=np.arange(1000, dtype=np.int32), **{"chunks": (64,), **filters})
        file.flush()
        out = np.empty(500, np.int32)
        assert Vector(dataset).read_into(100, 600, out)
        assert out.tolist() == list(range(100, 600))


@given(
    n=st.integers(1, 600),
    at=st.integers(0, 599),
    odd=st.sampled_from([65_535, 65_536, 99_999, -1, 1.5, math.nan, math.inf, 1e30, 2.0**40]),
    dtypes=st.tuples(st.sampled_from(["f4", "f8", "i4", "i8"]), st.sampled_from(["u2", "i4", "f4"])),
)
def test_a_number_that_another_dtype_cannot_represent_is_noticed(
    n: int, at: int, odd: float, dtypes: tuple[str, str]
) -> None:
    """However many numbers there are: a compiler that joins several may take an undefined conversion for exact."""
    before, after = map(np.dtype, dtypes)
    values = np.arange(n, dtype=before)
    if math.isfinite(odd) and abs(odd) < 2.0**31 and before.kind == "i":
        odd = math.floor(odd)
    if before.kind == "f" or (abs(odd) < 2.0**31):
        values[at % n] = odd
    out = np.empty(n, after)
    exact = narrow(values, out, *limits(after))
    with np.errstate(all="ignore"):
        fits = np.array([after.kind == "f" or (value == value and limits(after)[0] <= value <= limits(after)[1])
                         for value in values.tolist()])  # fmt: skip
        same = fits & (np.where(fits, values, 0).astype(after) == values)
    assert exact == same.all()
    assert np.array_equal(out[same], values[same].astype(after))


def test_values_that_do_not_fit_are_said_not_to(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        vector = Vector(file.create_dataset("x", data=np.float32([1, 65_535, 65_536, 0.5, np.nan, -1])))
        file.flush()
        out = np.empty(1, np.uint16)
        assert [vector.read_into(i, i + 1, out) for i in range(6)] == [True, True, False, False, False, False]


@pytest.mark.parametrize("where", ["X/data", "X/indices"])
def test_a_damaged_chunk_is_named(where: str, tmp_path: Path) -> None:
    write(tmp_path / "x.h5ad", 200)
    with h5py.File(tmp_path / "x.h5ad") as file:
        chunk = file[where].id.get_chunk_info(0)
    with (tmp_path / "x.h5ad").open("r+b") as raw:
        raw.seek(chunk.byte_offset + chunk.size // 2)
        raw.write(b"\xff" * 20)
    cells = PreparedCells(tmp_path / "x.h5ad")
    with pytest.raises(UserError, match=rf"x.h5ad is damaged .* /{where} from element 0 on"):
        cells.read([(0, 100)])


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x.h5ad", 200)
    data = (tmp_path / "x.h5ad").read_bytes()
    (tmp_path / "x.h5ad").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"x.h5ad is not an .h5ad written by scvi-prepare.py .*truncated"):
        PreparedCells(tmp_path / "x.h5ad")


def test_a_file_shortened_while_it_is_read_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x.h5ad", 20_000)
    cells = PreparedCells(tmp_path / "x.h5ad")
    with (tmp_path / "x.h5ad").open("r+b") as raw:
        raw.truncate(50_000)
    with pytest.raises(UserError, match=r"x.h5ad is damaged or was changed after it was written"):
        cells.read([(0, 20_000)])


# --- the order of the file


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=60), runs=st.integers(1, 9), seed=st.integers(0, 5))
def test_each_cell_is_in_one_pool(sizes: list[int], runs: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_order, "POOL_RUNS", runs)
        met: list[int] = []
        for pool in pools(list(pairwise([0, *np.cumsum(sizes).tolist()])), seed):
            cells = np.concatenate([np.arange(*run) for run in pool.runs])
            met += cells[pool.order()].tolist()
        assert sorted(met) == list(range(sum(sizes)))


@given(joinids=st.sets(st.integers(0, 500), min_size=1), tile=st.integers(1, 90), cells=st.integers(0, 200))
def test_runs_end_where_tiles_end(joinids: set[int], tile: int, cells: int) -> None:
    ids = np.array(sorted(joinids))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "X_TILE", tile)
        runs = stream.tile_runs(ids, cells)
    assert [place for run in runs for place in range(*run)] == list(range(len(ids)))
    tiles = [set(ids[slice(*run)] // tile) for run in runs]
    assert sum(map(len, tiles)) == len(set(ids // tile))  # none is read twice
    assert all(stop - start <= cells or len(rows) == 1 for (start, stop), rows in zip(runs, tiles, strict=True))
    joined = [second[1] - first[0] for first, second in pairwise(runs)]
    assert all(n_cells > cells for n_cells in joined)  # as few as may be


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@settings(deadline=None, max_examples=25)
@given(kills=st.lists(st.integers(1, 12), max_size=4), parts=st.integers(1, 4), n_cells=st.integers(1, 700))
def test_a_killed_store_ends_as_an_undisturbed_one(kills: list[int], parts: int, n_cells: int) -> None:
    obs, counts = cells_of(n_cells)
    writer = partial(H5adWriter, var=pd.DataFrame(index=[f"g{i}" for i in range(50)]))

    def fill(folder: Path, kill_at: int | None = None) -> bytes:
        store = PreparedStore(
            folder / "x.h5ad",
            stream.consecutive(0, n_cells, 32),
            0,
            writer,
        )
        read = [0]

        def runs():
            for pool in store.missing():
                for start, stop in pool.runs:
                    read[0] += 1
                    if read[0] == kill_at:
                        raise Killed
                    yield counts[start:stop]

        for _ in store.fill(runs(), (obs.iloc[pool.cells()] for pool in store.missing())):
            pass
        store.join()
        return hashlib.sha256((folder / "x.h5ad").read_bytes()).digest()

    with TemporaryDirectory() as one, TemporaryDirectory() as other, pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_order, "POOL_RUNS", 2)
        patch.setattr(prepared_store, "PART_POOLS", parts)
        for kill in kills:
            try:
                fill(Path(one), kill)
            except Killed:
                continue
        assert fill(Path(one)) == fill(Path(other))


# --- minibatches


@pytest.mark.parametrize("largest", LARGEST.values(), ids=LARGEST)
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_sparse_and_dense_minibatches_are_the_counts(largest: int, workers: int, tmp_path: Path) -> None:
    counts = write(tmp_path / "x.h5ad", 3000, largest=largest)
    data = PreparedDataModule(tmp_path / "x.h5ad", batch_size=256, train_size=1.0, seed=0, workers=workers)
    loader = data.train_dataloader()
    rows = []
    for dense in loader:
        row = dense["row"].numpy()
        rows += row.tolist()
        assert np.array_equal(dense["X"].numpy(), counts[row].toarray())
    assert sorted(rows) == list(range(3000))
    read = data.cells.read([(0, 40), (90, 100)]).take(np.array([3, 45, 0]))
    sparse = sparse_minibatch([read, read], counts.shape[1], pin=False)
    made = densify(sparse)
    assert np.array_equal(made["X"].numpy(), counts[[3, 95, 0, 3, 95, 0]].toarray())
    assert sparse["X"].counts.dtype == (torch.float32 if largest > 65_535 else torch.uint16)
    assert torch.equal(made["batch"], DenseMinibatches(counts.shape[1]).make([read, read])["batch"])


@pytest.mark.parametrize("largest", LARGEST.values(), ids=LARGEST)
@pytest.mark.parametrize(("workers", "sparse"), [(0, True), (1, False), (3, True)])
def test_cells_in_memory_give_the_same_minibatches_and_are_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int, workers: int, sparse: bool
) -> None:
    write(tmp_path / "x.h5ad", 1200, largest=largest)
    monkeypatch.setattr(order, "WINDOW_ROWS", 512)
    monkeypatch.setattr(kept_cells, "_BLOCK", 250)
    reads = []
    real = PreparedCells.read
    monkeypatch.setattr(PreparedCells, "read", lambda *arguments: reads.append(1) or real(*arguments))

    def two_epochs(*, in_memory: bool) -> list[tuple[list[int], np.ndarray]]:
        data = PreparedDataModule(tmp_path / "x.h5ad", batch_size=100, train_size=0.8, seed=0, workers=workers)
        data.sparse, data.in_memory = sparse, in_memory
        loaders = [data.train_dataloader(), data.val_dataloader()] * 2
        met = [(each["row"].tolist(), as_array(each["X"])) for loader in loaders for each in loader]
        data.cells.close()
        return met

    wanted = two_epochs(in_memory=False)
    reads.clear()
    for (rows, counts), (wanted_rows, wanted_counts) in zip(two_epochs(in_memory=True), wanted, strict=True):
        assert rows == wanted_rows
        assert np.array_equal(counts, wanted_counts)
    assert len(reads) == 1


def test_memory_of_the_cells_is_as_said(tmp_path: Path) -> None:
    write(tmp_path / "x.h5ad", 3000, n_genes=200)
    cells = PreparedCells(tmp_path / "x.h5ad")
    rows = EveryCell(cells, 2)._rows
    taken = sum(value.nbytes for value in vars(rows).values() if value is not None)
    assert bytes_in_memory(cells) == pytest.approx(taken, rel=0.1)
    assert bytes_in_memory(cells, 6000) == 2 * bytes_in_memory(cells)


def test_a_pass_goes_on_where_another_was(tmp_path: Path) -> None:
    write(tmp_path / "cells.h5ad", 300)

    def minibatches(done: int = 0) -> tuple[MinibatchLoader, list[np.ndarray]]:
        data = PreparedDataModule(tmp_path / "cells.h5ad", batch_size=32, train_size=1.0, seed=0, workers=1)
        loader = data.train_dataloader()
        if done:
            loader.load_state_dict({"minibatches": done})
        return loader, [minibatch["row"].numpy().copy() for minibatch in loader]

    _, whole = minibatches()
    for done in range(len(whole)):
        loader, rest = minibatches(done)
        assert np.array_equal(np.concatenate(rest), np.concatenate(whole[done:]))
        assert loader.state_dict() == {"minibatches": len(whole)}
        assert np.concatenate([minibatch["row"] for minibatch in loader]).size == 300  # the next pass is whole
    paused = iter(loader)
    next(paused), next(paused)
    assert loader.state_dict() == {"minibatches": 2}


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("most", [10_000_000, 5_000, 0])
def test_validation_cells_that_take_little_memory_are_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, sparse: bool
) -> None:
    write(tmp_path / "x.h5ad", 300)
    data = PreparedDataModule(tmp_path / "x.h5ad", batch_size=16, train_size=0.5, seed=0, workers=1)
    data.sparse = sparse
    loader = data.val_dataloader()
    loader._most = most
    reads = []
    real = PreparedCells.read
    monkeypatch.setattr(PreparedCells, "read", lambda *arguments: reads.append(1) or real(*arguments))
    first = next(iter(loader))  # a pass that is left is no whole one
    passes = []
    for _ in range(3):
        before = len(reads)
        # As Lightning does: it takes as many minibatches as the loader says that it has, and does not ask for more.
        taken = [(each["row"].clone(), as_array(each["X"])) for each in itertools.islice(loader, len(loader))]
        passes.append((len(reads) - before, taken))
    assert np.array_equal(passes[0][1][0][0], first["row"])
    assert sum(len(rows) for rows, _ in passes[0][1]) == data.n_val > 100
    for decoded, taken in passes[1:]:
        assert (decoded == 0) == (sparse and most > 1_000_000)
        for (rows, counts), (same_rows, same_counts) in zip(taken, passes[0][1], strict=True):
            assert torch.equal(rows, same_rows)
            assert np.array_equal(counts, same_counts)


def as_array(counts: torch.Tensor | SparseCounts) -> np.ndarray:
    dense = counts if isinstance(counts, torch.Tensor) else counts.dense()
    return dense.numpy().copy()


@pytest.fixture(scope="module")
def some_cells(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, sp.csr_matrix]:
    path = tmp_path_factory.mktemp("cells") / "x.h5ad"
    return path, write(path, 300)


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["next", "give back", "give back a copy"]), st.integers(0, 99)), max_size=80
    ),
    batch_size=st.sampled_from([16, 64, 290]),
    workers=st.integers(0, 1),
)
def test_a_minibatch_is_its_consumer_s_until_it_is_given_back(
    some_cells: tuple[Path, sp.csr_matrix], steps: list[tuple[str, int]], batch_size: int, workers: int
) -> None:
    """Whatever is kept and given back, in any order: what is kept is what was read."""
    path, counts = some_cells
    data = PreparedDataModule(path, batch_size=batch_size, train_size=0.9, seed=0, workers=workers)
    minibatches = itertools.chain.from_iterable(
        loader for _ in range(80) for loader in (data.train_dataloader(), data.val_dataloader())
    )
    kept: list[tuple[Minibatch, torch.Tensor]] = []
    for step, place in [*steps, ("next", 0)]:
        if step == "next":
            minibatch = next(minibatches)
            kept.append((minibatch, minibatch["X"][1:].T))  # a view, too
        elif kept:
            minibatch, _ = kept.pop(place % len(kept))
            data.give_back(dict(minibatch))
            assert step == "give back" or data.give_back(minibatch) is None  # as Lightning's transfer copies the dict
        for minibatch, view in kept:
            expected = counts[minibatch["row"].numpy()].toarray()
            assert np.array_equal(minibatch["X"].numpy(), expected)
            assert np.array_equal(view.numpy(), expected[1:].T)
    data.cells.close()


def test_memory_that_is_given_back_is_used_again(some_cells: tuple[Path, sp.csr_matrix]) -> None:
    data = PreparedDataModule(some_cells[0], batch_size=100, train_size=0.9, seed=0, workers=1)
    places = []
    for _ in range(3):
        places.append(set())
        for loader in (data.train_dataloader(), data.val_dataloader()):
            for minibatch in loader:
                places[-1].add(minibatch["X"].data_ptr())
                data.give_back(minibatch)
                assert "X" not in minibatch
    assert len(places[0]) <= 3  # of 100 cells, and the last of training and validation
    assert places[1] == places[2] == places[0]
    data.sparse = True
    sparse = next(iter(data.train_dataloader()))
    data.give_back(sparse)
    assert isinstance(sparse["X"], SparseCounts)  # those of validation cells may be kept


def test_a_prepared_file_without_compression_is_larger_and_the_same(tmp_path: Path) -> None:
    obs, counts = cells_of(4000)
    for compression in ("gzip", "none"):
        with H5adWriter(
            tmp_path / compression, pd.DataFrame(index=[f"g{i}" for i in range(50)]), compression=compression
        ) as file:
            file.append(obs, counts=counts)
    sizes = [(tmp_path / name).stat().st_size for name in ("gzip", "none")]
    assert sizes[1] > 1.5 * sizes[0]
    one, other = (ad.read_h5ad(tmp_path / name) for name in ("gzip", "none"))
    assert (one.X != other.X).nnz == 0


# --- hashes of counts


@given(
    rows=st.lists(st.dictionaries(st.integers(0, 30), st.integers(1, 40), max_size=6), min_size=1, max_size=40),
)
def test_hashes_are_equal_where_the_counts_are(rows: list[dict[int, int]]) -> None:
    counts = sp.lil_matrix((len(rows), 31), dtype=np.float32)
    for number, row in enumerate(rows):
        for gene, count in row.items():
            counts[number, gene] = count
    hashes = row_hashes(counts.tocsr()).tolist()
    distinct = {tuple(sorted(row.items())) for row in rows}
    assert len(set(zip(hashes, [tuple(sorted(row.items())) for row in rows], strict=True))) == len(distinct)
    assert len(set(hashes)) == len(distinct)


def test_a_hash_is_the_same_on_every_machine() -> None:
    counts = sp.csr_matrix(np.array([[0, 1, 0, 300], [0, 0, 0, 0]], dtype=np.float32))
    assert row_hashes(counts).tolist() == [1919750831552362019, 11400714819323198485]
