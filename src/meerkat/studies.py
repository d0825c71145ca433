"""What a comparison compares: studies, each a grid of settings, from one TOML file.

Any setting of a run may be given as a list: it is then an axis, and a study's settings are the product of
its axes. `seeds` repeats each. `total_steps` gives every setting the same number of local steps, as
total_steps / local_steps rounds.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meerkat.config import RunConfig, make_config, read_toml
from meerkat.errors import MeerkatError

Setting = Mapping[str, Any]
"""An axis' name -> one of its values."""


class Check(BaseModel):
    """A claim about a study, checked on differences between settings that agree in everything but one axis."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    claim: str = Field(description="the claim in words")
    axis: str
    better: Any = Field(None, description="the axis' value that is claimed to do better...")
    than: list[Any] = Field([], description="... than each of these")
    equal: list[Any] = Field([], description="or: two values that are claimed to do the same, the second the reference")
    where: dict[str, Any] = Field({}, description="values of other axes that the claim is about")
    measure: Literal["accuracy", "loss"] = "accuracy"


class Study(BaseModel):
    """One grid of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[\w.-]+$")
    title: str = ""
    note: str = ""
    axes: dict[str, list[Any]]
    shared: dict[str, Any]
    """Settings of all cells."""
    total_steps: int = Field(0, ge=0)
    check: list[Check] = []

    def settings(self) -> list[Setting]:
        """The product of the axes; the last varies fastest."""
        return [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]

    def config(self, setting: Setting, seed: int) -> RunConfig:
        """The run of one setting and seed.

        Raises:
            MeerkatError: its settings are no run's.
        """
        given = {**self.shared, **setting, "seed": seed}
        if self.total_steps:
            steps = given.get("local_steps", 1)
            if isinstance(steps, int) and (steps < 1 or self.total_steps % steps):
                raise MeerkatError(
                    f"study '{self.name}': total_steps {self.total_steps} is no multiple of local_steps {steps}"
                )
            given["rounds"] = self.total_steps // steps
            given.setdefault("eval_every", max(1, given["rounds"] // 10))  # ten points of a curve, whatever T is
        return make_config(given, spell=f"study '{self.name}': ")


class Search(BaseModel):
    """How each setting's learning rate is found: by the same rule for all, on held-back training rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    held_back: float = Field(0.2, gt=0, lt=1, description="share of the training rows that rates are judged on")
    rounds: float = Field(0.5, gt=0, le=1, description="length of a trial run, as a share of the setting's rounds")
    factor: float = Field(2.0, gt=1, description="between neighbouring rates")
    trials: int = Field(7, ge=3, description="rates tried for one setting, at most")


class Comparison(BaseModel):
    """All studies of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = "Comparison"
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    search: Search = Field(default_factory=lambda: Search.model_validate({}))
    studies: list[Study] = Field(min_length=1)


def read_comparison(file: Path | None, given: Mapping[str, Any], quick: bool = False) -> Comparison:
    """A comparison from a TOML file, and from settings that override it.

    Args:
        file: top-level keys are `title`, `seeds`, `search`, `total_steps` and any setting; each `[[study]]` has
            `name`, `title`, `note`, `check`, and settings of its own. Without `[[study]]` there is one.
        given: settings that override those of every study; lists are axes.
        quick: merge in the file's `[quick]` table, and each study's, which make a short form of it.

    Raises:
        MeerkatError: no such file, or it describes no comparison.
    """
    held = read_toml(file) if file else {}
    held = _merged(held, quick)
    own = {name: held.pop(name) for name in ("title", "seeds", "search") if name in held}
    listed = held.pop("study", None) or [{"name": "comparison"}]
    if not isinstance(listed, list):
        raise MeerkatError(f"config '{file}': studies are written [[study]], with two brackets")
    if "seeds" in given:
        own["seeds"] = given["seeds"]
    overrides = {name: value for name, value in given.items() if name != "seeds"}
    try:
        studies = [_study({**held, **_merged(study, quick), **overrides}) for study in listed]
        if quick or overrides:  # a shorter study may have lost values that a claim is about
            studies = [study.model_copy(update={"check": _still_checked(study)}) for study in studies]
        found = Comparison(studies=studies, **own)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MeerkatError(f"config '{file or 'of the command line'}': {where}: {first['msg']}") from None
    names = [study.name for study in found.studies]
    if len(set(names)) < len(names):
        raise MeerkatError(f"config '{file}': two studies have the same name; give each its own")
    for study in found.studies:
        for setting in study.settings():
            study.config(setting, found.seeds[0])
        for check in study.check:
            _check_values(study, check)
    return found


def _merged(held: dict[str, Any], quick: bool) -> dict[str, Any]:
    shorter = held.pop("quick", {})
    return {**held, **shorter} if quick else held


def _study(held: dict[str, Any]) -> Study:
    own = {name: held.pop(name) for name in ("name", "title", "note", "check", "total_steps") if name in held}
    if "seed" in held:
        raise MeerkatError(f"study '{own.get('name')}': takes 'seeds', a list, in place of 'seed'")
    axes = {name: value for name, value in held.items() if isinstance(value, list) and name != "exclude"}
    for name, values in axes.items():
        if not values or name not in RunConfig.model_fields:
            make_config({name: values}, spell=f"study '{own.get('name')}': ")
    shared = {name: value for name, value in held.items() if name not in axes}
    return Study(axes=axes, shared=shared, **own)


def _still_checked(study: Study) -> list[Check]:
    """A study's claims, about those values that it has."""
    kept = []
    for check in study.check:
        have = study.axes.get(check.axis, [])
        than = [value for value in check.than if value in have]
        whole = all(value in have for value in check.equal) and all(
            value in study.axes.get(axis, []) for axis, value in check.where.items()
        )
        if whole and (check.equal or (check.better in have and than)):
            kept.append(check.model_copy(update={"than": than}))
    return kept


def _check_values(study: Study, check: Check) -> None:
    """Raise MeerkatError unless a check speaks of values that the study has."""
    if (check.better is None) == (not check.equal) or (check.better is not None and not check.than):
        raise MeerkatError(f"study '{study.name}': check '{check.claim}' needs either better and than, or equal")
    if check.equal and len(check.equal) != 2:
        raise MeerkatError(f"study '{study.name}': check '{check.claim}': equal takes two values")
    values = [*([check.better] if check.better is not None else []), *check.than, *check.equal]
    for axis, value in [*((check.axis, v) for v in values), *check.where.items()]:
        if value not in study.axes.get(axis, []):
            raise MeerkatError(
                f"study '{study.name}': check '{check.claim}' speaks of {axis} {value!r}, which is not among the "
                f"study's: {', '.join(map(str, study.axes.get(axis, [])))}"
            )


def axis_words(setting: Setting) -> str:
    """A setting in words."""
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "all settings"
