"""All stages on a Census of many simulated cells with few genes: time and memory of each stage.

    python benchmarks/many_cells.py --folder FOLDER --cells 500000 5000000

Builds a Census of each size in FOLDER (once), then runs prepare, train (one epoch), create-latent-update and publish.
Prints what their records in manifest.json say. Memory must not grow with the cells by more than docs/full-census.md
says.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from releases import Simulated

from census_scvi.local_census.write import build_census

STAGES = ("prepare", "train", "create-latent-update", "publish")
CELLS_OF_A_DATASET = 100_000


def main() -> None:
    """Build what is missing, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cells", type=int, nargs="+", default=[500_000, 5_000_000])
    arguments = parser.parse_args()
    print("| stage | cells | s | CPU-s | peak GB |\n|---|---|---|---|---|")
    for n_cells in arguments.cells:
        config = _config(arguments.folder.absolute(), n_cells)
        for stage in STAGES:
            record = _done(stage, config)
            cpu, memory = record["cpu_seconds"], record["peak_memory_bytes"] / 1e9
            print(f"| {stage} | {n_cells:,} | {record['seconds']:.0f} | {cpu:.0f} | {memory:.2f} |", flush=True)


def _config(folder: Path, n_cells: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    census, config = folder / f"census-{n_cells}", folder / f"config-{n_cells}.json"
    if not census.exists():
        build_census(census, [Simulated(n, CELLS_OF_A_DATASET) for n in range(n_cells // CELLS_OF_A_DATASET)])
    settings: dict[str, Any] = {
        "census": {"uri": str(census), "organism": "homo_sapiens"},
        "hvg": {"top_n_hvg": 50, "hvg_batch": ["dataset_id"]},
        "anndata": {"batch_key": ["dataset_id", "donor_id"]},
        "model": {"n_hidden": 64, "n_latent": 10, "n_layers": 1},
        "train": {"max_epochs": 1, "accelerator": "cpu"},
        "gates": {"waived": dict.fromkeys(("active_units", "effective_rank"), "simulated cells with few genes")},
        "output": {"directory": str(folder / f"run-{n_cells}")},
    }
    config.write_text(json.dumps(settings))
    return config


def _done(stage: str, config: Path) -> dict[str, Any]:
    """Run a stage with one thread, unless it is done; its record."""
    code = "import sys; from census_scvi.cli import console; sys.exit(console())"
    command = [sys.executable, "-W", "ignore", "-c", code, stage, "--config", str(config)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}, check=True)
    directory = Path(json.loads(config.read_text())["output"]["directory"])
    return dict(json.loads((directory / "manifest.json").read_text())["stages"][stage])


if __name__ == "__main__":
    main()
