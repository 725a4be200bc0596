"""Speed of a training step and of a whole training, compared with scvi-tools, on the available device.

    python benchmarks/train_step.py --folder FOLDER [--hidden 512 128] [--cells 40000] [--genes 8000] [--repeats 3]
                                    [--epochs 3] [--threads 1] [--prepared FILE.h5ad]

Simulates cells in FOLDER (once), or uses the cells of FILE. Then, for each number of hidden units per layer:

1. steps: scvi-tools' step and this project's step, with one improvement after the other, process the same minibatches
   alternately; medians. The lower limit is the time of the matrix products and of the memory traffic at the measured
   rates of this device (on a CPU, of the faster library). There are two limits: with all counts in the encoder's
   products, and with the non-zeros only, for steps that skip zeros. A slower reduced precision is skipped.
2. end to end: `SCVI.train` with all cells in memory, and this project's training from the file, alternately and each in
   a separate process. Lightning, metrics, validation and the loader are included; imports and reading into memory are
   not.

Prints tables, with the processor, its instruction sets and the chosen libraries. FOLDER/train_step.json has all
numbers.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

LATENT, BATCH_SIZE, BATCHES = 50, 1024, 4
WARM_UP, STEPS = 2, 9
FAST = "train.engine fast"


def main() -> None:
    arguments = parse_arguments()
    if arguments.side:
        print(json.dumps(_end_to_end(arguments.side, arguments.prepared, arguments.hidden[0], arguments)))
        return
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before torch is imported
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    prepared = arguments.prepared or folder / f"cells-{arguments.cells}-{arguments.genes}.h5ad"
    if not prepared.exists():
        make_up_cells(prepared, arguments.cells, arguments.genes)
    results = []
    for hidden in arguments.hidden:
        result = {"hidden": hidden, **_steps(prepared, hidden, arguments.threads)}
        print(_step_table(result), flush=True)
        result["end to end"] = _trainings(prepared, hidden, arguments)
        print(_training_table(result["end to end"], hidden), flush=True)
        results.append(result)
    (folder / "train_step.json").write_text(json.dumps({"machine": _machine(), "results": results}, indent=1))
    print(_machine())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 128])
    parser.add_argument("--cells", type=int, default=40_000)
    parser.add_argument("--genes", type=int, default=8_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prepared", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_up_cells(path: Path, n_cells: int, n_genes: int) -> None:
    """Simulate cells of ten types and four batches, with gamma-Poisson counts."""
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp

    from census_scvi.counts.writer import H5adWriter

    rng = np.random.default_rng(0)
    profiles = rng.normal(0, 1.5, n_genes) + rng.normal(0, 0.7, (10, n_genes))
    profiles = np.exp(profiles) / np.exp(profiles).sum(1, keepdims=True)
    with H5adWriter(path, pd.DataFrame(index=pd.Index([f"g{i}" for i in range(n_genes)]))) as file:
        for start in range(0, n_cells, 4000):
            n = min(4000, n_cells - start)
            depth = n_genes * 0.28 * rng.lognormal(0, 0.4, (n, 1))
            rate = rng.gamma(2.0, profiles[rng.integers(0, 10, n)] * depth / 2.0)
            codes = rng.integers(0, BATCHES, n)
            obs = pd.DataFrame(
                {"batch": pd.Categorical.from_codes(codes, [f"b{i}" for i in range(BATCHES)])},
                index=[str(i) for i in range(start, start + n)],
            )
            file.append(obs, counts=sp.csr_matrix(rng.poisson(rate).astype(np.float32)))


# --- steps


def _steps(prepared: Path, hidden: int, threads: int) -> dict[str, Any]:
    import torch

    from census_scvi.counts.data_module import PreparedDataModule
    from census_scvi.model.build import build_model

    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = PreparedDataModule(prepared, batch_size=BATCH_SIZE, train_size=1.0, seed=0, workers=1)
    dense, sparse = _minibatches(data, device, sparse=False), _minibatches(data, device, sparse=True)
    torch.manual_seed(0)
    made = build_model(
        data.cells.genes, data.cells.batches, {"n_hidden": hidden, "n_latent": LATENT, "gene_likelihood": "nb"}
    )
    measured = _measured(made.module, data.cells.density, device)
    steps = {
        rung.name: _prepare(copy.deepcopy(made.module).to(device).train(), rung, dense if rung.shipped else sparse)
        for rung in _ladder(device, measured)
    }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    losses = {}
    for number in range(WARM_UP + STEPS):
        for name, step in steps.items():
            torch.manual_seed(number)
            seconds, losses[name] = _timed(lambda step=step, number=number: step(number), device)
            if number >= WARM_UP:
                taken[name].append(seconds)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "ms": {name: 1e3 * statistics.median(seconds) for name, seconds in taken.items()},
        "loss after the last step": losses,
        "measured": {name: str(value) for name, value in measured.items()},
        "roofline": _roofline(hidden, data.cells.n_genes, data.cells.density, device),
        "share of non-zeros": data.cells.density,
    }


@dataclass(frozen=True)
class Rung:
    """A training step, and the improvements of this project that it uses."""

    name: str
    shipped: bool = False
    one_pass_adam: bool = True
    libraries: Any = None
    kernel: bool = True
    reduced: bool = False


def _measured(module: Any, density: float, device: Any) -> dict[str, Any]:
    """The measurements at the start of a training: the faster libraries, and whether reduced precision is slower."""
    import torch

    from census_scvi.training.fast.measure import faster_libraries, measure_precision, shape_of
    from census_scvi.training.fast.products import Libraries

    if device.type != "cpu":
        return {"libraries": Libraries(), "precision": None}
    shape = shape_of(module)
    return {"libraries": faster_libraries(*shape, density), "precision": measure_precision(*shape, torch.bfloat16)}


def _ladder(device: Any, measured: dict[str, Any]) -> list[Rung]:
    from census_scvi.training.fast.products import Libraries

    chosen, precision = measured["libraries"], measured["precision"]
    torch_alone, onednn = Libraries(), Libraries("onednn", "onednn", "onednn")
    rungs = [
        Rung("scvi-tools as shipped", shipped=True, one_pass_adam=False),
        Rung(
            "sums over non-zeros, no unused heads: pure torch",
            one_pass_adam=False,
            libraries=torch_alone,
            kernel=False,
        ),
        Rung("+ Adam in one pass", libraries=torch_alone, kernel=False),
        Rung("the same with oneDNN's products", libraries=onednn, kernel=False),
        Rung("+ the faster library for each product", libraries=replace(chosen, counts="dense"), kernel=False),
        Rung("+ kernel for the loss", libraries=replace(chosen, counts="dense")),
    ]
    if chosen.counts == "sparse":
        rungs.append(Rung("+ the first layer without the zeros", libraries=chosen))
    rungs[-1] = replace(rungs[-1], name=f"{rungs[-1].name}: {FAST}")
    if precision is None or precision.reduced < precision.float32:
        rungs.append(Rung(f"+ products in {_reduced(device)[0]}", libraries=chosen, reduced=True))
    return [rung for rung in rungs if device.type == "cpu" or not ("oneDNN" in rung.name or "library" in rung.name)]


def _reduced(device: Any) -> tuple[str, Any]:
    """Name and dtype of the reduced precision of this device."""
    import torch

    half = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return ("fp16", torch.float16) if half else ("bf16", torch.bfloat16)


def _minibatches(data: Any, device: Any, *, sparse: bool) -> list[dict[str, Any]]:
    """Several minibatches, too large for a cache; on the CPU in the loader's format."""
    data.sparse = sparse
    loader = iter(data.train_dataloader())
    few = [{name: _kept(value) for name, value in next(loader).items()} for _ in range(4)]
    if device.type == "cuda" and sparse:
        few = [{name: value.pin_memory() for name, value in minibatch.items()} for minibatch in few]
    return few


