"""Settings: the YAML file, its sections and defaults, and messages about what is wrong in it."""

from census_scvi.config.settings import (
    CensusSection,
    Config,
    GatesSection,
    HvgSection,
    ModelSection,
    OutputSection,
    PublishSection,
    TrainSection,
    digest,
    flatten,
    load_config,
)

__all__ = [
    "CensusSection",
    "Config",
    "GatesSection",
    "HvgSection",
    "ModelSection",
    "OutputSection",
    "PublishSection",
    "TrainSection",
    "digest",
    "flatten",
    "load_config",
]
