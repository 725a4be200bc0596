"""Command line of all commands."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from census_scvi.config.extras import require_extra
from census_scvi.config.messages import suggestion
from census_scvi.config.stages import STAGES, Stage
from census_scvi.errors import UserError
from census_scvi.files.parts import Part
from census_scvi.files.paths import expand_argument
from census_scvi.settings import Config, load_config
from census_scvi.settings.table import help_of_stage
from census_scvi.terminal.guarded import DONE, USER_ERROR, fail, guarded
from census_scvi.terminal.printing import printable

DEFAULT_CONFIG = "scvi-config.yaml"

_EPILOG = """\
settings on the command line override the file:
  %(prog)s {example}

exit codes: 0 done, 2 something for you to fix (one line says what), 1 a defect of ours (traceback),
130 or 143 stopped by Ctrl-C or SIGTERM: the same command resumes"""


# Default help text; a stage with its own arguments may replace it.
_CONFIG_HELP = f"YAML file (default: {DEFAULT_CONFIG})"

_OVERVIEW = """\
usage: census-scvi COMMAND [ARGUMENTS]

Train, publish and use atlas-wide embeddings of single-cell RNA counts in CELLxGENE Census.

commands, in the order in which they are used:
{commands}

census-scvi COMMAND --help shows the arguments of a command, census-scvi --version the version.
Each command is a script as well: scvi-COMMAND.py."""


def main(name: str, argv: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run a command; the scripts call this function.

    Parameters
    ----------
    name
        One of `STAGES`.
    argv
        Arguments; None: those of the process.
    program
        Program name in help and errors; None: the name of the script.

    Returns
    -------
    The exit code.
    """
    stage = STAGES[name]
    own = importlib.import_module(stage.module) if stage.own_arguments else None
    arguments = _parser(stage, program, own).parse(_with_action(stage, argv))
    return guarded(lambda: _run(stage, arguments, own, program or stage.script))


def _with_action(stage: Stage, argv: Sequence[str] | None) -> list[str]:
    """The arguments, with the action of a stage as a setting: `train` becomes `annotate.action=train`."""
    given = sys.argv[1:] if argv is None else argv
    return [f"{stage.name}.action={argument}" if argument in stage.actions else argument for argument in given]


def console(argv: Sequence[str] | None = None) -> int:
    """Entry point of `census-scvi`: run the command given as first argument; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        return fail("expected a command; census-scvi --help lists them")
    name, *rest = arguments
    if name in ("-h", "--help"):
        width = max(map(len, STAGES))
        print(_OVERVIEW.format(commands="\n".join(f"  {each:<{width}}  {STAGES[each].summary}" for each in STAGES)))
        return DONE
    if name == "--version":
        print(f"census-scvi {version('census-scvi')}")
        return DONE
    if name not in STAGES:
        return fail(f"{name} is not a command{suggestion(name, list(STAGES))}; census-scvi --help lists them")
    return main(name, rest, program=f"census-scvi {name}")


class Parser(argparse.ArgumentParser):
    """Argument parser that accepts arguments in any order and prints errors on one line."""

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse options before, between and after positional arguments; exit with code 2 if one is wrong."""
        return self.parse_intermixed_args(argv)

    def error(self, message: str) -> NoReturn:
        """Print the error on one line and exit with code 2."""
        hint = "; settings have no dashes: section.key=value" if _DASHED_SETTING.search(message) else ""
        self.exit(USER_ERROR, f"error: {message}{hint} ({self.prog} --help shows the arguments)\n")


_DASHED_SETTING = re.compile(r"unrecognized arguments: .*--?\w+(\.\w+)+")


def _parser(stage: Stage, program: str | None, own: Any) -> Parser:
    settings = help_of_stage(Config, stage.name).replace("%", "%%") if own is None else own.EPILOG
    parser = Parser(
        prog=program or stage.script,
        description=stage.summary,
        epilog=f"{settings}\n\n{_EPILOG.format(example=getattr(own, 'EXAMPLE', stage.example))}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if own is not None:
        own.add_arguments(parser)
    if stage.actions:
        listed = f"{', '.join(stage.actions[:-1])} or {stage.actions[-1]}"
        parser.description = f"{stage.summary} The first argument may be {listed}."
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings that override the file")
    parser.add_argument("--config", metavar="FILE", help=getattr(own, "CONFIG_HELP", _CONFIG_HELP))
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the resolved config, the inputs and outputs, and the expected time and memory; change nothing",
    )
    parser.add_argument(
        "--force", action="store_true", help="run the stage again from the start, and replace its results"
    )
    if stage.parts:
        parser.add_argument(
            "--part",
            type=_part,
            metavar="I/N",
            help="do part I of N and write it to files of its own; parts can run at the same time, in any order, on"
            " several machines (those of prepare twice: first they read counts for the selection of genes); then the"
            " command without --part does what is missing and joins them",
        )
    return parser


def _part(text: str) -> Part:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no part; expected I/N, e.g. 2/8")
    try:
        return Part(int(found[1]), int(found[2]))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def is_setting(argument: str) -> bool:
    """Whether an argument is `section.key=value`; otherwise it is a file path."""
    return _SETTING.match(argument) is not None


_SETTING = re.compile(r"\w+(\.[\w-]+)*=")


def read_config(arguments: argparse.Namespace) -> Config:
    """Load the config file and overrides given in the arguments."""
    path = Path(expand_argument(arguments.config or DEFAULT_CONFIG, "--config"))
    if not path.exists():
        raise UserError(f"{path}: no such file; give the YAML file with your settings: --config FILE")
    return load_config(path, arguments.settings)


def _run(stage: Stage, arguments: argparse.Namespace, own: Any, program: str) -> None:
    if own is not None:
        own.run(arguments)
        return
    config = read_config(arguments)
    if stage.extra:
        require_extra(stage.extra, program)
    protocol = importlib.import_module("census_scvi.stages.protocol")  # imported after settings are checked
    if arguments.dry_run:
        print(printable(protocol.plan_stage(stage.name, config).text(config)))
        return
    part = getattr(arguments, "part", None)
    if part is not None and arguments.force:
        raise UserError("--force starts a stage again and --part does a part of it; give one of them")
    protocol.run_stage(stage.name, config, force=arguments.force, part=part)
