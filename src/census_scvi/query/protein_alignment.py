"""A query's protein counts for the proteins of a model: matched by name, with a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from census_scvi.config.types import NO_PROTEINS
from census_scvi.counts.protein_names import plain_name
from census_scvi.counts.proteins import Proteins
from census_scvi.errors import UserError
from census_scvi.query.cells import QueryCells

Values = npt.NDArray[np.float32]
# Number of names in a message.
_LISTED = 5


@dataclass(frozen=True)
class ProteinReport:
    """Report on a query's proteins.

    Attributes
    ----------
    place
        Place of the protein counts: `obsm/<name>` or `features`; "" if the query has none.
    n_proteins, n_shared
        Number of the model's proteins, and number of these in the query.
    renamed
        Proteins of the model that have another name in the query, which differs in suffixes or case.
    missing
        Proteins of the model that the query does not have; they count as 0, and the model imputes them.
    extra
        Proteins of the query that the model does not use.
    """

    place: str
    n_proteins: int
    n_shared: int
    renamed: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.place:
            return f"the query has no proteins: all {self.n_proteins} of the model count as 0 and are imputed by it"
        lines = [f"{self.n_shared} of the model's {self.n_proteins} proteins, from {self.place}"]
        if self.renamed:
            pairs = ", ".join(f"{own} = {name}" for name, own in self.renamed.items())
            lines.append(f"of these, under another name: {pairs}")
        if self.missing:
            listed = ", ".join(self.missing)
            lines.append(f"missing proteins, which count as 0 and are imputed by the model: {listed}")
        if self.extra:
            lines.append(f"proteins of the query that are not used: {', '.join(self.extra)}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """All attributes, for JSON and .h5ad; `renamed` as texts such as `CD3_TotalSeqB = CD3` (the model's first)."""
        return asdict(self) | {"renamed": [f"{name} = {own}" for name, own in self.renamed.items()]}


class AlignedProteins:
    """A query's raw protein counts for the proteins of a model.

    Parameters
    ----------
    proteins
        Protein counts of the query; None: all proteins are missing.
    names
        Proteins of the model, in the order of the columns.
    name
        Name of the query in messages.

    Attributes
    ----------
    report
        Report on the proteins.

    Raises
    ------
    UserError
        The query has proteins, but none of the model's, or it is unclear which of them is one of the model's.
    """

    @classmethod
    def find(cls, cells: QueryCells, place: str, names: Sequence[str], asked: str | None = None) -> Self:
        """Find the proteins of a query, and match them with those of a model.

        Parameters
        ----------
        cells
            The query.
        place
            Place of the raw counts of the genes.
        names
            Proteins of the model.
        asked
            Place of the proteins: `obsm/<name>`, `features`, or `none` for a query without proteins; None: found.

        Raises
        ------
        UserError
            Nothing is asked and the query has no proteins; or as in `QueryCells.find_proteins` and this class.
        """
        proteins = cells.find_proteins(place, asked)
        if proteins is None and asked != NO_PROTEINS:
            raise UserError(
                f"{cells.name} has no proteins, and the model uses {len(names)} ({_listed(names)}); put their raw"
                " counts into obsm['protein_expression'] with their names, or embed the cells without proteins,"
                f" which the model then imputes: set query.proteins (in Python: proteins=) to {NO_PROTEINS}"
            )
        return cls(proteins, names, cells.name)

    def __init__(self, proteins: Proteins | None, names: Sequence[str], name: str) -> None:
        self._proteins, self._names = proteins, list(names)
        own = [] if proteins is None else proteins.names
        self._columns = match_proteins(own, self._names, name)
        there = self._columns >= 0
        if proteins is not None and not there.any():
            raise UserError(
                f"{proteins.where} has none of the model's proteins: it has {_listed(own)}, the model"
                f" {_listed(self._names)}; rename the proteins, or embed the cells without them: set query.proteins"
                f" (in Python: proteins=) to {NO_PROTEINS}"
            )
        chosen = {each: own[column] for each, column in zip(self._names, self._columns, strict=True) if column >= 0}
        self.report = ProteinReport(
            place="" if proteins is None else proteins.place,
            n_proteins=len(self._names),
            n_shared=int(there.sum()),
            renamed={each: found for each, found in chosen.items() if each != found},
            missing=[each for each in self._names if each not in chosen],
            extra=[each for each in own if each not in chosen.values()],
        )

    def blocks(self, rows: int) -> Iterator[Values]:
        """Counts of at most `rows` cells at a time, float32 (cells, proteins of the model); 0 if missing.

        Raises
        ------
        UserError
            A value is not a raw count.
        """
        assert self._proteins is not None, "without proteins, `reader` gives zeros"
        there = np.flatnonzero(self._columns >= 0)
        for _, block in self._proteins.blocks(rows):
            counts = np.zeros((block.shape[0], len(self._names)), np.float32)
            counts[:, there] = block[:, self._columns[there]].toarray()
            yield counts

    def reader(self, rows: int) -> Callable[[int], Values]:
        """A function that returns the counts of the next n cells, float32 (n, proteins of the model).

        Blocks of `rows` cells are read when they are needed.
        """
        if self._proteins is None:
            return lambda n_cells: np.zeros((n_cells, len(self._names)), np.float32)
        blocks, waiting = self.blocks(rows), np.zeros((0, len(self._names)), np.float32)

        def following(n_cells: int) -> Values:
            nonlocal waiting
            while len(waiting) < n_cells:
                waiting = np.concatenate([waiting, next(blocks)])
            counts, waiting = waiting[:n_cells], waiting[n_cells:]
            return counts

        return following


def match_proteins(found: Sequence[str], names: Sequence[str], name: str) -> npt.NDArray[np.int64]:
    """Position in `found` of each protein of a model, int64 (proteins of the model,); -1 if it is missing.

    Names are equal, else equal without suffixes of antibody panels and without regard to case (`plain_name`).

    Raises
    ------
    UserError
        Several names may be the same protein; the error lists them, and `name` is the name of the data.
    """
    position = {own: number for number, own in enumerate(found)}
    columns = np.array([position.get(each, -1) for each in names], np.int64)
    plain = _by_plain_name(own for own in found if own not in set(names))
    wanted = _by_plain_name(each for each in names if each not in position)
    unclear = []
    for key, missing in wanted.items():
        candidates = plain.get(key, [])
        if len(missing) == len(candidates) == 1:
            columns[list(names).index(missing[0])] = position[candidates[0]]
        elif candidates:
            unclear.append(f"{' or '.join(candidates)} may be {' or '.join(missing)}")
    if unclear:
        raise UserError(f"{name}: {'; '.join(unclear)}; rename the proteins of your cells as in the model")
    return columns


def _by_plain_name(names: Iterable[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for each in names:
        grouped.setdefault(plain_name(each), []).append(each)
    return grouped


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
