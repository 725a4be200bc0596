"""Results: whether they can be written is asked before the work, and they appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pipeline import Run

from census_scvi.cli import main
from census_scvi.errors import UserError
from census_scvi.files import atomic
from census_scvi.files.atomic import replacing, write_json
from census_scvi.files.writable import require_writable, require_writable_folder


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder with things that are no place for a result."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


IMPOSSIBLE = {
    "none/out.h5ad": "none does not exist; create the folder first",
    "file/out.h5ad": "file is a file, not a folder",
    "file/none/out.h5ad": "none does not exist",
    "folder": "folder is a folder; give a file",
    "loop": "loop cannot be used (Too many levels of symbolic links)",
    "loop/out.h5ad": "loop cannot be used (Too many levels of symbolic links)",
    "pipe": "pipe is not a regular file",
    "x" * 240: "is too long; at most 255 bytes are possible",  # with the endings of its picture and of unfinished files
    "x" * 250: "is too long; at most 255 bytes are possible",
    "ü" * 126: "is too long; at most 255 bytes are possible",
    "y" * 300: "is too long; at most 255 bytes are possible",
}


def paths_of(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", IMPOSSIBLE, ids=lambda name: name[:20])
def test_targets_of_map_query(name: str, places: Path, finished_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Said in one line before anything is read, with --force and --dry-run as well; nothing is touched."""
    (places / "cells.h5ad").write_text("never read")
    before = paths_of(places)
    settings = (f"query.file={places}/cells.h5ad", f"query.output={places / name}")
    for arguments in ((), ("--force",), ("--dry-run",)):
        assert main("map-query", ["--config", str(finished_run.config), *settings, *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: query.output: ")
        assert IMPOSSIBLE[name] in line
    assert paths_of(places) == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("cells.h5ad", "query.output is query.file"),
        ("folder/../cells.h5ad", "query.output is query.file"),
        ("hard.h5ad", "query.output is query.file"),
        ("out.json", "query.output ends in .json, like the report"),
        ("out.png", "query.output ends in .png, like the report or a picture; expected NAME.h5ad"),
        ("report.h5ad", "report.json is a folder; give a file"),
        ("picture.h5ad", "picture-cell_type.png is a folder; give a file"),
    ],
)
def test_other_files_of_map_query(
    output: str, message: str, places: Path, finished_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (places / "cells.h5ad").write_text("never read")
    os.link(places / "cells.h5ad", places / "hard.h5ad")
    for folder in ("report.json", "picture-cell_type.png"):
        (places / folder).mkdir()
    before = paths_of(places)
    settings = (f"query.file={places}/cells.h5ad", f"query.output={places / output}", "--force")
    assert main("map-query", ["--config", str(finished_run.config), *settings]) == 2
    assert message in capsys.readouterr().err
    assert paths_of(places) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "file is a file, not a folder"),
        ("file/below/it", "file is a file, not a folder"),
        ("loop", "Too many levels of symbolic links"),
        ("y" * 300, "File name too long"),
        ("none/" + "y" * 256, "is too long; at most 255 bytes are possible"),
        ("taken", "report.html is a folder; give a file"),
    ],
    ids=lambda text: text[:20],
)
def test_folders_of_evaluate(
    name: str, message: str, places: Path, finished_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (places / "taken" / "report.html").mkdir(parents=True)
    before = paths_of(places)
    for arguments in ((), ("--force",), ("--dry-run",)):
        settings = (f"evaluate.folder={places / name}", *arguments)
        assert main("evaluate", ["--config", str(finished_run.config), *settings]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: evaluate.folder: ")
        assert message in line
    assert paths_of(places) == before


def test_where_one_may_not_write(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if os.access(closed, os.W_OK):
        pytest.skip("root may write everywhere; run the tests as another user")
    with pytest.raises(UserError, match=r"query.output: no permission to write in .*closed; give another location"):
        require_writable(closed / "out.h5ad", "query.output")
    with pytest.raises(UserError, match=r"evaluate.folder: no permission to write in .*closed; give another location"):
        require_writable_folder(closed / "new" / "er", ["report.html"], "evaluate.folder")


def test_what_can_be_written(places: Path) -> None:
    before = paths_of(places)
    for name in ("new.h5ad", "file", "link", "folder/new.h5ad", "z" * 200):
        require_writable(places / name, "query.output")
    for name in ("folder", "new", "new/and/deeper"):
        require_writable_folder(places / name, ["report.html"], "evaluate.folder")
    assert paths_of(places) == before


FILES = ("picture.png", "report.json", "cells.h5ad")


def write_all(folder: Path, text: str) -> None:
    with replacing([folder / name for name in FILES]) as partials:
        for partial in partials:
            partial.write_text(text)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt(), SystemExit(143)], ids=repr)
@pytest.mark.parametrize("operation", ["write_text", "sync", "replace"])
def test_a_failure_leaves_nothing_unfinished(
    operation: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "cells.h5ad.partial").write_text("of a run that was killed")
    if operation == "sync":
        monkeypatch.setattr(atomic, "sync", fail)
    else:
        monkeypatch.setattr(Path, operation, fail)
    with pytest.raises(type(error)):
        write_all(tmp_path, "new")
    if operation != "write_text":
        with pytest.raises(type(error)):
            write_json(tmp_path / "report.json", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", range(9))
def test_a_kill_leaves_the_last_file_out_until_all_are_there(step: int, tmp_path: Path) -> None:
    """Killed before each write, sync and rename; the same again then goes to its end."""
    child = os.fork()
    if not child:
        steps = iter(range(step))

        def dying(do):  # type: ignore[no-untyped-def]
            def step_or_die(*arguments: object, **options: object) -> object:
                if next(steps, None) is None:
                    os._exit(9)
                return do(*arguments, **options)

            return step_or_die

        Path.write_text, Path.replace = dying(Path.write_text), dying(Path.replace)  # type: ignore[method-assign]
        atomic.sync = dying(atomic.sync)
        write_all(tmp_path, "new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "cells.h5ad").exists()
    write_all(tmp_path, "newer")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(FILES, "newer")
