"""Extras: packages that only some commands need, as pyproject.toml lists them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution, requires
from typing import TYPE_CHECKING

from census_scvi.errors import UserError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_PROJECT = "census-scvi"


def require_extra(extra: str, user: str) -> None:
    """Check, before anything is imported, that the packages of an extra are installed.

    Parameters
    ----------
    extra
        A name of pyproject.toml's optional dependencies.
    user
        The command or class that needs it, for the message.

    Raises
    ------
    UserError
        Some are not installed; it names them and the extra.
    """
    missing = [name for name in _packages(extra) if not _installed(name)]
    if missing:
        *others, last = missing
        names = f"{', '.join(others)} and {last}, which are" if others else f"{last}, which is"
        raise UserError(f"{user} needs {names} not installed; pip install '{_PROJECT}[{extra}]'")


def _packages(extra: str) -> list[str]:
    """Packages that the extra adds to those that every installation has."""
    from packaging.requirements import Requirement  # commands without an extra start without it

    lines = map(Requirement, requires(_PROJECT) or ())
    return [line.name for line in lines if _holds(line, extra) and not _holds(line, "")]


def _holds(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True
