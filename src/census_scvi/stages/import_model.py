"""Command import-model: writes the safe form of a model that scvi-tools saved."""

from __future__ import annotations

import argparse
from pathlib import Path

from census_scvi.cli import Parser, read_config
from census_scvi.errors import UserError
from census_scvi.terminal.printing import printable

EPILOG = """\
settings of this command:
  import_model.folder    folder in which model.save of scvi-tools wrote: SCVI, SCANVI or TOTALVI
  import_model.output    folder to write the imported model to
  import_model.trust     true: load the pickle in the folder, which executes any code that its author put into it
  import_model.gene_map  TSV (or .tsv.gz) of ensembl_id and symbol; converts symbols to ids and ids to symbols
  census.organism        organism of the genes

example of a FILE:
  import_model: {folder: their-model, output: imported, trust: true}"""
EXAMPLE = "--config import.yaml import_model.output=elsewhere"


def add_arguments(parser: Parser) -> None:
    """Add nothing: all that the command needs is settings."""


def run(arguments: argparse.Namespace) -> None:
    """Import the model, and print what it is."""
    config = read_config(arguments)
    settings = config.import_model
    for name in ("folder", "output"):
        if getattr(settings, name) is None:
            raise UserError(f"import_model.{name} is not set; give a folder")
    folder, output = Path(str(settings.folder)), Path(str(settings.output))
    # Imported here, because torch and scvi-tools take seconds to import and --help must be fast.
    from census_scvi.model.imported import check_places, import_model

    if arguments.dry_run:
        check_places(folder, output, trust=settings.trust, force=arguments.force)
        print(printable(f"would load the pickle in {folder} and write the model to {output}/"))
        return
    found = import_model(
        folder,
        output,
        trust=settings.trust,
        organism=config.census.organism,
        gene_map=settings.gene_map,
        force=arguments.force,
    )
    print(printable(f"{output}: {found.summary}"))
