"""Settings: where results are written."""

from __future__ import annotations

from typing import Annotated, ClassVar

from census_scvi.config.section import USUAL, Section
from census_scvi.config.types import LocalPath


class OutputSection(Section):
    """Where the results are written."""

    changes: ClassVar[tuple[str, ...]] = ()
    directory: Annotated[LocalPath, USUAL] = "run"
    """Run directory; a relative path starts at the current folder."""
