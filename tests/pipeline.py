"""Running the stages in tests: in-process, since importing scvi-tools takes six seconds."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from census_scvi.cli import main

ROOT = Path(__file__).parents[1]
STAGES = ("prepare", "train", "create-latent-update")

SMALL: dict[str, Any] = {
    "census": {"obs_query_model": "is_primary_data == True and nnz >= 50"},
    "hvg": {"top_n_hvg": 200, "hvg_batch": ["assay"]},
    "model": {"n_hidden": 16, "n_latent": 4},
    "train": {"max_epochs": 3, "batch_size": 256, "num_workers": 1, "accelerator": "cpu"},
    "training_plan": {"lr": 1e-3, "n_epochs_kl_warmup": 2},
    "latent": {"block_size": 512},
    "evaluate": {"measured_cells": 300, "batches": ["dataset_id"]},
}


# What takes seconds to import: imported once, by the process that the processes of tests are forked from.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        "census_scvi.stages.prepare",
        "census_scvi.stages.train",
        "census_scvi.stages.create_latent_update",
        "census_scvi.stages.publish",
        "census_scvi.stages.verify",
        "census_scvi.stages.map_query",
        "census_scvi.stages.evaluate",
        "census_scvi.stages.annotate",
        "pytest",  # this file imports it
    ]
)


def forked(
    work: Callable[..., object], *arguments: Any, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A call in a process of its own, which begins where a new one has imported its libraries.

    Its exit code is what `sys.exit` was given, or minus the signal that ended it; its environment has `variables` too.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, error = (Path(folder) / name for name in ("stdout", "stderr"))
        place = (cwd or Path.cwd(), os.environ | {"OMP_NUM_THREADS": "1"} | variables, out, error)
        process = _forks.Process(target=_in_place, args=(*place, work, arguments))
        with pytest.MonkeyPatch.context() as patch:  # libraries read it once, in the process that is forked
            patch.setenv("OMP_NUM_THREADS", "1")
            process.start()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess([str(work)], process.exitcode, out.read_text(), error.read_text())


def _in_place(
    cwd: Path, environment: dict[str, str], out: Path, error: Path, work: Callable[..., object], arguments: Any
) -> None:
    for stream, path in ((1, out), (2, error)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    work(*arguments)


class ForkedKernel:
    """A kernel of Jupyter that begins, as `forked`, where a new one has imported its libraries.

    It has what jupyter_client needs of the `subprocess.Popen` of a kernel, for which it stands in: patch
    `jupyter_client.provisioning.local_provisioner.launch_kernel`.
    """

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], *, cwd: str, env: dict[str, str], **_: Any) -> None:
        self._process = _forks.Process(target=_run_kernel, args=(command, cwd, env))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        while os.getpgid(self.pid) != self.pid:  # signals go to the kernel's process group, which must not be ours
            time.sleep(0.01)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


def _run_kernel(command: list[str], cwd: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment | {"OMP_NUM_THREADS": "1"})
    os.chdir(cwd)
    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance(argv=command[command.index("-f") :])


def run_script(script: str, *arguments: str) -> None:
    """A script of the current folder as `python script arguments` runs it."""
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).absolute().parent)
    runpy.run_path(script, run_name="__main__")


def run_code(code: str, *arguments: str) -> None:
    """Code as `python -c code arguments` runs it."""
    sys.argv, sys.path[0] = ["-c", *arguments], ""
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


class Run:
    """A run directory with its config file."""

    def __init__(self, folder: Path, uri: str, **sections: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.directory = folder / "run"
        self.config = folder / "config.yaml"
        values = {key: dict(value) for key, value in SMALL.items()}
        values["census"]["uri"] = uri
        values["output"] = {"directory": str(self.directory)}
        for section, keys in sections.items():
            values[section] = {**values.get(section, {}), **keys}
        self.config.write_text(yaml.safe_dump(values))

    @classmethod
    def given(cls, folder: Path, values: dict[str, Any], finished: Path) -> Run:
        """A copy of a finished run directory, with the config that it was made with."""
        run = cls.__new__(cls)
        run.directory, run.config = folder / "run", folder / "config.yaml"
        run.config.write_text(yaml.safe_dump({**values, "output": {"directory": str(run.directory)}}))
        shutil.copytree(finished, run.directory)
        return run

    def __call__(self, stage: str, *arguments: str) -> int:
        return main(stage, ["--config", str(self.config), *arguments])

    def all(self) -> Run:
        for stage in STAGES:
            assert self(stage) == 0, stage
        return self

    def path(self, name: str) -> Path:
        return self.directory / name

    def manifest(self) -> dict[str, Any]:
        return json.loads(self.path("manifest.json").read_text())

    def record(self, stage: str) -> dict[str, Any]:
        return self.manifest()["stages"][stage]

    def subprocess(self, stage: str, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
        """The stage in a process of its own; `before` is code that runs first, for planting a failure."""
        code = f"import sys; from census_scvi.cli import main; {before}\nsys.exit(main({stage!r}, sys.argv[1:]))"
        return forked(run_code, code, "--config", str(self.config), *arguments)
