"""scNym's method here and in scNym itself: one training step from equal weights, and the accuracy on real blood.

    python benchmarks/scnym_equivalence.py --original CHECKOUT [--data FOLDER --seeds 0 1 2 3 4]

CHECKOUT is a checkout of https://github.com/calico/scnym. Of the packages that it imports, torchvision and tensorboardX
need not be installed: the little that is used of them is replaced. With --data, the folder of pbmc_multi_human.h5ad,
both transfer the types of pbmc3k and FACS-sorted blood to Kang et al., with the same cells, genes and values.
docs/scnym.md has the results.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
import torch
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split

from census_scvi.annotation.scnym.cells import InMemory, log_cpm, to_tensor
from census_scvi.annotation.scnym.interpret import expected_gradients
from census_scvi.annotation.scnym.mixmatch import cross_entropy, sharpen
from census_scvi.annotation.scnym.module import ScNymModule
from census_scvi.annotation.scnym.network import CellTypeClassifier, normalized
from census_scvi.annotation.scnym.settings import PRESETS, Hyperparameters, hyperparameters
from census_scvi.annotation.scnym.training import UNLABELLED, train

REFERENCE, QUERY = ("pbmc3k", "zheng_facs"), "kang_GSE96583"
_SAME = 1e-4  # largest relative difference that rounding of float32 explains
_SEED = 1


def original(checkout: Path) -> types.SimpleNamespace:
    """The modules of a checkout of scNym."""
    transforms = types.ModuleType("torchvision.transforms")
    transforms.Compose = _Compose  # type: ignore[attr-defined]  # a module made here has no declared names
    torchvision = types.ModuleType("torchvision")
    torchvision.transforms = transforms  # type: ignore[attr-defined]  # as above
    tensorboard = types.ModuleType("tensorboardX")
    tensorboard.SummaryWriter = object  # type: ignore[attr-defined]  # as above
    sys.modules |= {"torchvision": torchvision, "torchvision.transforms": transforms, "tensorboardX": tensorboard}
    sys.path.insert(0, str(checkout))
    from scnym import api, dataprep, interpret, losses, model, trainer

    return types.SimpleNamespace(
        api=api, dataprep=dataprep, interpret=interpret, losses=losses, model=model, trainer=trainer
    )


class _Compose:
    """What scNym uses of torchvision: functions one after another."""

    def __init__(self, steps: list[Callable[[Any], Any]]) -> None:
        self._steps = steps

    def __call__(self, sample: Any) -> Any:
        for step in self._steps:
            sample = step(sample)
        return sample


# --- one step


@dataclass(frozen=True)
class Row:
    """A quantity of both implementations."""

    quantity: str
    difference: float
    exception: str = ""

    @property
    def unexpected(self) -> bool:
        """Whether it differs by more than rounding, and no defect of the original explains it."""
        return not self.exception and not self.difference <= _SAME


def compare(quantity: str, ours: Any, theirs: Any, exception: str = "") -> Row:
    """Largest difference, relative to the largest value of both."""
    one, other = (
        np.asarray(values.detach() if isinstance(values, torch.Tensor) else values) for values in (ours, theirs)
    )
    if one.shape != other.shape:
        return Row(f"{quantity}, shape {one.shape} and {other.shape}", float("nan"), exception)
    scale = max(float(np.abs(other).max()), float(np.abs(one).max()), 1e-30)
    return Row(quantity, float(np.abs(one.astype(float) - other.astype(float)).max()) / scale, exception)


N_GENES, N_CLASSES, N_CELLS = 300, 5, 128


def simulated(seed: int) -> tuple[sp.csr_matrix, npt.NDArray[np.int64]]:
    """Counts of cells of five classes, labelled first, unlabelled second."""
    numbers = np.random.default_rng(seed)
    means = numbers.gamma(0.3, 3.0, (N_CLASSES, N_GENES))
    codes = numbers.integers(N_CLASSES, size=2 * N_CELLS)
    shift = np.where(np.arange(2 * N_CELLS)[:, None] < N_CELLS, 1.0, numbers.gamma(2.0, 0.5, N_GENES))
    return sp.csr_matrix(numbers.poisson(means[codes] * shift).astype(np.float32)), codes


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the original's classifier under our names."""
    parts = {"classif.0": "classify", "linear00": "first", "norm00": "first_norm", "linear01": "second",
             "norm01": "second_norm"}  # fmt: skip
    new = {}
    for name, value in weights.items():
        for old, ours in parts.items():
            name = name.replace(old, ours)
        new[name] = value.clone()
    return new


