"""Core and extras: each command needs no package but those that its installation has, and names the extra it lacks."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pipeline import ROOT, Run

from census_scvi.config.stages import PIPELINE, STAGES

SOURCE = ROOT / "src"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ATLAS = "census_scvi.atlas"


def declared(*extras: str) -> set[str]:
    """Names of the packages that the project requires, of core and of some extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(line).name) for line in lines}


# --- what is declared is what is imported


@cache
def imports(module: str) -> tuple[set[str], set[str]]:
    """Modules of the package, and top-level names of others, that a module imports anywhere but for types only."""
    own: set[str] = set()
    others: set[str] = set()
    for node in at_run_time(ast.parse(path_of(module).read_text())):
        if isinstance(node, ast.Import):
            others |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("census_scvi"):
            below = {f"{node.module}.{name.name}" for name in node.names}
            own |= {str(node.module)} | {name for name in below if path_of(name).exists()}
        elif isinstance(node, ast.ImportFrom):
            others.add(str(node.module).partition(".")[0])
    return own - {"census_scvi"}, others - set(sys.stdlib_module_names)


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(node):
            yield from at_run_time(child)


def path_of(module: str) -> Path:
    place = SOURCE.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def reached(modules: Iterable[str]) -> tuple[set[str], set[str]]:
    """Modules of the project, and top-level names of others, that some modules import, directly or through others."""
    todo, seen, names = list(modules), set(), set()
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            own, others = imports(module)
            todo += own
            names |= others
    return seen, names


def packages_of(modules: Iterable[str]) -> set[str]:
    """Names of the packages that some modules import, directly or through others of the project."""
    return {package_of(name) for name in reached(modules)[1]} - IF_INSTALLED


providers = cache(packages_distributions)


def package_of(name: str) -> str:
    """The package of a top-level module; of several that share a namespace, the one with its name."""
    packages = providers().get(name, [name])
    return canonicalize_name(name if name in packages else packages[0])


IF_INSTALLED = {"triton"}  # torch brings it where it is built for a GPU
USERS = {None: [command.module for command in STAGES.values() if not command.extra]}  # modules by extra
USERS |= {command.extra: [command.module] for command in STAGES.values() if command.extra}
USERS[None] += ["census_scvi.cli", "census_scvi.model.published"]
USERS["atlas"] += [ATLAS]
USERS["cluster"] = ["census_scvi.stages.workers", "census_scvi.cluster.ray_workers"]
USERS["evaluate"] += ["census_scvi.stages.decision"]
USERS["annotate"] += ["census_scvi.annotation.functions", "census_scvi.annotation.scnym.interpret"]


@pytest.mark.parametrize("extra", USERS, ids=str)
def test_commands_import_only_what_they_declare(extra: str | None) -> None:
    assert packages_of(USERS[extra]) <= (declared(extra) if extra else declared())


def test_what_is_declared_is_imported() -> None:
    assert declared() - packages_of(USERS[None]) == {"tensorboard"}  # Lightning's logger imports it
    for extra in filter(None, USERS):
        unused = declared(extra) - declared() - packages_of(USERS[extra])
        # scvi.hub imports the one; files/tiledb_py.py the others, by name.
        elsewhere = {"publish": {"huggingface-hub"}, "index": {"tiledb", "tiledb-vector-search"}}
        assert unused == elsewhere.get(extra, set())
    (everything,) = map(Requirement, PROJECT["optional-dependencies"]["all"])
    assert everything.extras == {extra for extra in USERS if extra}
    assert "census-scvi[all]" in PROJECT["optional-dependencies"]["dev"]  # what scvi-init.sh installs
    assert everything.extras | {"all", "bench", "dev"} == set(PROJECT["optional-dependencies"])


# --- installations with fewer packages


