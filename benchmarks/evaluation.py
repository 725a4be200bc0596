"""Evaluation metrics on real cells: PCA, scVI by this project, scVI by scvi-tools, and shuffled cells.

    python benchmarks/evaluation.py --data FOLDER [--seeds 0 1 2] [--folder KEEP]

FOLDER holds pbmc_multi_human.h5ad, pancreas_baron_mouse.h5ad and the gene maps. Both models are trained with the
published settings (configs/blood.yaml, configs/pancreas.yaml). docs/evaluation.md has the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

import anndata as ad
import cellxgene_census
import numpy as np
import numpy.typing as npt
import pandas as pd
import scvi
import torch

from census_scvi.census.open import open_census
from census_scvi.cli import main as run_stage
from census_scvi.local_census.settings import load_build_config
from census_scvi.report.slice import BATCH, read_slice
from census_scvi.settings import Config, load_config
from census_scvi.stages.build_census import build_from_config
from census_scvi.stages.evaluate import evaluate

CONFIGS = Path(__file__).parents[1] / "configs"
TISSUES = ("blood", "pancreas")
OURS, THEIRS, SHUFFLED = "census-scvi", "scvi-tools", "shuffled cells"


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the .h5ad files and the gene maps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tissues", nargs="+", default=TISSUES, choices=TISSUES)
    parser.add_argument("--folder", type=Path, help="keep everything there, and take what is there")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)).absolute()
        for tissue in arguments.tissues:
            census = folder / f"census-{tissue}"
            if not census.exists():
                build = load_build_config(CONFIGS / f"build-{tissue}.yaml", data=arguments.data)
                build_from_config(build.model_copy(update={"uri": census}))
            rows = [row for seed in arguments.seeds for row in one_seed(folder, tissue, seed)]
            print(f"\n{tissue}\n\n{report(pd.DataFrame(rows))}", flush=True)


def one_seed(folder: Path, tissue: str, seed: int) -> list[dict[str, object]]:
    """Compute all scores for one seed."""
    kept = folder / f"{tissue}-{seed}.json"
    if not kept.exists():
        directory = folder / f"{tissue}-{seed}"
        settings = [
            f"census.uri={folder}/census-{tissue}",
            f"output.directory={directory}",
            f"seed={seed}",
            f"evaluate.embeddings={{{OURS}: {directory}}}",
            "evaluate.batches=[dataset_id, batch]" if tissue == "blood" else "evaluate.batches=[batch]",
        ]
        for stage in ("prepare", "train", "create-latent-update"):
            if run_stage(stage, ["--config", str(CONFIGS / f"{tissue}.yaml"), *settings]):
                raise SystemExit(f"{stage} failed; the line above says why")
        config = load_config(CONFIGS / f"{tissue}.yaml", settings)
        with open_census(config.census) as census:
            cells = read_slice(
                census,
                config.evaluate,
                config.directory,
                batch_key=config.anndata.batch_key,
                n_genes=config.hvg.top_n_hvg,
                seed=config.seed,
            )
        joinids = cells.obs.index.to_numpy()
        cells.spaces[THEIRS] = plain_latent(config, joinids, cells.obs[BATCH].to_numpy(dtype=object))
        cells.spaces[SHUFFLED] = cells.spaces[OURS][np.random.default_rng(seed).permutation(len(joinids))]
        found = evaluate(config, cells, np.arange(len(joinids)))
        for problem in found.problems:
            print(problem)
        rows = [{"seed": seed, "who": who, **asdict(score)} for who, scores in found.scores.items() for score in scores]
        kept.write_text(json.dumps(rows, default=float))
    return list(json.loads(kept.read_text()))


def plain_latent(
    config: Config, joinids: npt.NDArray[np.int64], batches: npt.NDArray[np.object_]
) -> npt.NDArray[np.float32]:
    """Train with scvi-tools alone, in memory, on the prepared cells; return the latent of all cells of the slice."""
    torch.set_num_threads(1)
    scvi.settings.seed = config.seed
    prepared = ad.read_h5ad(config.directory / config.artifacts.prepared)
    scvi.model.SCVI.setup_anndata(prepared, batch_key="batch")
    arguments = config.model.model_dump(exclude={"filename"})
    model = scvi.model.SCVI(prepared, **arguments)
    model.train(
        max_epochs=config.train.max_epochs,
        batch_size=config.train.batch_size,
        train_size=config.train.train_size,
        plan_kwargs=dict(config.training_plan),
        accelerator="cpu",
        enable_progress_bar=False,
    )
    with cellxgene_census.open_soma(uri=config.census.uri) as census:
        cells = cellxgene_census.get_anndata(census, config.census.organism, obs_coords=joinids)
    cells.var_names = cells.var["feature_id"].astype(str)
    chosen = ad.AnnData(
        cells[:, prepared.var_names].X.astype(np.float32),
        obs=pd.DataFrame({"batch": batches}, index=joinids.astype(str)),
        var=prepared.var[[]],
    )
    return np.asarray(model.get_latent_representation(chosen), np.float32)


def report(rows: pd.DataFrame) -> str:
    """Markdown table with one row per metric: mean, minimum and maximum over seeds."""
    lines = []
    order = ["PCA", OURS, THEIRS, SHUFFLED]
    for (about, column), some in rows.groupby(["about", "column"], sort=False):
        levels = list(dict.fromkeys(name for level in some["levels"] for name in level))
        lines += [
            f"| {about}: {column} | " + " | ".join([*order, *levels]) + " |",
            "|---" * (len(order) + len(levels) + 1) + "|",
        ]
        for metric, scores in some.groupby("metric", sort=False):
            shown = []
            for who in order:
                values = scores.loc[scores["who"] == who, "value"]
                spread = f" ({values.min():.3f}-{values.max():.3f})" if values.max() - values.min() > 5e-4 else ""
                shown.append(f"{values.mean():.3f}{spread}")
            level = scores.loc[scores["who"] == OURS, "levels"]
            shown += [
                f"{np.mean([values.get(name, np.nan) for values in level]):.3f}".replace("nan", "") for name in levels
            ]
            lines.append(f"| {metric} | " + " | ".join(shown) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
