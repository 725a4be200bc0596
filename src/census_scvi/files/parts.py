"""Part i of n of the work of a stage: any process can do any part, in any order; the whole work is part 1 of 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """A part of the work.

    Attributes
    ----------
    number
        Number of the part, from 1.
    of
        Number of parts.

    Raises
    ------
    ValueError
        `number` is not between 1 and `of`.
    """

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ValueError(f"part {self.number} of {self.of} does not exist; expected 1 to {self.of}")

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"

    def take(self, items: Sequence[Item]) -> Sequence[Item]:
        """Consecutive items of this part; sizes differ by at most one item, and may be 0 if there are few items."""
        return items[(self.number - 1) * len(items) // self.of : self.number * len(items) // self.of]

    def name(self, name: str) -> str:
        """File name of this part: `latent.npy` becomes `latent-00002-of-00003.npy` in part 2 of 3."""
        if self.of == 1:
            return name
        stem, dot, ending = name.partition(".")
        return f"{stem}-{self.number:05d}-of-{self.of:05d}{dot}{ending}"


WHOLE = Part()


def begun(path: Path) -> bool:
    """Whether the file exists, or a file of one of its parts."""
    stem, dot, ending = path.name.partition(".")
    return path.exists() or any(path.parent.glob(f"{stem}-*-of-*{dot}{ending}"))


def parts(number: int) -> list[Part]:
    """All parts of work that is divided into `number` parts."""
    return [Part(place, number) for place in range(1, number + 1)]
