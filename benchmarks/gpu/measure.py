"""GPU benchmarks: equality of results, profile of the training, cells per second.

    python measure.py RESULTS cells   --prepared FILE.h5ad [--cells 100000] [--genes 8000]   makes the file
    python measure.py RESULTS check                         the step compared with scvi-tools' on the GPU, every variant
    python measure.py RESULTS kernel                        the loss' kernel compared with torch in float64; rates
    python measure.py RESULTS profile --prepared FILE.h5ad  where the time of 20 steps goes, and what the CPU waits for
                                      [--precision float32 tf32 bf16]
    python measure.py RESULTS rates   --prepared FILE.h5ad [--hidden 512 128] [--threads 1 8] cells/s of training
    python measure.py RESULTS latent  --prepared FILE.h5ad                                   cells/s of embedding

Run it in the root of the repository with census_scvi importable. Several measurements can be given. The script prints
tables; RESULTS/measure.json has all numbers. Without a GPU, everything runs on the CPU at a small size, which tests
only the script.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

GPU = torch.cuda.is_available()
sys.path[:0] = ["benchmarks", "tests"]
DEVICE = torch.device("cuda" if GPU else "cpu")
LATENT, MINIBATCH = 50, 1024
REDUCED = ("tf32", "bf16", "fp16")


def main() -> None:
    """Run the measurements one after another."""
    arguments = parse_arguments()
    if not GPU:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    arguments.results.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    for what in arguments.what:
        found = globals()[what](arguments)
        file = arguments.results / "measure.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        kept |= {"device": torch.cuda.get_device_name() if GPU else "CPU", "torch": torch.__version__}
        file.write_text(json.dumps({**kept, what: found}, indent=1, default=str))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("what", nargs="+", choices=("cells", "check", "kernel", "profile", "rates", "latent"))
    parser.add_argument("--prepared", type=Path)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=8_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4, 8, 12])
    parser.add_argument("--precision", nargs="+", default=["float32"])
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 128])
    return parser.parse_args()


def table(title: str, header: list[str], rows: list[list[Any]]) -> None:
    """Print a table in Markdown."""
    print(f"\n{title}\n| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for row in rows:
        print(f"| {' | '.join(f'{cell:,.3g}' if isinstance(cell, float) else str(cell) for cell in row)} |", flush=True)


def wait() -> None:
    """Wait until the GPU has finished all work."""
    if GPU:
        torch.cuda.synchronize()


# --- simulated cells


def cells(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write a prepared file of any number of cells: 12,000 simulated cells, repeated in different orders."""
    import anndata as ad
    import numpy as np
    import pandas as pd
    from train_step import make_up_cells

    from census_scvi.counts.writer import H5adWriter

    started, rng = time.perf_counter(), np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder, "few.h5ad")
        make_up_cells(few, min(12_000, arguments.cells), arguments.genes)
        made = ad.read_h5ad(few)
    codes, labels = made.obs["batch"].cat.codes.to_numpy(), made.obs["batch"].cat.categories
    with H5adWriter(arguments.prepared, pd.DataFrame(index=made.var_names)) as file:
        for start in range(0, arguments.cells, made.n_obs):
            order = rng.permutation(made.n_obs)[: arguments.cells - start]
            batch = pd.Categorical.from_codes(codes[order], labels)
            obs = pd.DataFrame({"batch": batch}, index=[str(i) for i in range(start, start + len(order))])
            file.append(obs, counts=made.X[order])
    seconds = time.perf_counter() - started
    print(f"{arguments.prepared}: {arguments.cells:,} cells x {arguments.genes:,} genes, made in {seconds:.0f} s")
    return {"cells": arguments.cells, "genes": arguments.genes, "seconds": seconds}


# --- equality of results


