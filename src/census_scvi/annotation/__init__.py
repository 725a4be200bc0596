"""Cell types for the user's cells: annotators behind one interface, their validation, and scanpy-like functions."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from census_scvi.annotation.functions import interpret, predict, train

__all__ = ["interpret", "predict", "train"]


def __getattr__(name: str) -> Any:
    """Import what takes seconds only when it is asked for."""
    if name in __all__:
        from census_scvi.config.extras import require_extra

        require_extra("annotate", f"census_scvi.annotation.{name}")
        from census_scvi.annotation import functions

        return getattr(functions, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
