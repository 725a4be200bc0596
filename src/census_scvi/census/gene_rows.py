"""Find the rows of a var that are genes of an organism, and clean gene names that other tools have extended."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

# Columns of var that contain the kind of a row, as Cell Ranger (scanpy, DropletUtils), CELLxGENE and muon write them.
_KIND_COLUMNS = ("feature_types", "feature_type", "feature_biotype", "modality", "Type", "type")
_GENE_EXPRESSION = {"gene expression", "gex", "rna"}
# Values for rows that are not genes; biotypes such as protein_coding are genes.
_NO_GENES = {
    "antibody capture", "antigen capture", "crispr guide capture", "multiplexing capture", "custom", "peaks", "peak",
    "adt", "hto", "hashtag", "protein", "prot", "antibody", "crispr", "atac", "chromatin accessibility", "tag",
    "spike-in", "spikein", "spike_in", "ercc",
}  # fmt: skip
_PROTEINS = {"antibody capture", "adt", "protein", "prot", "antibody"}
# Columns of gene names: there the form of a name shows the kind of the row. Other columns may contain other text, for
# example the genomic interval of a gene.
_NAMES = re.compile(r"^var_names$|_(?:id|ids|name|names|symbol|symbols)'\]$|^var\['(?:symbol|name|ID|Symbol)'\]$")
# If at least this share of the names are Ensembl ids, the few symbols among them are probably not genes.
_ALL_BUT_FEW = 0.95
NAMED_TWICE = "symbol of a gene that another row has by id"
_NO_GENE_NAMES = {
    "spike-in": r"^(?:gSpikein[-_])?(?:ERCC[-_.]\d{4,5}|SIRV\d+(?:[-_.]\d+)?|phiX(?:174)?|ArrayControl[-_.]?\d+)$",
    "peak": r"^(?:chr|CHR)?[\dXYMTW][\w.]*[:_-]\d+[-_]\d+$",
    "line of a counting program": r"^(?:__\w+|N_(?:unmapped|multimapping|noFeature|ambiguous))$",
}
# A genome before the gene name, as Cell Ranger writes it for references of several genomes: GRCh38_TP53, mm10___Xkr4.
_GENOME = re.compile(
    r"^((?:GRC[A-Za-z]{1,2}\d+|hg\d\d|mm\d+|rn\d|Rnor|mRatBN\d|T2T-CHM13|CHM13|dm\d|BDGP\d|danRer\d|galGal\d|Sscrofa\d"
    r"|susScr\d|Mmul|rheMac\d|m?CalJac\d|calJac\d|Callithrix_jacchus|[Pp]anTro|Pan_tro|CanFam\d)[A-Za-z0-9.-]*)_+(?=[^_])"
)
_ORGANISM_OF_GENOME = {
    "homo_sapiens": re.compile(r"^(?:GRCh|hg\d|T2T|CHM)", re.IGNORECASE),
    "mus_musculus": re.compile(r"^(?:GRCm|mm\d)", re.IGNORECASE),
    "macaca_mulatta": re.compile(r"^(?:Mmul|rheMac)", re.IGNORECASE),
    "callithrix_jacchus": re.compile(r"^(?:m?CalJac|Callithrix)", re.IGNORECASE),
    "pan_troglodytes": re.compile(r"^pan_?tro", re.IGNORECASE),
}
# An Ensembl id within other text: ENSG00000141510_TP53, TP53|ENSG00000141510.18, GRCh38_ENSG00000141510.
_ENSEMBL_WITHIN = r"(?<![A-Za-z0-9])(ENS[A-Z]*G\d{11}(?:\.\d+)?(?:_PAR_Y)?)(?![A-Za-z0-9])"


@dataclass(frozen=True)
class GeneRows:
    """The rows of a var that may be genes of an organism.

    Attributes
    ----------
    is_gene
        bool (rows,).
    left_out
        Number of excluded rows by kind: `Antibody Capture`, `spike-in`, `genome mm10`, ...
    is_expression
        bool (rows,): genes, including those of another organism's genome.
    """

    is_gene: npt.NDArray[np.bool_]
    left_out: dict[str, int]
    is_expression: npt.NDArray[np.bool_]

    def __str__(self) -> str:
        return left_out_words(self.left_out)


def left_out_words(left_out: dict[str, int]) -> str:
    """Describe `GeneRows.left_out` in words."""
    listed = ", ".join(f"{number:,} {kind}" for kind, number in left_out.items())
    return f"{sum(left_out.values()):,} rows that are not genes of the organism are excluded: {listed}"


def find_gene_rows(var: pd.DataFrame, organism: str) -> GeneRows:
    """Exclude rows of proteins, guides, hashtags, peaks and spike-ins, and rows of another organism's genome.

    Parameters
    ----------
    var
        Columns with the kind of a row are used, and the form of the names in the index and columns of gene names.
    organism
        For example `homo_sapiens`; rows of another organism's genome are excluded. Rows of an unknown genome are
        excluded only if the file also has a genome of this organism.
    """
    kinds = np.full(len(var), "", dtype=object)
    for column in _KIND_COLUMNS:
        if column in var:
            _set(kinds, *_kinds(_text(var[column])))
    for names in _names(var):
        for kind, pattern in _NO_GENE_NAMES.items():
            _set(kinds, names.str.fullmatch(pattern).to_numpy(bool), kind)
    genomes = _genomes(var)
    foreign = _foreign(genomes, organism)
    _set(kinds, foreign, ("genome " + genomes.str.replace("/", "-")).to_numpy(object))
    numbers = pd.Series(kinds[kinds != ""], dtype=object).value_counts()
    left_out = {str(kind): int(number) for kind, number in numbers.items()}
    return GeneRows(kinds == "", left_out, (kinds == "") | foreign)


def is_protein(var: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Rows of proteins according to a column with the kind of a row, bool (rows,)."""
    found = np.zeros(len(var), bool)
    for column in _KIND_COLUMNS:
        if column in var:
            found |= _text(var[column]).str.strip().str.casefold().isin(_PROTEINS).to_numpy(bool)
    return found