class Installation:
    """A folder with the packages that pip would install with some extras, by links, and the project's own metadata."""

    def __init__(self, folder: Path, metadata: Path, *extras: str) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / metadata.name).symlink_to(metadata)
        for package in installed_with(*extras):
            for top in {Path(file).parts[0] for file in distribution(package).files or ()} - {"..", "__pycache__"}:
                target = folder / top
                if not target.exists():
                    target.symlink_to(distribution(package).locate_file(top))

    def run(self, code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Code in a process that has no other packages."""
        environment = os.environ | {"PYTHONPATH": f"{self.folder}{os.pathsep}{SOURCE}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-S", "-c", code, *arguments]
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


def installed_with(*extras: str) -> set[str]:
    """The packages of core and of some extras, and all that these require."""
    todo: list[tuple[str, frozenset[str]]] = [(name, frozenset()) for name in declared(*extras)]
    seen, found = set(todo), set()
    while todo:
        name, wanted = todo.pop()
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:  # for another platform, or another Python
            continue
        found.add(name)
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted or {""}):
                each = canonicalize_name(requirement.name), frozenset(requirement.extras)
                if each not in seen:
                    seen.add(each)
                    todo.append(each)
    return found


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's metadata as its build writes it, which says what the extras are."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(SOURCE, folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    code = "import sys, setuptools.build_meta as build; build.prepare_metadata_for_build_wheel(sys.argv[1])"
    target = folder / "metadata"
    target.mkdir()
    subprocess.run([sys.executable, "-c", code, target], cwd=folder, check=True, capture_output=True)
    (found,) = target.glob("*.dist-info")
    return found


@pytest.fixture(scope="module")
def core(metadata: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("core") / "packages", metadata)


IMPORT_ALL = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"


def everything_of(extra: str | None) -> list[str]:
    """All that the commands of an extra import, at once or when it is needed."""
    own, others = reached(USERS[extra])
    return sorted({module for module in own if not imports(module)[1] & IF_INSTALLED} | others - IF_INSTALLED)


# What core imports is imported once; a fork of that process, for each extra, finds the packages of its installation.
IMPORT_EACH = """
import importlib, json, os, sys, traceback
core, names, installations = sys.argv[1], *map(json.loads, sys.argv[2:])
for name in names:
    importlib.import_module(name)
for extra, (folder, more) in installations.items():
    child = os.fork()
    if not child:
        try:
            sys.path[sys.path.index(core)] = folder
            importlib.invalidate_caches()
            for name in more:
                importlib.import_module(name)
        except BaseException:
            print(json.dumps([extra, traceback.format_exc()]), flush=True)
            os._exit(1)
        print(json.dumps([extra, None]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def imported(core: Installation, metadata: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """By extra: the error of importing all that its commands import, or None."""
    folders = {extra: tmp_path_factory.mktemp(extra) / "packages" for extra in USERS if extra}
    for extra, folder in folders.items():
        Installation(folder, metadata, extra)
    installations = {extra: (str(folder), everything_of(extra)) for extra, folder in folders.items()}
    done = core.run(IMPORT_EACH, str(core.folder), json.dumps(everything_of(None)), json.dumps(installations))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["'))


@pytest.mark.slow
@pytest.mark.parametrize("extra", [extra for extra in USERS if extra])
def test_commands_of_an_extra_need_core_and_that_extra(extra: str, imported: dict[str, str | None]) -> None:
    assert imported[extra] is None, imported[extra]


@pytest.mark.slow
def test_core_trains_and_embeds(core: Installation, tmp_path: Path) -> None:
    """The run comes first: an import of anything afterwards cannot have helped it."""
    census = str(tmp_path / "census")
    run = Run(tmp_path, census, train={"max_epochs": 1})
    commands = [["build-census", "--demo", census, "--scale", "0.25", "--genes", "600"]]
    commands += [[stage, "--config", str(run.config)] for stage in PIPELINE[:3]]
    code = f"from census_scvi.cli import console\nfor each in {commands}: assert console(each) == 0, each\n"
    done = core.run(code + IMPORT_ALL, *everything_of(None))
    assert done.returncode == 0, done.stderr
    assert run.path("latent.npy").exists()


REFUSALS = {
    "evaluate": "evaluate needs cellxgene-ontology-guide, igraph and scib-metrics, which are not installed",
    "publish": "publish needs huggingface-hub, which is not installed",
    "compare-releases": (
        "compare-releases needs cellxgene-ontology-guide, harmonypy, igraph and scib-metrics, which are not installed"
    ),
    "map-query": "map-query needs cellxgene-ontology-guide, harmonypy and igraph, which are not installed",
    "index": "index needs tiledb and tiledb-vector-search, which are not installed",
    "search": "search needs igraph, optuna, ray and scib-metrics, which are not installed",
    "annotate": "annotate needs captum, cellxgene-ontology-guide and harmonypy, which are not installed",
}


@pytest.mark.parametrize("name", [command.name for command in STAGES.values() if command.extra])
def test_a_missing_extra_is_one_line_that_names_it(name: str, core: Installation, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1")
    code = f"from census_scvi.cli import console; raise SystemExit(console([{name!r}, '--config', 'config.yaml']))"
    done = core.run(code, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: census-scvi {REFUSALS[name]}; pip install 'census-scvi[{STAGES[name].extra}]'\n"


def test_an_address_of_ray_names_the_extra_that_it_needs(core: Installation, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("cluster: {address: auto}")
    arguments = ["create-latent-update", "--config", "config.yaml"]
    done = core.run(f"from census_scvi.cli import console; raise SystemExit(console({arguments}))", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: cluster.address needs ray, which is not installed; pip install 'census-scvi[cluster]'\n"
    )


def test_atlas_names_the_extra_that_it_needs(core: Installation, tmp_path: Path) -> None:
    done = core.run("from census_scvi import Atlas", cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == (
        "census_scvi.errors.UserError: Atlas needs cellxgene-ontology-guide, harmonypy and igraph, which are not"
        " installed; pip install 'census-scvi[atlas]'"
    )


def test_the_version_is_that_of_the_installation(metadata: Path, tmp_path: Path) -> None:
    """The command, the package and records (from which the model card takes it) follow the one in pyproject.toml."""
    text = (metadata / "METADATA").read_text()
    assert f"\nVersion: {PROJECT['version']}\n" in text
    other = tmp_path / "census_scvi-98.7.dist-info"
    other.mkdir()
    (other / "METADATA").write_text(text.replace(f"\nVersion: {PROJECT['version']}\n", "\nVersion: 98.7\n"))
    code = """
import census_scvi
from census_scvi.cli import console
from census_scvi.workspace.provenance import package_versions
console(["--version"])
print(census_scvi.__version__, package_versions()["census-scvi"])
"""
    assert Installation(tmp_path / "packages", other).run(code).stdout == "census-scvi 98.7\n98.7 98.7\n"
