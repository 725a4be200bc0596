"""Select highly variable genes, read and write the genes file, and find the genes of a model in a Census."""

from __future__ import annotations

import importlib.util
import logging
import pickle
import pickletools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import tiledbsoma

from census_scvi.census.cells import require_columns, select_cells, soma_filter
from census_scvi.census.hvg.in_parts import SelectionInParts
from census_scvi.census.hvg.select import Masks, count_detections, select_in_one_pass
from census_scvi.census.open import Census, reading
from census_scvi.census.selected_once import selected_once
from census_scvi.census.settings import HvgSection
from census_scvi.errors import UserError
from census_scvi.files.parts import Part

log = logging.getLogger(__name__)


def read_var(census: Census) -> pd.DataFrame:
    """The var frame of the RNA measurement, all columns, in Census order."""
    var = census.experiment.ms["RNA"].var
    with reading(var.uri):
        return var.read().concat().to_pandas()


@dataclass(frozen=True)
class Selection:
    """Highly variable genes.

    Attributes
    ----------
    feature_ids
        In the order of the Census var.
    below_min_cells
        Number of genes that were excluded before the selection, because they are detected in too few cells.
    """

    feature_ids: list[str]
    below_min_cells: int = 0


def select_genes(
    census: Census, value_filter: str | None, settings: HvgSection, seed: int, min_cells: int = 0
) -> Selection:
    """Select highly variable genes of the filtered cells.

    The method is seurat_v3 on raw counts (Stuart et al. 2019, https://doi.org/10.1016/j.cell.2019.05.031). Genes are
    ranked within each combination of the `hvg_batch` columns. Candidates are the genes that are detected in at least
    `min_cells` of the cells. If there are no more candidates than requested, all are used, with a warning.

    Raises
    ------
    UserError
        A column is missing, no cell matches, no gene is detected in `min_cells` cells, or the fit fails because
        batches have too few cells.
    """
    require_columns(census, settings.hvg_batch, "hvg.hvg_batch")
    var = read_var(census)
    with _fit_errors(settings):
        masks = _select(census, value_filter, settings, seed, min_cells, len(var))
    return _selection(var, masks, settings, min_cells)


class GenesInParts:
    """Select highly variable genes as `select_genes` does, by several processes that each read parts of the cells.

    Only the engine one-pass can be divided: otherwise one process selects, and the others wait for it.

    Parameters
    ----------
    census, value_filter, settings, seed, min_cells
        As in `select_genes`.
    folder
        Folder for what the parts count.
    """

    def __init__(
        self, census: Census, value_filter: str | None, settings: HvgSection, seed: int, min_cells: int, folder: Path
    ) -> None:
        require_columns(census, settings.hvg_batch, "hvg.hvg_batch")
        self._arguments = (census, value_filter, settings, seed, min_cells)
        self._var, self._parts = read_var(census), None
        if settings.engine == "one-pass" and (min_cells or len(self._var) > settings.top_n_hvg):
            cells = selected_once(folder, lambda: select_cells(census, value_filter, settings.hvg_batch), "ranked")
            self._parts = SelectionInParts(census, cells, folder, settings.top_n_hvg, seed, min_cells)

    def read(self, part: Part) -> bool:
        """Read the counts of a part, if they are needed and this is not done; whether something was read."""
        return self._parts is not None and self._parts.read(part)

    def select(self, n_parts: int) -> Selection | None:
        """The selection; None if parts must be read (again). Only one process at a time; UserError: `select_genes`."""
        if self._parts is None:
            return select_genes(*self._arguments)
        _, _, settings, _, min_cells = self._arguments
        with _fit_errors(settings):
            masks = self._parts.select(n_parts)
        return None if masks is None else _selection(self._var, masks, settings, min_cells)


