"""prepare and create-latent-update in parts, compared with one process: CPU-seconds, wall time and memory.

    python benchmarks/scale_out.py --folder FOLDER [--cells 200000] [--genes 60000] [--selected 8000]
                                   [--workers 2] [--parts 4] [--repeats 3] [--stages prepare create-latent-update]

Builds the Census of benchmarks/scale.py in FOLDER, and trains a model on a few of its cells (both once). Then runs each
stage with one process, with `cluster.workers`, and with a command for each part followed by the join; interleaved, each
process with one thread. Prints medians; FOLDER/scale_out.json has every run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from scale import build_census_once

ROOT = Path(__file__).parents[1]
# Stages, and how often each part is run as a command.
ROUNDS = {"prepare": 2, "create-latent-update": 1}
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux
COMMAND = "import sys; from census_scvi.cli import console; sys.exit(console(sys.argv[1:]))"
_SECONDS_BETWEEN_LOOKS = 0.2


def main() -> None:
    """Build what is missing, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--genes", type=int, default=60_000)
    parser.add_argument("--selected", type=int, default=8_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stages", nargs="+", choices=list(ROUNDS), default=list(ROUNDS))
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    config = _build(folder, arguments)
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)  # so that the CPU-seconds of all processes are counted
    sides: dict[str, tuple[int, int, int]] = {"one process": (1, 1, 1)}
    for n in arguments.workers:
        sides[f"cluster.workers={n}"] = (1, 1, n)
        sides[f"{arguments.parts} commands, {n} at a time"] = (arguments.parts, n, 1)
    runs: dict[str, list[dict[str, float]]] = {f"{stage}, {side}": [] for stage in arguments.stages for side in sides}
    for stage in arguments.stages:
        for _ in range(arguments.repeats):
            for side, how in sides.items():
                runs[f"{stage}, {side}"].append(_measured(stage, folder, config, *how))
                (folder / "scale_out.json").write_text(json.dumps(runs, indent=1))
    print(_table(runs))


def _build(folder: Path, arguments: argparse.Namespace) -> Path:
    """The Census, and the model in FOLDER/trained; returns the config."""
    folder.mkdir(parents=True, exist_ok=True)
    census, config, trained = folder / "census", folder / "config.yaml", folder / "trained"
    build_census_once(census, arguments.cells, arguments.genes)
    settings: dict[str, Any] = {
        "census": {"uri": str(census)},
        "hvg": {"top_n_hvg": arguments.selected, "hvg_batch": ["assay"]},
        "anndata": {"batch_key": ["dataset_id", "donor_id"]},
        "train": {"max_epochs": 1, "accelerator": "cpu"},
        "latent": {"minified": "none"},
        "output": {"directory": str(folder / "whole")},
    }
    config.write_text(json.dumps(settings))
    for stage in ("prepare", "train"):
        _run(stage, config, f"output.directory={trained}", "census.obs_query_model='soma_joinid < 5000'")
    return config


def _measured(stage: str, folder: Path, config: Path, n_parts: int, at_a_time: int, workers: int) -> dict[str, float]:
    """One run in a new run directory: seconds, CPU-seconds of all processes, peak memory of the largest."""
    copy = folder / "run"
    shutil.rmtree(copy, ignore_errors=True)
    arguments = [f"output.directory={copy}"]
    if stage != "prepare":
        shutil.copytree(folder / "trained", copy)
        arguments.append("census.obs_query_model='soma_joinid < 5000'")
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    memory: list[float] = []
    if n_parts > 1:
        part = [f"--part={n + 1}/{n_parts}" for n in range(n_parts)]
        for _ in range(ROUNDS[stage]):
            with ThreadPoolExecutor(at_a_time) as pool:
                memory += list(pool.map(lambda which: _run(stage, config, *arguments, which), part))
    memory.append(_run(stage, config, *arguments, f"cluster.workers={workers}"))
    with suppress(ChildProcessError):  # the server of forks, which has no parent any more
        while True:
            os.waitpid(-1, 0)
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "memory": max(memory)}


def _run(stage: str, config: Path, *arguments: str) -> float:
    """Run a command with one thread; returns the peak memory of the largest of its processes in bytes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", COMMAND, stage, "--config", str(config), *arguments]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=said, stderr=said, text=True, start_new_session=True
        )
        memory = 0.0
        while process.poll() is None:
            memory = max(memory, *_memory_of_session(process.pid))
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{stage} failed: {said.read()}")
    return memory


def _memory_of_session(session: int) -> list[float]:
    """Peak memory in bytes of each process of a session."""
    # Not ru_maxrss, which begins with that of the process that started this one.
    found = [0.0]
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, StopIteration):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                lines = (folder / "status").read_text().splitlines()
                found.append(1024 * next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")))
    return found


def _table(runs: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| | CPU-s | wall s | GB per process |", "|---|---|---|---|"]
    for side, measured in runs.items():
        cpu, seconds, memory = (_median(measured, name) for name in ("cpu_seconds", "seconds", "memory"))
        lines.append(f"| {side} | {cpu:.1f} | {seconds:.1f} | {memory / 1e9:.2f} |")
    return "\n".join(lines)


def _median(measured: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(run[name] for run in measured)


if __name__ == "__main__":
    main()
