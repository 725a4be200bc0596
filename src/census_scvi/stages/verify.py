"""Command verify: checks the chain from a published embedding back to the counts, and reports broken links."""

from __future__ import annotations

import argparse

from census_scvi.cli import Parser, is_setting, read_config
from census_scvi.errors import UserError
from census_scvi.terminal.printing import on_one_line, printable

EPILOG = """\
links, offline:   provenance, files, model, sealed_counts, sealed_embedding, gates
with --census:    census, publication, embedding, sealed_cells, fresh_sample

without --census: consistent at best; only the Census can reveal a folder in which all files were forged together

exit code 2: a link is broken or cannot be checked (it is named)"""
EXAMPLE = "--config configs/demo.yaml output.directory=run2"


def add_arguments(parser: Parser) -> None:
    """Add the arguments that only this command has."""
    parser.add_argument(
        "published",
        nargs="?",
        metavar="PUBLISHED",
        help="folder or URL that was published with the embedding; without it, what the config published",
    )
    parser.add_argument("--census", metavar="URI", help="the Census that was embedded; cells are read from it again")
    parser.add_argument("--sample", type=int, default=500, help="cells to read again (default %(default)s)")
    parser.add_argument("--seed", type=int, help="seed of that sample; default: another sample each time")


def run(arguments: argparse.Namespace) -> None:
    """Check every link and print the findings."""
    published, census = _places(arguments)
    if arguments.dry_run:
        cells = f"and {arguments.sample:,} cells of {census}" if census else "and no Census"
        print(printable(f"would check {published} {cells}; writes nothing"))
        return
    # Imported here, because torch, scvi-tools and TileDB take seconds to import and --help must be fast.
    from census_scvi.publication.chain import verify

    links = verify(published, census, n_cells=arguments.sample, seed=arguments.seed)
    width = max(len(link.name) for link in links)
    for link in links:
        print(
            f"{link.name:<{width}}  {'valid ' if link.valid else 'BROKEN'}  {on_one_line(link.finding)[:_MOST_SHOWN]}"
        )
    if broken := [link.name for link in links if not link.valid]:
        raise UserError(f"{published} is not valid: {', '.join(broken)} failed; do not use the embedding")
    print(on_one_line(published) + (_VALID if census else _CONSISTENT))


def _places(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """Published folder and Census, from the arguments or from the config."""
    if arguments.published and not is_setting(arguments.published):
        if arguments.config or arguments.settings:
            raise UserError(
                f"expected the published folder {arguments.published}, or a config that says where it is, not both"
            )
        return arguments.published, arguments.census
    if arguments.published:
        arguments.settings.insert(0, arguments.published)
    config = read_config(arguments)
    place = config.publish.model_uri or str(config.directory / config.artifacts.published)
    return place, arguments.census or config.census.uri or config.census.version


_VALID = " is valid"
_CONSISTENT = (
    " is consistent: its files, record, model and sealed cells agree. --census URI also checks that the cells and the"
    " embedding are those of the Census"
)
_MOST_SHOWN = 1000  # maximum characters of a finding
