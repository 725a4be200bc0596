"""The whole config: the sections of all modules, their tables and help."""

from census_scvi.settings.config import Config, load_config

__all__ = ["Config", "load_config"]