@dataclass
class Pair:
    """A step of both implementations from equal weights with equal cells and random numbers."""

    ours: ScNymModule
    theirs: Any
    trainer: Any
    losses: dict[str, tuple[float, float]]
    before: dict[str, torch.Tensor]


def step(scnym: Any, settings: Hyperparameters, *, seed: int = 0) -> Pair:
    """Let the original's trainer and our module take one step; neither augments."""
    counts, codes = simulated(seed)
    values = log_cpm(to_tensor(counts))
    torch.manual_seed(seed)
    theirs = scnym.model.CellTypeCLF(
        N_GENES, N_CLASSES, n_hidden=settings.n_hidden, n_layers=settings.n_layers, residual=settings.residual
    )
    trainer = original_trainer(scnym, theirs, values.numpy(), codes, settings)
    network = CellTypeClassifier(N_GENES, N_CLASSES, settings)
    network.load_state_dict(renamed(theirs.state_dict()))
    ours = ScNymModule(network, 2, settings)
    adversary = trainer.dan_criterion.dann.domain_clf
    ours.adversary.layers.load_state_dict(adversary.state_dict())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trainer.epoch = 0
    trainer.train_epoch()
    recorded = take_step(ours, counts, codes)
    losses = {name: (recorded[name], float(value)) for name, value in trainer.unsup_criterion.recorded.items()}
    losses["domain"] = (recorded["domain"], float(trainer.dan_criterion.recorded))
    return Pair(ours, theirs, trainer, losses, before)


