"""The command line: its commands, and what becomes of their errors."""

import errno
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import entry_points

from meerkat import __version__
from meerkat.cli import outcomes, runs, sites
from meerkat.cli.parser import Command, Parser, add_list
from meerkat.errors import MeerkatError, RunFailed, is_utf8

ENTRY_POINTS = "meerkat.extensions"
"""The group of entry points by which installed packages name extensions."""

WITHOUT_EXTENSIONS = ("certify", "keygen", "doctor")
"""Commands for which nothing that an extension defines matters."""

COMMANDS: tuple[Command, ...] = (*runs.COMMANDS, *outcomes.COMMANDS, *sites.COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0, 1 for a run that failed, 2 for bad arguments."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    for argument in sys.argv[1:] if argv is None else argv:
        if not is_utf8(argument):
            print(f"meerkat: argument {argument!r:.80}: must be UTF-8; rename it", file=sys.stderr)
            return 2
    arguments = build_parser().parse_args(argv)
    status, message = 0, ""
    try:
        if arguments.extension or (arguments.command not in WITHOUT_EXTENSIONS and entry_points(group=ENTRY_POINTS)):
            from meerkat.extensions import load

            load(arguments.extension)
        arguments.run(arguments)
    except MeerkatError as error:
        status, message = 1 if isinstance(error, RunFailed) else 2, str(error)
    except OSError as error:
        status = 2 if error.errno == errno.ENAMETOOLONG else 1
        message = f"{error.filename or 'input or output'}: {error.strerror or error}"
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("cryptography"):
            raise
        cure = "pip install 'meerkat-fl[flower]'"
        status, message = 2, f"{arguments.command}: needs the 'cryptography' package; {cure}"
    except KeyboardInterrupt:
        status, message = 130, f"interrupted{_what_is_safe(arguments)}"
    if message:
        print(f"meerkat: {message}", file=sys.stderr)
    return status


def _what_is_safe(arguments: Namespace) -> str:
    """What an interrupted command leaves, where it begins something that can be continued."""
    if not hasattr(arguments, "safe"):
        return ""
    begun, cure = arguments.safe
    return f"; what was logged is safe: {cure}" if begun.exists() else "; nothing was begun"


def build_parser() -> Parser:
    """The parser of all commands. It needs neither torch nor any other heavy package."""
    parser = Parser(prog="meerkat", description="Sparse zeroth-order federated fine-tuning of language models.")
    parser.add_argument("--version", action="version", version=f"meerkat {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        made = commands.add_parser(command.name, help=command.about, description=command.about, allow_abbrev=False)
        made.set_defaults(run=command.run, extension=[])
        about = "print one JSON object on standard output, and nothing else there"
        made.add_argument("--json", action="store_true", help=about)
        command.add_arguments(made)
        if command.name not in WITHOUT_EXTENSIONS:
            about = "an extension, whose estimators, update rules, problems and partitions may then be named"
            add_list(made, "--extension", "MODULE|FILE.py", f"{about}; see docs/extending.md")
    return parser
