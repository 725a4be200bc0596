"""The Cell Ontology, offline: terms of cell types, their ancestors, and the classes of the Census' benchmark."""

from __future__ import annotations

from functools import cache, cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd

CELL_CLASS, CELL_SUBCLASS = COLUMNS = ("cell_class", "cell_subclass")
ROOT = "CL:0000000"  # cell
_PREFIX = "CL:"
# Curated classes that say nothing about the lineage: monocytes and hematopoietic stem cells are both "progenitor cell".
_STATES = (
    "precursor cell", "progenitor cell", "stem cell", "transit amplifying cell", "abnormal cell", "neoplastic cell",
    "motile cell", "secretory cell", "contractile cell", "ciliated cell", "supporting cell", "stuff accumulating cell",
    "perivascular cell", "neuron associated cell",
)  # fmt: skip


class CellOntology:
    """The Cell Ontology as cellxgene-ontology-guide contains it; it needs no network."""

    def __init__(self) -> None:
        # Imported only if a label needs it.
        from cellxgene_ontology_guide.curated_ontology_term_lists import get_curated_ontology_term_list
        from cellxgene_ontology_guide.entities import CuratedOntologyTermList
        from cellxgene_ontology_guide.ontology_parser import OntologyParser

        self._parser = OntologyParser()
        self._curated = {name: get_curated_ontology_term_list(CuratedOntologyTermList(name)) for name in COLUMNS}
        self._by_name = {name.lower(): term for name, term in self._parser.get_term_label_to_id_map("CL").items()}

    def curated(self, column: str) -> list[str]:
        """Terms of a curated list, `cell_class` or `cell_subclass`."""
        return list(self._curated[column])

    def term(self, label: str) -> str | None:
        """Term with exactly this name (in any case), or None.

        Synonyms are not searched: that of "alpha cell" is a cell of the retina.
        """
        return self.current(self._by_name.get(label.strip().lower()))

    def current(self, term: str | None) -> str | None:
        """The term itself, the one that replaces it if it is deprecated, or None if it is not a valid term."""
        if term is None or not term.startswith(_PREFIX) or not self._parser.is_valid_term_id(term):
            return None
        if self._parser.is_term_deprecated(term):
            return self.current(self._parser.get_term_replacement(term))
        return term

    def name(self, term: str) -> str:
        """Name of a valid term."""
        return str(self._parser.get_term_label(term))

    def ancestors(self, term: str) -> set[str]:
        """The term and all its ancestors; empty if it is not a valid term."""
        if not (term.startswith(_PREFIX) and self._parser.is_valid_term_id(term)):
            return set()
        return set(self._parser.get_term_ancestors(term, include_self=True))

    @cached_property
    def classes(self) -> frozenset[str]:
        """Curated terms of both lists that describe a lineage or an organ, not a state of cells of any type."""
        every = (term for terms in self._curated.values() for term in terms)
        return frozenset(term for term in every if self.current(term) == term and self.name(term) not in _STATES)


@cache
def cell_ontology() -> CellOntology:
    """The Cell Ontology, read once per process (0.1 s)."""
    return CellOntology()


def classes_of(terms: pd.Series, column: str) -> npt.NDArray[np.object_]:
    """Class of each cell type, object (cells,): its label, or None if the cell type has no class.

    Parameters
    ----------
    terms
        Term ids, for example CL:0000236.
    column
        `cell_class` or `cell_subclass`. The class is the first term of this curated list that is an ancestor of the
        cell type or the cell type itself.
    """
    ontology = cell_ontology()
    found: dict[str, str | None] = {}
    for term in terms.astype(str).unique():
        above = ontology.ancestors(term)
        first = next((candidate for candidate in ontology.curated(column) if candidate in above), None)
        found[term] = ontology.name(first) if first else None
    return terms.astype(str).map(found).astype(object).where(lambda names: names.notna(), None).to_numpy(dtype=object)
