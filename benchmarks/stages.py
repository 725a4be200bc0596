"""Cost of each stage for increasing numbers of cells, compared with the prediction of --dry-run.

    python benchmarks/stages.py --census FOLDER --folder FOLDER --cells 50000 200000 [--genes 8000] [--kind TOTALVI]

Runs prepare, train (one epoch of a small network) and create-latent-update on the first cells of a Census, each in a
separate process. Prints predicted and measured peak memory, time and disk; FOLDER/stages.json has every run.
`benchmarks/scale.py` builds a suitable Census. With `--kind`, a Census of simulated cells with labels and proteins is
built if there is none: as many cells as needed, 3,000 genes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

OF_KIND = {
    "SCVI": [],
    "SCANVI": ["anndata.labels_key=cell_type"],
    "TOTALVI": ["anndata.protein_measurement=protein"],
}
STAGES = {"prepare": "prepare", "train": "train", "create-latent-update": "create_latent_update"}
PLAN = """
import json, sys
from importlib import import_module
from census_scvi.settings import load_config
plan = import_module(f"census_scvi.stages.{sys.argv[1]}").plan(load_config(sys.argv[2], sys.argv[3:]))
print(json.dumps({"seconds": plan.seconds, "memory": plan.memory, "disk": plan.disk}))
"""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--census", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cells", type=int, nargs="+", required=True)
    parser.add_argument("--genes", type=int, default=8000)
    parser.add_argument("--kind", choices=list(OF_KIND), default="SCVI")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.kind != "SCVI" and not arguments.census.exists():
        _build(arguments.census, max(arguments.cells))
    runs = [
        {"cells": n_cells, "stage": stage, **_stage(stage, n_cells, arguments)}
        for n_cells in arguments.cells
        for stage in STAGES
    ]
    (arguments.folder / "stages.json").write_text(json.dumps(runs, indent=1))
    print(
        "| stage | cells | peak GB (predicted) | wall s (predicted) | disk MB (predicted) |",
        "|---|---|---|---|---|",
        sep="\n",
    )
    for stage in STAGES:
        for run in (run for run in runs if run["stage"] == stage):
            figures = [f"{run[key] / unit:.2f} ({run['predicted'][key] / unit:.2f})" for key, unit in UNITS.items()]
            print(f"| {stage} | {run['cells']:,} | {' | '.join(figures)} |")


def _build(census: Path, n_cells: int) -> None:
    from census_scvi.local_census.demo.cells import demo_sources
    from census_scvi.local_census.write import build_census

    sources = demo_sources(seed=0, scale=n_cells / 5900, n_genes=3000, proteins=True)  # 6,000 human cells at scale 1
    build_census(str(census), [source for source in sources if source.organism == "homo_sapiens"])


UNITS = {"memory": 1e9, "seconds": 1.0, "disk": 1e6}


def _stage(stage: str, n_cells: int, arguments: argparse.Namespace) -> dict[str, Any]:
    directory = arguments.folder / f"{arguments.kind}-cells-{n_cells}"
    config = arguments.folder / "empty.yaml"
    config.write_text("census:\n")
    settings = [
        f"census.uri={arguments.census}",
        f"census.obs_query='soma_joinid < {n_cells}'",
        f"output.directory={directory}",
        f"hvg.top_n_hvg={arguments.genes}",
        "hvg.hvg_batch=[assay]",
        "anndata.batch_key=[dataset_id, donor_id]",
        "train.max_epochs=1",
        "train.accelerator=cpu",
        "model.n_hidden=32",
        f"model.kind={arguments.kind}",
        *OF_KIND[arguments.kind],
    ]
    predicted = json.loads(_python("-c", PLAN, STAGES[stage], str(config), *settings).splitlines()[-1])
    _python(f"scvi-{stage}.py", "--config", str(config), *settings, "--force")
    record = json.loads((directory / "manifest.json").read_text())["stages"][stage]
    return {
        "predicted": predicted,
        "seconds": record["seconds"],
        "cpu_seconds": record["cpu_seconds"],
        "memory": record["peak_memory_bytes"],
        "disk": sum(output["size"] for output in record["outputs"].values()),
    }


def _python(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
