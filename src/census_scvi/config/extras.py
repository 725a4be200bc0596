"""Extras: optional packages that only some commands need, as listed in pyproject.toml."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution, requires
from typing import TYPE_CHECKING

from census_scvi.errors import UserError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_PROJECT = "census-scvi"


def require_extra(extra: str, user: str) -> None:
    """Check that the packages of an extra are installed, without importing them.

    Parameters
    ----------
    extra
        Name of optional dependencies in pyproject.toml.
    user
        Command or class that needs the extra, for the message.

    Raises
    ------
    UserError
        A package is not installed; the error lists the missing packages and the extra.
    """
    missing = [name for name in _packages(extra) if not _installed(name)]
    if missing:
        *others, last = missing
        names = f"{', '.join(others)} and {last}, which are" if others else f"{last}, which is"
        raise UserError(f"{user} needs {names} not installed; pip install '{_PROJECT}[{extra}]'")


def _packages(extra: str) -> list[str]:
    """Packages of the extra that are not part of every installation."""
    from packaging.requirements import Requirement  # imported here, so that commands without an extra start faster

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
