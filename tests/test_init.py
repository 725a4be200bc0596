"""scvi-init.sh with simulated Pythons, the GPU line, and the pins of constraints.txt."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from census_scvi.training import gpu
from census_scvi.training.gpu import Facts, describe

ROOT = Path(__file__).parents[1]
# All that scvi-init.sh and the simulated Pythons may use; the real Pythons stay out of sight.
TOOLS = ["bash", "env", "dirname", "cat", "cksum", "head", "tail", "grep", "mv", "rm", "mkdir", "cp", "sleep", "flock"]

FAKE_PYTHON = """\
#!/usr/bin/env bash
case "$1 $2" in
  *ensurepip*) echo "{version} {can} $0" ;;
  "-c "*) echo {version} ;;
  "-m venv") rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
  "-m pip") echo "$@" >> pip-calls; eval "${{FAKE_PIP:-true}}" ;;
  "-m census_scvi.training.gpu") eval "${{FAKE_GPU:-echo GPU: none}}" ;;
esac
"""
BROKEN_SHIM = "#!/usr/bin/env bash\necho 'pyenv: command not found' >&2\nexit 127\n"


class Sandbox:
    """A project folder with scvi-init.sh, and a PATH that has only the Pythons a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.tree = folder / "a project"
        self.venv = self.tree / ".venv"
        self.bin.mkdir()
        self.tree.mkdir()
        for tool in TOOLS:
            if path := shutil.which(tool):
                (self.bin / tool).symlink_to(path)
        shutil.copy(ROOT / "scvi-init.sh", self.tree)
        (self.tree / "pyproject.toml").write_text("[project]\n")
        (self.tree / "constraints.txt").write_text("torch==1\n")

    def python(self, name: str, version: str = "3.11", *, can: str = "venv") -> Path:
        return self.script(name, FAKE_PYTHON.format(version=version, can=can))

    def script(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def start(self, *arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.tree / "scvi-init.sh", *arguments],
            env={"PATH": str(self.bin), **variables},
            cwd=cwd or self.bin,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *arguments: str, cwd: Path | None = None, **variables: str) -> tuple[int, str]:
        process = self.start(*arguments, cwd=cwd, **variables)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def done(self, *arguments: str, **variables: str) -> str:
        code, output = self.run(*arguments, **variables)
        assert code == 0, output
        return output

    @property
    def pip_calls(self) -> list[str]:
        calls = self.tree / "pip-calls"
        return calls.read_text().splitlines() if calls.exists() else []

    @property
    def finished(self) -> bool:
        return (self.venv / "scvi-init.stamp").exists()


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_takes_the_first_python_that_runs_and_is_new_enough(sandbox: Sandbox) -> None:
    sandbox.script("python3.11", BROKEN_SHIM)
    sandbox.python("python3.12", can="bare")
    chosen = sandbox.python("python3.13", "3.13")
    sandbox.python("python3", "3.14")
    assert f"Python 3.13 ({chosen})" in sandbox.done()


def test_without_a_python_says_what_was_tried_and_how_to_get_one(sandbox: Sandbox) -> None:
    sandbox.script("python3.13", BROKEN_SHIM)
    sandbox.python("python3", "3.9")
    sandbox.python("python", "2.7", can="bare")
    code, output = sandbox.run()
    assert code == 2
    for line in [
        "python3.11: not found",
        "python3.13: does not run (pyenv: command not found)",
        "python3: is Python 3.9",
        "python: is Python 2.7",
        "sudo apt install python3.11 python3.11-venv",
        "brew install",
    ]:
        assert line in output
    assert not sandbox.venv.exists()


OLD_PYTHON = """\
#!/usr/bin/env bash
case "$*" in
  -c*) echo "3.8 venv $0" ;;
  "-m pip install --user uv") mkdir -p ~/uv ;;
  "-m uv python install 3.11") mkdir -p ~/uv/bin && cp {new} ~/uv/bin/python3.11 ;;
  "-m uv python find 3.11") echo ~/uv/bin/python3.11 ;;
  *) exit 1 ;;
esac
"""
CONDA = """\
#!/usr/bin/env bash
[ "$*" = "create -y -p $HOME/python3.11 python=3.11" ] && mkdir -p ~/python3.11/bin && cp {new} ~/python3.11/bin/python
"""


