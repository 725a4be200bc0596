"""Classes of cell types by the Cell Ontology, as the Census' benchmark groups them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

CELL_CLASS, CELL_SUBCLASS = COLUMNS = ("cell_class", "cell_subclass")


def classes_of(terms: pd.Series, column: str) -> npt.NDArray[np.object_]:
    """The class of each cell type, object (cells,): label, or None if the ontology has none.

    Parameters
    ----------
    terms
        Term ids, such as CL:0000236.
    column
        `cell_class` or `cell_subclass`: the first term of that curated list that is an ancestor, or the term itself.
    """
    # Imported only where a label needs it.
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
