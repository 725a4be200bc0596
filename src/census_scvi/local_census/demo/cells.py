"""An artificial Census to try the pipeline on: human and mouse cells with types, batch effects, copies and poor cells.

Counts are gamma-Poisson. A gene's molecules come in bursts: their number is Poisson, their size logarithmic, so that
their sum is negative binomial with mean `m` and variance `m / (1 - p)` (Quenouille 1949). Drawing bursts and not
a matrix takes time in proportion to the molecules, whatever the number of genes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.census.gene_ids import GeneReport
from census_scvi.census.schema import LABEL_COLUMNS, default_label
from census_scvi.config.messages import suggestion
from census_scvi.errors import UserError
from census_scvi.local_census.demo.design import (
    ASSAY_TERMS,
    DESIGNS,
    DISEASE_PROGRAMMES,
    DISEASE_TERMS,
    SEX_TERMS,
    DatasetDesign,
    OrganismDesign,
)
from census_scvi.local_census.demo.genes import Transcriptome
from census_scvi.local_census.demo.proteins import ProteinPanel, panel_of
from census_scvi.local_census.sources import regroup
from census_scvi.local_census.write import BuildReport, build_census, check_target

DEFAULT_ORGANISMS = ("homo_sapiens", "mus_musculus")
# Cells per random stream; the counts of a cell do not depend on the block in which it is read.
_CHUNK = 512
# Standard deviations of the natural logarithm of a gene's rate, by cause.
_DATASET_SD, _DONOR_SD = 0.3, 0.1
_DEPTH_SD = 0.25
_POOR_CELLS, _POOR_DEPTH = 0.02, 0.08
# Share of the molecules of a cell that comes from its surroundings, and the most that its cycle adds.
_AMBIENT, _CYCLING = 0.04, 0.25
_NOT_MEASURED = 0.03


class DemoSource:
    """One dataset of the demo Census (a `Source`): its own cells, then copies of cells of other datasets."""

    path = ""

    def __init__(
        self,
        design: DatasetDesign,
        organism: OrganismDesign,
        transcriptome: Transcriptome,
        *,
        n_cells: int,
        depth: float,
        copies: list[tuple["DemoSource", int]],
        seed: int,
        key: tuple[int, int],
        proteins: bool = False,
    ) -> None:
        self.dataset_id, self.title, self.organism = design.dataset_id, design.title, organism.organism
        self._design, self._organism, self._transcriptome = design, organism, transcriptome
        self.n_own, self._median_depth = n_cells, depth * design.depth
        self._copies, self._seed, self._key = copies, seed, key
        rng = self._random(0)
        n_genes = len(transcriptome.var)
        self._effect = rng.normal(0, _DATASET_SD, n_genes)
        # Republished cells bring their own genes: a dataset with copies measures all.
        self._measured = np.full(n_genes, True) if copies else rng.random(n_genes) >= _NOT_MEASURED
        self._donor_effect = rng.normal(0, _DONOR_SD, (len(design.donors), n_genes))
        self._draw_cells(rng)
        self._leaked: npt.NDArray[np.float64] | None = None
        self._shares: dict[tuple[int, int], tuple[npt.NDArray[np.float64], float]] = {}
        self.var = transcriptome.var[self._measured].reset_index(drop=True)
        self.genes = GeneReport(in_file=len(self.var), kept=len(self.var))
        self.obs = self._labels()
        self.kept_counts = np.ones(len(self.obs))
        kinds = [cell_type.programmes for cell_type in organism.cell_types]
        self._panel = ProteinPanel(panel_of(design.dataset_id) if proteins else [], kinds, self._random(2))
        self.proteins = self._panel.names

    def protein_blocks(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, raw counts int64 of at most `rows` cells x proteins)."""
        starts = range(0, self.n_own if self.proteins else 0, _CHUNK)
        kinds = (self._type[start : start + _CHUNK] for start in starts)
        return regroup((self._panel.draw(some, self._random(3, chunk)) for chunk, some in enumerate(kinds)), rows)

    def blocks(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, raw counts int64 of at most `rows` cells x genes)."""
        return regroup((block[:, self._measured] for block in self._all_cells()), rows)

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(*self._key, *key)))

    def _draw_cells(self, rng: np.random.Generator) -> None:
        """Donor, type, depth and cycle of the dataset's own cells."""
        n_cells, design = self.n_own, self._design
        self._donor = rng.permutation(_allocate([donor.share for donor in design.donors], n_cells))
        types = [cell_type.name for cell_type in self._organism.cell_types]
        self._type = rng.permutation(_allocate([design.cell_types.get(name, 0.0) for name in types], n_cells))
        donor_depth = rng.lognormal(0, 0.1, len(design.donors))
        self._depth = self._median_depth * donor_depth[self._donor] * rng.lognormal(0, _DEPTH_SD, n_cells)
        poor = rng.permutation(n_cells)[: round(_POOR_CELLS * n_cells)]
        self._depth[poor] = self._median_depth * _POOR_DEPTH
        self._cycling = _CYCLING * rng.beta(0.4, 3.0, n_cells)

    def _all_cells(self) -> Iterator[sp.csr_matrix]:
        """Counts over all genes of the organism: own cells, then copies."""
        yield from self._own_cells(self.n_own)
        for origin, n_cells in self._copies:
            yield from origin._own_cells(n_cells)

    def _own_cells(self, n_cells: int) -> Iterator[sp.csr_matrix]:
        for chunk, start in enumerate(range(0, n_cells, _CHUNK)):
            yield self._draw_counts(chunk)[: n_cells - start]

    def _draw_counts(self, chunk: int) -> sp.csr_matrix:
        """Counts (at most _CHUNK cells x all genes) of a chunk of own cells."""
        rng = self._random(1, chunk)
        cells = np.arange(chunk * _CHUNK, min((chunk + 1) * _CHUNK, self.n_own))
        rows, genes = [], []
        group = self._donor[cells] * len(self._organism.cell_types) + self._type[cells]
        for code in np.unique(group):
            members = np.flatnonzero(group == code)
            donor, cell_type = divmod(int(code), len(self._organism.cell_types))
            share, burst = self._share(donor, cell_type)
            total = rng.poisson(self._depth[cells[members]] / burst)
            ambient = rng.binomial(total, _AMBIENT)
            cycle = rng.binomial(total - ambient, self._cycling[cells[members]])
            for number, source in (
                (total - ambient - cycle, share),
                (ambient, self._mixture()),
                (cycle, self._cycle()),
            ):
                rows.append(np.repeat(members, number))
                drawn = np.searchsorted(source, rng.random(int(number.sum())), side="right")
                genes.append(np.minimum(drawn, len(source) - 1))
        row, gene = np.concatenate(rows), np.concatenate(genes)
        size = rng.logseries(self._transcriptome.burst[gene])
        return sp.coo_matrix((size, (row, gene)), shape=(len(cells), len(self._measured))).tocsr()

    def _share(self, donor: int, cell_type: int) -> tuple[npt.NDArray[np.float64], float]:
        """Cumulative share of the genes and mean burst of a donor's cells of a type."""
        if (donor, cell_type) not in self._shares:
            disease = DISEASE_PROGRAMMES.get(self._design.donors[donor].disease, ())
            programmes = (*self._organism.cell_types[cell_type].programmes, *disease)
            self._shares[donor, cell_type] = self._bursts(programmes, donor)
        return self._shares[donor, cell_type]

    def _bursts(self, programmes: tuple[str, ...], donor: int) -> tuple[npt.NDArray[np.float64], float]:
        assay = self._design.donors[donor].assay
        rate = self._transcriptome.log_rate(programmes, assay=assay, suspension=self._design.suspension)
        rate = rate + self._effect + self._donor_effect[donor]
        return self._transcriptome.bursts(np.where(self._measured, rate, -np.inf))

    def _mixture(self) -> npt.NDArray[np.float64]:
        """Cumulative share of the genes in the ambient RNA, to which all types of the dataset contribute."""
        if self._leaked is None:
            types = [n for n, kind in enumerate(self._organism.cell_types) if kind.name in self._design.cell_types]
            weights = [self._design.cell_types[self._organism.cell_types[n].name] for n in types]
            shares = np.stack([self._share(0, n)[0] for n in types])
            self._leaked = np.average(shares, axis=0, weights=weights)
        return self._leaked

    def _cycle(self) -> npt.NDArray[np.float64]:
        """Cumulative share of the genes in the cycle: its markers, as far as the dataset measures them."""
        active = self._transcriptome.markers("cycle") & self._measured
        return np.cumsum(active / max(active.sum(), 1))

    def _labels(self) -> pd.DataFrame:
        """Obs of the own cells, then of the copies, which are not primary."""
        design, n_cells = self._design, self.n_own
        kinds, donors = self._organism.cell_types, design.donors
        short = self.dataset_id.removeprefix("demo-")
        columns: dict[str, list[str] | str] = {
            "assay": [donor.assay for donor in donors],
            "assay_ontology_term_id": [ASSAY_TERMS[donor.assay] for donor in donors],
            "disease": [donor.disease for donor in donors],
            "disease_ontology_term_id": [DISEASE_TERMS[donor.disease] for donor in donors],
            "donor_id": [f"{short}-{number + 1}" for number in range(len(donors))],
            "sex": [donor.sex for donor in donors],
            "sex_ontology_term_id": [SEX_TERMS[donor.sex] for donor in donors],
            "suspension_type": design.suspension,
            "tissue": design.tissue[0],
            "tissue_ontology_term_id": design.tissue[1],
            "tissue_general": design.tissue[0],
            "tissue_general_ontology_term_id": design.tissue[1],
            "development_stage": self._organism.development_stage[0],
            "development_stage_ontology_term_id": self._organism.development_stage[1],
        }
        own = pd.DataFrame(index=pd.RangeIndex(n_cells))
        for name in LABEL_COLUMNS:
            value = columns.get(name, default_label(name, self.organism))
            own[name] = np.array(value, dtype=object)[self._donor] if isinstance(value, list) else value
        own["cell_type"] = np.array([kind.name for kind in kinds], dtype=object)[self._type]
        own["cell_type_ontology_term_id"] = np.array([kind.term_id for kind in kinds], dtype=object)[self._type]
        own["is_primary_data"] = True
        copies = [origin.obs.iloc[:number].assign(is_primary_data=False) for origin, number in self._copies]
        obs = pd.concat([own.astype(dict.fromkeys(LABEL_COLUMNS, "category")), *copies], ignore_index=True)
        return obs.astype(dict.fromkeys(LABEL_COLUMNS, "category"))


