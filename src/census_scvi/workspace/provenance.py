"""Provenance of a run: code, packages, hardware, memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from census_scvi.config.versions import version

PACKAGES = (
    "census-scvi", "cellxgene-census", "tiledbsoma", "scvi-tools", "torch", "lightning", "anndata", "scanpy", "h5py",
    "numpy", "pandas", "scipy", "pyarrow", "scikit-misc", "safetensors", "tiledb-vector-search",
)  # fmt: skip
# Keys are the names in /proc/cpuinfo.
_INSTRUCTIONS = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16",
    "asimd": "NEON", "sve": "SVE", "bf16": "BF16",
}  # fmt: skip


def package_versions() -> dict[str, str]:
    """Versions of Python and of every installed package that can change a result."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def code_state() -> dict[str, Any]:
    """Commit of the checkout that the package runs from, and whether it is clean; empty for an installed package."""
    folder = Path(__file__).resolve().parents[3]
    if not (folder / ".git").exists():
        return {}
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "clean": not _git(folder, "status", "--porcelain", "--untracked-files=no")}
    except (OSError, subprocess.SubprocessError):
        return {}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes and, if torch is already imported, GPUs."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def processor() -> str:
    """Name of the processor, and its instruction sets that affect the speed of matrix products."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return ", ".join([name, *(shown for flag, shown in _INSTRUCTIONS.items() if flag in flags)])


def peak_memory_bytes() -> int:
    """Peak resident set size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: ru_maxrss would include the parent process
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