def original_trainer(
    scnym: Any, network: Any, values: npt.NDArray[np.float32], codes: npt.NDArray[np.int64], settings: Hyperparameters
) -> Any:
    """The original's trainer with one minibatch."""

    class MixMatch(scnym.losses.MixMatchLoss):
        def __call__(self, **arguments: Any) -> Any:
            torch.manual_seed(_SEED)
            found = super().__call__(**arguments)
            self.recorded = {"supervised": found[0].detach(), "unsupervised": found[1].detach()}
            return found

    class Adversary(scnym.losses.DANLoss):
        def __call__(self, **arguments: Any) -> Any:
            found = super().__call__(**arguments)
            self.recorded = found.detach()
            return found

    def loader(rows: slice) -> Any:
        data = scnym.dataprep.SingleCellDS(values[rows], codes[rows], num_classes=N_CLASSES)
        return torch.utils.data.DataLoader(data, batch_size=N_CELLS)

    weight = scnym.losses.ICLWeight
    adversary = Adversary(
        dan_criterion=scnym.losses.cross_entropy,
        model=network,
        use_conf_pseudolabels=settings.dan_use_conf_pseudolabels,
    )
    optimizer = torch.optim.Adadelta(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    optimizer.add_param_group({"params": adversary.dann.domain_clf.parameters()})
    return scnym.trainer.SemiSupervisedTrainer(
        model=network,
        criterion=scnym.losses.cross_entropy,
        optimizer=optimizer,
        dataloaders={"train": loader(slice(N_CELLS)), "val": loader(slice(N_CELLS))},
        out_path=tempfile.mkdtemp(),
        unsup_dataloader=loader(slice(N_CELLS, None)),
        unsup_criterion=MixMatch(
            alpha=settings.mixup_alpha,
            unsup_criterion=torch.nn.MSELoss(reduction="none"),
            sup_criterion=scnym.losses.cross_entropy,
            decay_coef=settings.decay_coef,
            mean_teacher=settings.unsup_mean_teacher,
            augment=scnym.dataprep.identity,
            n_augmentations=1,
            T=settings.T,
            augment_pseudolabels=False,
            pseudolabel_min_confidence=settings.pseudolabel_min_confidence,
        ),
        unsup_weight=weight(ramp_epochs=settings.ramp_epochs, max_unsup_weight=settings.unsup_max_weight),
        dan_criterion=adversary,
        dan_weight=weight(ramp_epochs=settings.dan_ramp_epochs, max_unsup_weight=settings.dan_max_weight, sigmoid=True),
    )


def take_step(ours: ScNymModule, counts: sp.csr_matrix, codes: npt.NDArray[np.int64]) -> dict[str, float]:
    """One step of our module; returns its losses."""
    domains = torch.from_numpy(np.repeat([0, 1], N_CELLS))
    minibatch = {"counts": to_tensor(counts[:N_CELLS]), "codes": torch.from_numpy(codes[:N_CELLS])}
    minibatch |= {"domains": domains[:N_CELLS], "unlabelled_counts": to_tensor(counts[N_CELLS:])}
    minibatch |= {"unlabelled_domains": domains[N_CELLS:]}
    recorded: dict[str, float] = {}

    def record(values: dict[str, torch.Tensor], **_: Any) -> None:
        recorded.update({name: float(value) for name, value in values.items()})

    # Outside of a training, Lightning refuses to log.
    setattr(ours, "log_dict", record)  # noqa: B010  # mypy refuses to assign to a method
    setattr(ours, "log", lambda *_, **__: None)  # noqa: B010  # as above
    optimizer = ours.configure_optimizers()
    ours.train()
    optimizer.zero_grad()
    torch.manual_seed(_SEED)
    ours.training_step(minibatch, 0).backward()
    optimizer.step()
    return {name: recorded[f"{name}_loss"] for name in ("supervised", "unsupervised", "domain")}


def rows_of_step(scnym: Any, title: str, overrides: dict[str, Any]) -> Iterator[Row]:
    """Losses, gradients, batch statistics and weights after a step."""
    full = {"augment": "none", "ramp_epochs": 0, "dan_ramp_epochs": 0} | overrides
    settings = hyperparameters("no_new_identity", full)
    pair = step(scnym, settings)
    for name, (ours, theirs) in pair.losses.items():
        yield compare(f"{title}: {name} loss", ours, theirs)
    gradients = renamed({name: value.grad for name, value in pair.theirs.named_parameters()})
    weights = renamed(pair.theirs.state_dict())
    mine = dict(pair.ours.network.named_parameters())
    for name in ("embed.0.weight", "embed.4.weight", "embed.8.weight", "classify.weight"):
        if name in mine:
            yield compare(f"{title}: gradient of {name}", mine[name].grad, gradients[name])
    everything = (
        torch.cat([values[name].flatten() for name in mine])
        for values in ({n: p.grad for n, p in mine.items()}, gradients)
    )
    yield compare(f"{title}: gradients of all {sum(p.numel() for p in mine.values()):,} weights", *everything)
    adversary = pair.trainer.dan_criterion.dann.domain_clf
    yield compare(
        f"{title}: gradient of the adversary", pair.ours.adversary.layers[0].weight.grad, adversary[0].weight.grad
    )
    state = pair.ours.network.state_dict()

    def moved(values: Any) -> torch.Tensor:
        return torch.cat([(values[name] - pair.before[name]).flatten() for name in mine])

    yield compare(f"{title}: change of the weights (Adadelta)", moved(state), moved(weights))
    statistics = [name for name in state if "running" in name]
    yield compare(
        f"{title}: statistics of batch normalisation",
        torch.cat([state[name] for name in statistics]),
        torch.cat([weights[name] for name in statistics]),
    )


def rows_of_parts(scnym: Any) -> Iterator[Row]:
    """Input, augmentation, sharpening, schedules, network; and the defects that are not shared."""
    counts, codes = simulated(2)
    dense = torch.from_numpy(counts.toarray())
    theirs = scnym.dataprep.LibrarySizeNormalize()({"input": dense.clone()})["input"]
    values = log_cpm(to_tensor(counts))
    yield compare("input: log(CPM + 1) of counts", values, theirs)
    mask = torch.rand(dense.shape) >= 0.1
    drop = scnym.dataprep.LibrarySizeNormalize()({"input": torch.expm1(values) * mask / 0.9})["input"]
    yield compare("augmentation: a tenth of the values dropped", normalized(dense * mask).log1p(), drop)
    probability = torch.rand(50, 7).softmax(dim=1)
    yield compare(
        "pseudolabels: sharpening", sharpen(probability, 0.5), scnym.losses.sharpen_labels(probability.clone(), 0.5)
    )
    for title, settings in PRESETS.items():
        if settings.unsup_max_weight:
            ramps = scnym.losses.ICLWeight(settings.ramp_epochs, settings.burn_in_epochs, settings.unsup_max_weight)
            mine, other = zip(*((settings.unsupervised_weight(e), ramps(e)) for e in range(150)), strict=True)
            yield compare(f"{title}: weight of pseudolabels, epochs 0-149", mine, other)
            ramps = scnym.losses.ICLWeight(settings.dan_ramp_epochs, 0, settings.dan_max_weight, sigmoid=True)
            mine, other = zip(*((settings.domain_weight(e), ramps(e)) for e in range(150)), strict=True)
            yield compare(f"{title}: weight of the adversary, epochs 0-149", mine, other)
    for overrides in ({}, {"residual": True}, {"n_hidden": 64}):
        settings = hyperparameters("no_new_identity", overrides)
        other = scnym.model.CellTypeCLF(N_GENES, N_CLASSES, **overrides)
        network = CellTypeClassifier(N_GENES, N_CLASSES, settings)
        network.load_state_dict(renamed(other.state_dict()))
        title = ", ".join(f"{name} {value}" for name, value in overrides.items()) or "published settings"
        network.eval(), other.eval()
        yield compare(f"network, {title}: probabilities", network(values).softmax(1), other(values).softmax(1))
        yield compare(f"network, {title}: embedding (X_scnym)", network.penultimate(values), other.embed[:-1](values))
    for n_layers in (3, 4):
        number = [
            sum(p.numel() for p in model.parameters())
            for model in (
                CellTypeClassifier(N_GENES, N_CLASSES, hyperparameters("no_new_identity", {"n_layers": n_layers})),
                scnym.model.CellTypeCLF(N_GENES, N_CLASSES, n_layers=n_layers),
            )
        ]
        yield compare(f"network, n_layers {n_layers}: number of weights", *number, "3: the original repeats one layer")
    yield from rows_of_defects(scnym, counts, codes, values)


def rows_of_defects(
    scnym: Any, counts: sp.csr_matrix, codes: npt.NDArray[np.int64], values: torch.Tensor
) -> Iterator[Row]:
    """Where both must differ."""
    empty = torch.zeros(1, N_GENES)
    theirs = scnym.dataprep.LibrarySizeNormalize()({"input": empty.clone()})["input"]
    yield compare("input: a cell without counts", normalized(empty).log1p(), theirs, "9: the original's is NaN")
    settings = PRESETS["no_new_identity"]
    torch.manual_seed(0)
    other = scnym.model.CellTypeCLF(N_GENES, N_CLASSES)
    network = CellTypeClassifier(N_GENES, N_CLASSES, settings)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    network.load_state_dict(renamed(before))
    other.eval(), network.eval()

    labels = torch.nn.functional.one_hot(torch.from_numpy(codes), N_CLASSES).float()
    per_cell = scnym.losses.cross_entropy(other(values), labels, reduction="none")
    parts = per_cell.split(200)
    of_original = np.mean([float(part.mean()) / len(part) for part in parts]) * 200
    yield compare("validation loss of 256 cells in minibatches of 200", float(per_cell.mean()), of_original,
                  "13: the original divides by the size of each minibatch twice")  # fmt: skip

    adversary = scnym.losses.DANLoss(dan_criterion=scnym.losses.cross_entropy, model=other)
    augmented = {"input": values[:N_CELLS].clone(), "output": labels[:N_CELLS]}
    augmented = scnym.dataprep.AUGMENTATION_SCHEMES["log1p_drop"](augmented)
    raw = {"input": values[:N_CELLS]}
    unlabelled = {"input": values[N_CELLS:]}
    loss = [float(adversary(labeled_sample=sample, unlabeled_sample=unlabelled)) for sample in (raw, augmented)]
    yield compare("loss of the adversary with augmentation", *loss, "14: the original augments one domain only")

    one = {"input": values[:N_CELLS], "output": labels[:N_CELLS]}
    supervised = float(scnym.losses.scNymCrossEntropy()(labeled_sample=one, unlabeled_sample=None, model=other))
    mine = float(cross_entropy(network(values[:N_CELLS]), labels[:N_CELLS]).mean())
    twice = "the original applies softmax twice"
    yield compare("supervised loss with domains and without unlabelled cells", mine, supervised, twice)

    average = scnym.losses.MixMatchLoss(
        unsup_criterion=None, sup_criterion=None, mean_teacher=True, augment=scnym.dataprep.identity
    )
    average._update_teacher(other)
    other.train()(values)
    average._update_teacher(other)
    other.eval()
    kept = "the original keeps those of the first step"
    teacher = average.teacher.embed[1].running_mean
    yield compare("mean teacher, second step: batch statistics", other.embed[1].running_mean, teacher, kept)

    names = np.array([f"type {code}" for code in codes], dtype=object)
    classes = sorted(set(names))
    genes = [f"gene {number}" for number in range(N_GENES)]
    short = hyperparameters("supervised", {"n_epochs": 20, "batch_size": 64})
    classifier = train(InMemory(counts), genes, names, short, accelerator="cpu").classifier
    mine = classifier.network.state_dict()
    other.load_state_dict({name: mine[next(iter(renamed({name: value})))] for name, value in before.items()})
    found = expected_gradients(classifier, InMemory(counts), genes, names, classes[0], n_samples=200)
    explainer = scnym.interpret.ExpectedGradient(model=other, gene_names=np.array(genes), class_names=np.array(classes))
    obs = pd.DataFrame({"type": names.astype(str)}, index=[str(number) for number in range(len(names))])
    cells = ad.AnnData(values.numpy(), obs=obs, var=pd.DataFrame(index=genes))
    explainer.query(cells, target=classes[0], source="all", cell_type_col="type", n_batches=200)
    sums = [float(table.sum(axis=1).mean()) for table in (found.gradients, explainer.gradients)]
    exact = float(found.difference.mean())
    yield compare(
        "expected gradients: sum and difference of outputs, here", sums[0], exact, "random choice of references"
    )
    yield compare("expected gradients: sum, original", sums[0], sums[1], "11: the original takes absolute differences")


def table_of_step(scnym: Any) -> tuple[list[str], bool]:
    """Markdown lines, and whether all is as expected."""
    rows = list(rows_of_parts(scnym))
    rows += rows_of_step(scnym, "no_new_identity", {})
    confident = {"pseudolabel_min_confidence": 0.3, "dan_use_conf_pseudolabels": True}
    rows += rows_of_step(scnym, "new_identity_discovery, confidence 0.3", confident)
    rows += rows_of_step(scnym, "mean teacher", {"unsup_mean_teacher": True})
    rows += rows_of_step(scnym, "residual", {"residual": True})
    lines = ["| quantity | largest relative difference | |", "|---|---|---|"]
    for row in rows:
        word = row.exception or ("**differs**" if row.unexpected else "equal")
        lines.append(f"| {row.quantity} | {row.difference:.1e} | {word} |")
    return lines, not any(row.unexpected for row in rows)


# --- accuracy


def blood(folder: Path, n_reference: int, n_genes: int) -> tuple[ad.AnnData, int]:
    """Reference cells, then query cells of types that the reference has; the reference's variable genes. Raw counts."""
    cells = ad.read_h5ad(folder / "pbmc_multi_human.h5ad")
    types_, study = (cells.obs[name].astype(str).to_numpy() for name in ("cell_type_coarse", "dataset"))
    reference = np.flatnonzero(np.isin(study, REFERENCE) & (types_ != "unknown"))
    query = np.flatnonzero((study == QUERY) & np.isin(types_, np.unique(types_[reference])))
    if n_reference < len(reference):
        reference = np.sort(
            train_test_split(reference, train_size=n_reference, stratify=types_[reference], random_state=0)[0]
        )
    measured = cells.var[[f"measured_in_{name}" for name in (*REFERENCE, QUERY)]].all(axis=1).to_numpy()
    chosen = cells[reference, measured].copy()
    sc.pp.filter_genes(chosen, min_cells=3)
    sc.pp.highly_variable_genes(chosen, n_top_genes=n_genes, flavor="seurat_v3", batch_key="dataset")
    genes = chosen.var_names[chosen.var["highly_variable"]]
    return cells[np.concatenate([reference, query]), genes].copy(), len(reference)


def run_ours(cells: ad.AnnData, labels: npt.NDArray[np.object_], preset: str, seed: int) -> npt.NDArray[Any]:
    """Labels of the query cells."""
    counts, genes = sp.csr_matrix(cells.X, dtype=np.float32), list(cells.var_names)
    torch.set_num_threads(1)  # scanpy's compiled functions reset it to the number of cores
    trained = train(InMemory(counts), genes, labels, PRESETS[preset], seed=seed, accelerator="cpu")
    query = InMemory(counts[labels == UNLABELLED])
    return trained.classifier.predict(query, genes, accelerator="cpu").labels


def run_original(
    scnym: Any, cells: ad.AnnData, labels: npt.NDArray[np.object_], preset: str, seed: int
) -> npt.NDArray[Any]:
    """The same with the original."""
    cells = cells.copy()
    cells.X = sp.csr_matrix(cells.X, dtype=np.float32)
    sc.pp.normalize_total(cells, target_sum=1e6)
    sc.pp.log1p(cells)
    cells.obs["labels"] = labels.astype(str)
    torch.set_num_threads(1)
    np.random.seed(seed)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder, quiet():
        scnym.api.scnym_api(cells, task="train", groupby="labels", out_path=folder, config=preset)
        scnym.api.scnym_api(cells, task="predict", trained_model=folder, config=preset)
    return cells.obs["scNym"].to_numpy(dtype=object)[labels == UNLABELLED]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the original prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def accuracy(scnym: Any, options: argparse.Namespace) -> list[str]:
    """Markdown lines."""
    cells, n_reference = blood(options.data, options.cells, options.genes)
    truth = cells.obs["cell_type_coarse"].astype(str).to_numpy(dtype=object)
    labels = truth.copy()
    labels[n_reference:] = UNLABELLED
    lines = [f"{n_reference:,} reference cells, {len(cells) - n_reference:,} query cells, {cells.n_vars:,} genes", "",
             "| preset | | " + " | ".join(f"seed {seed}" for seed in options.seeds) + " | mean | macro F1 | CPU s |",
             "|---" * (len(options.seeds) + 5) + "|"]  # fmt: skip
    for preset in options.presets:
        for name, run in {"here": run_ours, "original": lambda *arguments: run_original(scnym, *arguments)}.items():
            scores = []
            for seed in options.seeds:
                started = time.process_time()
                found = run(cells, labels, preset, seed)
                seconds = time.process_time() - started
                right, predicted = truth[n_reference:].astype(str), found.astype(str)
                f1 = f1_score(right, predicted, average="macro", labels=np.unique(right), zero_division=0)
                scores.append((accuracy_score(right, predicted), f1, seconds))
                print(preset, name, seed, "{:.3f} {:.3f} {:.0f}".format(*scores[-1]), file=sys.stderr, flush=True)
            means = np.mean(scores, axis=0)
            each = " | ".join(f"{score[0]:.3f}" for score in scores)
            lines.append(f"| {preset} | {name} | {each} | {means[0]:.3f} | {means[1]:.3f} | {means[2]:.0f} |")
    return lines


def main() -> None:
    """Print the tables; exit code 1 if a step differs without a known reason."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", type=Path, required=True, help="checkout of calico/scnym")
    parser.add_argument("--data", type=Path, help="folder of pbmc_multi_human.h5ad; without it, only the step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--presets", nargs="+", default=["no_new_identity", "new_identity_discovery"])
    parser.add_argument("--cells", type=int, default=3000, help="reference cells, with the same shares of the types")
    parser.add_argument("--genes", type=int, default=1500)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    scnym = original(options.original)
    with quiet():
        lines, as_expected = table_of_step(scnym)
    print("\n".join(lines))
    if options.data:
        print()
        print("\n".join(accuracy(scnym, options)))
    sys.exit(0 if as_expected else 1)


if __name__ == "__main__":
    main()
