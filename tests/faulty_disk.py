"""A disk that fails at a counted operation: the process that uses it is gone there, or finds it full from there on.

TileDB writes with C++, which no patch of Python sees: `faulty_disk.c` is preloaded into a process that publishes into a
small Experiment, again and again in forks of itself, and says what became of it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

CELLS, DIMENSIONS = 40, 3
KILLED = 137


def built(folder: Path) -> Path:
    """The library to preload; skips where there is no compiler."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None or sys.platform != "linux":
        pytest.skip("faults at counted operations are planted with a C library on Linux: install gcc")
    library = folder / "faulty_disk.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def run_driver(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run this file with the library; what it prints, an event a line."""
    library = built(folder)
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, __file__, str(folder), str(library), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# --- in the process with the library


def small_experiment(uri: str) -> None:
    """An Experiment of a few cells and genes."""
    import numpy as np
    import pyarrow as pa
    import tiledbsoma as soma

    with soma.Experiment.create(uri) as experiment:
        obs = pa.table({"soma_joinid": np.arange(CELLS), "cell_type": ["x"] * CELLS})
        table = experiment.add_new_dataframe("obs", schema=obs.schema, domain=[(0, CELLS - 1)])
        table.write(obs)
        table.close()
        measurements = experiment.add_new_collection("ms")
        measurement = measurements.add_new_collection("RNA", soma.Measurement)
        layers = measurement.add_new_collection("X")
        counts = layers.add_new_sparse_ndarray("raw", type=pa.float32(), shape=(CELLS, 5))
        diagonal = np.arange(CELLS)
        data = pa.table({"soma_dim_0": diagonal, "soma_dim_1": diagonal % 5, "soma_data": np.ones(CELLS, np.float32)})
        counts.write(data)
        for opened in (counts, layers, measurement, measurements):
            opened.close()


def values(seed: int) -> Any:
    """An embedding."""
    import numpy as np

    return np.random.default_rng(seed).normal(size=(CELLS, DIMENSIONS)).astype(np.float32)


def publish(experiment: str, publication: str, seed: int, *, replace: bool, name: str = "scvi") -> None:
    """As scvi-publish.py does once its gates are passed."""
    import numpy as np
    import pyarrow as pa

    from census_scvi.publication.obsm import EmbeddingDraft
    from census_scvi.publication.summary import _SCHEMA, append_summary

    draft = EmbeddingDraft(experiment, name, (CELLS, DIMENSIONS), publication, replace=replace)
    if draft.done:
        return
    draft.write(np.arange(CELLS), values(seed))
    row = {field.name: 0 if pa.types.is_integer(field.type) else "-" for field in _SCHEMA}
    row = {key: value for key, value in row.items() if key not in ("soma_joinid", "provenance")}
    append_summary(experiment, row | {"publication": publication}, {"seed": seed})
    draft.publish({"id": publication})


def look(experiment: str, name: str = "scvi") -> dict[str, Any]:
    """What a reader finds: cells with counts, the embedding (as its seed), the publications."""
    import numpy as np
    import tiledbsoma as soma

    from census_scvi.census.embedding import published_uri, read_embedding
    from census_scvi.publication.summary import read_summary

    with soma.Experiment.open(experiment) as opened:
        counts = opened.ms["RNA"].X["raw"].read().tables().concat()
    uri = published_uri(experiment, name)
    found = None if uri is None else np.concatenate([block for _, block in read_embedding(uri)])
    seeds = [seed for seed in (0, 1) if found is not None and np.array_equal(found, values(seed))]
    return {
        "cells": len(counts),
        "embedding": None if found is None else seeds[0] if seeds else "neither",
        "publications": sorted(read_summary(experiment)["publication"]),
    }


def forked(work: Callable[[], Any]) -> dict[str, Any]:
    """What some work gives, or how it ended, in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with suppress(BaseException):
            try:
                answer = {"found": work()}
            except BaseException as error:
                answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]}
            os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return {**(json.loads(text) if text else {}), "exit": os.waitstatus_to_exitcode(status)}


@contextmanager
def copied(template: Path, scratch: Path) -> Iterator[str]:
    """A copy of an Experiment."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(template, scratch)
    yield str(scratch)


def main(folder: str, library: str, kind: str, full: str, first: str, stride: str) -> None:
    """Publish with a fault at each `stride`-th operation; prints what was found after it, and after a rerun."""
    faults = ctypes.CDLL(library)
    # What is imported before the forks is imported once.
    for name in (
        "census_scvi.publication.obsm",
        "census_scvi.publication.summary",
        "fsspec.implementations.local",
        "pyarrow.pandas_compat",
    ):
        importlib.import_module(name)

    replace = kind == "replacement"
    template, scratch = Path(folder) / "template", Path(folder) / "experiment"
    forked(lambda: small_experiment(str(template)))
    if replace:
        forked(lambda: publish(str(template), "a" * 32, 0, replace=False))

    def attempt(experiment: str, nth: int) -> int:
        faults.arm(str(experiment).encode(), nth, int(full))
        publish(experiment, "b" * 32, 1, replace=replace)
        return int(faults.operations())

    with copied(template, scratch) as experiment:
        total = forked(lambda: attempt(experiment, 0))["found"]
    for nth in range(int(first), total + 1, int(stride)):
        with copied(template, scratch) as experiment:
            fault = forked(lambda at=nth: attempt(experiment, at))
            before = forked(lambda: look(experiment))
            after = forked(lambda: (publish(experiment, "b" * 32, 1, replace=replace), look(experiment))[1])
            left = [path.name for path in Path(experiment).rglob("*partial*")]
        line = {"nth": nth, "of": total, "fault": fault, "before": before, "after": after, "left": left}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
