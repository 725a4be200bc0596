"""`make demo`: builds a small simulated Census, runs and verifies all stages, and lists the artifacts."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from census_scvi.cli import main
from census_scvi.config.stages import PIPELINE
from census_scvi.errors import UserError
from census_scvi.files.uri import local_path
from census_scvi.settings import Config, load_config
from census_scvi.terminal.guarded import guarded
from census_scvi.workspace import Workspace

CONFIG = "configs/demo.yaml"
# Study of the demo whose cells are the query of configs/annotate-demo.yaml.
OWN_STUDY = "demo-human-blood"


def run_demo(argv: Sequence[str] | None = None) -> int:
    """Build the demo Census if it is missing, run the stages, verify, list the artifacts; return the exit code."""
    overrides = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(overrides))


def _run(overrides: list[str]) -> None:
    started = time.monotonic()
    config = load_config(CONFIG, overrides)
    _say(f"1. a small Census of simulated cells in {config.census.uri}")
    _build_census(config)
    write_own_cells(str(config.census.uri), config.directory.parent / "my-cells.h5ad")
    for number, stage in enumerate(PIPELINE, start=2):
        _say(f"{number}. scvi-{stage}.py --config {CONFIG}")
        _require_done(main(stage, ["--config", CONFIG, *overrides]), f"in {stage}; the line above says why")
    published = str(config.directory / config.artifacts.published)
    verification = [published, "--census", str(config.census.uri)]
    _say(f"7. scvi-verify.py {' '.join(verification)}")
    _require_done(main("verify", verification), "because the published folder is not valid; the lines above say where")
    _say(f"8. scvi-evaluate.py --config {CONFIG}")
    evaluated = main("evaluate", ["--config", CONFIG, "--force", *overrides])
    _require_done(evaluated, "in evaluate; the line above says why")
    _say("9. the picture")
    picture = config.directory.parent / "demo-umap.png"
    _draw(config, picture)
    _say(f"done in {time.monotonic() - started:.0f} s")
    print(artifact_table(config, [picture]))
    print(_next_steps(config))


def _require_done(exit_code: int, where: str) -> None:
    if exit_code > 128:  # stopped by a signal; the stage has reported it
        raise SystemExit(exit_code)
    if exit_code:
        raise UserError(f"the demo stopped {where}")


def _say(text: str) -> None:
    print(f"\n== {text}", file=sys.stderr, flush=True)


def _build_census(config: Config) -> None:
    from census_scvi.local_census.demo.cells import write_demo_census

    uri = config.census.uri or ""
    path = local_path(uri)
    if path is not None and path.exists():
        print(f"{uri} is there already", file=sys.stderr)
    else:
        write_demo_census(uri, seed=config.seed)


def write_own_cells(census: str, path: Path) -> None:
    """Write the cells of the demo's blood study as a user may have them: symbols, donors, and no cell types.

    Parameters
    ----------
    census
        URI of the demo Census.
    path
        The .h5ad to write; it stays as it is if it exists.
    """
    import anndata as ad
    import cellxgene_census
    import pandas as pd

    if path.exists():
        return
    with cellxgene_census.open_soma(uri=census) as root:
        cells = cellxgene_census.get_anndata(root, "homo_sapiens", obs_value_filter=f"dataset_id == '{OWN_STUDY}'")
    obs = pd.DataFrame({"donor": cells.obs["donor_id"].astype(str).to_numpy()})
    obs.index = [f"cell-{number}" for number in range(cells.n_obs)]
    var = pd.DataFrame(index=cells.var["feature_name"].astype(str).to_numpy())
    partial = path.with_name(path.name + ".partial")
    ad.AnnData(cells.X, obs, var).write_h5ad(partial)
    partial.replace(path)


def _draw(config: Config, picture: Path) -> None:
    import anndata as ad

    from census_scvi.pictures.umap import draw_before_and_after

    names = config.artifacts
    cells = ad.read_h5ad(config.directory / names.prepared)
    latent = np.load(config.directory / names.latent, mmap_mode="r")
    joinids = np.load(config.directory / names.latent_joinids)
    rows = np.searchsorted(joinids, cells.obs["soma_joinid"].to_numpy())
    draw_before_and_after(cells, np.asarray(latent[rows]), picture, seed=config.seed)


def artifact_table(config: Config, more: Sequence[Path] = ()) -> str:
    """Table of the artifacts of a run: path, size, content."""
    from census_scvi.model.families import family_of

    workspace = Workspace(config.directory)
    names, title = config.artifacts, family_of(config.model.kind).title
    prepared, trained, embedded, *_ = ((workspace.whole_record(stage) or {})["counts"] for stage in PIPELINE)
    shape = f"{prepared['cells']:,} cells x {prepared['genes']:,} genes"
    contents = {
        names.genes: f"{prepared['genes']:,} highly variable genes (feature_id)",
        names.prepared: f"raw counts, {shape}, {prepared['batches']} batches",
        names.model: f"{title}, {trained['parameters']:,} parameters, {trained['epochs']} epochs",
        names.tensorboard: "TensorBoard: losses, KL weight, learning rate",
        names.latent: f"latent means, {embedded['cells']:,} cells x {embedded['n_latent']}",
        names.latent_joinids: "soma_joinid of each row of the latent",
        names.latent_hashes: "hash of each cell's counts, equal for copies",
        names.minified: "minified model: obs, latent means and variances",
        names.qa: "the gates: value, threshold, passed or not",
        names.published: "model, sealed sample of cells, provenance",
        names.index: "index for the nearest of all cells",
        "evaluation": "metrics.json, and report.html to open in a browser",
        "manifest.json": "how it was made: config, Census, versions, hashes, times",
    }
    rows = [(config.directory / name, text) for name, text in contents.items()]
    rows += [(path, "cells before and after integration") for path in more]
    width = max(len(str(path)) for path, _ in rows)
    lines = [f"  {path!s:<{width}}  {_size(path):>9}  {text}" for path, text in rows if path.exists()]
    return "\n".join(["", f"  {'artifact':<{width}}  {'size':>9}  content", *lines])


def _size(path: Path) -> str:
    from census_scvi.stages.plan import human_bytes

    files = path.rglob("*") if path.is_dir() else [path]
    return human_bytes(sum(file.stat().st_size for file in files if file.is_file()))


def _next_steps(config: Config) -> str:
    folder, kind = config.directory / config.artifacts.minified, config.model.kind
    return f"\n  next: python -c 'import scvi; print(scvi.model.{kind}.load(\"{folder}\"))'  (in .venv/bin)\n"


if __name__ == "__main__":
    sys.exit(run_demo())
