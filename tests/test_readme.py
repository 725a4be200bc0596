"""README and docs are true: their commands run as printed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Client, Listener
from pathlib import Path

import anndata as ad
import cellxgene_census
import pytest
import yaml
from pipeline import ROOT, SMALL, forked, run_code, run_script

from census_scvi.cli import console
from census_scvi.config.stages import STAGES
from census_scvi.stages.demo import write_own_cells

STEPS = 100  # of the training of annotators
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A command that needs no shell: our program or a script, and arguments without a character special to bash.
# Between single quotes, none is.
PLAIN = re.compile(r"(census-scvi|python [\w./-]+\.py)( ([^'$`|&;<>*?~\\(){}!]|'[^']*')*)?")
# Run by CI itself (this test is part of `make test`), or not ours.
NOT_HERE = ("make ", "./scvi-init.sh", "tensorboard ", "sudo apt ")


def blocks(document: Path) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands_of_table(document: Path) -> list[str]:
    """The commands in the last column of a table: `census-scvi ...` and `make ...`."""
    rows = [line for line in document.read_text().splitlines() if line.startswith("| ")]
    return [command for row in rows for command in re.findall(r"`((?:census-scvi|make) [^`]+)`", row.split("|")[-2])]


@pytest.fixture(scope="module")
def sandbox(demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project after a small `make demo`; the other configs are small and have a local Census, too."""
    folder = tmp_path_factory.mktemp("sandbox") / "census-scvi"
    ignored = shutil.ignore_patterns(".git", ".venv", "demo", "run*", "__pycache__", "tests", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    for census in ("census", "demo/census"):  # to publish into
        shutil.copytree(demo_census, folder / census)
    small = {**SMALL, "census": {**SMALL["census"], "uri": "census"}}
    demo = {**SMALL, "census": {**SMALL["census"], "uri": "demo/census"}, "output": {"directory": "demo/run"}}
    demo |= {"query": {"umap_cells": 300, "baseline_cells": 400}, "annotate": {"overrides": {"steps": STEPS}}}
    few = yaml.safe_load((folder / "configs/small.yaml").read_text())  # its settings, for fewer genes and epochs
    few["census"]["obs_query_model"] = SMALL["census"]["obs_query_model"]
    few["train"]["max_epochs"], few["hvg"]["top_n_hvg"] = 3, 200
    few["evaluate"] = SMALL["evaluate"]
    mouse = {**small, "output": {"directory": "run-mouse"}}
    configs = {"scvi-config": small, "configs/demo": demo, "configs/small": few, "configs/mus_musculus": mouse}
    quick = yaml.safe_load((folder / "configs/annotate-demo.yaml").read_text())
    quick["annotate"]["overrides"] = {"steps": STEPS}
    configs["configs/annotate-demo"] = quick
    for name, values in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    with cellxgene_census.open_soma(uri=demo_census) as root:
        cells = cellxgene_census.get_anndata(root, "Homo sapiens")
    cells = cells[::3].copy()
    cells.var_names = cells.var["feature_id"]
    mine = ad.AnnData(cells.X, obs=cells.obs[["cell_type", "donor_id"]], var=cells.var[[]])
    mine.obs = mine.obs.rename(columns={"cell_type": "annotation", "donor_id": "patient"})
    mine.obs["run"] = cells.obs["dataset_id"].astype(str).to_numpy()
    mine.write_h5ad(folder / "my-cells.h5ad")
    write_own_cells(demo_census, folder / "demo" / "my-cells.h5ad")
    for stage in ("prepare", "train", "create-latent-update", "publish"):
        done = forked(run_program, stage, "--config", "configs/demo.yaml", cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


# The program `census-scvi` of a script in bash: in a fork with its libraries, whose imports take most of the time.
FORKED_PROGRAM = """#!{python} -S
import os, sys
from multiprocessing.connection import Client
with Client({address!r}, "AF_UNIX") as connection:
    connection.send((sys.argv[1:], os.getcwd(), dict(os.environ)))
    code, out, error = connection.recv()
sys.stdout.write(out)
sys.stderr.write(error)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def forking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with the `FORKED_PROGRAM`."""
    folder = tmp_path_factory.mktemp("bin")
    program, address = folder / "census-scvi", str(folder / "socket")
    program.write_text(FORKED_PROGRAM.format(python=sys.executable, address=address))
    program.chmod(0o755)

    def serve() -> None:
        while True:
            with listener.accept() as connection:
                if (request := connection.recv()) is None:
                    return
                arguments, cwd, variables = request
                done = forked(run_program, *arguments, cwd=Path(cwd), **variables)
                connection.send((done.returncode, done.stdout, done.stderr))

    with Listener(address, "AF_UNIX") as listener:
        server = threading.Thread(target=serve)
        server.start()
        yield folder
        with Client(address, "AF_UNIX") as connection:
            connection.send(None)
        server.join()


def run_program(*arguments: str) -> None:
    """As the installed program `census-scvi` runs."""
    sys.exit(console(arguments))


def run_quickly(code: str) -> None:
    """A block of Python; an Atlas trains its annotators for fewer steps, as those of the configs in the sandbox."""
    if "Atlas" in code:
        from census_scvi import Atlas

        assert Atlas.predict.__kwdefaults__["steps"] > STEPS
        Atlas.predict.__kwdefaults__["steps"] = STEPS
    run_code(code)


STARTED: set[str] = set()


def run_commands(
    commands: list[str], folder: Path, environment: dict[str, str], forking: Path
) -> Iterator[subprocess.CompletedProcess[str]]:
    """The commands of a block in bash; a program that has been started so before, in a fork with its libraries."""
    if not all(PLAIN.fullmatch(command) for command in commands):
        yield in_bash("\n".join(commands), folder, environment | {"PATH": f"{forking}:{environment['PATH']}"})
        return
    for command in commands:
        name, *words = shlex.split(command, comments=True)
        program = words[0] if name == "python" else name
        if program in STARTED:
            work = run_script if name == "python" else run_program
            yield forked(work, *words, cwd=folder, PATH=environment["PATH"])
        else:
            yield in_bash(command, folder, environment)
            STARTED.add(program)


def in_bash(command: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    line = ["bash", "-euc", command]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_runs_as_printed(document: Path, sandbox: Path, forking: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran: set[str] = set()
    for language, content in blocks(document):
        if language == "yaml" and (name := re.match(r"# ([\w-]+\.yaml)\n", content)):
            (sandbox / name[1]).write_text(content)
        elif language == "python":
            done = forked(run_quickly, content, cwd=sandbox, PATH=environment["PATH"])
            assert done.returncode == 0, f"{content}\n{done.stderr}"
        elif language == "sh":
            commands = [line for line in content.splitlines() if line and not line.startswith(NOT_HERE)]
            ran.update(commands)
            for done in run_commands(commands, sandbox, environment, forking):
                assert done.returncode == 0, f"{content}\n{done.stdout}\n{done.stderr}"
    for command in commands_of_table(document) if document.name == "README.md" else []:
        if command not in ran and not command.startswith(NOT_HERE):
            (done,) = run_commands([command], sandbox, environment, forking)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_readme_names_each_command_and_target() -> None:
    """README's table, `census-scvi --help` and `make help` list the same commands."""
    named = [tuple(command.split()[:2]) for command in commands_of_table(ROOT / "README.md")]
    assert {name for program, name in named if program == "census-scvi"} == set(STAGES)
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^make ([a-z-]+) ", listed, re.M)
    assert {name for program, name in named if program == "make"} == set(targets)
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M)
    assert phony is not None
    assert set(phony[1].split()) == set(targets)
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_exist(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target
