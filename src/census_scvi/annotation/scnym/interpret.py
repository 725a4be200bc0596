"""Which genes make the classifier predict a class: expected gradients, with captum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from captum.attr import GradientShap

from census_scvi.annotation.scnym.cells import CellSource, in_order, log_cpm, regrouped, to_tensor
from census_scvi.annotation.scnym.classifier import Classifier, device_of
from census_scvi.config.messages import suggestion
from census_scvi.config.random_streams import Stream, draw, generator
from census_scvi.errors import UserError
from census_scvi.model.seeded import seeded
from census_scvi.pictures.canvas import Picture

_REFERENCE_CELLS = 2000
_MOST_VALUES = 2**25  # of the copies of the cells, in memory at a time


@dataclass(frozen=True)
class Attribution:
    """Expected gradients of the output (logit) of a class.

    Attributes
    ----------
    target
        The class.
    against
        The class of the reference cells; None: all other classes.
    gradients
        float32, cells x genes: contribution of each gene to the output of a cell, compared with the reference cells.
    values
        Mean log(CPM + 1) of each gene in the cells (`target`) and in the reference cells (`reference`).
    difference
        float32 (cells,): output of each cell, less the mean output of the reference cells. The contributions of a cell
        add up to it, except for the random choice of reference cells.
    """

    target: str
    against: str | None
    gradients: pd.DataFrame
    values: pd.DataFrame
    difference: npt.NDArray[np.float32]

    @property
    def saliency(self) -> pd.Series:
        """Mean contribution of each gene, the largest first."""
        return self.gradients.mean().sort_values(ascending=False, kind="stable").rename("saliency")

    @property
    def completeness(self) -> float:
        """Mean sum of the contributions, relative to the mean difference of the outputs; 1 is exact."""
        return float(self.gradients.sum(axis=1).mean() / self.difference.mean())

    def top(self, n_genes: int = 20) -> pd.DataFrame:
        """The genes with the largest contributions, with their share of the total and their mean log(CPM + 1)."""
        table = self.saliency.head(n_genes).to_frame()
        table["share"] = table["saliency"] / self.saliency.clip(lower=0).sum()
        return table.join(self.values)

    def draw(self, n_genes: int = 20, symbols: dict[str, str] | None = None) -> Picture:
        """Bars of the largest contributions; `symbols` are shown instead of the names of genes."""
        top = self.top(n_genes)[::-1]
        picture = Picture(figsize=(5, 1 + 0.22 * len(top)), layout="constrained")
        axes = picture.add_subplot()
        axes.barh([(symbols or {}).get(gene, gene) for gene in top.index], top["saliency"], color="0.35")
        axes.set_xlabel("mean contribution to the output (expected gradients)")
        axes.set_title(f"{self.target}, compared with {self.against or 'all other cells'}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        return picture


def expected_gradients(
    classifier: Classifier,
    source: CellSource,
    genes: list[str],
    labels: npt.NDArray[np.object_],
    target: str,
    *,
    against: str | None = None,
    n_cells: int = 300,
    n_samples: int = 50,
    seed: int = 0,
    accelerator: str = "auto",
) -> Attribution:
    """Contributions of genes to the output of a class.

    Parameters
    ----------
    source, genes
        Cells, as for `Classifier.predict`.
    labels
        (cells,): known or predicted class of each cell.
    target
        The class to explain; its cells are explained.
    against
        Class of the reference cells; None: all cells of other classes.
    n_cells
        Maximum number of cells to explain, drawn at random.
    n_samples
        Reference cells drawn for each cell.
    seed
        Seed of all choices.

    Raises
    ------
    UserError
        A class does not exist, or has no cells with counts.
    """
    labels = labels.astype(str)
    for name in (target, against):
        if name is not None and name not in classifier.classes:
            raise UserError(
                f"{name!r} is not a class of the classifier{suggestion(name, classifier.classes)} (classes:"
                f" {', '.join(classifier.classes[:20])})"
            )
    if against == target:
        raise UserError(f"{target!r} is compared with itself; choose another class")
    aligned = classifier.align(source, genes)
    references = labels != target if against is None else labels == against
    numbers = generator(seed, Stream.CLASSIFIER_INTERPRETATION)
    device = device_of(accelerator)
    cells, rows = _values(aligned, labels == target, n_cells, numbers, device, f"of class {target!r}")
    words = "of other classes" if against is None else f"of class {against!r}"
    reference, _ = _values(aligned, references, _REFERENCE_CELLS, numbers, device, words)
    code = classifier.classes.index(target)
    network = classifier.network.to(device)
    with seeded(int(numbers.integers(2**32))):
        method = GradientShap(network)
        size = max(_MOST_VALUES // (n_samples * network.n_genes), 1)
        parts = [
            method.attribute(part, reference, n_samples=n_samples, stdevs=0.0, target=code).detach().cpu().numpy()
            for part in cells.split(size)
        ]
    with torch.no_grad():
        difference = network(cells)[:, code] - network(reference)[:, code].mean()
    return Attribution(
        target,
        against,
        pd.DataFrame(np.concatenate(parts).astype(np.float32), index=rows, columns=classifier.genes),
        pd.DataFrame(
            {"target": cells.mean(dim=0).cpu().numpy(), "reference": reference.mean(dim=0).cpu().numpy()},
            index=classifier.genes,
        ),
        difference.cpu().numpy(),
    )


def _values(
    source: CellSource,
    wanted: npt.NDArray[np.bool_],
    n_cells: int,
    numbers: np.random.Generator,
    device: torch.device,
    words: str,
) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
    """log(CPM + 1) of some wanted cells with counts, drawn at random, and their rows."""
    rows = np.flatnonzero(wanted)
    chosen = np.zeros(len(wanted), bool)
    chosen[rows[draw(len(rows), n_cells, numbers)]] = True
    values = torch.zeros(0, source.shape[1], device=device)
    if chosen.any():
        found, counts = next(regrouped(in_order(source, chosen, None), [int(chosen.sum())]))
        values = log_cpm(to_tensor(counts).to(device))
        filled = values.sum(dim=1) > 0
        values, rows = values[filled], found[filled.cpu().numpy()]
    if not len(values):
        raise UserError(f"there are no cells {words} with counts; give their labels, or choose another class")
    return values, rows
