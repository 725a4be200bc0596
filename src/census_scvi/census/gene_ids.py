"""Map the gene names of a file to Ensembl ids: remove version suffixes, look up symbols, handle genes without id."""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.census.gene_names import KINDS, count_kinds
from census_scvi.census.schema import ORGANISMS
from census_scvi.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneReport:
    """Numbers of genes of one file. `in_file` = `kept` + `dropped` + `summed`; `not_genes` are not included."""

    in_file: int = 0
    kept: int = 0  # distinct genes in the Census
    by_symbol: int = 0  # kept columns whose id was found by the gene's symbol
    under_symbol: int = 0  # kept columns without an id; their symbol is the feature_id
    dropped: int = 0  # columns without an id
    summed: int = 0  # columns added to another column of the same gene
    not_genes: int = 0  # columns of proteins, guides, peaks, spike-ins or another genome

    def __str__(self) -> str:
        text = f"{self.kept:,} of {self.in_file:,} genes"
        notes = {
            "found by symbol": self.by_symbol,
            "without Ensembl id kept under their symbol": self.under_symbol,
            "without Ensembl id dropped": self.dropped,
            "duplicates summed": self.summed,
            "columns that are not genes excluded": self.not_genes,
        }
        return "; ".join([text, *(f"{number:,} {what}" for what, number in notes.items() if number)])


@dataclass(frozen=True)
class Genes:
    """The genes of a file.

    var: feature_id (unique), feature_name, feature_length (int64, 0 if unknown), feature_type.
    column_to_gene: int64 (columns of the file,), row of `var` that each column is added to; -1 if it is dropped.
    """

    var: pd.DataFrame
    column_to_gene: npt.NDArray[np.int64]
    report: GeneReport


