"""Recognise names that are not genes of the organism: genes of other organisms, transcripts, probes, numbers."""

import math
import re
from dataclasses import dataclass

import pandas as pd

from census_scvi.census.schema import ORGANISMS, PRIMATES


@dataclass(frozen=True)
class Kind:
    """A kind of names that are not Ensembl gene ids of the declared organism.

    Attributes
    ----------
    pattern
        Regular expression that matches the whole name.
    advice
        What to do with a file of such names.
    organisms
        Organisms that the genes may be of; none if the name does not show it.
    mixed
        If at least this share of a file's genes has such names, the file contains genes of another organism.
    """

    pattern: re.Pattern[str]
    advice: str
    organisms: tuple[str, ...] = ()
    mixed: float = math.inf


_NAME_GENES = "give the genes as Ensembl ids or symbols (gene_id: a column of var with them)"
_PREFIXES = {
    **{name: organism.gene_id_prefix for name, organism in ORGANISMS.items()},
    "rat": "ENSRNOG", "crab-eating macaque": "ENSMFAG", "gorilla": "ENSGGOG", "pig": "ENSSSCG", "cow": "ENSBTAG",
    "dog": "ENSCAFG", "rabbit": "ENSOCUG", "chicken": "ENSGALG", "zebrafish": "ENSDARG", "frog": "ENSXETG",
}  # fmt: skip


def _of(organism: str) -> str:
    if organism in ORGANISMS:
        return f"if the cells are of {organism}, set organism: {organism}"
    return f"a local Census holds cells of {_listed(tuple(ORGANISMS), 'and')}"


def _listed(names: tuple[str, ...], word: str) -> str:
    return f"{', '.join(names[:-1])} {word} {names[-1]}"


# The order matters: a name belongs to the first kind that it matches.
KINDS = {
    **{
        f"Ensembl ids of {name}": Kind(re.compile(prefix + r"\d{11}(\.\d+)?"), _of(name), (name,), 0.05)
        for name, prefix in _PREFIXES.items()
    },
    "Ensembl ids of another organism": Kind(
        re.compile(r"ENS[A-Z]{2,6}G\d{11}(\.\d+)?"), _of("another"), ("another",), 0.05
    ),
    "ids of fly genes": Kind(re.compile(r"FBgn\d{7}"), _of("fly"), ("fly",), 0.05),
    "ids of worm genes": Kind(re.compile(r"WBGene\d{8}"), _of("worm"), ("worm",), 0.05),
    "ids of yeast genes": Kind(re.compile(r"Y[A-P][LR]\d{3}[WC](-[A-Z])?"), _of("yeast"), ("yeast",), 0.05),
    "transcript ids": Kind(re.compile(r"ENS[A-Z]*T\d{11}(\.\d+)?|[NX][MR]_\d+(\.\d+)?"), "sum the counts by gene"),
    "protein ids": Kind(re.compile(r"ENS[A-Z]*P\d{11}(\.\d+)?|[NX]P_\d+(\.\d+)?"), _NAME_GENES),
    "numbers, as of Entrez or of rows": Kind(re.compile(r"\d+(\.0)?"), _NAME_GENES),
    "probes of a microarray": Kind(re.compile(r"\S+_at|ILMN_\d+|A_\d+_P\d+"), _NAME_GENES),
    "symbols of mouse genes": Kind(
        re.compile(r"(?!Ercc)[A-Z][a-z][A-Za-z0-9]*([.-][A-Za-z0-9]+)*|\d{6,}[A-Z]\d{2}Rik|mt-[A-Z]\w+"),
        _of("mus_musculus"),
        ("mus_musculus",),
        0.2,  # symbols without an id, for example old ones, may look like those of another organism
    ),
    "symbols of primate genes": Kind(
        re.compile(r"(?!ERCC|[A-Z]{2}\d{6})[A-Z]{2,}[A-Z0-9]*(-[A-Z0-9]+)*|[A-Z]\d+orf\d+|MT-[A-Z]\w+"),
        f"symbols do not tell one primate from another: set organism to {_listed(PRIMATES, 'or')}, as the cells are",
        PRIMATES,
        0.2,
    ),
}


def count_kinds(names: pd.Series, organism: str) -> dict[str, tuple[int, str]]:
    """Number of names of each kind and an example, most frequent first; kinds of the organism itself are skipped.

    Parameters
    ----------
    names
        str (genes,): names that were not recognised as genes of the organism.
    organism
        The declared organism.
    """
    left, found = names, {}
    for kind, description in KINDS.items():
        if organism in description.organisms:
            continue
        matches = left.str.fullmatch(description.pattern.pattern).astype(bool)
        if matches.any():
            found[kind] = (int(matches.sum()), str(left[matches].iloc[0]))
            left = left[~matches]
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))
