"""All settings of a run in one model: the source of TOML keys, flags, their help and their validation."""

import tomllib
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import create_model, model_validator

from meerkat.algorithm.attacks import attackers
from meerkat.algorithm.extreme_clients import EarlyStop
from meerkat.algorithm.robust import Aggregation
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
from meerkat.settings.validation import Settings, validate

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
        return Aggregation(
            self.aggregation, self.byzantine, self.mixing, self.clipping, self.clip_norm, self.missing_steps
        )

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
        """See `compatibility.idle`."""
        return compatibility.idle(self)

    def check_none_idle(self) -> None:
        """Raise MeerkatError for a setting of a new run that does nothing. What was run with one can still be read."""
        for line in self.idle().values():
            raise MeerkatError(line)

    def check_resolved(self, where: str, but: Collection[str] = ()) -> None:
        """Raise MeerkatError for a setting, except those of `but`, that says auto: a run that has begun has a value.

        `where` stands before the setting's name in the message.
        """
        needed = ["lr", "eps", "dtype", "server_lr", "threads", "tokens_per_pass"]
        needed += ["dp_noise_multiplier"] if self.dp != "none" else []
        for name in needed:
            if name not in but and getattr(self, name) == AUTO:
                what = "a type" if name == "dtype" else "a number"
                raise MeerkatError(f"{where}{name} auto: must be {what}, as this run has begun; restore it")

    def to_toml(self) -> str:
        """The settings as TOML."""
        return tomli_w.dumps(self.model_dump(mode="json"))


def with_names_of_today(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with older spellings of names replaced. Raises MeerkatError: one is given by both of its names."""
    for older, name in OLDER_NAMES.items():
        if older in given and name in given:
            raise MeerkatError(f"{older}: is an older name of {name}, which is given too; give only {name}")
    return {OLDER_NAMES.get(name, name): value for name, value in given.items()}


def make_config(given: Mapping[str, Any], where: str = "--") -> RunConfig:
    """Validate settings. See `validate`."""
    return validate(RunConfig, given, where)


def make_value(name: str, value: Any, where: str = "--") -> Any:
    """Validate one setting by itself, without what settings ask of each other. Returns it as a run has it.

    Raises:
        MeerkatError: an unknown setting, or a value out of range, in one line.
    """
    alone = _alone(name) if name in RunConfig.model_fields else RunConfig
    return getattr(validate(alone, {name: value}, where), name)


@cache
def _alone(name: str) -> type[Settings]:
    field = RunConfig.model_fields[name]
    fields: Any = {name: (field.annotation, field)}
    return create_model(name, __base__=Settings, **fields)


def may_be_auto(name: str) -> bool:
    """Whether a setting is a number or the word auto."""
    return Auto in get_args(RunConfig.model_fields[name].annotation)


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, not validated yet. Raises MeerkatError: no such file, or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MeerkatError(f"config '{path}': {error.strerror}; give a TOML file with settings") from None
    except (ValueError, RecursionError) as error:  # among them TOMLDecodeError, and numbers too long for Python
        raise MeerkatError(f"config '{path}': not valid TOML ({in_short(error)})") from None
