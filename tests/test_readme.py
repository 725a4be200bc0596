"""The README is true: its commands run as printed, its table of settings is the config's own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import cellxgene_census
import pytest
import yaml
from pipeline import ROOT, SMALL, forked, run_code, run_script
from pydantic import BaseModel

from census_scvi.config import Config

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A command that needs no shell: a script, and arguments without a character that means something to bash alone.
PLAIN = re.compile(r"python [\w./-]+\.py( [^$`|&;<>*?~\\(){}!]*)?")
# Run by CI itself, and this test is part of one of them.
NOT_HERE = ("make demo", "make test", "make lint", "make fuzz", "./scvi-init.sh", "tensorboard ")


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Dotted name, default and meaning of every setting."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.get_default(call_default_factory=True), str(field.description)


def table() -> list[str]:
    """The rows of the README's table."""
    return [f"| `{name}` | `{json.dumps(default)}` | {meaning} |" for name, default, meaning in settings(Config)]


def test_the_table_of_settings_is_the_config_s_own() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = readme.partition("| setting | default | meaning |\n|---|---|---|\n")[2].partition("\n\n")[0]
    assert rows.splitlines() == table()


def blocks(document: Path) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def sandbox(demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project as a user has it, whose Census and settings are small and local."""
    folder = tmp_path_factory.mktemp("sandbox") / "census-scvi"
    ignored = shutil.ignore_patterns(".git", ".venv", "demo", "run*", "__pycache__", "tests", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    shutil.copytree(demo_census, folder / "census")  # to publish into
    small = {**SMALL, "census": {**SMALL["census"], "uri": str(folder / "census")}}
    (folder / "scvi-config.yaml").write_text(yaml.safe_dump(small))
    few = yaml.safe_load((folder / "configs/small.yaml").read_text())  # its settings, for fewer genes and epochs
    few["census"]["obs_query_model"] = SMALL["census"]["obs_query_model"]
    few["train"]["max_epochs"], few["hvg"]["top_n_hvg"] = 3, 200
    (folder / "configs/small.yaml").write_text(yaml.safe_dump(few))
    (folder / "configs/mus_musculus.yaml").write_text(yaml.safe_dump({**small, "output": {"directory": "run-mouse"}}))
    with cellxgene_census.open_soma(uri=demo_census) as root:
        cells = cellxgene_census.get_anndata(root, "Homo sapiens")
    cells.var_names = cells.var["feature_id"]
    mine = ad.AnnData(cells.X, obs=cells.obs[["cell_type", "donor_id"]], var=cells.var[[]])
    mine.obs = mine.obs.rename(columns={"cell_type": "annotation", "donor_id": "patient"})
    mine.obs["run"] = cells.obs["dataset_id"].astype(str).to_numpy()
    mine.write_h5ad(folder / "my-cells.h5ad")
    return folder


STARTED: set[str] = set()


def run_commands(
    commands: list[str], folder: Path, environment: dict[str, str]
) -> Iterator[subprocess.CompletedProcess[str]]:
    """The commands of a block in bash; scripts that have all been started so before, in forks with their libraries."""
    plain = [shlex.split(command, comments=True)[1:] for command in commands if PLAIN.fullmatch(command)]
    scripts = {words[0] for words in plain}
    if len(plain) == len(commands) and scripts <= STARTED:
        for words in plain:
            yield forked(run_script, *words, cwd=folder, PATH=environment["PATH"])
    else:
        line = ["bash", "-euc", "\n".join(commands)]
        yield subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        STARTED.update(scripts)


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_runs_as_printed(document: Path, sandbox: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    used = "".join(content for language, content in blocks(document) if language in ("sh", "python"))
    if "run/published" in used and document.name != "README.md" and not (sandbox / "run" / "published").exists():
        for stage in ("prepare", "train", "create-latent-update", "publish"):  # what the README makes
            command = [sys.executable, f"scvi-{stage}.py"]
            subprocess.run(command, cwd=sandbox, env=environment, capture_output=True, check=True)
    for language, content in blocks(document):
        if language == "yaml" and (name := re.match(r"# ([\w-]+\.yaml)\n", content)):
            (sandbox / name[1]).write_text(content)
        elif language == "python":
            done = forked(run_code, content, cwd=sandbox, PATH=environment["PATH"])
            assert done.returncode == 0, f"{content}\n{done.stderr}"
        elif language == "sh":
            commands = [line for line in content.splitlines() if line and not line.startswith(NOT_HERE)]
            commands = [line for line in commands if not line.startswith((". .venv", "#"))]
            for done in run_commands(commands, sandbox, environment):
                assert done.returncode == 0, f"{content}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_exist(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


if __name__ == "__main__":
    print("\n".join(table()))
