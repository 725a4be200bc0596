"""census-scvi: train, publish and use atlas-wide single-cell embeddings of CELLxGENE Census."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from census_scvi.atlas import Atlas
    from census_scvi.model.imported import import_model
    from census_scvi.model.published import load_model

__version__ = version("census-scvi")
__all__ = ["Atlas", "__version__", "import_model", "load_model"]


def __getattr__(name: str) -> Any:
    """Import what takes seconds only when it is asked for."""
    if name == "load_model":
        from census_scvi.model.published import load_model

        return load_model
    if name == "import_model":
        from census_scvi.model.imported import import_model

        return import_model
    if name == "Atlas":
        from census_scvi.config.extras import require_extra

        require_extra("atlas", "Atlas")
        from census_scvi.atlas import Atlas

        return Atlas
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
