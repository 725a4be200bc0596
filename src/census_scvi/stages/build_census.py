"""Command: build a local Census from .h5ad files, or a small artificial one to try the pipeline on."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from census_scvi.cli import Parser, guarded
from census_scvi.config.commands import COMMANDS
from census_scvi.files.paths import expand_argument

if TYPE_CHECKING:
    from census_scvi.local_census.config import BuildConfig
    from census_scvi.local_census.write import BuildReport

COMMAND = COMMANDS["build-census"]
_EXAMPLE = """\
example of a CONFIG.yaml (all keys: configs/build-blood.yaml):
  uri: my-census                          # folder of the new Census, relative to this file
  genes:
    map: {homo_sapiens: gene_map.tsv.gz}  # optional: ensembl_id, symbol, length, type
  datasets:
    - file: pbmc.h5ad                     # raw counts
      organism: homo_sapiens
      obs: {cell_type: annotation, donor_id: patient}         # Census column: column of the file
      values: {assay: "10x 3' v3", tissue: blood}             # the same for every cell

then open it:
  cellxgene_census.open_soma(uri="my-census")
"""


def main(argv: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command; returns 0 (done), 2 (the user can fix it, one line on stderr) or 1 (a defect, traceback)."""
    parser = _parser(program)
    arguments = parser.parse(argv)
    if (arguments.config is None) == (arguments.demo is None):
        parser.error("expected CONFIG.yaml or --demo URI" + (", not both" if arguments.demo else ""))
    return guarded(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    report = _build_demo(arguments) if arguments.demo else _build_from_config(arguments)
    for dataset in report.datasets:
        print(dataset)
    print(f"{report.uri}: {sum(report.n_cells.values()):,} cells, {len(report.datasets)} datasets")


def _parser(program: str | None) -> Parser:
    parser = Parser(
        prog=program or COMMAND.script,
        description=COMMAND.summary,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", type=Path, help="which files, which columns")
    parser.add_argument("--demo", metavar="URI", help="write an artificial Census there instead (human and mouse)")
    parser.add_argument("--data", metavar="DIR", help="folder of the .h5ad files and gene maps (replaces `data`)")
    parser.add_argument("--force", action="store_true", help="replace a Census that is already there")
    demo = parser.add_argument_group("with --demo")
    demo.add_argument("--seed", type=int, default=0, help="the same seed gives the same cells (default 0)")
    demo.add_argument("--scale", type=float, default=1.0, help="times 6,000 human and 2,000 mouse cells (default 1)")
    demo.add_argument("--genes", type=int, default=3000, help="genes of each organism (default 3000)")
    return parser


def _build_demo(arguments: argparse.Namespace) -> "BuildReport":
    from census_scvi.local_census.demo.cells import write_demo_census

    uri = expand_argument(arguments.demo, "--demo")
    return write_demo_census(
        uri,
        seed=arguments.seed,
        scale=arguments.scale,
        n_genes=arguments.genes,
        force=arguments.force,
    )


def _build_from_config(arguments: argparse.Namespace) -> "BuildReport":
    # The YAML first: a wrong key is answered before the heavy imports.
    from census_scvi.local_census.config import load_build_config

    return build_from_config(load_build_config(arguments.config, data=arguments.data), force=arguments.force)


def build_from_config(config: "BuildConfig", *, force: bool = False) -> "BuildReport":
    """Build the Census that a config describes; UserError for files that are missing or unsuitable."""
    from census_scvi.census.gene_ids import GeneMap
    from census_scvi.local_census.sources import H5adSource, open_h5ad
    from census_scvi.local_census.write import build_census, check_target

    check_target(config.uri, force=force)
    maps = {organism: GeneMap(path) for organism, path in config.genes.map.items()}
    sources: list[H5adSource] = []
    for dataset in config.datasets:
        several = None if dataset.dataset_id is None or isinstance(dataset.dataset_id, str) else dataset.dataset_id
        sources += open_h5ad(
            dataset.file,
            dataset_id=dataset.dataset_id if isinstance(dataset.dataset_id, str) else None,
            dataset_column=several.column if several else None,
            title=dataset.title,
            organism=dataset.organism,
            counts=dataset.counts,
            gene_id=dataset.gene_id,
            obs_columns=dataset.obs,
            values=dataset.values,
            gene_map=maps.get(dataset.organism),
            keep_without_id=config.genes.without_id == "keep",
            min_recognised=config.genes.min_recognised,
        )
    return build_census(config.uri, sources, force=force)