@pytest.mark.parametrize("way", [0, 1], ids=["uv", "conda"])
def test_on_an_old_system_the_commands_of_the_message_work_as_printed(sandbox: Sandbox, way: int) -> None:
    """Ubuntu 20.04 has Python 3.8; what uv and conda download is stood in for by a script."""
    new = sandbox.script("new-python", FAKE_PYTHON.format(version="3.11", can="venv"))
    sandbox.script("python3", OLD_PYTHON.format(new=new))
    sandbox.script("conda", CONDA.format(new=new))
    home = sandbox.bin.parent / "a home"
    home.mkdir()
    code, output = sandbox.run(HOME=str(home))
    assert code == 2
    commands = output.partition("one of these two pairs of commands:\n")[2].split("or\n")[way]
    printed = subprocess.run(
        ["bash", "-e", "-c", commands],
        env={"PATH": str(sandbox.bin), "HOME": str(home)},
        cwd=sandbox.tree,
        text=True,
        capture_output=True,
        check=False,
    )
    assert printed.returncode == 0, printed.stderr
    assert "making it with Python 3.11" in printed.stdout
    assert sandbox.finished


@pytest.mark.parametrize("by_variable", [False, True], ids=["argument", "variable"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BROKEN_SHIM, "does not run (pyenv: command not found)"),
        (FAKE_PYTHON.format(version="3.10", can="venv"), "is Python 3.10"),
        (FAKE_PYTHON.format(version="3.12", can="bare"), "apt install python3.12-venv"),
        (None, "not found"),
    ],
    ids=["shim", "old", "no venv", "missing"],
)
def test_a_python_that_was_asked_for_is_not_replaced_by_another(
    sandbox: Sandbox, by_variable: bool, text: str | None, reason: str
) -> None:
    sandbox.python("python3.11")
    if text:
        sandbox.script("mine", text)
    code, output = sandbox.run(PYTHON="mine") if by_variable else sandbox.run("mine", PYTHON="python3.11")
    assert code == 2
    assert output.startswith("scvi-init.sh: mine: ")
    assert reason in output
    assert not sandbox.venv.exists()


def test_a_relative_path_is_seen_from_where_the_user_stands(sandbox: Sandbox) -> None:
    python = sandbox.python("python3.12", "3.12")
    code, output = sandbox.run(f"bin/{python.name}", cwd=sandbox.bin.parent)
    assert (code, "Python 3.12" in output) == (0, True)


@pytest.mark.parametrize(("version", "pinned"), [("3.11", True), ("3.12", False), ("3.13", False)])
def test_the_pins_are_for_python_311_alone(sandbox: Sandbox, version: str, pinned: bool) -> None:
    sandbox.python("python3", version)
    sandbox.done()
    assert sandbox.pip_calls == ["-m pip install " + "-c constraints.txt " * pinned + "-e .[dev]"]


def test_the_first_run_prints_the_gpu_line_and_the_second_nothing(sandbox: Sandbox) -> None:
    sandbox.python("python3.11")
    assert "GPU: none" in sandbox.done()
    for again in [sandbox.done(), sandbox.done("python3.11"), sandbox.done(PYTHON="python3.11")]:
        assert again == ""
    assert len(sandbox.pip_calls) == 1


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_into_the_same_venv(sandbox: Sandbox, name: str) -> None:
    sandbox.python("python3.11")
    sandbox.done()
    (sandbox.venv / "kept").touch()
    with (sandbox.tree / name).open("a") as file:
        file.write("# changed\n")
    assert "making it" not in sandbox.done()
    assert len(sandbox.pip_calls) == 2
    assert (sandbox.venv / "kept").exists()
    assert sandbox.done() == ""