@contextmanager
def _fit_errors(settings: HvgSection) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # raised by the loess fit if a batch has too few cells or counts
        raise UserError(
            f"the genes cannot be ranked within each combination of hvg.hvg_batch {settings.hvg_batch}: the fit of"
            f" variance to mean failed ({str(error).strip()}), which happens in batches of few cells;"
            " use fewer columns in hvg.hvg_batch, or exclude small batches with census.obs_query_model"
        ) from None


def _select(
    census: Census, value_filter: str | None, settings: HvgSection, seed: int, min_cells: int, n_genes: int
) -> Masks:
    if not min_cells and n_genes <= settings.top_n_hvg:
        every = np.ones(n_genes, dtype=bool)
        return every, every
    if settings.engine == "one-pass":
        cells = select_cells(census, value_filter, settings.hvg_batch)
        return select_in_one_pass(census, cells, settings.top_n_hvg, seed, min_cells)
    return _select_by_census(census, value_filter, settings, seed, min_cells)


def _selection(var: pd.DataFrame, masks: Masks, settings: HvgSection, min_cells: int) -> Selection:
    chosen, candidates = masks
    n_candidates = int(candidates.sum())
    if not n_candidates:
        raise UserError(f"genes.min_cells is {min_cells:,} and no gene is detected in that many of the cells; lower it")
    if n_candidates <= settings.top_n_hvg:
        words = f"{n_candidates} genes" + (f" in at least {min_cells:,} cells" if min_cells else "")
        log.warning("hvg.top_n_hvg is %d, but the Census has %s: all are used", settings.top_n_hvg, words)
    return Selection(list(var.loc[chosen, "feature_id"].astype(str)), len(var) - n_candidates)


def _select_by_census(
    census: Census, value_filter: str | None, settings: HvgSection, seed: int, min_cells: int
) -> Masks:
    candidates = np.ones(int(census.experiment.ms["RNA"].var.count), dtype=bool)
    if min_cells:
        candidates = count_detections(census, select_cells(census, value_filter, [])) >= min_cells
        if candidates.sum() <= settings.top_n_hvg:
            return candidates, candidates
    value_filter = soma_filter(census, value_filter, "census.obs_query")
    cells = tiledbsoma.AxisQuery(value_filter=value_filter) if value_filter else None
    genes = tiledbsoma.AxisQuery(coords=(np.flatnonzero(candidates),)) if min_cells else None
    with census.experiment.axis_query("RNA", obs_query=cells, var_query=genes) as query:
        scores = _seeded_highly_variable_genes(seed)(
            query, n_top_genes=settings.top_n_hvg, batch_key=settings.hvg_batch or None
        )
    chosen = np.zeros(len(candidates), dtype=bool)
    chosen[scores.index[scores["highly_variable"]]] = True
    return chosen, candidates


def _seeded_highly_variable_genes(seed: int) -> Callable[..., pd.DataFrame]:
    """`highly_variable_genes` of cellxgene_census, made reproducible.

    If a loess fit fails (batches of few cells), the original retries with jitter from `np.random.default_rng()`, which
    cannot be seeded, so that two runs may select different genes. This function comes from a second copy of its module,
    in which the generator is seeded. numpy itself is not changed, so other threads are not affected.
    """
    # Imported only if used: the import compiles its kernels, which takes seconds.
    from cellxgene_census.experimental import pp

    specification = importlib.util.find_spec(pp.highly_variable_genes.__module__)
    assert specification is not None, "it was imported from there"
    assert specification.loader is not None, "it was imported from there"
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    seeded = ModuleType("numpy")
    random = SimpleNamespace(default_rng=lambda: np.random.default_rng(seed))
    vars(seeded).update(random=random, __getattr__=lambda name: getattr(np, name))
    vars(module)["np"] = seeded
    select: Callable[..., pd.DataFrame] = module.highly_variable_genes
    return select


