"""Speed and memory on a large Census, compared with common alternatives.

    python benchmarks/scale.py --folder FOLDER [--cells 200000] [--genes 60000] [--selected 8000] [--repeats 3]
                               [--annbatch PYTHON]

Builds a Census of simulated cells in FOLDER (once). Then runs each side of each comparison in a separate process, in
turn, and prints a table of medians of CPU-seconds, wall time and peak memory. FOLDER/results.json has every run.
annbatch needs Python 3.12: PYTHON is an interpreter with `annbatch[torch,zarrs]`. Without it, that side is skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
CASES = {
    "hvg": ("genes selected", ["hvg_ours", "hvg_library"]),
    "prepare": ("prepare, whole", ["prepare_ours", "prepare_library"]),
    "loader": (
        "loader, 150 dense minibatches of 1,024",
        [
            "loader_ours",
            "loader_ours_uncompressed",
            "loader_ours_sparse",
            "loader_scvi_in_memory",
            "loader_scdataset",
            "loader_tiledbsoma_ml",
            "loader_scvi_tiledb",
            "loader_annbatch",
        ],
    ),
    "latent": ("latent of all cells", ["latent_ours", "latent_library"]),
}


def main() -> None:
    """Build what is missing, run, print."""
    arguments = _arguments()
    folder = arguments.folder.absolute()
    _build(folder, arguments)
    results: dict[str, list[dict[str, Any]]] = {}
    for case in arguments.only or CASES:
        for repeat in range(arguments.repeats):
            for side in CASES[case][1]:
                python = arguments.annbatch if side == "loader_annbatch" else sys.executable
                if python is None:
                    continue
                taken = _run(python, side, folder, arguments.selected)
                results.setdefault(side, []).append(taken)
                print(f"{side} {repeat + 1}: {taken}", file=sys.stderr, flush=True)
    (folder / "results.json").write_text(json.dumps({"machine": _machine(), "runs": results}, indent=1))
    print(_table(results, folder))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--genes", type=int, default=60_000)
    parser.add_argument("--selected", type=int, default=8_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--annbatch", metavar="PYTHON")
    parser.add_argument("--only", nargs="*", choices=list(CASES))
    return parser.parse_args()


def _build(folder: Path, arguments: argparse.Namespace) -> None:
    """Build the Census, train a model for one epoch on a few of its cells, and prepare all its cells."""
    from scale_sides import Folder, run_stage

    folder.mkdir(parents=True, exist_ok=True)
    paths = Folder(folder, arguments.selected)
    build_census_once(Path(paths.census), arguments.cells, arguments.genes)
    if not (Path(paths.model) / "scvi.model").exists():
        small = ["census.obs_query_model='soma_joinid < 5000'", "train.max_epochs=1"]
        for stage in ("prepare", "train"):
            run_stage(stage, paths, paths.model, *small, "model.n_hidden=512", "model.n_latent=50", "model.n_layers=2")
    for directory, compression in ((paths.prepared, "gzip"), (paths.uncompressed, "none")):
        if not (Path(directory) / "anndata_model.h5ad").exists():
            run_stage("prepare", paths, directory, f"anndata.compression={compression}")


def build_census_once(uri: Path, n_cells: int, n_genes: int) -> None:
    """A Census of simulated human cells, unless it is there."""
    from census_scvi.local_census.demo.cells import demo_sources
    from census_scvi.local_census.write import build_census

    if not uri.exists():
        # 1,770 detected genes per cell, as in the tissues of the Census; 38 % of them are among the 8,000 selected.
        sources = demo_sources(seed=0, scale=n_cells / 6000, n_genes=n_genes, depth=1.35, type_sd=0.8)
        build_census(uri, [source for source in sources if source.organism == "homo_sapiens"])


def _run(python: str, side: str, folder: Path, n_genes: int) -> dict[str, Any]:
    command = [python, "-W", "ignore", str(HERE / "scale_sides.py"), side, str(folder), str(n_genes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else str(done.returncode)}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _table(results: dict[str, list[dict[str, Any]]], folder: Path) -> str:
    lines = ["| what | who | CPU s | wall s | peak GB | CPU, wall relative to ours |", "|---|---|---|---|---|---|"]
    for title, sides in CASES.values():
        ours = _medians(results.get(sides[0], []))
        for side in sides:
            taken = _medians(results.get(side, []))
            if not taken or not ours:
                continue
            ratio = (
                f"{taken['cpu'] / ours['cpu']:.1f}x less CPU, {taken['wall'] / ours['wall']:.1f}x faster"
                if ours
                else ""
            )
            name = side.partition("_")[2].replace("_", " ")
            figures = f"{taken['cpu']:.1f} | {taken['wall']:.1f} | {taken['peak'] / 1e9:.2f}"
            lines.append(f"| {title} | {name} | {figures} | {'' if side == sides[0] else ratio} |")
    return "\n".join([*lines, "", _agreement(folder), _machine()])


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    good = [run for run in runs if "cpu" in run]
    return {key: statistics.median(run[key] for run in good) for key in ("cpu", "wall", "peak")} if good else {}


def _agreement(folder: Path) -> str:
    """Agreement of the results of both sides: shared genes, and difference of the latents."""
    words = []
    results = {name: folder / f"{name}.npy" for name in ("hvg_ours", "hvg_library", "latent_ours", "latent_library")}
    loaded = {name: np.load(path) for name, path in results.items() if path.exists()}
    if {"hvg_ours", "hvg_library"} <= loaded.keys():
        shared = len(set(loaded["hvg_ours"]) & set(loaded["hvg_library"]))
        words.append(f"genes in common: {shared:,} of {len(loaded['hvg_ours']):,}")
    if {"latent_ours", "latent_library"} <= loaded.keys():
        difference = np.abs(loaded["latent_ours"] - loaded["latent_library"]).max()
        words.append(f"largest difference of the latents: {difference:.1e}")
    return "; ".join(words)


def _machine() -> str:
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("scvi-tools", "tiledbsoma", "cellxgene-census", "torch")
    )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"Python {platform.python_version()}, {os.cpu_count()} cores, load {load}; {packages}"


if __name__ == "__main__":
    main()