def test_another_python_makes_venv_anew_and_stays(sandbox: Sandbox) -> None:
    sandbox.python("python3.11")
    sandbox.python("python3.13", "3.13")
    sandbox.done()
    assert ".venv has Python 3.11, python3.13 is Python 3.13: making it" in sandbox.done("python3.13")
    assert sandbox.done() == ""


def test_a_venv_whose_python_is_gone_is_made_anew(sandbox: Sandbox) -> None:
    sandbox.python("python3.11")
    sandbox.done()
    (sandbox.venv / "bin/python").unlink()
    assert "the Python in .venv does not run: making it" in sandbox.done()


def test_a_moved_project_gets_a_new_venv(sandbox: Sandbox) -> None:
    sandbox.python("python3.11")
    sandbox.done()
    sandbox.tree = sandbox.tree.rename(sandbox.tree.with_name("moved"))
    assert ".venv was made in another folder: making it" in sandbox.done()


def test_a_killed_installation_is_not_taken_for_a_finished_one(sandbox: Sandbox) -> None:
    sandbox.python("python3.11")
    code, _ = sandbox.run(FAKE_PIP="kill -9 $PPID")
    assert code == -9
    assert not sandbox.finished
    assert ".venv was not finished by scvi-init.sh: making it" in sandbox.done()


def test_a_killed_update_leaves_no_stamp(sandbox: Sandbox) -> None:
    sandbox.python("python3.11")
    sandbox.done()
    (sandbox.tree / "constraints.txt").write_text("torch==2\n")
    sandbox.run(FAKE_PIP="kill -9 $PPID")
    assert not sandbox.finished


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        ("echo ERROR: no network; exit 1", "ERROR: no network"),
        ("echo 'OSError: [Errno 28] No space left on device'; exit 2", "the disk is full"),
    ],
    ids=["network", "disk"],
)
def test_a_failing_pip_is_told_with_the_place_of_its_log(sandbox: Sandbox, pip: str, message: str) -> None:
    sandbox.python("python3.11")
    code, output = sandbox.run(FAKE_PIP=pip)
    assert code == 1
    assert message in output
    assert str(sandbox.venv / "scvi-init.log") in output
    assert not sandbox.finished


def test_a_failing_update_keeps_the_venv(sandbox: Sandbox) -> None:
    """Without a network nobody may lose an environment that works."""
    sandbox.python("python3.11")
    sandbox.done()
    (sandbox.tree / "constraints.txt").write_text("torch==2\n")
    assert sandbox.run(FAKE_PIP="exit 1")[0] == 1
    again = sandbox.done()
    assert "making it" not in again
    assert "updating .venv" in again


def test_a_torch_that_does_not_start_is_no_installation(sandbox: Sandbox) -> None:
    sandbox.python("python3.11")
    code, output = sandbox.run(FAKE_GPU="echo no libc >&2; exit 1")
    assert code == 1
    assert "torch is installed but does not start" in output
    assert "no libc" in (sandbox.venv / "scvi-init.log").read_text()
    assert not sandbox.finished


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock: install util-linux")
def test_of_two_runs_at_once_one_installs_and_one_waits(sandbox: Sandbox) -> None:
    sandbox.python("python3.11")
    runs = [sandbox.start(FAKE_PIP="sleep 1") for _ in range(2)]
    outputs = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert len(sandbox.pip_calls) == 1
    assert sum("waiting" in output for output in outputs) == 1


def test_check_gpu_asks_anew_and_needs_a_venv(sandbox: Sandbox) -> None:
    sandbox.python("python3.11")
    code, output = sandbox.run("--check-gpu")
    assert (code, "run ./scvi-init.sh first" in output) == (2, True)
    sandbox.done()
    assert sandbox.done("--check-gpu", FAKE_GPU="echo GPU: 1 x T4") == "GPU: 1 x T4\n"


