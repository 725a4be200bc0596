"""Plain English: phrases that a reader stumbles over, and the usual words of the field for them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from pipeline import ROOT

FOLDERS = ("src", "docs", "configs", "benchmarks", "notebooks")
KINDS = {".py", ".md", ".yaml", ".jinja", ".sh", ".ipynb"}
ROOT_FILES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "scvi-config.yaml", "scvi-init.sh")

# A regular expression, and what to write instead.
AVOIDED = {
    r"held against|hold \w+ against": "compared with",
    r"anew|once more": "again",
    r"mend(s|ed|ing)?": "fix",
    r"nodes? a hidden layer": "hidden units per layer",
    r"(cells?|counts?|bytes|genes|rows?|milliseconds) an? (second|minibatch|cell|core|epoch|gene|chunk)": "per",
    r"made-up|make-believe": "simulated",
    r"(told|tells?) (\w+ ){0,2}apart": "separated",
    r"left out|leaves? (it |them )?out": "excluded",
    r"surest": "most confident",
    r"commonest": "most frequent",
    r"(?-i:beside)": "next to, compared with",
    r"what it takes": "cost",
    r"times as far": "distance ratio",
    r"at hand": "available",
    r"at the (most|least)": "at most, at least",
    r"so many": "this number",
    r"by heart": "overfits",
    r"in rooms|this room|own room|a room of": "folder, module",
}


def texts() -> Iterator[tuple[Path, str]]:
    """Every text that a user or a developer reads; of notebooks, what was written, not what they put out."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in KINDS]
    for path in sorted(files) + [ROOT / name for name in ROOT_FILES]:
        if path.suffix == ".ipynb":
            yield path, "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
        else:
            yield path, path.read_text(encoding="utf-8")


@pytest.mark.parametrize("phrase", AVOIDED)
def test_texts_use_the_words_of_the_field(phrase: str) -> None:
    pattern = re.compile(rf"(?<![\w.-])(?:{phrase})(?![\w-])", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}: {match[0]!r}; write: {AVOIDED[phrase]}"
        for path, text in texts()
        for match in pattern.finditer(text)
    ]
    assert not found, "\n".join(found)
