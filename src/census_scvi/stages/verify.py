"""Command: walk the chain from a published embedding back to the counts, and say which link broke."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from census_scvi.cli import Parser, guarded
from census_scvi.config.commands import COMMANDS
from census_scvi.errors import UserError
from census_scvi.terminal.printing import on_one_line

COMMAND = COMMANDS["verify"]
_EPILOG = """\
links, offline:   provenance, files, model, sealed_counts, sealed_embedding, gates
with --census:    census, publication, embedding, sealed_cells, fresh_sample

without --census: consistent at best; a folder whose files were all forged together is found only with the Census

exit codes: 0 valid or consistent, 2 a link is broken or cannot be checked (it is named),
1 a defect of ours (traceback)"""


def main(argv: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = _parser(program).parse(argv)
    return guarded(lambda: _run(arguments))


def _parser(program: str | None) -> Parser:
    parser = Parser(
        prog=program or COMMAND.script,
        description=COMMAND.summary,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("published", metavar="PUBLISHED", help="folder or URL that was published with the embedding")
    parser.add_argument("--census", metavar="URI", help="the Census that was embedded; cells are read from it again")
    parser.add_argument("--sample", type=int, default=500, help="cells to read again (default %(default)s)")
    parser.add_argument("--seed", type=int, help="seed of that sample; default: another sample each time")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    # Imported only now: torch, scvi-tools and TileDB take seconds, and --help is answered at once.
    from census_scvi.publication.chain import verify

    links = verify(arguments.published, arguments.census, n_cells=arguments.sample, seed=arguments.seed)
    width = max(len(link.name) for link in links)
    for link in links:
        print(
            f"{link.name:<{width}}  {'valid ' if link.valid else 'BROKEN'}  {on_one_line(link.finding)[:_MOST_SHOWN]}"
        )
    if broken := [link.name for link in links if not link.valid]:
        raise UserError(f"{arguments.published} is not valid: {', '.join(broken)} broke; do not use the embedding")
    print(on_one_line(arguments.published) + (_VALID if arguments.census else _CONSISTENT))


_VALID = " is valid"
_CONSISTENT = (
    " is consistent: its files, record, model and sealed cells agree. --census URI also checks that the cells and the"
    " embedding are those of the Census"
)
_MOST_SHOWN = 1000  # characters of a finding
