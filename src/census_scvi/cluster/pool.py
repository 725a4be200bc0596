"""Do the parts of a stage, whoever runs them: the queue, further tries, errors, the progress bar."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from census_scvi.errors import UserError
from census_scvi.files.parts import Part
from census_scvi.terminal.progress import progress_bar

log = logging.getLogger(__name__)

_MOST_TRIES = 3

Running = TypeVar("Running")


@dataclass(frozen=True)
class Failure:
    """Why a part was not done.

    Attributes
    ----------
    reason
        Text.
    again
        Whether it is worth another try.
    host
        Name of the machine, if it was another one.
    """

    reason: str
    again: bool
    host: str | None = None

    def __str__(self) -> str:
        return f"on {self.host}: {self.reason}" if self.host else self.reason


class Pool(ABC, Generic[Running]):
    """Something that does a number of parts at the same time.

    Attributes
    ----------
    number
        Parts at the same time.
    logs
        Folder for the output of each part.
    """

    number: int
    logs: Path

    def do(self, parts: Sequence[Part], what: str) -> None:
        """Do all parts; one that is killed, takes too long or ends with a defect is tried up to three times.

        Parameters
        ----------
        parts
            The parts.
        what
            Name of the work, for the progress bar.

        Raises
        ------
        UserError
            A part cannot be done: the error is that of its process, and names the part.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        waiting, tries, running = deque(parts), Counter[Part](), dict[Running, Part]()
        with progress_bar(len(parts), what, unit="parts") as bar:
            try:
                while waiting or running:
                    while waiting and len(running) < self.number:
                        part = waiting.popleft()
                        running[self._start(part)] = part
                    for ended, failure in self._ended(running).items():
                        part = running.pop(ended)
                        if failure is None:
                            bar.update(1)
                            continue
                        tries[part] += 1
                        self._require_another_try(part, failure, tries[part])
                        waiting.append(part)
            finally:
                self._stop(list(running))

    def _require_another_try(self, part: Part, failure: Failure, tries: int) -> None:
        if failure.again and tries < _MOST_TRIES:
            log.warning("%s is done again: %s", part, failure)
            return
        output = self.logs / part.name("part.log")
        raise UserError(f"{part}: {failure}{f'; its output is in {output}' if output.exists() else ''}")

    @abstractmethod
    def _start(self, part: Part) -> Running:
        """Start a part."""

    @abstractmethod
    def _ended(self, running: Mapping[Running, Part]) -> dict[Running, Failure | None]:
        """Wait for some time, and return those that have ended, with the reason if they failed."""

    @abstractmethod
    def _stop(self, running: Sequence[Running]) -> None:
        """Stop what runs."""
