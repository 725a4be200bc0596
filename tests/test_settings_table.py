"""Settings in docs/settings.md and in the help of the commands are those of the config."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
from pydantic import Field

from census_scvi.cli import main
from census_scvi.config.section import USUAL, Changes, Section, Usual, mark_of, settings_of
from census_scvi.config.types import Columns, LocalPath, ObsFilter, Share
from census_scvi.settings import Config
from census_scvi.settings.table import kind_of, with_tables

ROOT = Path(__file__).parents[1]
STAGES = ["prepare", "train", "create-latent-update", "evaluate", "publish", "map-query", "annotate"]


def test_the_tables_are_current() -> None:
    document = (ROOT / "docs/settings.md").read_text()
    current = with_tables(document, Config)
    assert document == current, "run python -m census_scvi.settings.table docs/settings.md"
    usual, expert = (re.findall(r"^\| `([\w.]+)`", part, re.MULTILINE) for part in document.split("## Expert"))
    assert sorted([*usual, *expert]) == sorted(name for name, _, _ in settings_of(Config))
    assert 20 <= len(usual) <= 38


def test_every_setting_has_a_meaning() -> None:
    for name, field, _ in settings_of(Config):
        assert str(field.description or "").strip().endswith("."), name


def test_types_in_words() -> None:
    class Kinds(Section):
        changes: ClassVar[tuple[str, ...]] = ()
        number: Annotated[int, Field(ge=1, lt=2**32), USUAL] = 1
        share: Annotated[Share, Changes()] = 0.5
        columns: Annotated[Columns | None, USUAL] = None
        place: LocalPath | None = None
        cells: Annotated[ObsFilter | None, Changes("train")] = None
        several: int | list[int] | bool = 1

    assert {name: kind_of(field) for name, field, _ in settings_of(Kinds)} == {
        "number": "whole number, 1 or more and below 4,294,967,296",
        "share": "number, 0 or more and at most 1",
        "columns": "list of obs columns or null",
        "place": "path or null",
        "cells": "value filter or null",
        "several": "whole number, list of whole numbers or true or false",
    }


@pytest.mark.parametrize("width", ["40", "200"])
@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_the_usual_settings_of_the_command(
    stage: str, width: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    with pytest.raises(SystemExit):
        main(stage, ["--help"])
    text = capsys.readouterr().out.partition("usual settings of this command:\n")[2].partition("\n\n")[0]
    listed = set(re.findall(r"^  ([\w.]+)  ", text, re.MULTILINE))
    usual = {name for name, field, _ in settings_of(Config) if mark_of(field, Usual)}
    assert {"output.directory", "seed", "census.organism"} <= listed < usual
    assert listed - {"output.directory", "query.output"} <= {key.partition("=")[0] for key in Config().of_stage(stage)}
    assert max(map(len, text.splitlines())) <= (60 if width == "40" else 120)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from census_scvi.cli import main\n"
        "try: main('train', ['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'scvi', 'tiledbsoma', 'numpy', 'pandas', 'lightning', 'anndata'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train.max_epochs" in done.stdout
