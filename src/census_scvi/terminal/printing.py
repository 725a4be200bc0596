"""Safe output of untrusted text to a terminal: without credentials and control characters."""

from __future__ import annotations

import unicodedata

from census_scvi.files.uri import without_credentials

# Control, format (among them those that turn the direction of writing), surrogate, line and paragraph separators.
_ACTS = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    """Lines of text as they may be printed; a character that would act on the terminal becomes its escape."""
    return "".join(_shown(character) for character in str(without_credentials(text)))


def on_one_line(text: str) -> str:
    """The same, on one line: for a value from a file within a line of ours."""
    return " ".join(printable(text).split())


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in _ACTS:
        return character
    return character.encode("unicode_escape").decode()