def test_an_unknown_option_is_refused(sandbox: Sandbox) -> None:
    code, output = sandbox.run("--gpu")
    assert (code, output.startswith("usage: ")) == (2, True)


T4 = "Tesla T4"
CUDA_BUILD = Facts(torch="2.13.0", torch_cuda="13.0")
TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 12040). Please update your GPU "
    "driver by downloading and installing a new version"
)


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        (CUDA_BUILD, "GPU: none, work runs on the CPU"),
        (
            replace(CUDA_BUILD, cards=(T4,) * 4, driver="580.95", usable=(T4,) * 4),
            "GPU: 4 x Tesla T4 (torch 2.13.0, driver 580.95)",
        ),
        (
            replace(CUDA_BUILD, cards=("A10G", T4), driver="580.95", usable=("A10G",), complaint="why"),
            "GPU: 1 x A10G (torch 2.13.0, driver 580.95); 1 more not usable: why",
        ),
        (
            replace(CUDA_BUILD, cards=(T4,), driver="550.90", complaint=TOO_OLD),
            "GPU: 1 x Tesla T4, but torch cannot use it: driver 550.90 is too old: it supports CUDA up to 12.4,"
            " but torch "
            "2.13.0 is built for CUDA 13.0; update the NVIDIA driver, or install a torch built for CUDA 12 into",
        ),
        (
            Facts(torch="2.13.0+cpu", cards=(T4,), driver="580.95"),
            "GPU: 1 x Tesla T4, but torch cannot use it: torch 2.13.0+cpu is a CPU-only build; install a CUDA build",
        ),
        (
            replace(CUDA_BUILD, cards=("Tesla V100",), driver="580.95", complaint="no kernel image"),
            "GPU: 1 x Tesla V100, but torch cannot use it: no kernel image",
        ),
        (
            replace(CUDA_BUILD, driver_error="couldn't communicate with the NVIDIA driver"),
            "GPU: none usable, because nvidia-smi fails: couldn't communicate",
        ),
    ],
    ids=["none", "usable", "partly", "old driver", "CPU build", "old card", "broken driver"],
)
def test_gpu_line(facts: Facts, line: str) -> None:
    assert describe(facts).startswith(line)
    assert "\n" not in describe(facts)


@pytest.mark.parametrize(
    ("nvidia_smi", "found"),
    [
        ("echo '550.90.07, Tesla T4'; echo '550.90.07, NVIDIA A10G'", ((T4, "NVIDIA A10G"), "550.90.07", "")),
        ("echo No devices were found; exit 6", ((), "", "")),
        ("echo 'NVIDIA-SMI has failed.'; echo more; exit 9", ((), "", "NVIDIA-SMI has failed.")),
        (None, ((), "", "")),
    ],
    ids=["two", "none", "failing", "not there"],
)
def test_reads_nvidia_smi(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, nvidia_smi: str | None, found: tuple[tuple[str, ...], str, str]
) -> None:
    monkeypatch.setenv("PATH", str(sandbox.bin))
    if nvidia_smi:
        sandbox.script("nvidia-smi", f"#!/usr/bin/env bash\n{nvidia_smi}\n")
    assert gpu._nvidia_smi() == found


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(re.split("==", line) for line in lines if not line.startswith("#"))


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {canonicalize_name(name): Version(number) for name, number in pins().items()}
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for line in [*project["dependencies"], *extras]:
        requirement = Requirement(line)
        if requirement.name == project["name"]:  # an extra that has others
            continue
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, line


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the pins are for Python 3.11: make test PYTHON=python3.11")
def test_installed_packages_have_the_pinned_versions() -> None:
    different = {}
    for name, pinned in pins().items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if Version(installed).public != pinned:
            different[name] = f"{installed}, pinned {pinned}"
    assert not different, f"{different}; run ./scvi-init.sh"


def test_scripts_are_executable() -> None:
    for name in ["scvi-init.sh", ".ci/run"]:
        assert os.access(ROOT / name, os.X_OK), name
