"""Find out what kind of source a path or URL of a model or an embedding is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from census_scvi.config.run_names import DESCRIPTION, MANIFEST, PROVENANCE
from census_scvi.files.uri import local_path

PICKLE = "model.pt"


class Kind(Enum):
    """Kinds of sources; the first one applies to a folder of several kinds."""

    RUN = auto()
    """A run directory; its manifest lists its contents."""
    PUBLISHED = auto()
    """A folder that scvi-publish.py wrote."""
    MODEL = auto()
    """A folder with a model in its safe form, such as `scvi.model` in a run directory."""
    PICKLE = auto()
    """A folder with a model only in scvi-tools' own form."""
    FOLDER = auto()
    """Another local path: an Experiment, or something unknown."""
    MISSING = auto()
    """A local path that does not exist."""
    REMOTE = auto()
    """A URL; its contents are not known before it is opened."""


@dataclass(frozen=True)
class Source:
    """A source of a model or an embedding.

    Attributes
    ----------
    kind
        Its kind.
    path
        Its local path; None for a URL that is not local.
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
        """The run directory; None for other kinds."""
        return self.path if self.kind is Kind.RUN else None

    @property
    def is_published(self) -> bool:
        """Whether it is a published folder, or a URL that may be one."""
        return self.kind in (Kind.PUBLISHED, Kind.REMOTE)


def _kind_of(path: Path) -> Kind:
    marks = {MANIFEST: Kind.RUN, PROVENANCE: Kind.PUBLISHED, DESCRIPTION: Kind.MODEL, PICKLE: Kind.PICKLE}
    found = (kind for name, kind in marks.items() if (path / name).exists())
    return next(found, Kind.FOLDER if path.exists() else Kind.MISSING)