def check(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare loss, gradients and random numbers of the step with scvi-tools' module, both in float32 on the device."""
    import test_fast_step as tests

    from census_scvi.training.fast.step import step

    found, rows = [], []
    for name, values in tests.VARIANTS.items():
        for size, largest in tests.COUNTS.items():
            module = tests.make(torch.float32, **values).to(DEVICE)
            ours, theirs = tests.minibatches(tests.some_counts(largest=largest), 3, torch.float32)
            seen: list[Any] = []
            for minibatch in (ours, theirs):
                copied = copy.deepcopy(module).train()
                moved = {key: value.to(DEVICE) for key, value in minibatch.items()}
                torch.manual_seed(3)
                shipped = minibatch is theirs
                losses = copied(moved, loss_kwargs={"kl_weight": 0.4})[2] if shipped else step(copied, moved, 0.4)
                losses.loss.backward()
                gradients = {key: value.grad for key, value in copied.named_parameters() if value.grad is not None}
                random = torch.cuda.get_rng_state() if GPU else torch.get_rng_state()
                seen.append((losses.loss.item(), gradients, random))
            (loss, gradients, random), (wanted, wanted_gradients, wanted_random) = seen
            whole = torch.cat([value.flatten() for value in wanted_gradients.values()]).norm()
            worst = 0.0
            for key, gradient in gradients.items():
                difference, norm = (gradient - wanted_gradients[key]).norm(), wanted_gradients[key].norm()
                if difference > 1e-6 * whole:  # less is rounding: inputs of a BatchNorm have zero gradient
                    worst = max(worst, (difference / norm).item())
            of_loss, same = abs(loss - wanted) / abs(wanted), torch.equal(random, wanted_random)
            good = of_loss < 1e-5 + largest * 6e-8 / abs(wanted) and worst < 1e-3 and same
            found.append({"variant": name, "counts": size, "loss": of_loss, "gradients": worst, "random numbers": same})
            rows.append([name, size, of_loss, worst, "same" if same else "OTHER", "ok" if good else "DIFFERS"])
    table(
        "The step compared with scvi-tools', float32: relative differences (gradients: the worst parameter's, by norm)",
        ["variant", "counts", "loss", "gradients", "random numbers", ""],
        [row for row in rows if row[-1] != "ok"]
        or [["all", "all", *map(max, zip(*(r[2:4] for r in rows), strict=True)), "same", "ok"]],
    )
    return found


def kernel(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the loss kernel with torch in float64; measure its time, other block sizes, and rates of the GPU."""
    from census_scvi.counts.minibatch import SparseCounts
    from census_scvi.training.fast import gpu_kernel, torch_kernel
    from census_scvi.training.fast.decoded import Decoded

    n_cells, n_genes = (MINIBATCH, arguments.genes) if GPU else (6, 90)  # the interpreter of Triton 3.6: numpy < 2.4
    torch.manual_seed(0)
    there = torch.rand(n_cells, n_genes, device=DEVICE) < 0.15
    x = (1 + torch.empty(int(there.sum()), device=DEVICE).exponential_(0.5)).floor().to(torch.uint16)
    counts = SparseCounts(there.sum(1), there.nonzero()[:, 1].to(torch.uint16), x, n_genes)
    logits, zeros = 2 * torch.randn(n_cells, n_genes, device=DEVICE), torch.randn(n_cells, n_genes, device=DEVICE)

    def decoded(
        theta: torch.Tensor, row_of_cell: torch.Tensor, inflated: bool, dtype: torch.dtype = torch.float32
    ) -> Decoded:
        tensors = [each.to(dtype, copy=True) for each in (logits, theta, zeros)]
        return Decoded(*tensors[:2], row_of_cell, counts, tensors[2] if inflated else None)

    found: dict[str, Any] = {"rates": rates_of_gpu(n_genes) if GPU else {}}
    rows = []
    for inflated in (False, True):
        for n_rows in (1, 4):
            theta = torch.randn(n_rows, n_genes, device=DEVICE).exp()
            row_of_cell = torch.arange(n_cells, device=DEVICE) % n_rows
            make = partial(decoded, theta, row_of_cell, inflated)

            exact, plain = torch_kernel.loss_and_slopes(make(torch.float64)), torch_kernel.loss_and_slopes(make())
            made = gpu_kernel.loss_and_slopes(make())
            name = f"{'zinb' if inflated else 'nb'}, {n_rows} row(s) of theta"
            errors = [[_error(a, c), _error(b, c)] for a, b, c in zip(made, plain, exact, strict=True) if c is not None]
            times: dict[str, float] = {}
            if GPU:
                for label, module in (("kernel", gpu_kernel), ("torch", torch_kernel)):
                    some = make()
                    times[label] = _milliseconds(lambda m=module, s=some: m.loss_and_slopes(s))
            found[name] = {"errors of kernel and of torch": errors, "ms": times}
            worst = [max(error[side] for error in errors) for side in (0, 1)]
            moved = 8 * n_cells * n_genes * (1 + inflated) + 4 * len(x)
            share = moved / found["rates"]["bytes/s"] / (times["kernel"] / 1e3) if GPU else 0.0
            ok = "ok" if worst[0] < max(1e-5, 4 * worst[1]) else "DIFFERS"
            rows.append([name, *worst, ok, times.get("kernel", 0.0), times.get("torch", 0.0), f"{share:.0%}"])
    header = ["", "kernel's error", "torch's", "", "kernel ms", "torch ms", "share of the copy's bandwidth"]
    table("Loss and slopes compared with float64, largest of |out - exact| / |exact|", header, rows)
    found["shapes"] = _shapes(gpu_kernel, lambda: Decoded(logits.clone(), theta[:1].clone(), row_of_cell * 0, counts))
    return found


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    error = ((found.double() - exact).norm() / exact.norm()).item()
    return error if error == error else float("inf")


def _milliseconds(work: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return do_bench(work, warmup=50, rep=200, return_mode="median")


def _shapes(module: Any, make: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of the kernel (nb, one row) by cells per program, genes per block and warps."""
    if not GPU:
        return {}
    taken: dict[str, float] = {}
    shipped = f"{module._CELLS_A_PROGRAM} cells, {module._BLOCK} genes, {module._WARPS} warps"
    for n_cells in (1, 2, 4, 8):
        for block, warps in ((512, 4), (1024, 4), (1024, 8), (2048, 8), (2048, 16)):
            with patch.multiple(module, _CELLS_A_PROGRAM=n_cells, _BLOCK=block, _WARPS=warps):
                some = make()
                taken[f"{n_cells} cells, {block} genes, {warps} warps"] = _milliseconds(
                    lambda s=some: module.loss_and_slopes(s)
                )
    best = sorted(taken, key=taken.get)[:4]
    rows = [[name, taken[name]] for name in dict.fromkeys([*best, shipped])]
    table(f"Shapes of the kernel (shipped: {shipped})", ["a program", "ms"], rows)
    return taken


def rates_of_gpu(n_genes: int) -> dict[str, Any]:
    """Bytes/s of a copy of 1 GB, and the time of the five products of a step in each precision."""
    large = torch.randn(2**27, device=DEVICE)
    other = torch.empty_like(large)
    rates: dict[str, Any] = {"bytes/s": 8 * large.numel() / (_milliseconds(lambda: other.copy_(large)) / 1e3)}
    rows = []
    for hidden in (512, 128):
        for name, dtype, precision in (
            ("float32", torch.float32, "highest"),
            ("tf32", torch.float32, "high"),
            ("bf16", torch.bfloat16, "highest"),
        ):
            torch.set_float32_matmul_precision(precision)
            narrow = torch.randn(MINIBATCH, hidden, device=DEVICE, dtype=dtype)
            weight = torch.randn(n_genes, hidden, device=DEVICE, dtype=dtype)
            wide = torch.randn(MINIBATCH, n_genes, device=DEVICE, dtype=dtype)
            # Encoder and its weights' gradient; decoder, its weights' gradient and its input's gradient.
            taken = 2 * _milliseconds(lambda a=wide, b=weight: a @ b) + _milliseconds(
                lambda a=narrow, b=weight: a @ b.T
            )
            taken += 2 * _milliseconds(lambda a=wide, b=narrow: a.T @ b)
            rates[f"products, {hidden} hidden, {name}: ms"] = taken
            rows.append([hidden, name, taken, 10 * MINIBATCH * n_genes * hidden / taken / 1e9])
        torch.set_float32_matmul_precision("highest")
    table(
        f"A step's five products; a copy moves {rates['bytes/s'] / 1e12:.2f} TB/s (read and written)",
        ["hidden", "in", "ms", "TFLOP/s"],
        rows,
    )
    return rates


# --- whole trainings


def warm(n_genes: int) -> None:
    """Compile the kernel for all arguments of a training, so that compilation is not measured."""
    from census_scvi.counts.minibatch import SparseCounts
    from census_scvi.training.fast import gpu_kernel
    from census_scvi.training.fast.decoded import Decoded
    from census_scvi.training.fast.negative_binomial import loss_and_slopes

    for n_cells in (MINIBATCH, MINIBATCH - 1):  # Triton compiles separately for multiples of 16
        for more in (0, 1):
            n_detected = torch.full((n_cells,), 16, device=DEVICE)
            n_detected[0] += more
            genes = torch.cat([torch.arange(int(n), device=DEVICE) for n in n_detected.tolist()]).to(torch.uint16)
            counts = SparseCounts(n_detected, genes, torch.ones(len(genes), device=DEVICE).to(torch.uint16), n_genes)
            logits, theta = torch.zeros(n_cells, n_genes, device=DEVICE), torch.ones(1, n_genes, device=DEVICE)
            for slopes in (True, False):
                cells = torch.zeros(n_cells, dtype=torch.int64, device=DEVICE)
                loss_and_slopes(Decoded(logits, theta, cells, counts), slopes=slopes)
            if GPU:
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    gpu_kernel.log_counts(counts, dtype)
    wait()


def training(
    prepared: Path, hidden: int, probe: Any, *, workers: int = 8, in_memory: bool = False, **settings: Any
) -> float:
    """Seconds of this project's training, with `probe` among the callbacks."""
    from census_scvi.counts.data_module import PreparedDataModule
    from census_scvi.model.build import build_model
    from census_scvi.settings import Config
    from census_scvi.training import fit as project

    chosen = Config().train.model_copy(update={"batch_size": MINIBATCH, "engine": "fast", "max_epochs": 1, **settings})
    data = PreparedDataModule(prepared, batch_size=chosen.batch_size, train_size=0.9, seed=0, workers=workers)
    data.in_memory = in_memory
    torch.manual_seed(0)
    arguments = {"n_hidden": hidden, "n_latent": LATENT, "gene_likelihood": "nb"}
    model = build_model(data.cells.genes, data.cells.batches, arguments)
    with tempfile.TemporaryDirectory() as folder, patch.object(project, "TrainMode", lambda: probe):
        started = time.perf_counter()
        plan = {"lr": 1e-4, "n_epochs_kl_warmup": 20}
        files = {"checkpoint": Path(folder, "checkpoint.ckpt"), "tensorboard": Path(folder, "tensorboard")}
        project.fit(model, data, chosen, plan, seed=0, **files)
        wait()
        seconds = time.perf_counter() - started
    data.cells.close()
    return seconds


def _n_genes(prepared: Path) -> int:
    return _shape(prepared)[1]


def _n_cells(prepared: Path) -> int:
    return _shape(prepared)[0]


def _shape(prepared: Path) -> tuple[int, int]:
    import h5py

    with h5py.File(prepared) as file:
        n_cells, n_genes = file["X"].attrs["shape"]
        return int(n_cells), int(n_genes)


def probe_class() -> type:
    """Callback class that replaces `TrainMode`: measures cells/s within epochs, and calls functions at given steps."""
    import lightning

    class Probe(lightning.Callback):
        def __init__(self, at: dict[int, Callable[[], None]] | None = None, skip: int = 10) -> None:
            self.spans: list[tuple[int, float]] = []
            self.epochs: list[float] = []
            self.at, self.skip, self.step = at or {}, skip, 0

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            wait()
            self.epochs.append(time.perf_counter())

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.train()

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == min(self.skip, trainer.num_training_batches // 2):
                wait()
                self.cells, self.started = 0, time.perf_counter()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.step += 1
            if batch_idx >= min(self.skip, trainer.num_training_batches // 2):
                self.cells += len(batch["batch"])
                if batch_idx + 1 == trainer.num_training_batches:
                    wait()
                    self.spans.append((self.cells, time.perf_counter() - self.started))
            self.at.get(self.step, lambda: None)()

        def seconds_an_epoch(self) -> float:
            """From the start of an epoch to the start of the next: validation and checkpoint included."""
            spans = [after - before for before, after in pairwise(self.epochs)]
            return statistics.median(spans) if spans else float("nan")

        def rate(self) -> float:
            return statistics.median(cells / seconds for cells, seconds in self.spans)

    return Probe


def rates(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Cells/s within epochs: `SCVI.train` from memory, and this project from the file with many settings."""
    Probe = probe_class()
    if GPU:
        warm(_n_genes(arguments.prepared))
    kinds: dict[str, dict[str, Any]] = {"train.engine scvi-tools": {"engine": "scvi-tools"}}
    kinds |= {f"fast, {n} loader threads": {"workers": n} for n in arguments.threads}
    kinds |= {f"fast, cells in memory, {n} threads": {"workers": n, "in_memory": True} for n in (4, 8)}
    kinds |= {f"fast, cells in memory, {name}": {"precision": name, "in_memory": True} for name in REDUCED}
    kinds |= {
        f"fast, cells in memory, {name}, 4,096 cells per minibatch": {
            "precision": name, "in_memory": True, "batch_size": 4096
        }
        for name in ("float32", "bf16")
    }  # fmt: skip
    if not GPU:
        few = ("train.engine scvi-tools", "fast, 1 loader threads", "fast, cells in memory, bf16")
        kinds = {name: kinds[name] for name in few if name in kinds}
    found = []
    for hidden in arguments.hidden:
        rows = []
        for name, settings in {"SCVI.train, all cells in memory": None, **kinds}.items():
            probe, cpu = Probe(), time.process_time()
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            try:
                if settings is None:
                    seconds = _scvi_tools(arguments.prepared, hidden, probe)
                else:
                    epochs = 2 if settings.get("engine") else 4
                    seconds = training(arguments.prepared, hidden, probe, max_epochs=epochs, **settings)
            except Exception as error:  # continue with the other settings
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
                continue
            memory = torch.cuda.max_memory_allocated() / 1e9 if GPU else 0.0
            found.append(
                {"hidden": hidden, "trained by": name, "cells/s": probe.rate(), "spans": probe.spans}
                | {"seconds": seconds, "CPU s": time.process_time() - cpu, "GPU GB": memory}
            )
            whole = 0.9 * _n_cells(arguments.prepared) / probe.seconds_an_epoch()
            found[-1]["cells/s of whole epochs"] = whole
            rows.append(
                [name, f"{probe.rate():,.0f}", f"{probe.rate() / _first(found, hidden):.1f}", f"{whole:,.0f}", seconds]
            )
            print(rows[-1], f"{memory:.2f} GB", flush=True)
        table(
            f"{hidden} hidden: training cells per second, within an epoch and of whole epochs (with validation and"
            " checkpoint); seconds of all of the training",
            ["trained by", "cells/s", "times SCVI.train", "cells/s of whole epochs", "seconds"],
            rows,
        )
    return found


def _first(found: list[dict[str, Any]], hidden: int) -> float:
    return next(each["cells/s"] for each in found if each["hidden"] == hidden)


def _scvi_tools(prepared: Path, hidden: int, probe: Any) -> float:
    import anndata as ad
    import scvi

    adata = ad.read_h5ad(prepared)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata, n_hidden=hidden, n_latent=LATENT, gene_likelihood="nb")
    started = time.perf_counter()
    model.train(
        max_epochs=2,
        batch_size=MINIBATCH,
        train_size=0.9,
        check_val_every_n_epoch=1,
        plan_kwargs={"lr": 1e-4, "n_epochs_kl_warmup": 20},
        enable_progress_bar=False,
        callbacks=[probe],
    )
    wait()
    return time.perf_counter() - started


# --- profile


def profile(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parts of a step for each size and precision."""
    return {
        f"{hidden} hidden, {precision}": _profile(arguments, hidden, precision)
        for hidden in arguments.hidden
        for precision in (arguments.precision if GPU else ["float32"])
    }


def _profile(arguments: argparse.Namespace, hidden: int, precision: str) -> dict[str, Any]:
    """Measure 20 steps of a training without profiler (time), 20 with profiler (parts), and 5 for CPU waits."""
    from census_scvi.counts import loader

    Probe = probe_class()
    warm(_n_genes(arguments.prepared))
    marks: dict[str, float] = {}
    waits: Counter[str] = Counter()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * GPU
    profiler = torch.profiler.profile(activities=activities)
    trace = arguments.results / f"trace-{hidden}-{precision}.json.gz"
    shown, own = warnings.showwarning, loader.MinibatchLoader.__iter__

    def mark(name: str) -> Callable[[], None]:
        def take() -> None:
            wait()
            marks[name] = time.perf_counter()

        return take

    def start() -> None:
        mark("with the profiler")()
        profiler.start()

    def stop() -> None:
        wait()
        marks["profiler stopped"] = time.perf_counter()
        profiler.stop()
        if GPU:
            torch.cuda.set_sync_debug_mode("warn")
            warnings.simplefilter("always")
            warnings.showwarning = note

    def note(message: Any, *_: Any) -> None:
        if "synchroniz" in str(message):
            libraries = ("/torch/", "warnings.py")
            frames = [f for f in traceback.extract_stack()[:-1] if not any(name in f.filename for name in libraries)]
            waits[" < ".join(f"{'/'.join(f.filename.split('/')[-3:])}:{f.lineno}" for f in frames[:-4:-1])] += 1

    def quiet() -> None:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")
            warnings.simplefilter("ignore")
            warnings.showwarning = shown

    def timed(self: Any) -> Iterator[Any]:
        minibatches = own(self)
        while True:
            with torch.profiler.record_function("the loader"):
                minibatch = next(minibatches, None)
            if minibatch is None:
                return
            yield minibatch

    first = 24 if GPU else 2
    n = 20 if GPU else 2
    at = {first: mark("20 steps"), first + n: start, first + 2 * n: stop, first + 2 * n + 5: quiet}
    with patch.object(loader.MinibatchLoader, "__iter__", timed):
        training(arguments.prepared, hidden, Probe(at), precision=precision)
    if "profiler stopped" not in marks:
        sys.exit(f"an epoch of {arguments.prepared} has fewer than the {first + 2 * n + 5} steps that are looked at")
    profiler.export_chrome_trace(str(trace))
    milliseconds = 1e3 * (marks["with the profiler"] - marks["20 steps"]) / n
    parts = _parts(trace, n)
    slower = 1e3 * (marks["profiler stopped"] - marks["with the profiler"]) / n
    busy = parts["GPU busy"]
    print(
        f"\n{hidden} hidden, {precision}, {n} steps of a whole training: {milliseconds:.2f} ms a step"
        f" ({1e3 * MINIBATCH / milliseconds:,.0f} cells/s); with the profiler {slower:.2f} ms.\n"
        f"The GPU is busy for {busy:.2f} ms of them: idle {max(1 - busy / milliseconds, 0):.0%}."
    )
    table("Parts, ms a step", ["", "ms", "times a step"], parts["rows"])
    if waits:
        table(
            "What the CPU waits for, 5 steps", ["where (innermost first)", "times"], [[k, v] for k, v in waits.items()]
        )
    return {"ms": milliseconds, "ms with the profiler": slower, **parts, "waits in 5 steps": dict(waits)}


def _parts(trace: Path, n: int) -> dict[str, Any]:
    """GPU busy time, kernels, copies, waits and loader time in a trace, as ms and calls per step."""
    with gzip.open(trace) as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    busy, until = 0.0, 0.0
    for event in sorted(on_gpu, key=lambda e: e["ts"]):
        end = event["ts"] + event["dur"]
        busy += max(end - max(event["ts"], until), 0)
        until = max(until, end)
    named: dict[str, list[float]] = {}
    for event in on_gpu:
        named.setdefault(event["name"][:90], []).append(event["dur"])
    for event in events:
        if event.get("cat") == "user_annotation" and (event["name"] == "the loader" or "Optimizer" in event["name"]):
            named.setdefault(f"CPU: {event['name']}", []).append(event["dur"])
        if event.get("cat") == "cuda_runtime" and ("Synchronize" in event["name"] or "Launch" in event["name"]):
            named.setdefault(f"CPU: {event['name']}", []).append(event["dur"])
    order = sorted(named, key=lambda name: -sum(named[name]))[:25]
    return {
        "GPU busy": busy / 1e3 / n,
        "kernels a step": sum(e.get("cat") == "kernel" for e in events) / n,
        "rows": [[name.replace("|", "/"), sum(named[name]) / 1e3 / n, len(named[name]) / n] for name in order],
    }


# --- embedding


def latent(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Cells per second of the encoder on counts in memory, and its largest difference from scvi-tools' latent."""
    import numpy as np

    from census_scvi.counts.reader import PreparedCells
    from census_scvi.model.build import build_model
    from census_scvi.model.encode import Encoder, reference_latent

    found = []
    for hidden in arguments.hidden:
        data = PreparedCells(arguments.prepared)
        n = min(data.n_cells, 65_536 if GPU else 2_000)
        counts = data.read([(0, n)]).csr(data.n_genes)
        torch.manual_seed(0)
        arguments_of_model = {"n_hidden": hidden, "n_latent": LATENT, "gene_likelihood": "nb"}
        model = build_model(data.genes, data.batches, arguments_of_model)
        model.is_trained_ = True
        model.to_device(DEVICE)
        encode = Encoder(model)
        for minibatch in (1024, 4096, 16_384):
            seconds = []
            for _ in range(4):
                started = time.perf_counter()
                made = encode(counts, np.zeros(n, np.int64), minibatch=minibatch)
                seconds.append(time.perf_counter() - started)
            found.append({"hidden": hidden, "minibatch": minibatch, "cells/s": n / min(seconds)})
        few = slice(0, 4096)
        batches, accelerator = [data.batches[0]] * min(n, 4096), "gpu" if GPU else "cpu"
        wanted, _ = reference_latent(model, data.genes, counts[few], batches, accelerator=accelerator)
        found[-1]["largest difference"] = float(np.abs(made.mean[few] - wanted).max())
        data.close()
    rows = [
        [each["hidden"], each["minibatch"], f"{each['cells/s']:,.0f}", each.get("largest difference", "")]
        for each in found
    ]
    table("Embedding of counts in memory", ["hidden", "minibatch", "cells/s", "difference to scvi-tools"], rows)
    return found


if __name__ == "__main__":
    main()