class GeneMap:
    """Ensembl ids, symbols, lengths and types of an organism's genes, read from a TSV.

    The TSV (may be gzipped) has the columns `ensembl_id` and `symbol`, and may have `length` and `type`
    (or `gene_type`). A symbol that several genes share is ambiguous and not mapped.
    """

    def __init__(self, path: Path) -> None:
        try:
            table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
        except FileNotFoundError:
            raise UserError(f"{path}: no such gene map") from None
        except (OSError, EOFError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
            raise UserError(f"{path}: not a readable TSV ({error})") from error
        missing = [name for name in ("ensembl_id", "symbol") if name not in table.columns]
        if missing:
            raise UserError(f"{path}: a gene map needs the columns ensembl_id and symbol; found {list(table.columns)}")
        table["ensembl_id"] = strip_version(table["ensembl_id"])
        table = table.rename(columns={"gene_type": "type"}).drop_duplicates("ensembl_id")
        self.by_id = table.set_index("ensembl_id")
        once = table[(table["symbol"] != "") & ~table["symbol"].duplicated(keep=False)]
        self.id_of_symbol: dict[str, str] = dict(zip(once["symbol"], once["ensembl_id"], strict=True))


def strip_version(ids: pd.Series) -> pd.Series:
    """Remove the version (`ENSG00000141510.18`) and the pseudo-autosomal suffix (`_PAR_Y`) from Ensembl ids."""
    return ids.str.replace(r"^(ENS[A-Z]*G\d{11})(?:\.\d+)?(?:_PAR_Y)?$", r"\1", regex=True)


def resolve_genes(
    names: pd.Series,
    attributes: pd.DataFrame,
    *,
    organism: str,
    gene_map: GeneMap | None,
    keep_without_id: bool,
    min_recognised: float = 0.0,
) -> Genes:
    """Assign a gene to every column of a file.

    `names` (str, one per column of the file) contains Ensembl ids or symbols. `attributes` (same rows) may contain
    feature_name, feature_length and feature_type. Raises UserError if no gene remains, if the genes belong to another
    organism or to two organisms, or if the share of genes with an Ensembl id is below `min_recognised`. With
    `keep_without_id`, a name that may be a symbol of the organism counts like an id.
    """
    names = names.astype(object).where(names.notna(), "").astype(str).reset_index(drop=True)
    ids = strip_version(names)
    _refuse_other_organism(ids, organism)
    has_id = ids.str.fullmatch(re.escape(ORGANISMS[organism].gene_id_prefix) + r"\d{11}")
    report = GeneReport(in_file=len(ids))
    if gene_map is not None:
        found = ids[~has_id].map(gene_map.id_of_symbol).dropna()
        ids[found.index] = found
        has_id[found.index] = True
        report = replace(report, by_symbol=len(found))
    keep = has_id | (ids != "") if keep_without_id else has_id
    _require_recognised(ids, has_id, organism, gene_map, keep_without_id=keep_without_id, least=min_recognised)
    gene_of_kept, unique_ids = pd.factorize(ids[keep])
    column_to_gene = np.full(len(ids), -1, dtype=np.int64)
    column_to_gene[keep.to_numpy()] = gene_of_kept
    report = replace(
        report,
        kept=len(unique_ids),
        under_symbol=int((keep & ~has_id).sum()),
        dropped=int((~keep).sum()),
        summed=int(keep.sum()) - len(unique_ids),
    )
    first_column = np.flatnonzero(keep.to_numpy())[~pd.Series(gene_of_kept).duplicated().to_numpy()]
    attributes = attributes.reset_index(drop=True).iloc[first_column].reset_index(drop=True)
    return Genes(_describe(pd.Series(unique_ids, dtype=object), attributes, gene_map), column_to_gene, report)


def _refuse_other_organism(ids: pd.Series, organism: str) -> None:
    number = {name: int(ids.str.fullmatch(other.gene_id_prefix + r"\d{11}").sum()) for name, other in ORGANISMS.items()}
    likely = max(number, key=number.__getitem__)
    if likely != organism and number[organism] < _MIXED * number[likely]:
        raise UserError(
            f"{number[likely]:,} of {len(ids):,} gene ids are of {likely}, but organism is {organism};"
            f" if the cells are of {likely}, set organism: {likely}"
        )


# If at least this share of the ids belongs to a second organism, the file has genes of both.
_MIXED = 0.05
_SPLIT = "write the cells and genes of each organism to a separate file, and build from these"


def _require_recognised(
    ids: pd.Series,
    has_id: pd.Series,
    organism: str,
    gene_map: GeneMap | None,
    *,
    keep_without_id: bool,
    least: float,
) -> None:
    """UserError if the genes are of two organisms, or too few of the declared one; it describes the other names."""
    kinds = count_kinds(ids[~has_id], organism)
    foreign = sum(number for number, _ in kinds.values())
    recognised = len(ids) - int((ids == "").sum()) - foreign if keep_without_id else int(has_id.sum())
    look = [f"{number:,} look like {kind} such as {example!r}" for kind, (number, example) in kinds.items()]
    for words, (kind, (number, _)) in zip(look, kinds.items(), strict=True):
        mixed = KINDS[kind].mixed * len(ids)
        if number >= mixed and recognised >= mixed:
            raise UserError(
                f"genes of two organisms: {recognised:,} of {len(ids):,} are of {organism}, {words}. Cells of"
                f" the other one would be empty in the Census; {_SPLIT}"
            )
    if recognised >= least * len(ids) and (recognised or keep_without_id):
        return
    found = f"no gene has an Ensembl id of {organism} (the first is {ids.iloc[0]!r})"
    if recognised:
        share = f"{recognised / len(ids):.1%}, genes.min_recognised is {least:.1%}"
        found = f"only {recognised:,} of {len(ids):,} genes are recognised as genes of {organism} ({share})"
    likely = [(words, kind) for words, kind in zip(look, kinds, strict=True) if 2 * kinds[kind][0] > (~has_id).sum()]
    if likely:
        raise UserError(f"{found}: {likely[0][0]}; {KINDS[likely[0][1]].advice}")
    hint = "give a symbol map (genes.map)" if gene_map is None else "check organism, gene_id and genes.map"
    raise UserError(f"{found}; {hint}")


# In bases; longer than any chromosome of the organisms, so that larger values are errors.
_LONGEST_GENE = 10**9


def _describe(ids: pd.Series, attributes: pd.DataFrame, gene_map: GeneMap | None) -> pd.DataFrame:
    """Create var of the resolved genes: values from the gene map, else from the file, else defaults."""
    known = pd.DataFrame(index=range(len(ids))) if gene_map is None else gene_map.by_id.reindex(ids).reset_index()

    def first_known(in_map: str, in_file: str) -> pd.Series:
        value = pd.Series(np.nan, index=range(len(ids)), dtype=object)
        for table, column in ((known, in_map), (attributes, in_file)):
            if column in table:
                candidate = table[column].astype(object)
                value = value.where(value.notna(), candidate.where(candidate.astype(str) != ""))
        return value

    length = pd.to_numeric(first_known("length", "feature_length"), errors="coerce")
    length = length.where((length > 0) & (length < _LONGEST_GENE), 0)
    return pd.DataFrame(
        {
            "feature_id": ids,
            "feature_name": first_known("symbol", "feature_name").fillna(ids).astype(str),
            "feature_length": length.astype(np.int64),
            "feature_type": first_known("type", "feature_type").fillna("unknown").astype(str),
        }
    )