def write_genes(path: Path, feature_ids: list[str]) -> None:
    """Pickle feature_ids as a numpy array of str."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(_pickled(feature_ids))
    partial.replace(path)


def read_genes(path: Path) -> list[str]:
    """feature_ids of a genes file, in order.

    A pickle can run code, and an array in it can contain forged pointers. The file is therefore not unpickled. Its
    opcodes are read, and they must be equal to those that `write_genes` writes for the same feature_ids.

    Raises
    ------
    UserError
        The file is missing, damaged, not as `write_genes` writes it, or lists a gene twice.
    """
    try:
        found = _opcodes(path.read_bytes())
        genes = _feature_ids(found)
        as_written = found == _opcodes(_pickled(genes))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run scvi-prepare.py first") from None
    except OSError:
        raise
    except Exception:  # whatever reading a damaged or forged pickle raises
        as_written = False
    if not as_written:
        raise UserError(
            f"{path} is refused: it is not the pickled numpy array of feature_ids that scvi-prepare.py writes;"
            " restore it, or run scvi-prepare.py --force"
        )
    if len(set(genes)) != len(genes):
        raise UserError(f"{path} lists a gene twice; run scvi-prepare.py --force")
    return genes


def _pickled(feature_ids: list[str]) -> bytes:
    return pickle.dumps(np.array(feature_ids, dtype="<U"), protocol=4)


def _opcodes(pickled: bytes) -> list[tuple[str, Any]]:
    """Name and argument of each opcode of a pickle; nothing is executed."""
    # numpy 1 and numpy 2 have the same function in different modules.
    renamed = {"numpy.core.multiarray": "numpy._core.multiarray"}
    return [
        (opcode.name, renamed.get(argument, argument) if isinstance(argument, str) else argument)
        for opcode, argument, _ in pickletools.genops(pickled)
        if opcode.name != "FRAME"  # a length that follows from the rest
    ]


def _feature_ids(opcodes: list[tuple[str, Any]]) -> list[str]:
    """Elements of a pickled array of str: the dtype is the text U<length>, the elements are the longest bytes."""
    dtype = next(text for _, text in opcodes if isinstance(text, str) and re.fullmatch(r"U[1-9]\d*", text))
    data = max((argument for _, argument in opcodes if isinstance(argument, bytes)), key=len)
    # Decoded here, because numpy accepts any four bytes as a character.
    text, length = data.decode("utf-32-le"), int(dtype[1:])
    return [text[start : start + length].rstrip("\0") for start in range(0, len(text), length)]


def locate_genes(census: Census, feature_ids: list[str], min_share: float, setting: str = "") -> npt.NDArray[np.int64]:
    """Find the position of each gene of a model in a Census.

    Parameters
    ----------
    census
        The open Census.
    feature_ids
        Genes of the model.
    min_share
        Minimum share of these genes that the Census must have.
    setting
        Name of the setting for `min_share`, for messages; "" if there is none.

    Returns
    -------
    int64 (genes,): soma_joinid of each gene in the var of this Census; -1 if the gene is absent.

    Raises
    ------
    UserError
        The Census has fewer than `min_share` of the genes; the error lists missing ones.
    """
    var = read_var(census)
    joinids = pd.Series(var["soma_joinid"].to_numpy(), index=var["feature_id"].astype(str))
    found = joinids.reindex(feature_ids).fillna(-1).to_numpy().astype(np.int64)
    missing = [gene for gene, joinid in zip(feature_ids, found, strict=True) if joinid < 0]
    share = 1 - len(missing) / len(feature_ids)
    if share < min_share:
        hint = "" if share else f"; genes of this Census have names such as {joinids.index[0]!r}"
        raise UserError(
            f"{len(missing):,} of the model's {len(feature_ids):,} genes are not in {census.identity['uri']}"
            f" ({census.identity['organism']}): {share:.1%} are there,"
            f" {f'{setting} asks for {min_share:.1%}' if setting else f'{min_share:.1%} are needed'}."
            f" Missing: {_listed(missing)}{hint}"
        )
    if missing:
        log.warning(
            "%d of %d genes are not in this Census and count as 0: %s", len(missing), len(found), _listed(missing)
        )
    return found


def _listed(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
