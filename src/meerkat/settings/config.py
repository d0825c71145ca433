"""All settings of a run in one model: the source of TOML keys, flags, their help and their validation."""

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import tomli_w
from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator

from meerkat.algorithm.attacks import attackers
from meerkat.algorithm.robust import Aggregation
from meerkat.algorithm.selection import EarlyStop
from meerkat.errors import MeerkatError, in_short
from meerkat.settings import compatibility
from meerkat.settings.auto import AUTO, Auto
from meerkat.settings.compatibility import SITES as SITES
from meerkat.settings.groups import CLASSIFICATION as CLASSIFICATION
from meerkat.settings.groups import EMBEDDED as EMBEDDED
from meerkat.settings.groups import (
    CalibrationSettings,
    FederationSettings,
    MachineSettings,
    MethodSettings,
    ModelAndData,
    PrivacySettings,
    RobustnessSettings,
)
from meerkat.settings.methods import METHODS, Recipe

OLDER_NAMES = {"server_optimizer": "update_rule"}
"""Older spellings of settings, which files and flags may still use."""


class RunConfig(  # pydantic takes the fields of the last base first
    MachineSettings,
    CalibrationSettings,
    RobustnessSettings,
    PrivacySettings,
    FederationSettings,
    MethodSettings,
    ModelAndData,
):
    """Settings of one run. Left out, a setting takes the default that its help names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, given: Any) -> Any:
        return with_names_of_today(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _together(self) -> "RunConfig":
        compatibility.check(self)
        return self

    @property
    def rule(self) -> Aggregation:
        """How replies become one."""
        return Aggregation(self.aggregation, self.byzantine, self.mixing, self.clipping, self.clip_norm)

    @property
    def recipe(self) -> Recipe:
        """What the method's name stands for."""
        return METHODS[self.method]

    @property
    def stopping(self) -> EarlyStop:
        """Who stops early: as set, or as the method has it."""
        return self.recipe.early_stop if self.early_stop == "by-method" else self.early_stop

    @property
    def attacking_clients(self) -> tuple[int, ...]:
        """The clients that attack, ascending; none where there is no attack."""
        return () if self.attack == "none" else attackers(self.attackers, self.clients, self.seed)

    def idle(self) -> dict[str, str]:
        """Settings that are not at their defaults and do nothing beside the others, each with a line that says so."""
        return compatibility.idle(self)

    def check_none_idle(self) -> None:
        """Raise MeerkatError for a setting of a new run that does nothing. What was run with one can still be read."""
        for line in self.idle().values():
            raise MeerkatError(line)

    def check_resolved(self, spell: str, but: Collection[str] = ()) -> None:
        """Raise MeerkatError for a setting that says auto where a run that has begun needs a number.

        Args:
            spell: what stands before a setting's name in the message.
            but: settings that may say auto.
        """
        needed = ["lr", "eps", "server_lr", "threads", "tokens_per_pass"]
        needed += ["dp_noise_multiplier"] if self.dp != "none" else []
        for name in needed:
            if name not in but and getattr(self, name) == AUTO:
                raise MeerkatError(f"{spell}{name} auto: must be a number, as this run has begun; restore it")

    def to_toml(self) -> str:
        """The settings as TOML."""
        return tomli_w.dumps(self.model_dump(mode="json"))


def with_names_of_today(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with older spellings of their names replaced.

    Raises:
        MeerkatError: a setting is given by both of its names.
    """
    for older, name in OLDER_NAMES.items():
        if older in given and name in given:
            raise MeerkatError(f"{older}: is an older name of {name}, which is given too; give {name} alone")
    return {OLDER_NAMES.get(name, name): value for name, value in given.items()}


def make_config(given: Mapping[str, Any], spell: str = "--") -> RunConfig:
    """Validate settings.

    Args:
        spell: what stands before a setting's name in a message: "--" for flags.

    Raises:
        MeerkatError: an unknown setting, or a value out of range; the first one, in one line.
    """
    try:
        return RunConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise MeerkatError(str(first["msg"]).removeprefix("Value error, ")) from None
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise _unknown(name) from None
        raise _refused(name, first["input"], first["msg"], spell) from None


def make_value(name: str, value: Any, spell: str = "--") -> Any:
    """Validate one setting by itself, without what settings ask of each other. Returns it as a run holds it.

    Raises:
        MeerkatError: an unknown setting, or a value out of range, in one line.
    """
    field = RunConfig.model_fields.get(name)
    if field is None:
        raise _unknown(name)
    alone: Any = Annotated[field.annotation, field]
    try:
        return TypeAdapter(alone).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise _refused(name, first["input"], first["msg"], spell) from None


def may_be_auto(name: str) -> bool:
    """Whether a setting is a number or the word auto."""
    return Auto in get_args(RunConfig.model_fields[name].annotation)


def _unknown(name: str) -> MeerkatError:
    return MeerkatError(f"setting '{name}': unknown; must be one of {', '.join(RunConfig.model_fields)}")


def _refused(name: str, value: Any, reason: str, spell: str) -> MeerkatError:
    flag = spell + (name.replace("_", "-") if spell == "--" else name)
    reason = reason.removeprefix("Input should be ").removeprefix("Value error, ")
    reason = reason.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    if may_be_auto(name):
        reason += ", or auto, which chooses one"
    return MeerkatError(f"{flag} {value}: must be {reason}; see 'meerkat simulate --help'")


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, not validated yet.

    Raises:
        MeerkatError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MeerkatError(f"config '{path}': {error.strerror}; give a TOML file with settings") from None
    except (ValueError, RecursionError) as error:  # among them TOMLDecodeError, and numbers too long for Python
        raise MeerkatError(f"config '{path}': not valid TOML ({in_short(error)})") from None
