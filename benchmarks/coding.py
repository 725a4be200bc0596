"""Compression of the counts in the prepared file: size, and speed of writing and reading on one core.

    python benchmarks/coding.py PREPARED.h5ad

Writes some millions of the file's non-zeros in each coding and reads them back. The codings alternate; medians of three
runs are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np

from census_scvi.counts.vector import Vector, VectorWriter

NONZEROS, CHUNK = 8_000_000, 2**14
BY_HDF5 = {
    "gzip 1, shuffled, by HDF5": {"compression": "gzip", "compression_opts": 1, "shuffle": True},
    "lzf, shuffled, by HDF5": {"compression": "lzf", "shuffle": True},
}
OURS = {"gzip, ours": "gzip", "none": "none"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    with h5py.File(parser.parse_args().prepared) as file:
        vectors = {name: file[f"X/{name}"][:NONZEROS] for name in ("data", "indices")}
    n_nonzeros = len(vectors["data"])
    taken: dict[str, list[tuple[float, float, float, float]]] = {}
    with TemporaryDirectory() as folder:
        for _ in range(3):
            for name in (*BY_HDF5, *OURS):
                path = Path(folder) / "x.h5"
                written = _timed(lambda name=name, path=path: _write(name, path, vectors))
                through = _timed(lambda path=path: _read_through_hdf5(path))
                past = _timed(lambda path=path: _read_past_hdf5(path))
                with h5py.File(path) as file:
                    size = sum(file[key].id.get_storage_size() for key in vectors) / n_nonzeros
                taken.setdefault(name, []).append((size, written, through, past))
    print(
        "| coding | bytes a non-zero | written | read through HDF5 | read past it |", "|---|---|---|---|---|", sep="\n"
    )
    for name, runs in taken.items():
        size, *seconds = (statistics.median(column) for column in zip(*runs, strict=True))
        speeds = " | ".join(f"{n_nonzeros / second / 1e6:.0f}" for second in seconds)
        print(f"| {name} | {size:.2f} | {speeds} |")


def _timed(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _write(name: str, path: Path, vectors: dict[str, np.ndarray]) -> None:
    with h5py.File(path, "w") as file, ThreadPoolExecutor(1) as pool:
        for key, values in vectors.items():
            if name in BY_HDF5:
                file.create_dataset(key, data=values, chunks=(CHUNK,), **BY_HDF5[name])
                continue
            noisy = key == "indices"
            writer = VectorWriter(
                file, key, values.dtype, chunk=CHUNK, compression=OURS[name], pool=pool, random_low_byte=noisy
            )
            writer.append(values)
            writer.finish()


def _read_through_hdf5(path: Path) -> None:
    with h5py.File(path) as file:
        for key in ("data", "indices"):
            file[key][:]


def _read_past_hdf5(path: Path) -> None:
    with h5py.File(path) as file:
        for key in ("data", "indices"):
            vector = Vector(file[key])
            vector.read_into(0, len(file[key]), np.empty(len(file[key]), np.uint16))
            vector.close()


if __name__ == "__main__":
    main()
