"""What the commands share: one-line errors, the settings of a run as flags, in their groups, and what they print."""

import argparse
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from meerkat.settings.auto import AUTO
from meerkat.settings.config import OLDER_NAMES, RunConfig, may_be_auto
from meerkat.settings.groups import GROUPS

FIRST = ("model", "task", "data", "text", "method", "clients", "partition", "rounds", "local_steps")
"""The settings that matter most: with the folder of the run, the ten that `--help` begins with."""
FIRST_TITLE = "the settings that matter most"

_EXTENSIBLE = ("problem", "estimator", "update_rule")
"""Settings that name something built in, or an extension's."""

_LONGEST_VALUE = 60
"""Characters of the choices that stand beside a flag; more of them stand in its help."""


@dataclass(frozen=True)
class Command:
    """One command of `meerkat`."""

    name: str
    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and that takes -1e-5 for a value, but nothing empty, except for a setting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-[\d.]")  # -1e-5 too is a value, and no flag

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        is_setting = action.default is argparse.SUPPRESS  # such as --mask "", which overrides a file's mask
        if not arg_string and not is_setting and action.nargs != argparse.PARSER:  # that has a parser of its own
            raise argparse.ArgumentError(action, "is empty; give a value, or leave it out")
        return super()._get_value(action, arg_string)

    def error(self, message: str) -> Any:
        """Exit with status 2, and one line."""
        self.exit(2, f"{self.prog}: error: {message}; see '{self.prog} --help'\n")


def show(arguments: argparse.Namespace, outcome: Mapping[str, Any], *lines: str) -> None:
    """Print a command's outcome: as one JSON object with --json, otherwise as lines."""
    print(json.dumps(outcome) if arguments.json else "\n".join(lines))


def run_argument(parser: argparse.ArgumentParser) -> None:
    """Add the folder of a run."""
    parser.add_argument("folder", metavar="RUN", type=Path, help="the run's folder")


def add_list(parser: argparse.ArgumentParser, flag: str, value: str, about: str, required: bool = False) -> None:
    """Add a flag that may be given several times."""
    about = f"{about}; may be given again"
    parser.add_argument(flag, action="append", default=[], metavar=value, help=about, required=required)


def add_run_settings(parser: argparse.ArgumentParser, but: Collection[str] = ()) -> argparse._ArgumentGroup:
    """Add a flag for every setting of a run but some, in groups. Returns the first, of those that matter most."""
    first = parser.add_argument_group(FIRST_TITLE)
    add_settings(first, (name for name in FIRST if name not in but))
    for title, group in GROUPS.items():
        rest = [name for name in group.model_fields if name not in (*FIRST, *but)]
        add_settings(parser.add_argument_group(title, group.__doc__), rest)
    return first


def add_settings(parser: argparse._ActionsContainer, names: Iterable[str]) -> None:
    """Add a flag for each of these settings of a run; their older names serve too, and are not shown."""
    for name in names:
        field = RunConfig.model_fields[name]
        value, about = _value_of(name, field), field.description or ""
        if len(value) > _LONGEST_VALUE:
            value, about = "NAME", f"{about}: {value.replace('|', ', ')}"
        if field.default != "" and "[default" not in about:
            shown = f"{field.default:g}" if isinstance(field.default, float) else field.default
            about += f" [default: {shown}]"
        parser.add_argument(_flag(name), dest=name, default=argparse.SUPPRESS, metavar=value, help=about)
        for older in (older for older, today in OLDER_NAMES.items() if today == name):
            parser.add_argument(_flag(older), dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value_of(name: str, field: FieldInfo) -> str:
    """What stands for a setting's value in the help."""
    if may_be_auto(name):
        return f"{'N' if name in ('threads', 'tokens_per_pass') else 'X'}|{AUTO}"
    if isinstance(field.default, str) and (choices := get_args(field.annotation)):
        return "|".join(map(str, choices))
    if name in _EXTENSIBLE:
        return "NAME"
    return {int: "N", float: "X"}.get(type(field.default), name.upper())


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of a run that flags gave, as text."""
    return {name: value for name, value in vars(arguments).items() if name in RunConfig.model_fields}