def _kept(value: Any) -> Any:
    return value.clone() if hasattr(value, "clone") else value


def _prepare(module: Any, rung: Rung, minibatches: list[dict[str, Any]]) -> Callable[[int], Any]:
    """Return a function `step(number) -> loss` for a whole training step, from minibatch to updated weights."""
    import torch

    from census_scvi.training.fast import negative_binomial, products
    from census_scvi.training.fast.step import step, unused_frozen

    device = next(module.parameters()).device

    def run(number: int) -> Any:
        moved = {key: value.to(device) for key, value in minibatches[number % len(minibatches)].items()}
        with ExitStack() as changed:
            if not rung.shipped:
                changed.enter_context(unused_frozen(module))
            if rung.libraries:
                products.use(rung.libraries)
            if not rung.kernel:
                changed.enter_context(patch.object(negative_binomial, "_kernel", lambda device: None))
            with torch.autocast(device.type, _reduced(device)[1], enabled=rung.reduced):
                losses = module(moved, loss_kwargs={"kl_weight": 1.0})[2] if rung.shipped else step(module, moved, 1.0)
            optimiser.zero_grad()
            losses.loss.backward()
        optimiser.step()
        return losses.loss.detach()

    fused = {"fused": True} if rung.one_pass_adam else {}
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-4, eps=0.01, weight_decay=1e-6, **fused)
    return run


