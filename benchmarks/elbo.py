"""Final ELBO of training with this project, compared with scvi-tools.

    python benchmarks/elbo.py PREPARED.h5ad [--epochs 20] [--seeds 0 1 2] [--window ROWS] [--precision float32 bf16]
                              [key=value ...]

For each seed, one model is trained three times, on the same cells and from the same weights: with `SCVI.train` on the
AnnData in memory, whose loader shuffles all cells; with this project from the file and `train.engine: scvi-tools`; and
with `train.engine: fast`, which gets the same minibatches and random numbers as `train.engine: scvi-tools`. The script
prints the ELBO (negative, lower is better) of the same validation cells after every fifth of the epochs. Data of up to
one window of cells is shuffled fully by all three. A smaller --window shows the effect of the shuffle of larger data.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from functools import partial
from pathlib import Path
from statistics import stdev

import anndata as ad
import lightning
import numpy as np
import scvi

from census_scvi.counts import order
from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.model.build import build_model, init_arguments
from census_scvi.settings import Config, load_config
from census_scvi.training.fit import fit

SETTINGS = [
    "model.n_hidden=128",
    "model.n_latent=10",
    "training_plan.lr=1e-3",
    "training_plan.n_epochs_kl_warmup=10",
    "train.accelerator=cpu",
]


def main() -> None:
    """Train and print."""
    arguments = parse_arguments()
    order.WINDOW_ROWS = arguments.window
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as empty:
        empty.write("train:\n")
        empty.flush()
        config = load_config(empty.name, [*SETTINGS, f"train.max_epochs={arguments.epochs}", *arguments.settings])
    warnings.simplefilter("ignore")
    shown = range(max(arguments.epochs // 5, 1) - 1, arguments.epochs, max(arguments.epochs // 5, 1))
    print(f"windows of {arguments.window:,} cells; ELBO of the validation cells after epoch")
    print(f"| seed | trained by | {' | '.join(str(epoch + 1) for epoch in shown)} |")
    print("|---" * (2 + len(shown)) + "|")
    sides = {"SCVI.train": _theirs, "ours, scvi-tools' steps": partial(_ours, engine="scvi-tools")}
    for precision in arguments.precision or [config.train.precision]:
        sides[f"ours, fast steps, {precision}"] = partial(_ours, engine="fast", precision=precision)
    last: dict[str, list[float]] = {name: [] for name in sides}
    for seed in arguments.seeds:
        for name, side in sides.items():
            curve = side(arguments.prepared, config, seed)
            last[name].append(curve[-1])
            print(f"| {seed} | {name} | {' | '.join(f'{curve[epoch]:.2f}' for epoch in shown)} |", flush=True)
    first, *others = last
    for name in others:
        differences = [ours - theirs for ours, theirs in zip(last[name], last[first], strict=True)]
        print(f"{name} less {first}, by seed: {', '.join(f'{value:+.2f}' for value in differences)}")
    if len(arguments.seeds) > 1:
        print(
            "standard deviation over seeds:", ", ".join(f"{name} {stdev(values):.2f}" for name, values in last.items())
        )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--window", type=int, default=order.WINDOW_ROWS)
    parser.add_argument("--precision", nargs="+", choices=("float32", "tf32", "bf16", "fp16"))
    parser.add_argument("settings", nargs="*")
    return parser.parse_intermixed_args()


def _data(prepared: Path, config: Config, seed: int) -> PreparedDataModule:
    return PreparedDataModule(
        prepared, batch_size=config.train.batch_size, train_size=config.train.train_size, seed=seed, workers=1
    )


def _ours(prepared: Path, config: Config, seed: int, **changed: str) -> list[float]:
    data = _data(prepared, config, seed)
    lightning.seed_everything(seed, verbose=False)
    model = build_model(data.cells.genes, data.cells.batches, init_arguments(config.model))
    with tempfile.TemporaryDirectory() as folder:
        curves = fit(
            model,
            data,
            config.train.model_copy(update=changed),
            config.training_plan,
            seed=seed,
            checkpoint=Path(folder, "checkpoint.ckpt"),
            tensorboard=Path(folder, "tensorboard"),
        )
    data.cells.close()
    return curves.curves["elbo_validation"]


def _theirs(prepared: Path, config: Config, seed: int) -> list[float]:
    cells = ad.read_h5ad(prepared)
    data = _data(prepared, config, seed)
    held_out = np.zeros(cells.n_obs, dtype=bool)
    for minibatch in data.val_dataloader():
        held_out[minibatch["row"].numpy()] = True
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    lightning.seed_everything(seed, verbose=False)
    model = scvi.model.SCVI(cells, **init_arguments(config.model))
    model.train(
        max_epochs=config.train.max_epochs,
        batch_size=config.train.batch_size,
        accelerator=config.train.accelerator,
        check_val_every_n_epoch=1,
        datasplitter_kwargs={"external_indexing": [np.flatnonzero(~held_out), np.flatnonzero(held_out)]},
        plan_kwargs=config.training_plan,
        enable_progress_bar=False,
    )
    return model.history["elbo_validation"].iloc[:, 0].tolist()


if __name__ == "__main__":
    main()
