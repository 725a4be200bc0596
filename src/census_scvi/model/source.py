"""What lies at a path or URL that people name as the source of a model or an embedding."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from census_scvi.config.run_names import DESCRIPTION, MANIFEST, PROVENANCE
from census_scvi.files.uri import local_path

_PICKLE = "model.pt"


class Kind(Enum):
    """Kinds of sources; a folder that is several of them is the first."""

    RUN = auto()
    """A run directory, whose manifest says what is in it."""
    PUBLISHED = auto()
    """A folder that publish wrote."""
    MODEL = auto()
    """A folder with a model in its safe form, such as `scvi.model` in a run directory."""
    PICKLE = auto()
    """A folder with nothing but scvi-tools' own form of a model."""
    FOLDER = auto()
    """Something else on a disk: an Experiment, or nothing of ours."""
    MISSING = auto()
    """Nothing is there."""
    REMOTE = auto()
    """A URL, which says nothing of what is there before it is opened."""


@dataclass(frozen=True)
class Source:
    """A place and what is there.

    Attributes
    ----------
    kind
        What is there.
    path
        Where; None for a URL that leads elsewhere.
    """

    kind: Kind
    path: Path | None

    @classmethod
    def at(cls, place: str) -> Source:
        """The source at a path or URL."""
        path = local_path(place)
        return cls(Kind.REMOTE if path is None else _kind_of(path), path)

    @property
    def run(self) -> Path | None:
        """The run directory; None where it is none."""
        return self.path if self.kind is Kind.RUN else None

    @property
    def is_published(self) -> bool:
        """Whether it is a published folder, or may be one that is to be fetched."""
        return self.kind in (Kind.PUBLISHED, Kind.REMOTE)


def _kind_of(path: Path) -> Kind:
    marks = {MANIFEST: Kind.RUN, PROVENANCE: Kind.PUBLISHED, DESCRIPTION: Kind.MODEL, _PICKLE: Kind.PICKLE}
    found = (kind for name, kind in marks.items() if (path / name).exists())
    return next(found, Kind.FOLDER if path.exists() else Kind.MISSING)
