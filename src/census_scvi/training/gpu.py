"""Report in one line which GPUs torch can use: `python -m census_scvi.training.gpu`."""

from __future__ import annotations

import os
import re
import subprocess
import warnings
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """Information about the GPUs of this machine, from the driver and from torch."""

    torch: str  # version of torch
    torch_cuda: str = ""  # CUDA version torch is built for; "" for a CPU-only build
    cards: tuple[str, ...] = ()  # names of the GPUs that nvidia-smi lists
    driver: str = ""  # version of the NVIDIA driver; "" if nvidia-smi does not report it
    driver_error: str = ""  # message of nvidia-smi if it fails
    usable: tuple[str, ...] = ()  # names of the GPUs on which torch computed a test sum
    complaint: str = ""  # why torch could not use a GPU


def describe(facts: Facts) -> str:
    """One line: the GPUs found, whether torch can use them and, if not, what to do."""
    if facts.usable:
        return f"GPU: {_count(facts.usable)} (torch {facts.torch}, driver {facts.driver or 'unknown'})" + _rest(facts)
    if facts.driver_error:
        return f"GPU: none usable, because nvidia-smi fails: {facts.driver_error}; fix the NVIDIA driver"
    if not facts.cards:
        return "GPU: none, work runs on the CPU (an NVIDIA GPU needs its driver; nvidia-smi then lists it)"
    return f"GPU: {_count(facts.cards)}, but torch cannot use it: {_reason(facts)}"


def _reason(facts: Facts) -> str:
    if not facts.torch_cuda:
        return f"torch {facts.torch} is a CPU-only build; {_install('a CUDA build of torch')}"
    too_old = re.search(r"driver .*too old \(found version (\d+)\)", facts.complaint)
    if too_old:
        number = int(too_old[1])  # 12040 means CUDA 12.4
        major, minor = number // 1000, number % 1000 // 10
        return (
            f"driver {facts.driver} is too old: it supports CUDA up to {major}.{minor}, but torch {facts.torch}"
            " is built "
            f"for CUDA {facts.torch_cuda}; update the NVIDIA driver, or {_install(f'a torch built for CUDA {major}')}"
        )
    return facts.complaint or "torch gives no reason"


def _install(what: str) -> str:
    return f"install {what} into .venv (PyTorch's install page has the command)"


def _rest(facts: Facts) -> str:
    unused = len(facts.cards) - len(facts.usable)
    return f"; {unused} more not usable: {facts.complaint or 'torch gives no reason'}" if unused > 0 else ""


def _count(names: tuple[str, ...]) -> str:
    return ", ".join(f"{number} x {name}" for name, number in Counter(names).items())


def probe() -> Facts:
    """Information about this machine; imports torch, which takes seconds."""
    import torch

    cards, driver, driver_error = _nvidia_smi()
    usable, complaint = _try_torch()
    if not complaint and len(usable) < len(cards) and "CUDA_VISIBLE_DEVICES" in os.environ:
        complaint = f"hidden by CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r}"
    return Facts(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda or "",
        cards=cards,
        driver=driver,
        driver_error=driver_error,
        usable=usable,
        complaint=complaint,
    )


def _nvidia_smi() -> tuple[tuple[str, ...], str, str]:
    """Names of the GPUs, driver version, error message."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return (), "", ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), "", _one_line(str(error))
    if "No devices were found" in answer.stdout:
        return (), "", ""
    if answer.returncode:
        return (), "", _one_line(answer.stdout or answer.stderr)
    rows = [line.split(", ", 1) for line in answer.stdout.splitlines() if ", " in line]
    return tuple(name for _, name in rows), rows[0][0] if rows else "", ""


def _try_torch() -> tuple[tuple[str, ...], str]:
    """Names of the GPUs on which torch can add two numbers, and the first error or CUDA warning.

    torch.cuda.is_available() is not enough: it is also true if torch was built without code for the GPU's architecture.
    """
    import torch

    usable: list[str] = []
    complaints: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    complaints += [str(warning.message) for warning in caught if "CUDA" in str(warning.message)]
    for index in range(number):
        try:
            torch.ones(2, device=f"cuda:{index}").sum().item()
            usable.append(torch.cuda.get_device_name(index))
        except RuntimeError as error:
            complaints.append(str(error))
    return tuple(usable), _one_line(complaints[0]) if complaints else ""


def _one_line(message: str) -> str:
    return (message.strip().splitlines() or ["(no message)"])[0]


if __name__ == "__main__":
    print(describe(probe()))
