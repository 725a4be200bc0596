"""Import a model that scvi-tools saved: its pickles are read once, and its safe form is written."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import scvi

from census_scvi.census.gene_ids import GeneMap, strip_version
from census_scvi.census.schema import ORGANISMS
from census_scvi.config.run_names import DESCRIPTION
from census_scvi.errors import UserError
from census_scvi.files.atomic import sync, sync_tree
from census_scvi.files.partial_folder import OLD, partial_folder
from census_scvi.files.paths import expand_argument
from census_scvi.model.build import check_arguments
from census_scvi.model.safe import ModelDescription, check_finite, load_safe, save_for_scvi_tools, save_safe
from census_scvi.model.saved import SavedModel, read_saved

log = logging.getLogger(__name__)

_SCRIPT = "scvi-import-model.py"
# Gene names are of another organism if this share of them are its ids.
_MOST_FOREIGN = 0.05


def import_model(
    folder: str | Path,
    output: str | Path,
    *,
    trust: bool = False,
    organism: str = "homo_sapiens",
    gene_map: str | Path | None = None,
    force: bool = False,
) -> ModelDescription:
    """Import a SCVI, SCANVI or TOTALVI model that scvi-tools saved, so that it can be used without its pickle.

    Parameters
    ----------
    folder
        Folder in which `model.save` of scvi-tools wrote `model.pt`, or the separate files of versions before 0.15.
    output
        Folder to write: the safe form, and `model.pt` of the installed scvi-tools.
    trust
        Must be set: loading the pickle of scvi-tools executes any code that its author put into it.
    organism
        Organism of the genes, as in the Census.
    gene_map
        TSV of ensembl_id and symbol. Genes that the model has by symbol get their Ensembl id; all genes get a symbol,
        by which queries are matched, too. None: the genes keep their names.
    force
        Replace a model in `output`.

    Returns
    -------
    The description of the imported model; `load_model(output)` loads it.

    Raises
    ------
    UserError
        `trust` is not set, the model cannot be imported (with the reason), or `output` exists.
    """
    source, target = Path(expand_argument(folder, "folder")), Path(expand_argument(output, "output"))
    check_places(source, target, trust=trust, force=force)
    known = None if gene_map is None else GeneMap(Path(expand_argument(gene_map, "gene_map")))
    try:
        saved = read_saved(source)
        description = describe(saved, organism, known)
        model = _rebuilt(saved, description)
    except ValueError as error:
        raise UserError(f"{source} cannot be imported: {error}") from None
    with partial_folder(target, _SCRIPT) as partial:
        check_places(source, target, trust=trust, force=force)
        _write(model, description, partial / "new")
        if target.exists():
            target.rename(partial / OLD)
        (partial / "new").rename(target)
        sync(target.parent)
    return description


def check_places(source: Path, target: Path, *, trust: bool, force: bool) -> None:
    """UserError if the source may not be unpickled, or the target exists or cannot be replaced."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; give the one in which model.save of scvi-tools wrote")
    if not trust:
        raise UserError(
            f"{source} has a pickle, and loading it executes any code that its author put into it; if you trust the"
            " author, set import_model.trust=true"
        )
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"the output {target} would replace {source}; give another folder")
    if not target.exists():
        return
    if not force:
        raise UserError(f"{target} exists; choose another import_model.output, or replace it with --force")
    if not (target / DESCRIPTION).exists():
        raise UserError(f"{target} exists and is not a model: it is not replaced; choose another import_model.output")


def describe(saved: SavedModel, organism: str, gene_map: GeneMap | None) -> ModelDescription:
    """Description of a saved model; ValueError, in one line, if it cannot have one."""
    genes, symbols = name_genes(saved.genes, organism, gene_map)
    check_arguments(saved.arguments, saved.kind)
    return ModelDescription(
        genes=genes,
        batches=saved.batches,
        arguments=saved.arguments,
        organism=organism,
        batch_key=[saved.batch_key] if saved.batch_key else [],
        n_cells=saved.n_cells,
        symbols=symbols,
        model=saved.kind,
        labels=saved.labels,
        labels_key=saved.labels_key,
        unlabeled_category=saved.unlabeled_category,
        proteins=saved.proteins,
        missing_proteins=saved.missing_proteins,
    )


def name_genes(names: list[str], organism: str, gene_map: GeneMap | None) -> tuple[list[str], list[str]]:
    """Ensembl ids of genes as far as they are known, and their symbols (empty without a gene map).

    Raises
    ------
    ValueError
        The names are ids of another organism, no gene is in the map, or two genes get the same id.
    """
    ids = strip_version(pd.Series(names, dtype=object))
    for other in ORGANISMS.values():
        foreign = int(ids.str.fullmatch(other.gene_id_prefix + r"\d{11}").sum())
        if other.name != organism and foreign > _MOST_FOREIGN * len(ids):
            raise ValueError(
                f"{foreign:,} of its {len(ids):,} genes are of {other.name}, and the organism is {organism}; set"
                f" census.organism={other.name}"
            )
    if gene_map is not None:
        ids = ids.where(ids.isin(gene_map.by_id.index), ids.map(gene_map.id_of_symbol)).fillna(pd.Series(names))
    if ids.duplicated().any():
        twice = ids[ids.duplicated()].iloc[0]
        both = [name for name, gene in zip(names, ids, strict=True) if gene == twice]
        raise ValueError(f"its genes {_listed(both)} are all {twice}; each gene must be there once")
    unknown = [gene for gene in ids if not gene.startswith(tuple(each.gene_id_prefix for each in ORGANISMS.values()))]
    if unknown:
        log.warning(
            "%s of the model's %s genes have no Ensembl id, such as %s: cells must have these names%s",
            f"{len(unknown):,}", f"{len(ids):,}", _listed(unknown), "" if gene_map else ", or give a gene_map",
        )  # fmt: skip
    if gene_map is None:
        return ids.tolist(), []
    symbols = ids.map(gene_map.by_id["symbol"])
    if symbols.notna().sum() == 0:
        raise ValueError(f"none of its genes, such as {_listed(names)}, is in the gene map")
    return ids.tolist(), symbols.where(symbols.notna() & (symbols != ""), ids).tolist()


def _listed(names: Iterable[str], most: int = 3) -> str:
    return ", ".join(list(names)[:most])


def _rebuilt(saved: SavedModel, description: ModelDescription) -> scvi.model.SCVI:
    """The model with its weights; ValueError if they do not fit the description."""
    try:
        model = description.build()
        model.module.load_state_dict(saved.weights)
    except (RuntimeError, TypeError) as error:
        problem = next((line for line in reversed(str(error).splitlines()) if line.strip()), "").strip()
        raise ValueError(
            f"its weights are not those of a {saved.kind} with {len(saved.genes):,} genes, {len(saved.batches):,}"
            f" batches and these arguments ({problem})"
        ) from None
    check_finite(saved.weights)
    model.module.eval()
    model.is_trained_ = True
    return model


def _write(model: scvi.model.SCVI, description: ModelDescription, folder: Path) -> None:
    """Write both forms into a new folder, and read the safe one again."""
    save_for_scvi_tools(model, folder)
    save_safe(model, description, folder)
    load_safe(folder)
    sync_tree(folder)
