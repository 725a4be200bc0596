"""The genes of the demo Census: rates, marker programmes, effects of the assay, and how counts vary."""

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.census.schema import ORGANISMS
from census_scvi.local_census.demo.design import OrganismDesign

# Standard deviations of the natural logarithm of a gene's rate, by cause.
_ASSAY_SD, _NUCLEUS_SD = 0.2, 0.25
_MAX_MARKERS = 150
# Genes that a cell of 3,000 molecules detects, by the number of genes that there are.
_DETECTED = {100: 60, 600: 420, 3_000: 470, 20_000: 1_100, 60_000: 1_400}
# Share of the genes, the most expressed, that differ between cell types where `type_sd` says so.
_EXPRESSED = 0.17
_MEDIAN_DEPTH = 3000.0
_MAX_SD = 2.2
# Molecules in a cell of a gene that is off.
_LEAK = 0.03

Floats = npt.NDArray[np.float64]


class Transcriptome:
    """Rates of the genes of an organism: by cell type, assay, suspension; how they vary.

    In addition to the markers of a programme, `type_sd` makes every expressed gene differ between the programmes.

    Attributes: var (feature_id, feature_name, feature_length, feature_type), burst (genes,) parameter p of the
    logarithmic burst size.
    """

    def __init__(
        self, design: OrganismDesign, *, n_genes: int, seed: np.random.SeedSequence, type_sd: float = 0.0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.burst = np.clip(rng.beta(2, 8, size=n_genes), 0.02, 0.8)
        self._mean_burst = -self.burst / ((1 - self.burst) * np.log1p(-self.burst))
        # Rates are log-normal, but no gene has more than a few percent of a cell's counts, and none has rate 0.
        rank = _MAX_SD * np.tanh(rng.normal(size=n_genes) / _MAX_SD)
        leak = _LEAK * rng.lognormal(0, 1.2, n_genes)
        self._log_rate = np.log(_molecules(rank, leak, self._mean_burst))
        names = np.array([f"Gene{number + 1}" for number in range(n_genes)], dtype=object)
        if ORGANISMS[design.organism].primate:
            names = np.array([name.upper() for name in names], dtype=object)
        free = rng.permutation(n_genes)
        self._programmes: dict[str, Floats] = {}
        for programme, share in design.programmes.items():
            size = min(max(3, round(share * n_genes)), _MAX_MARKERS)
            genes, free = free[:size], free[size:]
            self._programmes[programme] = np.zeros(n_genes)
            # Markers are genes of middling rate: otherwise a programme of silent genes would not show.
            self._log_rate[genes] = np.maximum(self._log_rate[genes], np.quantile(self._log_rate, 0.6))
            self._programmes[programme][genes] = rng.uniform(0.8, 2.4, size=size)
            names[genes] = [f"{programme.upper()}-{number + 1}" for number in range(size)]
        self._assays = {name: rng.normal(0, _ASSAY_SD, n_genes) for name in design.assays}
        self._nucleus = rng.normal(0, _NUCLEUS_SD, n_genes)
        expressed = self._log_rate >= np.quantile(self._log_rate, 1 - _EXPRESSED)
        spread = type_sd * (expressed & (rng.random(n_genes) < 0.6))
        self._broad = {name: rng.normal(0, spread) for name in design.programmes}
        if type_sd:  # genes that are hardly expressed do not vary: their bursts would be taken for it
            self.burst[~expressed] = 0.02
            self._mean_burst = -self.burst / ((1 - self.burst) * np.log1p(-self.burst))
        prefix = ORGANISMS[design.organism].gene_id_prefix
        self.var = pd.DataFrame(
            {
                "feature_id": [f"{prefix}{99_000_001 + number:011d}" for number in range(n_genes)],
                "feature_name": names,
                "feature_length": rng.lognormal(7.7, 0.6, n_genes).astype(np.int64) + 200,
                "feature_type": np.where(rng.random(n_genes) < 0.85, "protein_coding", "lncRNA"),
            }
        )

    def log_rate(self, programmes: tuple[str, ...], *, assay: str, suspension: str) -> Floats:
        """Logarithm of the rate of every gene (genes,), up to a constant."""
        rate = self._log_rate + self._assays[assay]
        if suspension == "nucleus":
            rate = rate + self._nucleus
        for programme in programmes:
            rate = rate + self._programmes[programme] + self._broad[programme]
        return rate

    def markers(self, programme: str) -> npt.NDArray[np.bool_]:
        """Which genes a programme raises: bool (genes,)."""
        return self._programmes[programme] > 0

    def bursts(self, log_rate: Floats) -> tuple[Floats, float]:
        """(cumulative share (genes,) of each gene in the bursts of a cell, mean size of a burst)."""
        molecules = np.exp(log_rate - log_rate.max())
        bursts = molecules / self._mean_burst
        return np.cumsum(bursts / bursts.sum()), float(molecules.sum() / bursts.sum())


def _molecules(rank: Floats, leak: Floats, mean_burst: Floats) -> Floats:
    """Mean molecules (genes,) in a cell of median depth, so far apart that it detects the wanted number of genes.

    `rank` is the logarithm of a gene's rate up to a factor, found by bisection; `leak` are molecules on top.
    """
    wanted = float(np.interp(np.log(len(rank)), np.log(list(_DETECTED)), list(_DETECTED.values())))
    low, high = 0.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        rate = np.exp(middle * rank)
        molecules = _MEDIAN_DEPTH * rate / rate.sum() + leak
        detected = -np.expm1(-molecules / mean_burst).sum()
        low, high = (middle, high) if detected > wanted else (low, middle)
    return molecules
