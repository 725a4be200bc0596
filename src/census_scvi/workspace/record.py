"""One run of a stage: its fingerprint, and the record of its results."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from census_scvi.config.renamed import translate_record
from census_scvi.files.uri import without_credentials
from census_scvi.workspace import provenance
from census_scvi.workspace.identity import Identity

Fingerprint = dict[str, Any]


def fingerprint_of(settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> Fingerprint:
    """Fingerprint that determines the result of a stage: settings by dotted key, and identities of the inputs."""
    fingerprint: Fingerprint = without_credentials({"config": dict(settings), "inputs": dict(inputs)})
    return fingerprint


def changes(before: Fingerprint, now: Fingerprint, defaults: Mapping[str, Any]) -> str:
    """Describe the settings and inputs that differ; empty if none differs.

    A setting that the earlier run did not have yet is compared by its default. Removed settings are ignored.
    """
    words = []
    old, new = translate_record(before["config"]), translate_record(now["config"])
    old = {key: defaults[key] for key in new if key in defaults} | {
        key: value for key, value in old.items() if _is_known(key, new.keys() | defaults.keys())
    }
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            words.append(f"{key} was {json.dumps(old.get(key))} and is {json.dumps(new.get(key))}")
    read, reads = before["inputs"], now["inputs"]
    for name in sorted(read.keys() | reads.keys()):
        if read.get(name) != reads.get(name):
            words.append(f"the input {name} has changed")
    return "; ".join(words)


def _is_known(key: str, settings: Set[str]) -> bool:
    """Whether the key is a setting, or an entry of a setting that is a mapping."""
    parts = key.split(".")
    return any(".".join(parts[:n]) in settings for n in range(1, len(parts) + 1))


@dataclass(kw_only=True)
class RecordedRun:
    """One run of a stage.

    Attributes
    ----------
    stage
        Name of the stage.
    fingerprint
        Settings and inputs that determine the result.
    forced
        Whether to run even if the stage is done.
    done
        Whether the result already exists.
    resumed
        Whether the run continues unfinished work.
    earlier
        Seconds and CPU seconds of the interrupted runs whose work it continues.
    """

    stage: str
    fingerprint: Fingerprint
    forced: bool = False
    done: bool = False
    resumed: bool = False
    earlier: tuple[float, float] = (0.0, 0.0)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    _clock: float = field(default_factory=time.monotonic)
    _cpu: float = field(default_factory=time.process_time)

    def record(
        self,
        artifacts: Sequence[str],
        outputs: dict[str, Identity],
        counts: dict[str, Any],
        *,
        config: dict[str, Any],
        seed: int,
        **details: Any,
    ) -> dict[str, Any]:
        """Record of the run: code, inputs and outputs."""
        return {
            "stage": self.stage,
            "artifacts": list(artifacts),
            "fingerprint": self.fingerprint,
            "config": config,
            "outputs": outputs,
            "counts": counts,
            "resumed": self.resumed,
            "seed": seed,
            "started": self.started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(self.earlier[0] + time.monotonic() - self._clock, 3),
            "cpu_seconds": round(self.earlier[1] + time.process_time() - self._cpu, 3),
            "peak_memory_bytes": provenance.peak_memory_bytes(),
            "packages": provenance.package_versions(),
            "code": provenance.code_state(),
            "hardware": provenance.hardware(),
            **details,
        }
