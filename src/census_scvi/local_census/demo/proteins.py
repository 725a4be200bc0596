"""Simulated protein counts of the demo Census: markers of the cell types above a background, as in CITE-seq."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

# Proteins and the programmes of the cells that have them on their surface; the last is a control without a target.
MARKERS = {
    "CD45": ("immune",),
    "CD3": ("tcell",),
    "CD4": ("cd4",),
    "CD8a": ("cd8",),
    "CD56": ("nk",),
    "CD16": ("nk", "macrophage"),
    "CD19": ("bcell",),
    "CD14": ("monocyte", "macrophage"),
    "CD11b": ("myeloid", "macrophage"),
    "CD31": ("endothelium",),
    "CD90": ("fibroblast",),
    "IgG1": (),
}
# Datasets with proteins, and the proteins that they did not measure.
_PANELS: dict[str, tuple[str, ...]] = {
    "demo-human-blood": (),
    "demo-human-lung": ("CD16", "CD31", "CD90"),
    "demo-mouse-lung": (),
}
# Median counts of the background, and how many times more a cell has of its markers. Standard deviations of natural
# logarithms: of the background by protein and dataset, of the antibodies that a cell binds. Shape of the gamma.
_BACKGROUND, _FOLD = 6.0, 12.0
_PROTEIN_SD, _CELL_SD = 0.5, 0.3
_SHAPE = 5.0


def panel_of(dataset_id: str) -> list[str]:
    """Proteins that a dataset measured; empty if it has none."""
    if dataset_id not in _PANELS:
        return []
    return [name for name in MARKERS if name not in _PANELS[dataset_id]]


class ProteinPanel:
    """The proteins of a dataset.

    Parameters
    ----------
    names
        The measured proteins.
    programmes
        Programmes of each cell type, in the order of the codes.
    rng
        Draws the levels of the background.
    """

    def __init__(self, names: list[str], programmes: list[tuple[str, ...]], rng: np.random.Generator) -> None:
        self.names = names
        self._background = _BACKGROUND * rng.lognormal(0, _PROTEIN_SD, len(names))
        on = [[bool(set(MARKERS[name]) & set(has)) for name in names] for has in programmes]
        self._fold = np.where(np.array(on, bool), _FOLD, 1.0)

    def draw(self, cell_types: npt.NDArray[np.int64], rng: np.random.Generator) -> sp.csr_matrix:
        """Raw counts, CSR int64 (cells, proteins), of cells with these codes of cell types; gamma-Poisson."""
        bound = rng.lognormal(0, _CELL_SD, len(cell_types))
        mean = bound[:, None] * self._background * self._fold[cell_types]
        return sp.csr_matrix(rng.poisson(rng.gamma(_SHAPE, mean / _SHAPE)))
