"""Part i of n of a stage's work, for any process to do, in any order; the whole work is part 1 of 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """Which part of the work.

    Attributes
    ----------
    number
        From 1.
    of
        How many parts there are.

    Raises
    ------
    ValueError
        There is no such part.
    """

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ValueError(f"part {self.number} of {self.of} does not exist; expected 1 to {self.of}")

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"

    def take(self, items: Sequence[Item]) -> Sequence[Item]:
        """Its share of the items: consecutive ones; shares differ by one item, and are empty where there are few."""
        return items[(self.number - 1) * len(items) // self.of : self.number * len(items) // self.of]

    def name(self, name: str) -> str:
        """Its own file of that name: `latent.npy` is `latent-00002-of-00003.npy` in part 2 of 3."""
        if self.of == 1:
            return name
        stem, dot, ending = name.partition(".")
        return f"{stem}-{self.number:05d}-of-{self.of:05d}{dot}{ending}"


WHOLE = Part()


def begun(path: Path) -> bool:
    """Whether there is such a file, or one of a part's own."""
    stem, dot, ending = path.name.partition(".")
    return path.exists() or any(path.parent.glob(f"{stem}-*-of-*{dot}{ending}"))


def parts(number: int) -> list[Part]:
    """All parts of work that is divided into as many."""
    return [Part(place, number) for place in range(1, number + 1)]
