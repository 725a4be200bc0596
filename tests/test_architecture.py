"""The layout that docs/architecture.md describes: rooms in layers, imports downwards only."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "census_scvi"
DOCUMENT = ROOT / "docs" / "architecture.md"


def imports() -> Iterator[tuple[str, str]]:
    """Every import of one of the package's modules by another, wherever in the module it stands."""
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    for path in PACKAGE.rglob("*.py"):
        importer = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("census_scvi"):
                continue
            source = (node.module or "").removeprefix("census_scvi").lstrip(".")
            for name in node.names:
                whole = f"{source}.{name.name}".lstrip(".")
                found = next(each for each in (whole, source, f"{source}.__init__".lstrip(".")) if each in modules)
                yield importer, found


def layers() -> list[list[str]]:
    """The rooms of each layer, top down, as the document's table has them."""
    table = DOCUMENT.read_text().partition("## Layers")[2].partition("\n## ")[0]
    return [re.findall(r"`(\w+)(?:/|\.py)`", row.split("|")[1]) for row in table.splitlines() if row.startswith("| `")]


def test_the_root_holds_the_face_the_command_line_the_error_and_rooms() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files - {"py.typed"} == {"__init__.py", "atlas.py", "cli.py", "errors.py"}


def test_the_document_has_every_room_once() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    named = [room for layer in layers() for room in layer]
    assert sorted(named) == sorted({*rooms, "atlas", "cli", "errors"})


def test_imports_run_downwards() -> None:
    level = {room: number for number, rooms in enumerate(layers()) for room in rooms}
    wrong = [
        f"{importer} imports {imported}"
        for importer, imported in imports()
        if (above := importer.split(".")[0]) != (below := imported.split(".")[0])
        and above != "__init__"  # the package offers some names of its own
        and not level[above] < level[below]
    ]
    assert not wrong


def test_no_module_imports_itself_through_others() -> None:
    graph: dict[str, set[str]] = {}
    for importer, imported in imports():
        # A room's __init__ offers names of its modules, which import each other directly.
        if not importer.endswith("__init__") and not imported.endswith("__init__"):
            graph.setdefault(importer, set()).add(imported)
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_every_room_says_what_it_is_for() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_one_module_searches_nearest_neighbors() -> None:
    search = re.compile(r"import .*\b(NearestNeighbors|KNeighborsClassifier|NNDescent)\b")
    modules = {
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if search.search(path.read_text())
    }
    assert modules == {"neighbors/index.py"}
