"""benchmarks/gpu: what it runs on a GPU machine is kept working where there is no GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "gpu"


@pytest.mark.slow
def test_everything_that_is_measured_runs_in_small(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs Triton: pip install triton (Linux)")
    whats = ["cells", "check", "kernel", "profile", "rates", "latent"]
    made = ["--prepared", str(tmp_path / "cells.h5ad"), "--cells", "12500", "--genes", "100", "--hidden", "16"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(FOLDER / "measure.py"), str(tmp_path), *whats, *made],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be used here" not in done.stderr
    measured = json.loads((tmp_path / "measure.json").read_text())
    assert all(measured[what] for what in whats)
    assert "DIFFERS" not in done.stdout
    assert "OTHER" not in done.stdout


@pytest.mark.parametrize("what", ["first", "long", "elbo"])
def test_the_script_gives_options_that_the_programs_have(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.sh with a `python3` that only notes what it is called with."""
    site, python = tmp_path / "site", tmp_path / "bin" / "python3"
    site.mkdir()
    (site / "installed").touch()
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$#" "$@" >>"$CALLS"\n')
    python.chmod(0o755)
    calls = tmp_path / "calls"
    environment = {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "SITE": str(site),
        "WORK": str(tmp_path / "work"),
    }
    command = ["bash", str(FOLDER / "run.sh"), "wheels", str(tmp_path / "results"), what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    assert "exit code 1" not in done.stdout
    programs = set()
    words = iter(calls.read_text().split("\0")[:-1])
    for number in words:
        call = [next(words) for _ in range(int(number))]
        if not call[0].endswith(".py"):
            continue
        script = Path(call[0])
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(ROOT / script.parent))
            patch.setattr(sys, "argv", call)
            importlib.import_module(script.stem).parse_arguments()  # SystemExit where an option is unknown
        programs.add(script.name)
    assert programs == {"first": {"measure.py", "train_step.py"}, "long": {"measure.py"}, "elbo": {"elbo.py"}}[what]
