"""Safe output of untrusted text to a terminal, without credentials and control characters."""

from __future__ import annotations

import unicodedata

from census_scvi.files.uri import without_credentials

# Unicode categories: control, format (which includes changes of the text direction), surrogate, line separator,
# paragraph separator.
_ACTS = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    """Text that is safe to print: credentials are removed, and characters that control the terminal are escaped."""
    return "".join(_shown(character) for character in str(without_credentials(text)))


def on_one_line(text: str) -> str:
    """Like `printable`, on one line: for a value from a file within a message."""
    return " ".join(printable(text).split())


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in _ACTS:
        return character
    return character.encode("unicode_escape").decode()
