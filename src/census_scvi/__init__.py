"""census-scvi: train, publish and use atlas-wide single-cell embeddings of CELLxGENE Census."""

from importlib.metadata import version

__version__ = version("census-scvi")
