"""Command build-census: builds a local Census from .h5ad files, or a small demo Census of simulated cells."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from census_scvi.cli import Parser, is_setting
from census_scvi.errors import UserError
from census_scvi.files.paths import expand_argument
from census_scvi.stages.plan import Plan
from census_scvi.terminal.printing import printable

if TYPE_CHECKING:
    from census_scvi.local_census.settings import BuildConfig
    from census_scvi.local_census.sources import H5adSource
    from census_scvi.local_census.write import BuildReport

EPILOG = """\
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
  cellxgene_census.open_soma(uri="my-census")"""
CONFIG_HELP = "YAML file, as CONFIG.yaml"
EXAMPLE = "my-build.yaml uri=my-census genes.min_recognised=0.3"
# Constants for --dry-run, measured on two cores. Memory: of the imports, per cell, and per non-zero of a block.
# Time: fixed, per cell, per non-zero. Disk: bytes per non-zero; a Census stores each twice, raw and normalized.
_BASE_MEMORY, _BYTES_A_CELL, _BYTES_A_NONZERO_READ = 0.5e9, 2000.0, 120.0
_FIXED_SECONDS, _SECONDS_A_CELL, _SECONDS_A_NONZERO, _BYTES_A_NONZERO = 3.5, 1e-5, 4.5e-7, 4.5


def add_arguments(parser: Parser) -> None:
    """Add the arguments that only this command has."""
    parser.add_argument("source", nargs="?", metavar="CONFIG.yaml", help="YAML file: which files, which columns")
    parser.add_argument("--demo", metavar="URI", help="write a Census of simulated cells there")
    parser.add_argument("--data", metavar="DIR", help="folder of the .h5ad files and gene maps (replaces `data`)")
    demo = parser.add_argument_group("with --demo")
    demo.add_argument("--seed", type=int, default=0, help="the same seed gives the same cells (default 0)")
    demo.add_argument(
        "--organisms",
        nargs="+",
        metavar="ORGANISM",
        help="of which organisms, e.g. macaca_mulatta (default: homo_sapiens mus_musculus)",
    )
    demo.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="multiplies 6,000 human cells, and 2,000 of each other organism (default 1)",
    )
    demo.add_argument("--genes", type=int, default=3000, help="genes of each organism (default 3000)")
    demo.add_argument("--proteins", action="store_true", help="with protein counts in three datasets, as of CITE-seq")


def run(arguments: argparse.Namespace) -> None:
    """Build the Census and print its datasets."""
    if arguments.source and is_setting(arguments.source):
        arguments.settings.insert(0, arguments.source)
        arguments.source = None
    named = [place for place in (arguments.source, arguments.config, arguments.demo) if place]
    if len(named) != 1:
        raise UserError("expected CONFIG.yaml or --demo URI" + (", not both" if named else ""))
    if arguments.demo:
        _run_demo(arguments)
        return
    # Read the YAML first: a wrong key is reported before the slow imports.
    from census_scvi.local_census.settings import load_build_config

    config = load_build_config(arguments.source or arguments.config, data=arguments.data, overrides=arguments.settings)
    if arguments.dry_run:
        print(printable(plan(config, force=arguments.force).text(config)))
        return
    _show(build_from_config(config, force=arguments.force))


def _show(report: BuildReport) -> None:
    for dataset in report.datasets:
        print(dataset)
    print(f"{report.uri}: {sum(report.n_cells.values()):,} cells, {len(report.datasets)} datasets")


def _run_demo(arguments: argparse.Namespace) -> None:
    from census_scvi.local_census.demo.cells import DEFAULT_ORGANISMS, write_demo_census
    from census_scvi.local_census.write import check_target

    if arguments.settings:
        raise UserError(
            f"--demo takes no settings, found {arguments.settings[0]}; see --organisms, --seed, --scale, --genes and"
            " --proteins"
        )
    uri = expand_argument(arguments.demo, "--demo")
    if arguments.dry_run:
        print(printable(f"would write a Census of simulated cells to {check_target(uri, force=arguments.force)}"))
        return
    _show(
        write_demo_census(
            uri,
            seed=arguments.seed,
            scale=arguments.scale,
            n_genes=arguments.genes,
            proteins=arguments.proteins,
            organisms=arguments.organisms or DEFAULT_ORGANISMS,
            force=arguments.force,
        )
    )


def build_from_config(config: BuildConfig, *, force: bool = False) -> BuildReport:
    """Build the Census that a config describes; UserError if a file is missing or unsuitable."""
    from census_scvi.local_census.write import build_census, check_target

    check_target(config.uri, force=force)
    return build_census(config.uri, _sources(config), force=force)


def _sources(config: BuildConfig) -> list[H5adSource]:
    from census_scvi.census.gene_ids import GeneMap
    from census_scvi.local_census.sources import open_h5ad

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
            proteins=dataset.proteins,
            gene_id=dataset.gene_id,
            obs_columns=dataset.obs,
            values=dataset.values,
            gene_map=maps.get(dataset.organism),
            keep_without_id=config.genes.without_id == "keep",
            min_recognised=config.genes.min_recognised,
        )
    return sources


def _words(source: H5adSource) -> str:
    proteins = f"; {len(source.proteins):,} proteins" if source.proteins else ""
    return f"{source.path}: {source.dataset_id}, {len(source.obs):,} cells, {source.genes}{proteins}"


def plan(config: BuildConfig, *, force: bool = False) -> Plan:
    """Plan of a build: cells and genes from the files, cost estimated from the first block of counts of each file."""
    from census_scvi.local_census.write import BLOCK_ROWS, check_target

    target = check_target(config.uri, force=force)
    sources = _sources(config)
    nonzeros, block = 0.0, 0.0
    for source in sources:
        _, counts = next(source.blocks(BLOCK_ROWS))
        nonzeros += counts.nnz / counts.shape[0] * len(source.obs)
        block = max(block, counts.nnz)
    n_cells = sum(len(source.obs) for source in sources)
    return Plan(
        "build-census",
        reads=[_words(source) for source in sources],
        writes=[f"{target}/"],
        cells=n_cells,
        genes=len({gene for source in sources for gene in source.var["feature_id"]}),
        memory=_BASE_MEMORY + _BYTES_A_CELL * n_cells + _BYTES_A_NONZERO_READ * block,
        disk=_BYTES_A_NONZERO * nonzeros,
        seconds=_FIXED_SECONDS + _SECONDS_A_CELL * n_cells + _SECONDS_A_NONZERO * nonzeros,
    )
