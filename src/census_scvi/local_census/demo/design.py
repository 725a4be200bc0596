"""Which organisms, datasets, donors, assays and cell types the demo Census has."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class CellType:
    """A cell type: name, Cell Ontology id, and the gene programmes it expresses, from lineage to type."""

    name: str
    term_id: str
    programmes: tuple[str, ...]


@dataclass(frozen=True)
class Donor:
    """A donor: share of the cells of the dataset, assay, sex, disease."""

    share: float
    assay: str
    sex: str
    disease: str = "normal"


@dataclass(frozen=True)
class DatasetDesign:
    """A dataset: its share of the organism's cells, and its composition.

    cell_types: share of each cell type.
    copies: cells of other datasets that come again here, by dataset_id, as a share of the organism's cells.
    depth: median of the molecules of a cell.
    """

    dataset_id: str
    title: str
    share: float
    tissue: tuple[str, str]
    suspension: str
    depth: float
    donors: tuple[Donor, ...]
    cell_types: dict[str, float]
    copies: dict[str, float]


@dataclass(frozen=True)
class OrganismDesign:
    """An organism of the demo: cells at scale 1, cell types, datasets; programmes by share of the genes."""

    organism: str
    n_cells: int
    development_stage: tuple[str, str]
    cell_types: tuple[CellType, ...]
    datasets: tuple[DatasetDesign, ...]

    @property
    def programmes(self) -> dict[str, float]:
        """Share of the genes of every programme; the cycle is on, more or less, in cells of every type."""
        shares: dict[str, float] = {}
        for cell_type in self.cell_types:
            for depth, programme in enumerate(cell_type.programmes):
                last = depth == len(cell_type.programmes) - 1
                shares.setdefault(programme, 0.015 if last else 0.02)
        return {**shares, "cycle": 0.015, "interferon": 0.015}

    @property
    def assays(self) -> list[str]:
        """Every assay that occurs, once."""
        return list(dict.fromkeys(donor.assay for dataset in self.datasets for donor in dataset.donors))


ASSAY_TERMS = {
    "10x 3' v2": "EFO:0009899",
    "10x 3' v3": "EFO:0009922",
    "10x 5' v1": "EFO:0011025",
    "Drop-seq": "EFO:0008722",
}
DISEASE_TERMS = {"normal": "PATO:0000461", "COVID-19": "MONDO:0100096"}
# Additional expression in all cells of a donor with the disease.
DISEASE_PROGRAMMES = {"COVID-19": ("interferon",)}
SEX_TERMS = {"female": "PATO:0000383", "male": "PATO:0000384", "unknown": "unknown"}

_BLOOD = ("blood", "UBERON:0000178")
_LUNG = ("lung", "UBERON:0002048")
_HEART = ("heart", "UBERON:0000948")

_HUMAN_TYPES = (
    CellType("CD4-positive, alpha-beta T cell", "CL:0000624", ("immune", "lymphoid", "tcell", "cd4")),
    CellType("CD8-positive, alpha-beta T cell", "CL:0000625", ("immune", "lymphoid", "tcell", "cd8")),
    CellType("natural killer cell", "CL:0000623", ("immune", "lymphoid", "nk")),
    CellType("B cell", "CL:0000236", ("immune", "lymphoid", "bcell")),
    CellType("classical monocyte", "CL:0000860", ("immune", "myeloid", "monocyte")),
    CellType("macrophage", "CL:0000235", ("immune", "myeloid", "macrophage")),
    CellType("fibroblast", "CL:0000057", ("stroma", "fibroblast")),
    CellType("endothelial cell", "CL:0000115", ("stroma", "endothelium")),
)
_CD4, _CD8, _NK, _B, _MONO, _MACRO, _FIBRO, _ENDO = (cell_type.name for cell_type in _HUMAN_TYPES)

_HUMAN = OrganismDesign(
    organism="homo_sapiens",
    n_cells=6000,
    development_stage=("adult stage", "HsapDv:0000258"),
    cell_types=_HUMAN_TYPES,
    datasets=(
        DatasetDesign(
            dataset_id="demo-human-blood",
            title="Demo: human blood, cells",
            share=0.30,
            tissue=_BLOOD,
            suspension="cell",
            depth=2800.0,
            donors=(
                Donor(0.30, "10x 3' v3", "female"),
                Donor(0.30, "10x 3' v3", "male"),
                Donor(0.25, "10x 3' v2", "female"),
                Donor(0.15, "10x 3' v2", "male"),
            ),
            cell_types={_CD4: 0.34, _CD8: 0.2, _NK: 0.12, _B: 0.14, _MONO: 0.2},
            copies={},
        ),
        DatasetDesign(
            dataset_id="demo-human-lung",
            title="Demo: human lung, cells, normal and COVID-19",
            share=0.30,
            tissue=_LUNG,
            suspension="cell",
            depth=3300.0,
            donors=(
                Donor(0.40, "10x 5' v1", "male", "COVID-19"),
                Donor(0.35, "10x 5' v1", "female", "normal"),
                Donor(0.24, "10x 3' v3", "male", "COVID-19"),
                Donor(0.01, "10x 3' v3", "female", "normal"),  # a donor with few cells
            ),
            cell_types={
                _CD4: 0.14,
                _CD8: 0.12,
                _NK: 0.07,
                _B: 0.07,
                _MONO: 0.12,
                _MACRO: 0.2,
                _FIBRO: 0.14,
                _ENDO: 0.14,
            },
            copies={},
        ),
        DatasetDesign(
            dataset_id="demo-human-heart",
            title="Demo: human heart, nuclei",
            share=0.20,
            tissue=_HEART,
            suspension="nucleus",
            depth=2900.0,
            donors=(
                Donor(0.4, "10x 3' v3", "male"),
                Donor(0.35, "10x 3' v3", "female"),
                Donor(0.25, "10x 3' v3", "unknown"),
            ),
            cell_types={_CD4: 0.05, _CD8: 0.05, _MACRO: 0.15, _FIBRO: 0.4, _ENDO: 0.35},
            copies={},
        ),
        DatasetDesign(
            dataset_id="demo-human-atlas",
            title="Demo: immune atlas that republishes cells of blood and lung",
            share=0.12,
            tissue=_LUNG,
            suspension="cell",
            depth=3100.0,
            donors=(Donor(0.6, "10x 3' v2", "female"), Donor(0.4, "10x 3' v2", "male")),
            cell_types={_CD4: 0.25, _CD8: 0.2, _NK: 0.1, _B: 0.15, _MONO: 0.15, _MACRO: 0.15},
            copies={"demo-human-blood": 0.05, "demo-human-lung": 0.03},
        ),
    ),
)

_MOUSE_TYPES = (
    CellType("T cell", "CL:0000084", ("immune", "lymphoid", "tcell")),
    CellType("B cell", "CL:0000236", ("immune", "lymphoid", "bcell")),
    CellType("macrophage", "CL:0000235", ("immune", "macrophage")),
    CellType("fibroblast", "CL:0000057", ("stroma", "fibroblast")),
    CellType("endothelial cell", "CL:0000115", ("stroma", "endothelium")),
)
_M_T, _M_B, _M_MACRO, _M_FIBRO, _M_ENDO = (cell_type.name for cell_type in _MOUSE_TYPES)

_MOUSE = OrganismDesign(
    organism="mus_musculus",
    n_cells=2000,
    development_stage=("adult stage", "MmusDv:0000110"),
    cell_types=_MOUSE_TYPES,
    datasets=(
        DatasetDesign(
            dataset_id="demo-mouse-lung",
            title="Demo: mouse lung, cells",
            share=0.52,
            tissue=_LUNG,
            suspension="cell",
            depth=2900.0,
            donors=(
                Donor(0.5, "10x 3' v2", "female"),
                Donor(0.3, "10x 3' v2", "male"),
                Donor(0.2, "10x 3' v3", "male"),
            ),
            cell_types={_M_T: 0.25, _M_B: 0.2, _M_MACRO: 0.2, _M_FIBRO: 0.15, _M_ENDO: 0.2},
            copies={},
        ),
        DatasetDesign(
            dataset_id="demo-mouse-heart",
            title="Demo: mouse heart, nuclei, with cells of the lung dataset again",
            share=0.40,
            tissue=_HEART,
            suspension="nucleus",
            depth=3000.0,
            donors=(Donor(0.55, "Drop-seq", "male"), Donor(0.45, "10x 3' v3", "female")),
            cell_types={_M_T: 0.08, _M_MACRO: 0.17, _M_FIBRO: 0.4, _M_ENDO: 0.35},
            copies={"demo-mouse-lung": 0.08},
        ),
    ),
)


def _primate(organism: str, called: str) -> OrganismDesign:
    """The types and datasets of the human cells, for another primate."""
    names = {design.dataset_id: design.dataset_id.replace("human", called) for design in _HUMAN.datasets}
    datasets = (
        replace(
            design,
            dataset_id=names[design.dataset_id],
            title=design.title.replace("human", called),
            copies={names[origin]: share for origin, share in design.copies.items()},
        )
        for design in _HUMAN.datasets
    )
    stage = ("prime adult stage", "UBERON:0018241")
    return replace(_HUMAN, organism=organism, n_cells=2000, development_stage=stage, datasets=tuple(datasets))


_OTHERS = {"macaca_mulatta": "macaque", "callithrix_jacchus": "marmoset", "pan_troglodytes": "chimpanzee"}
# By organism; `make demo` has the first two.
DESIGNS = {
    design.organism: design
    for design in (_HUMAN, _MOUSE, *(_primate(organism, called) for organism, called in _OTHERS.items()))
}
