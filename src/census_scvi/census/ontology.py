"""Classes of cell types from the Cell Ontology, as the benchmark of the Census groups them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

CELL_CLASS, CELL_SUBCLASS = COLUMNS = ("cell_class", "cell_subclass")


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
    # Imported only if a label needs it.
    from cellxgene_ontology_guide.curated_ontology_term_lists import get_curated_ontology_term_list
    from cellxgene_ontology_guide.entities import CuratedOntologyTermList
    from cellxgene_ontology_guide.ontology_parser import OntologyParser

    ontology, curated = OntologyParser(), get_curated_ontology_term_list(CuratedOntologyTermList(column))
    found: dict[str, str | None] = {}
    for term in terms.astype(str).unique():
        valid = term.startswith("CL:") and ontology.is_valid_term_id(term)
        above = set(ontology.get_term_ancestors(term, include_self=True)) if valid else set()
        first = next((candidate for candidate in curated if candidate in above), None)
        found[term] = ontology.get_term_label(first) if first else None
    return terms.astype(str).map(found).astype(object).where(lambda names: names.notna(), None).to_numpy(dtype=object)
