"""Names of proteins that differ between files: suffixes of antibody panels, upper and lower case."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

# Suffixes that say how a protein was measured: CD3_TotalSeqB, CD3-TotalSeq-C, CD3_TotalC, CD3_TSA, CD3-ADT, CD3_prot.
_PANEL = re.compile(
    r"[ _.-]+(?:total[ _-]?(?:seq(?:[ _-]?[a-d])?|[a-d])|ts[a-d]|adt|prot|protein|antibody)$", re.IGNORECASE
)


def plain_name(name: str) -> str:
    """A protein's name without suffixes of antibody panels, in lower case: `cd3` for CD3, CD3_TotalSeqB and CD3-ADT."""
    plain = name.strip()
    while (shorter := _PANEL.sub("", plain)) not in (plain, ""):
        plain = shorter
    return plain.casefold()


def joined_names(panels: Iterable[Sequence[str]]) -> dict[str, str]:
    """The name under which each protein of several files is known: the first one, if names differ only in suffixes.

    Names of one file that differ only in suffixes or case are different proteins; they, and the same plain name in
    other files, keep their exact names.

    Parameters
    ----------
    panels
        Names of the proteins of each file; all different within a file.
    """
    panels = [list(panel) for panel in panels]
    unclear = {plain for panel in panels for plain, number in Counter(map(plain_name, panel)).items() if number > 1}
    first: dict[str, str] = {}
    known = {}
    for name in (name for panel in panels for name in panel):
        plain = plain_name(name)
        known[name] = name if plain in unclear else first.setdefault(plain, name)
    return known
