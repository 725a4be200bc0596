"""The commands: one list, from which scripts, the program census-scvi, help and documents are made or checked."""

from __future__ import annotations

import ast
import re
import tomllib
import warnings
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from pipeline import ROOT

from census_scvi.cli import console
from census_scvi.config.stages import PIPELINE, STAGES
from census_scvi.terminal.guarded import configure_logging


def test_each_command_has_its_script_and_module() -> None:
    assert {path.name for path in ROOT.glob("scvi-*.py")} == {command.script for command in STAGES.values()}
    for command in STAGES.values():
        script = ast.parse((ROOT / command.script).read_text())
        assert ast.get_docstring(script) == command.summary
        assert f'main("{command.name}")' in ast.unparse(script).replace("'", '"')
        module = ROOT.joinpath("src", *command.module.split(".")).with_suffix(".py")
        functions = {node.name for node in ast.parse(module.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert functions >= ({"run", "add_arguments"} if command.own_arguments else {"run", "plan"}), module
        assert (ROOT / command.script).stat().st_mode & 0o111, "it is executable"


def test_documents_and_type_checks_have_each_command() -> None:
    scripts = {command.script for command in STAGES.values()}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {name for name in settings["tool"]["mypy"]["files"] if name.endswith(".py")} == scripts
    document = (ROOT / "docs/run-directory.md").read_text()
    stages = re.findall(r"^\| ([a-z-]+) \|", document.partition("## The stages")[2].partition("\n## ")[0], re.M)
    assert [name for name in stages if name != "stage"] == list(PIPELINE)


def test_the_program_is_installed() -> None:
    (program,) = entry_points(group="console_scripts", name="census-scvi")
    assert program.load() is console


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("-h", "--help"):
        assert console([option]) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown and command.summary in shown for name, command in STAGES.items())
        assert max(map(len, shown.splitlines())) <= 120
    assert console(["--version"]) == 0
    assert capsys.readouterr().out == f"census-scvi {version('census-scvi')}\n"


@pytest.mark.parametrize("name", STAGES)
def test_each_command_runs_by_its_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        console([name, "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: census-scvi {name} ")
    with pytest.raises(SystemExit) as left:
        console([name, "--nonsense"])
    assert left.value.code == 2
    assert f"(census-scvi {name} --help shows the arguments)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "expected a command; census-scvi --help lists them"),
        (["trian"], "trian is not a command; did you mean train?"),
        (["--config", "x.yaml"], "--config is not a command"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
    ],
)
def test_a_wrong_command_is_one_line(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert console(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    ("category", "text", "shown"),
    [
        (UserWarning, "a file of this version will be removed", True),
        (FutureWarning, "the default of an argument will change", False),
        (UserWarning, "Variable names are not unique. To make them unique, call `.var_names_make_unique`.", False),
    ],
)
def test_users_see_the_warnings_that_are_for_them(category: type[Warning], text: str, shown: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        configure_logging()
        warnings.warn(text, category, stacklevel=1)
    assert len(caught) == shown
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as tests, and who asks for all of them
        configure_logging()
        with pytest.raises(category, match=re.escape(text)):
            warnings.warn(text, category, stacklevel=1)
