"""Embedding of all cells in parts, compared with one process: CPU-seconds, wall time and memory.

    python benchmarks/scale_out.py --folder FOLDER [--cells 50000] [--workers 2] [--parts 4] [--repeats 3]

Builds a Census of simulated cells in FOLDER, and trains a small model (both once). Then runs create-latent-update
with one process, with `cluster.workers`, and with a command for each part followed by the join; interleaved, each
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
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STAGE = "create-latent-update"
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux
# A command, whose peak memory is the last line of its output.
MEASURED = """
import resource, sys
from census_scvi.cli import console
code = console(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def main() -> None:
    """Build what is missing, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=50_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    config = _build(folder, arguments.cells)
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)  # so that the CPU-seconds of all processes are counted
    sides: dict[str, tuple[int, int, int]] = {"one process": (1, 1, 1)}
    for n in arguments.workers:
        sides[f"cluster.workers={n}"] = (1, 1, n)
        sides[f"{arguments.parts} commands, {n} at a time"] = (arguments.parts, n, 1)
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(arguments.repeats):
        for side, (n_parts, at_a_time, workers) in sides.items():
            runs[side].append(_measured(folder, config, n_parts, at_a_time, workers))
    (folder / "scale_out.json").write_text(json.dumps(runs, indent=1))
    print(_table(runs))


def _build(folder: Path, n_cells: int) -> Path:
    """The Census, the prepared cells and the model in FOLDER/trained; returns the config."""
    folder.mkdir(parents=True, exist_ok=True)
    census, config = folder / f"census-{n_cells}", folder / f"config-{n_cells}.yaml"
    if not census.exists():
        from census_scvi.local_census.demo.cells import demo_sources
        from census_scvi.local_census.write import build_census

        sources = demo_sources(seed=0, scale=n_cells / 5900, n_genes=20_000)  # 6,000 human cells at scale 1
        build_census(str(census), [source for source in sources if source.organism == "homo_sapiens"])
    settings: dict[str, Any] = {
        "census": {"uri": str(census)},
        "hvg": {"top_n_hvg": 4000, "hvg_batch": ["assay"]},
        "anndata": {"batch_key": ["dataset_id", "donor_id"]},
        "train": {"max_epochs": 1, "accelerator": "cpu"},
        "latent": {"minified": "none"},
        "output": {"directory": str(folder / f"trained-{n_cells}")},
    }
    config.write_text(json.dumps(settings))
    for stage in ("prepare", "train"):
        _run(stage, config)
    return config


def _measured(folder: Path, config: Path, n_parts: int, at_a_time: int, workers: int) -> dict[str, float]:
    """One run in a copy of the run directory: seconds, CPU-seconds of all processes, peak memory of the largest."""
    copy = folder / "run"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(json.loads(config.read_text())["output"]["directory"], copy)
    arguments = (f"output.directory={copy}",)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    memory = []
    if n_parts > 1:
        with ThreadPoolExecutor(at_a_time) as pool:
            done = [pool.submit(_run, STAGE, config, *arguments, f"--part={n + 1}/{n_parts}") for n in range(n_parts)]
            memory = [each.result() for each in done]
    memory.append(_run(STAGE, config, *arguments, f"cluster.workers={workers}"))
    with suppress(ChildProcessError):  # the server of forks, which has no parent any more
        while True:
            os.waitpid(-1, 0)
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "memory": max(memory)}


def _run(stage: str, config: Path, *arguments: str) -> float:
    """Run a command with one thread; returns its peak memory in bytes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, stage, "--config", str(config), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{stage} failed: {done.stderr}")
    return float(done.stdout.splitlines()[-1])


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
