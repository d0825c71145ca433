"""The command line: its commands, and what becomes of their errors."""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from meerkat import __version__
from meerkat.cli import outcomes, runs, sites
from meerkat.cli.parser import Command, Parser
from meerkat.errors import MeerkatError, RunFailed

ENTRY_POINTS = "meerkat.extensions"
"""The group of entry points by which installed packages name extensions."""

WITHOUT_EXTENSIONS = ("certify", "keygen", "doctor")
"""Commands for which nothing that an extension defines matters."""

COMMANDS: tuple[Command, ...] = (*runs.COMMANDS, *outcomes.COMMANDS, *sites.COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0, 1 for a run that failed, 2 for bad arguments."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.extension or (arguments.command not in WITHOUT_EXTENSIONS and entry_points(group=ENTRY_POINTS)):
            from meerkat.extensions import load

            load(arguments.extension)
        arguments.run(arguments)
    except RunFailed as error:
        print(f"meerkat: {error}", file=sys.stderr)
        return 1
    except MeerkatError as error:
        print(f"meerkat: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"meerkat: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        cure = getattr(arguments, "cure", "'meerkat resume' continues the run")
        print(f"meerkat: interrupted; what was logged is safe: {cure}", file=sys.stderr)
        return 130
    return 0


def build_parser() -> Parser:
    """The parser of all commands. It needs neither torch nor any other heavy package."""
    parser = Parser(prog="meerkat", description="Sparse zeroth-order federated fine-tuning of language models.")
    parser.add_argument("--version", action="version", version=f"meerkat {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        made = commands.add_parser(command.name, help=command.about, description=command.about, allow_abbrev=False)
        made.set_defaults(run=command.run, extension=[])
        made.add_argument(
            "--json", action="store_true", help="print one JSON object on standard output, and nothing else there"
        )
        command.add_arguments(made)
        if command.name not in WITHOUT_EXTENSIONS:
            made.add_argument(
                "--extension",
                action="append",
                default=[],
                metavar="MODULE|FILE.py",
                help="an extension, whose estimators, update rules, problems and partitions may then be named; may be "
                "given again; see docs/extending.md",
            )
    return parser