def demo_sources(
    seed: int = 0,
    scale: float = 1.0,
    n_genes: int = 3000,
    *,
    depth: float = 1.0,
    type_sd: float = 0.0,
    proteins: bool = False,
    organisms: Sequence[str] = DEFAULT_ORGANISMS,
) -> list[DemoSource]:
    """The datasets of the demo Census: about 6,000 human and 2,000 mouse cells times `scale`, `n_genes` genes each.

    Shared cell types with marker programmes; strong effects of dataset, assay, suspension type and donor; a median of
    about 3,000 counts per cell; 8 % copies that are not primary, with counts and labels of their originals; 2 % cells
    with few genes; a donor with few cells. `depth` multiplies the counts per cell. With `type_sd`, the standard
    deviation of a log rate, all expressed genes differ between cell types and not the markers alone. With `proteins`,
    three datasets have counts of up to 12 proteins, without an effect on the RNA. The same arguments give the same
    cells. Of other `organisms`, there are about 2,000 cells each.
    """
    if wrong := [name for name in organisms if name not in DESIGNS]:
        raise UserError(f"{wrong[0]!r} is not an organism of the Census{suggestion(wrong[0], list(DESIGNS))}")
    if not organisms:
        raise UserError(f"no organism for the demo; expected some of {', '.join(DESIGNS)}")
    if scale * min(DESIGNS[name].n_cells for name in organisms) < 100 or n_genes < 100:
        raise UserError(f"{scale=} and {n_genes=} are too small for a demo; take a scale of 0.05 and 100 genes or more")
    sources: list[DemoSource] = []
    for first, organism in enumerate(DESIGNS.values()):
        if organism.organism not in organisms:
            continue
        genes_seed = np.random.SeedSequence(seed, spawn_key=(first,))
        transcriptome = Transcriptome(organism, n_genes=n_genes, seed=genes_seed, type_sd=type_sd)
        total = scale * organism.n_cells
        made: dict[str, DemoSource] = {}
        for second, design in enumerate(organism.datasets):
            copies = [
                (made[name], min(round(share * total), made[name].n_own)) for name, share in design.copies.items()
            ]
            made[design.dataset_id] = DemoSource(
                design,
                organism,
                transcriptome,
                n_cells=round(design.share * total),
                depth=depth,
                copies=copies,
                seed=seed,
                key=(first, second),
                proteins=proteins,
            )
        sources += made.values()
    return sources


def write_demo_census(
    uri: str | Path,
    *,
    seed: int = 0,
    scale: float = 1.0,
    n_genes: int = 3000,
    proteins: bool = False,
    organisms: Sequence[str] = DEFAULT_ORGANISMS,
    force: bool = False,
) -> BuildReport:
    """Write the demo Census into the folder `uri`; see `demo_sources` and `build_census`."""
    check_target(uri, force=force)
    return build_census(uri, demo_sources(seed, scale, n_genes, proteins=proteins, organisms=organisms), force=force)


def _allocate(shares: list[float], n_cells: int) -> npt.NDArray[np.int64]:
    """Code of each of `n_cells` cells (int64), with shares as close as possible to the given ones."""
    until = np.cumsum(shares) / np.sum(shares)
    return np.searchsorted(until, (np.arange(n_cells) + 0.5) / n_cells, side="right").clip(max=len(shares) - 1)