def holds_kinds(values: pd.Series) -> bool:
    """Whether a column marks rows of gene expression, as Cell Ranger does; a column of biotypes does not."""
    return bool(_text(values).str.strip().str.casefold().isin(_GENE_EXPRESSION).any())


def name_columns(var: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """Yield (place, names) for every place that may contain gene names: the index and each text column."""
    yield "var_names", _text(var.index.to_series())
    for column in var.columns:
        if not pd.api.types.is_numeric_dtype(var[column]):  # bool is numeric, too
            yield f"var[{column!r}]", _text(var[column])


def named_twice(ids: pd.Series, genes: pd.Series) -> npt.NDArray[np.bool_]:
    """Rows with the symbol of a gene that another row contains by id, bool (rows,); all False below 95 % ids.

    In a 10x file without `feature_types`, such a row is an antibody: CD4 next to the gene ENSG00000010610. Tables
    joined from files with ids and files with symbols contain many symbols; their rows are summed instead.

    Parameters
    ----------
    ids
        Names as `clean_names` returns them.
    genes
        Ensembl id of each symbol; NaN if it is not a symbol.
    """
    by_id = ids.str.fullmatch(r"ENS[A-Z]*G\d{11}").to_numpy(bool)
    if not len(ids) or by_id.mean() < _ALL_BUT_FEW:
        return np.zeros(len(ids), bool)
    return ~by_id & genes.isin(ids[by_id]).to_numpy(bool)


def _names(var: pd.DataFrame) -> Iterator[pd.Series]:
    return (names for where, names in name_columns(var) if _NAMES.search(where))


def clean_names(names: pd.Series) -> pd.Series:
    """Remove surrounding spaces, a genome before the name, and a symbol next to an Ensembl id.

    A name that contains exactly one Ensembl id becomes that id, in capitals. A name that is only a genome stays as it
    is.
    """
    stripped = names.str.strip()
    ids = stripped.str.findall(_ENSEMBL_WITHIN, flags=re.IGNORECASE)
    one = ids.str.len() == 1
    cleaned = stripped.str.replace(_GENOME, "", regex=True)
    cleaned[one] = ids[one].str[0].str.upper()
    return cleaned


def _text(values: pd.Series) -> pd.Series:
    """Values as str with the index 0 to n - 1; missing values become ""."""
    values = values.astype(object)
    return values.where(values.notna(), "").astype(str).reset_index(drop=True)


def _set(kinds: npt.NDArray[np.object_], rows: npt.NDArray[np.bool_], kind: str | npt.NDArray[np.object_]) -> None:
    """Set the kind of those rows that have no kind yet."""
    rows = rows & (kinds == "")
    kinds[rows] = kind if isinstance(kind, str) else kind[rows]


def _kinds(values: pd.Series) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.object_]]:
    """Rows that are not genes according to a column, and the kind of every row."""
    folded = values.str.strip().str.casefold()
    # If a column contains "Gene Expression", its rows of any other kind are not genes.
    says_genes = folded.isin(_GENE_EXPRESSION)
    others = (folded != "") & ~says_genes if says_genes.any() else folded.isin(_NO_GENES)
    return others.to_numpy(bool), values.str.strip().str.replace("/", "-").to_numpy(object)


def _genomes(var: pd.DataFrame) -> pd.Series:
    """Genome of each row, from the column `genome` or from a prefix of the name; "" if there is none."""
    genomes = _text(var["genome"]) if "genome" in var else pd.Series("", index=range(len(var)), dtype=object)
    for names in _names(var):
        found = names.str.strip().str.extract(_GENOME)[0].fillna("")
        genomes = genomes.where(genomes != "", found)
    return genomes


def _foreign(genomes: pd.Series, organism: str) -> npt.NDArray[np.bool_]:
    """Rows of another organism's genome; an unknown genome counts as foreign only if the organism's own is present."""
    owner = {genome: _organism_of(genome) for genome in genomes.unique() if genome}
    own = {genome for genome, name in owner.items() if name == organism}
    foreign = {genome for genome, name in owner.items() if name != organism and (name or own)}
    return genomes.isin(foreign).to_numpy(bool)


def _organism_of(genome: str) -> str:
    return next((name for name, pattern in _ORGANISM_OF_GENOME.items() if pattern.match(genome)), "")
