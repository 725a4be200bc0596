"""The command line of all commands: arguments, logging, exit codes, errors of one line."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from census_scvi.config.extras import require_extra
from census_scvi.config.messages import suggestion
from census_scvi.config.stages import STAGES, Stage
from census_scvi.errors import UserError
from census_scvi.files.paths import expand_argument
from census_scvi.settings import Config, load_config
from census_scvi.settings.table import help_of_stage
from census_scvi.terminal.printing import on_one_line, printable
from census_scvi.terminal.stopping import Stopped, Stopping, say

DONE, DEFECT, USER_ERROR = 0, 1, 2
DEFAULT_CONFIG = "scvi-config.yaml"

_EPILOG = """\
settings on the command line override the file:
  %(prog)s {example}

exit codes: 0 done, 2 something for you to fix (one line says what), 1 a defect of ours (traceback),
130 or 143 stopped by Ctrl-C or SIGTERM: the same command resumes"""


# A stage with arguments of its own may have other texts than these.
_EXAMPLE = "--config configs/demo.yaml hvg.top_n_hvg=2000 output.directory=run2"
_CONFIG_HELP = f"YAML file (default: {DEFAULT_CONFIG})"

_OVERVIEW = """\
usage: census-scvi COMMAND [ARGUMENTS]

Train, publish and use atlas-wide embeddings of single-cell RNA counts in CELLxGENE Census.

commands, in the order in which they are used:
{commands}

census-scvi COMMAND --help shows the arguments of a command, census-scvi --version the version.
Each command is a script as well: scvi-COMMAND.py."""


def main(name: str, argv: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run a command as its script does.

    Parameters
    ----------
    name
        One of `STAGES`.
    argv
        Arguments; None: those of the process.
    program
        Its name in help and errors; None: the script.

    Returns
    -------
    The exit code.
    """
    stage = STAGES[name]
    own = importlib.import_module(stage.module) if stage.own_arguments else None
    arguments = _parser(stage, program, own).parse(argv)
    return guarded(lambda: _run(stage, arguments, own, program or stage.script))


def console(argv: Sequence[str] | None = None) -> int:
    """The program `census-scvi`: runs the command that its first argument names; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        return _fail("expected a command; census-scvi --help lists them")
    name, *rest = arguments
    if name in ("-h", "--help"):
        width = max(map(len, STAGES))
        print(_OVERVIEW.format(commands="\n".join(f"  {each:<{width}}  {STAGES[each].summary}" for each in STAGES)))
        return DONE
    if name == "--version":
        print(f"census-scvi {version('census-scvi')}")
        return DONE
    if name not in STAGES:
        return _fail(f"{name} is not a command{suggestion(name, list(STAGES))}; census-scvi --help lists them")
    return main(name, rest, program=f"census-scvi {name}")


class Parser(argparse.ArgumentParser):
    """Arguments in any order; an error is one line."""

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Options before, between and after the others; leaves the process with exit code 2 where one is wrong."""
        return self.parse_intermixed_args(argv)

    def error(self, message: str) -> NoReturn:
        """Print the line and leave with exit code 2."""
        hint = "; settings have no dashes: section.key=value" if _DASHED_SETTING.search(message) else ""
        self.exit(USER_ERROR, f"error: {message}{hint} ({self.prog} --help shows the arguments)\n")


_DASHED_SETTING = re.compile(r"unrecognized arguments: .*--?\w+(\.\w+)+")