def _timed(work: Callable[[], Any], device: Any) -> tuple[float, float]:
    """Seconds (CPU-seconds on a CPU) and the result of the work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        return time.perf_counter() - started, float(result)
    started = time.process_time()
    result = work()
    return time.process_time() - started, float(result)


def _roofline(hidden: int, n_genes: int, density: float, device: Any) -> dict[str, float]:
    """Lower limit of the time of a step: five products of genes x hidden, and minimum traffic of the large arrays.

    `without zeros ms`: two of the products use only the non-zeros, and no dense matrix of counts is created.
    """
    import torch

    from census_scvi.training.fast.products import times_transposed

    left, right = torch.randn(BATCH_SIZE, hidden, device=device), torch.randn(n_genes, hidden, device=device)
    large = torch.randn(BATCH_SIZE * n_genes * 2, device=device)
    other = torch.empty_like(large)
    product = 2 * BATCH_SIZE * n_genes * hidden
    flops = 5 * product  # encoder and its weights' gradient; decoder and its two gradients
    # The dense input is written once and read twice. Logits are written and replaced by slopes, which are read twice.
    # Weights are read twice, and updated with their gradients and Adam's two averages.
    moved = 4 * (8 * BATCH_SIZE * n_genes + 2 * 10 * n_genes * hidden)
    rates = {}
    for name, work, size in (
        ("flop/s", lambda: times_transposed("torch", left, right)[0, 0], product),
        ("flop/s of oneDNN", lambda: times_transposed("onednn", left, right)[0, 0], product),
        ("bytes/s", lambda: other.copy_(large)[0], 2 * 4 * large.numel()),
    ):
        rates[name] = size / statistics.median(_timed(work, device)[0] for _ in range(9))
    rates["flop/s"] = max(rates["flop/s"], rates["flop/s of oneDNN"])
    least_flops, least_moved = (3 + 2 * density) * product, moved - 4 * 3 * (1 - density) * BATCH_SIZE * n_genes
    return {
        "flop": flops,
        "bytes": moved,
        **rates,
        "ms": 1e3 * (flops / rates["flop/s"] + moved / rates["bytes/s"]),
        "without zeros ms": 1e3 * (least_flops / rates["flop/s"] + least_moved / rates["bytes/s"]),
    }


def _step_table(result: dict[str, Any]) -> str:
    shipped = result["ms"]["scvi-tools as shipped"]
    unit = "ms" if result["device"] != "CPU" else "CPU ms"
    lines = [
        f"\n{result['hidden']} hidden, {result['device']}, {result['share of non-zeros']:.1%} of the counts are not 0"
    ]
    lines += [f"| step | {unit} a minibatch | cells per second | times faster |", "|---|---|---|---|"]
    for name, milliseconds in result["ms"].items():
        speed = 1e3 * BATCH_SIZE / milliseconds
        lines.append(f"| {name} | {milliseconds:.1f} | {speed:,.0f} | {shipped / milliseconds:.2f} |")
    roofline = result["roofline"]
    (fast,) = (value for name, value in result["ms"].items() if name.endswith(FAST))
    lines.append(
        f"roofline: {roofline['flop'] / 1e9:.1f} GFLOP at {roofline['flop/s'] / 1e9:,.0f} GFLOP/s and"
        f" {roofline['bytes'] / 1e9:.2f} GB at {roofline['bytes/s'] / 1e9:,.0f} GB/s: {roofline['ms']:.1f} ms;"
        f" the step reaches {roofline['ms'] / fast:.0%} of it"
    )
    without = roofline["without zeros ms"]
    lines.append(f"without the zeros of the counts: {without:.1f} ms; the step reaches {without / fast:.0%} of it")
    lines += [f"{name}: {value}" for name, value in result["measured"].items()]
    return "\n".join(lines)


# --- end to end

# A function that trains, and returns elbo_validation and the libraries of the matrix products.
Work = Callable[[], tuple[float, Any]]

SIDES = {
    "SCVI.train, all cells in memory": "scvi-tools",
    "ours from the file, train.engine scvi-tools": "ours-scvi-tools",
    "ours from the file, train.engine fast": "ours-fast",
}


def _trainings(prepared: Path, hidden: int, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    for _ in range(arguments.repeats):
        for name, side in SIDES.items():
            command = [sys.executable, "-W", "ignore", __file__, "--folder", str(arguments.folder), "--side", side]
            command += ["--prepared", str(prepared), "--hidden", str(hidden), "--threads", str(arguments.threads)]
            command += ["--epochs", str(arguments.epochs)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            runs[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"{name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    return runs


def _end_to_end(side: str, prepared: Path, hidden: int, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    train = _theirs if side == "scvi-tools" else _ours
    with train(side, prepared, hidden, arguments.epochs) as (work, steps):
        wall, cpu = time.perf_counter(), time.process_time()
        elbo, libraries = work()
        taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    peak_bytes = int(peak.split()[1]) * 1024
    return {**taken, "steps": steps, "elbo_validation": elbo, "peak": peak_bytes, "libraries": libraries}


@contextmanager
def _theirs(side: str, prepared: Path, hidden: int, epochs: int) -> Iterator[tuple[Work, int]]:
    import anndata as ad
    import lightning
    import scvi

    cells = ad.read_h5ad(prepared)
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    lightning.seed_everything(0, verbose=False)
    model = scvi.model.SCVI(cells, n_hidden=hidden, n_latent=LATENT, gene_likelihood="nb")

    def train() -> tuple[float, Any]:
        model.train(
            max_epochs=epochs,
            batch_size=BATCH_SIZE,
            train_size=0.9,
            check_val_every_n_epoch=1,
            plan_kwargs={"lr": 1e-4, "n_epochs_kl_warmup": 20},
            enable_progress_bar=False,
        )
        return float(model.history["elbo_validation"].iloc[-1, 0]), None

    yield train, epochs * -(-int(0.9 * cells.n_obs) // BATCH_SIZE)


@contextmanager
def _ours(side: str, prepared: Path, hidden: int, epochs: int) -> Iterator[tuple[Work, int]]:
    import lightning
    import torch.utils.tensorboard  # noqa: F401 - Lightning would import it during the timed training

    from census_scvi.counts.data_module import PreparedDataModule
    from census_scvi.model.build import build_model
    from census_scvi.settings import Config
    from census_scvi.training.fast import negative_binomial
    from census_scvi.training.fit import fit

    negative_binomial.compiled_kernel("cpu")  # compile the kernel before the timed training
    settings = Config().train.model_copy(
        update={"max_epochs": epochs, "batch_size": BATCH_SIZE, "engine": side.removeprefix("ours-")}
    )
    data = PreparedDataModule(prepared, batch_size=BATCH_SIZE, train_size=0.9, seed=0, workers=1)
    lightning.seed_everything(0, verbose=False)
    model = build_model(
        data.cells.genes, data.cells.batches, {"n_hidden": hidden, "n_latent": LATENT, "gene_likelihood": "nb"}
    )
    with tempfile.TemporaryDirectory() as folder:

        def train() -> tuple[float, Any]:
            curves = fit(
                model,
                data,
                settings,
                {"lr": 1e-4, "n_epochs_kl_warmup": 20},
                seed=0,
                checkpoint=Path(folder, "checkpoint.ckpt"),
                tensorboard=Path(folder, "tensorboard"),
            )
            return curves.curves["elbo_validation"][-1], curves.libraries

        yield train, epochs * -(-data.n_train // BATCH_SIZE)


def _training_table(runs: dict[str, list[dict[str, Any]]], hidden: int) -> str:
    lines = [f"\n{hidden} hidden, whole trainings, medians of {len(next(iter(runs.values())))}"]
    lines += [
        "| trained by | CPU s a minibatch | wall s a minibatch | peak GB | CPU, wall relative to it | elbo_validation |"
    ]
    lines.append("|---" * 6 + "|")
    medians = {
        name: {key: statistics.median(run[key] for run in some) for key in some[0] if key != "libraries"}
        for name, some in runs.items()
    }
    theirs = next(iter(medians.values()))
    for name, taken in medians.items():
        less = f"{theirs['cpu'] / taken['cpu']:.2f}, {theirs['wall'] / taken['wall']:.2f}"
        lines.append(
            f"| {name} | {taken['cpu'] / taken['steps']:.3f} | {taken['wall'] / taken['steps']:.3f} |"
            f" {taken['peak'] / 1e9:.2f} | {less} | {taken['elbo_validation']:.1f} |"
        )
    return "\n".join(lines)


# Environment variables that restrict the instruction sets of the libraries, to measure without them.
LIMITS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "NUMBA_CPU_NAME",
    "NUMBA_CPU_FEATURES",
)


def _machine() -> str:
    from importlib.metadata import version

    import torch

    from census_scvi.workspace.provenance import processor

    packages = ", ".join(f"{name} {version(name)}" for name in ("scvi-tools", "torch", "lightning", "numba"))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    limits = "".join(f", {name}={os.environ[name]}" for name in LIMITS if name in os.environ)
    return f"{processor()}{limits}, {os.cpu_count()} cores{gpu}; Python {platform.python_version()}, {packages}"


if __name__ == "__main__":
    main()
