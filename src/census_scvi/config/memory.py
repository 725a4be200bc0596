"""Memory that this process can still use."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes of memory that are free on this machine, and within the limit of its container or job (cgroup v2)."""
    found = _available()
    try:
        group = _own_group()
        limit = int((group / "memory.max").read_text())
        found = min(found, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no cgroup v2, or no limit: "max"
        pass
    return max(found, 0)


def _own_group() -> Path:
    return _CGROUP / Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