def guarded(work: Callable[[], None]) -> int:
    """Exit code of some work; an error that the user can fix is one line on stderr, a defect a traceback.

    A signal to stop (Ctrl-C, SIGTERM, SIGHUP) ends it with 128 + its number, and the line that says how to resume.
    """
    configure_logging()
    stopping = Stopping()
    try:
        with stopping:
            work()
    except KeyboardInterrupt:  # which no signal brought
        stopping.exit_code = 128 + signal.SIGINT
    except (Stopped, SystemExit, Exception) as error:
        if not stopping.exit_code:
            return _exit_code(error)
    if stopping.exit_code:  # whatever a library made of it on the way
        say(stopping.line)
    return stopping.exit_code


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        raise error
    if isinstance(error, UserError):
        return _fail(str(error))
    if message := _storage_problem(error):
        return _fail(message)
    print(printable("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    return DEFECT


class _Printable(logging.Formatter):
    """Removes credentials, and escapes characters that would act on the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The line without them."""
        return printable(super().format(record))


def configure_logging() -> None:
    """Times and messages of this project on stderr; of libraries, warnings only."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(asctime)s %(message)s", "%H:%M:%S"))
    project = logging.getLogger("census_scvi")
    project.handlers = [handler]
    project.setLevel(logging.INFO)
    project.propagate = False
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "cellxgene_census", "scvi"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Appended: PYTHONWARNINGS and tests, where these are errors, come first.
    warnings.filterwarnings("ignore", category=FutureWarning, append=True)  # of libraries, to who calls them
    # Genes are matched by their ids, which are checked.
    warnings.filterwarnings("ignore", "Variable names are not unique", UserWarning, append=True)


def _parser(stage: Stage, program: str | None, own: Any) -> Parser:
    settings = help_of_stage(Config, stage.name).replace("%", "%%") if own is None else own.EPILOG
    parser = Parser(
        prog=program or stage.script,
        description=stage.summary,
        epilog=f"{settings}\n\n{_EPILOG.format(example=getattr(own, 'EXAMPLE', _EXAMPLE))}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if own is not None:
        own.add_arguments(parser)
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
    return parser


def is_setting(argument: str) -> bool:
    """Whether an argument is `section.key=value`, and not the path of a file."""
    return _SETTING.match(argument) is not None


_SETTING = re.compile(r"\w+(\.[\w-]+)*=")


def read_config(arguments: argparse.Namespace) -> Config:
    """The config that the arguments name."""
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
    protocol = importlib.import_module("census_scvi.stages.protocol")  # a wrong setting is answered before it
    if arguments.dry_run:
        print(printable(protocol.plan_stage(stage.name, config).text(config)))
        return
    try:
        protocol.run_stage(stage.name, config, force=arguments.force)
    except Exception as error:
        error.add_note(f"{_IN_FOLDER}{config.directory}")
        raise


def _fail(message: str) -> int:
    print(f"error: {on_one_line(message)}", file=sys.stderr)
    return USER_ERROR


_IN_FOLDER = "run directory: "
_HDF5_FILE = re.compile(r"filename = '([^']*)'")


def _free_space(error: BaseException, cause: BaseException) -> str:
    """Free space for the file that could not be written, or in the run directory; and for temporary files."""
    notes = [note.removeprefix(_IN_FOLDER) for note in getattr(error, "__notes__", []) if note.startswith(_IN_FOLDER)]
    named = _HDF5_FILE.search(str(cause))
    file = getattr(cause, "filename", None) or (named[1] if named else None)
    place = Path(os.fsdecode(file)).parent if isinstance(file, str | bytes) else Path(notes[0] if notes else ".")
    folders = {folder.stat().st_dev: folder for folder in (Path(tempfile.gettempdir()), _existing(place.absolute()))}
    free = {folder: shutil.disk_usage(folder).free for folder in reversed(folders.values())}
    return ", ".join(f"{number / 1e6:,.1f} MB in {folder}" for folder, number in free.items())


def _existing(folder: Path) -> Path:
    """The folder, or the nearest existing one above it."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _storage_problem(error: BaseException) -> str | None:
    """A line for a full disk, a missing permission or a vanished file, anywhere in the chain of causes."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        number = getattr(seen, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text or "errno = 28" in text:
            return (
                f"the disk is full ({text.splitlines()[0]}; {_free_space(error, seen)} free): free some space or choose"
                " another output.directory, and run the same command again; nothing is lost"
            )
        if isinstance(seen, PermissionError):
            return f"{seen.filename or text}: no permission to write or read there"
        if isinstance(seen, OSError) and number == errno.EROFS:
            return f"{seen.filename or text}: the file system is read-only"
        seen = seen.__cause__ or seen.__context__
    return None
