"""Nearest cells with the index of scvi-index.py, compared with usearch (HNSW) and pynndescent.

    python benchmarks/nearest_cells.py --folder FOLDER [--cells 200000 1000000] [--dimensions 50] [--queries 1000]

Simulates an embedding: 300 cell types, within each ten directions that vary more than the others. Each library builds
its index in a process of its own and writes it to disk; then it searches the ten nearest cells of queries that are not
among the cells, three times, and the median counts. The recall is that of the exact search. Prints a table;
FOLDER/nearest_cells.json has every number. `--threads` limits all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LIBRARIES = ("index", "usearch", "pynndescent")
NEIGHBORS = 10
# What trades recall for speed: nprobe, expansion, epsilon.
EFFORTS: dict[str, tuple[float, ...]] = {"index": (3, 10, 30, 100), "usearch": (64, 256), "pynndescent": (0.1, 0.3)}
Search = Callable[[np.ndarray, float], np.ndarray]


def main() -> None:
    """Simulate, measure each library, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cells", type=int, nargs="+", default=[200_000, 1_000_000])
    parser.add_argument("--dimensions", type=int, default=50)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if arguments.one:
        print(json.dumps(measured(arguments.one, folder, arguments.threads)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for n_cells in arguments.cells:
        simulate(folder, n_cells, arguments.dimensions, arguments.queries)
        for library in arguments.libraries:
            threads = {name: str(arguments.threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
            command = [sys.executable, "-W", "ignore", __file__, "--folder", str(folder), "--one", library]
            command += ["--threads", str(arguments.threads)]
            done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{library} failed: {done.stderr}")
            rows.append({"cells": n_cells, "library": library, **json.loads(done.stdout.splitlines()[-1])})
            (folder / "nearest_cells.json").write_text(json.dumps(rows, indent=1))
    print(table(rows))


def simulate(folder: Path, n_cells: int, n_dimensions: int, n_queries: int) -> None:
    """Write the embedding, queries and their exact neighbors."""
    from sklearn.neighbors import NearestNeighbors

    numbers = np.random.default_rng(0)
    centres = 2 * numbers.normal(size=(300, n_dimensions))
    directions = numbers.normal(size=(300, 10, n_dimensions)) / np.sqrt(10)

    def cells(n: int) -> np.ndarray:
        types = numbers.integers(0, 300, n)
        found = np.empty((n, n_dimensions), np.float32)
        for kind in range(300):
            rows = np.flatnonzero(types == kind)
            spread = numbers.normal(size=(len(rows), 10)) @ directions[kind]
            found[rows] = centres[kind] + spread + 0.2 * numbers.normal(size=(len(rows), n_dimensions))
        return found

    vectors, queries = cells(n_cells), cells(n_queries)
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "queries.npy", queries)
    np.save(folder / "exact.npy", NearestNeighbors(algorithm="brute").fit(vectors).kneighbors(queries, NEIGHBORS)[1])


def measured(library: str, folder: Path, threads: int) -> dict[str, Any]:
    """Build, open and search one index."""
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    queries, exact = np.load(folder / "queries.npy"), np.load(folder / "exact.npy")
    place = folder / f"built-{library}"
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    prepare, build = {"index": ours, "usearch": with_usearch, "pynndescent": with_pynndescent}[library](threads)
    prepare()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = peak_memory()
    started, cpu = time.perf_counter(), time.process_time()
    search = build(vectors, place)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    memory = peak_memory() - before
    files = [file for file in place.rglob("*") if file.is_file()] if place.is_dir() else [place]
    efforts = {}
    for effort in EFFORTS[library]:
        search(queries, effort)  # what is compiled or read once
        times = []
        for _ in range(3):
            started = time.perf_counter()
            found = search(queries, effort)
            times.append(time.perf_counter() - started)
        right = [len(set(one) & set(other)) for one, other in zip(found.tolist(), exact.tolist(), strict=True)]
        efforts[effort] = {
            "queries_per_second": len(queries) / statistics.median(times),
            "recall": sum(right) / (NEIGHBORS * len(queries)),
        }
    disk = sum(file.stat().st_size for file in files)
    return {"seconds": seconds, "cpu_seconds": cpu, "memory": memory, "disk": disk, "efforts": efforts}


def peak_memory() -> int:
    """Peak memory of this process in bytes, pages of memory-mapped files included."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def ours(_threads: int) -> tuple[Callable[[], None], Callable[[np.ndarray, Path], Search]]:
    from census_scvi.neighbors.cell_index import CellIndex
    from census_scvi.neighbors.ivf_flat import IvfFlatBuilder

    def prepare() -> None:
        few = np.random.default_rng(0).normal(size=(200, 10)).astype(np.float32)
        build(few, Path(tempfile.mkdtemp()) / "few")  # imports

    def build(vectors: np.ndarray, place: Path) -> Search:
        n_cells, n_partitions = len(vectors), int(len(vectors) ** 0.5)
        for _ in IvfFlatBuilder(vectors, np.arange(n_cells), place, "euclidean", n_partitions, 0).build():
            pass
        index = CellIndex(str(place), "euclidean", *vectors.shape, n_partitions, 100)
        return lambda queries, nprobe: index.query(queries, NEIGHBORS, int(nprobe))[1]

    return prepare, build


def with_usearch(threads: int) -> tuple[Callable[[], None], Callable[[np.ndarray, Path], Search]]:
    from usearch.index import Index

    def build(vectors: np.ndarray, place: Path) -> Search:
        index = Index(ndim=vectors.shape[1], metric="l2sq", dtype="f32")
        index.add(np.arange(len(vectors)), np.ascontiguousarray(vectors), threads=threads)
        index.save(str(place))

        def search(queries: np.ndarray, expansion: float) -> np.ndarray:
            index.expansion_search = int(expansion)
            return np.asarray(index.search(queries, NEIGHBORS, threads=threads).keys)

        return search

    return lambda: None, build


def with_pynndescent(_threads: int) -> tuple[Callable[[], None], Callable[[np.ndarray, Path], Search]]:
    import pickle

    from pynndescent import NNDescent

    def prepare() -> None:
        few = np.random.default_rng(0).normal(size=(20_000, 50)).astype(np.float32)
        NNDescent(few, n_neighbors=30, random_state=0).query(few, NEIGHBORS)  # compiles

    def build(vectors: np.ndarray, place: Path) -> Search:
        index = NNDescent(np.ascontiguousarray(vectors), n_neighbors=30, random_state=0)
        index.prepare()
        with place.open("wb") as file:
            pickle.dump(index, file)
        return lambda queries, epsilon: index.query(queries, NEIGHBORS, epsilon=epsilon)[0]

    return prepare, build


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table."""
    lines = [
        "| cells | index | build, CPU-s | wall s | memory GB | disk MB | queries/s (recall at 10) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speeds = ", ".join(
            f"{value['queries_per_second']:,.0f} ({value['recall']:.3f})" for value in row["efforts"].values()
        )
        lines.append(
            f"| {row['cells']:,} | {row['library']} | {row['cpu_seconds']:.0f} | {row['seconds']:.0f} |"
            f" {row['memory'] / 1e9:.2f} | {row['disk'] / 1e6:,.0f} | {speeds} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
