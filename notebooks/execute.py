"""Run the notebooks and keep what they put out: `python notebooks/execute.py [NOTEBOOK ...]`, after `make demo`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
# Of libraries, which a reader can do nothing about.
IGNORED = ("Transforming to str index", "IProgress not found", "Category ", "Observation names are not unique")


def execute(path: Path) -> None:
    """Run a notebook in its folder, from a fresh kernel, and write it back; an error ends it, with where it was."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    # Outputs are read by others: the folder in which they were made is nobody's business.
    text = nbformat.writes(notebook).replace(json.dumps(str(path.parent.parent.absolute()))[1:-1], "census-scvi")
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ["PYTHONWARNINGS"] = ",".join(f"ignore:{message}" for message in IGNORED)
    for notebook in map(Path, sys.argv[1:] or sorted(FOLDER.glob("*.ipynb"))):
        print(notebook, file=sys.stderr)
        execute(notebook)
