"""The whole config: the sections of all rooms in one, their tables and help."""

from census_scvi.settings.config import Config, load_config

__all__ = ["Config", "load_config"]
