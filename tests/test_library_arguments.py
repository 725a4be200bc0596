"""The table of the libraries' arguments: current for the versions we install, and no obstacle to newer ones."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from census_scvi.config import library_arguments as names
from census_scvi.config.library_arguments import LIBRARIES, listed
from census_scvi.errors import UserError
from census_scvi.settings import load_config
from census_scvi.training import fit
from census_scvi.training.installed_arguments import installed
from census_scvi.training.settings import TrainSection

ROOT = Path(__file__).parents[1]
UPDATE = "run python -m census_scvi.training.installed_arguments"


def test_the_table_has_the_versions_that_are_installed_by_default() -> None:
    constraints = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert listed({name: constraints[name] for name in LIBRARIES}) is not None, UPDATE


def test_the_table_says_what_the_installed_libraries_take() -> None:
    table = json.loads(Path(names.__file__).with_name(names.TABLE).read_text())
    if any(version(name) not in table[name] for name in LIBRARIES):
        pytest.skip("the installed version is not in the table: names are checked when training starts")
    assert listed() == installed(), UPDATE


@pytest.fixture
def unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """scvi-tools as if it had come out after the table was written."""
    newer = {"lightning": version("lightning"), "scvi-tools": "99.0"}
    monkeypatch.setattr(names, "version", newer.__getitem__)
    assert listed() is None


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("train.trainer", {"gradient_clip_vall": 1}, "is not an argument of Lightning's Trainer; did you mean gradient_"),
    ("train.trainer", {"benchmark": 3}, "train.trainer.benchmark is 3, expected true or false"),
    ("training_plan", {"learning_rate": 1}, "training_plan.learning_rate is not an argument of scvi-tools' TrainingPl"),
    ("training_plan", {"update_only_decoder": 5}, "training_plan.update_only_decoder is 5, expected true or false"),
]


@pytest.mark.parametrize(("setting", "arguments", "message"), WRONG)
def test_names_are_checked_when_training_starts_with_an_unknown_version(
    setting: str, arguments: dict[str, Any], message: str, tmp_path: Path, unknown_version: None
) -> None:
    path = tmp_path / "c.yaml"
    values = {"training_plan": arguments} if setting == "training_plan" else {"train": {"trainer": arguments}}
    path.write_text(json.dumps(values))
    config = load_config(path)
    with pytest.raises(UserError, match=re.escape(message)):
        fit.check_arguments(config.train, config.training_plan, None, "SCVI")  # type: ignore[arg-type]  # not read


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.trainer.max_epochs=1", "train.trainer.max_epochs cannot be set here; set train.max_epochs"),
        ("training_plan.lr=-1", "training_plan.lr is -1, expected a finite number above 0"),
        ("training_plan.lr=fast", "training_plan.lr is 'fast', expected a finite number above 0"),
    ],
)
def test_what_needs_no_table_is_checked_at_once_with_any_version(
    setting: str, message: str, tmp_path: Path, unknown_version: None
) -> None:
    (tmp_path / "c.yaml").write_text("{}")
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(tmp_path / "c.yaml", [setting])


def test_arguments_of_a_newer_version_are_accepted(tmp_path: Path, unknown_version: None) -> None:
    (tmp_path / "c.yaml").write_text("training_plan: {brand_new: 1, lr: null}\ntrain: {trainer: {newer: [1]}}")
    config = load_config(tmp_path / "c.yaml")
    assert config.training_plan == {"brand_new": 1, "lr": None}
    assert config.train == TrainSection(trainer={"newer": [1]})
