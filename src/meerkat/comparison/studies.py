"""What a comparison compares: studies, each a grid of settings, from one TOML file.

Any setting of a run may be given as a list: it is then an axis, and a study's settings are the product of
its axes; `exclude`, a list itself, is one as a list of lists. `lr` is `search` where it is not given. `seeds` repeats
each setting. `total_steps`, in place of `rounds`, gives every setting the same number of local steps, as
total_steps / local_steps rounds.
"""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from meerkat.errors import MeerkatError
from meerkat.progress import say
from meerkat.settings.auto import AUTO
from meerkat.settings.config import OLDER_NAMES, RunConfig, make_config, make_value, read_toml, with_names_of_today
from meerkat.settings.validation import Settings, validate

_FOR_ALL = ("title", "seeds", "search")
"""What stands at the top of a file, for all studies alike."""

_MOST_SETTINGS = 10_000
"""Of one study: each is at least one run."""

SEARCH = "search"
"""What `lr` is in a comparison, unless it is `auto` or a number: the best rate is searched for."""

Setting = Mapping[str, Any]
"""An axis' name -> one of its values."""


class Check(Settings):
    """A claim about a study, checked on differences between settings that agree in everything but one axis."""

    claim: str = Field(description="the claim in words")
    axis: str
    better: Any = Field(None, description="the axis' value that is claimed to do better...")
    than: list[Any] = Field([], description="... than each of these")
    equal: list[Any] = Field([], description="or: two values that are claimed to do the same, the second the reference")
    where: dict[str, Any] = Field({}, description="values of other axes that the claim is about")
    measure: str = Field("", description="a score's name; empty for the problem's first, such as accuracy")


class Study(Settings):
    """One grid of settings."""

    name: str = Field(pattern=r"^[\w.-]+$")
    title: str = ""
    note: str = ""
    axes: dict[str, list[Any]]
    shared: dict[str, Any]
    """Settings of all cells."""
    total_steps: int = Field(0, ge=0)
    check: list[Check] = Field([])

    def settings(self) -> list[Setting]:
        """The product of the axes; the last varies fastest."""
        return [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]

    def searches(self, setting: Setting) -> bool:
        """Whether a setting's learning rate is searched for."""
        return bool({"lr": SEARCH, **self.shared, **setting}["lr"] == SEARCH)

    def config(self, setting: Setting, seed: int) -> RunConfig:
        """The run of one setting and seed, its learning rate `auto` where it is searched for.

        Raises:
            MeerkatError: its settings are no run's.
        """
        given = {**self.shared, **setting, "seed": seed}
        if self.searches(setting):
            given["lr"] = AUTO
        config = make_config(given, where=f"study '{self.name}': ")
        if not self.total_steps:
            return config
        rounds, rest = divmod(self.total_steps, config.local_steps)
        if rest:
            raise MeerkatError(
                f"study '{self.name}': total_steps {self.total_steps}: must be a multiple of every local_steps, "
                f"such as {config.local_steps}"
            )
        ten_points = config.eval_every if "eval_every" in given else max(1, rounds // 10)  # whatever T is
        return config.model_copy(update={"rounds": rounds, "eval_every": ten_points})


class Search(Settings):
    """How each setting's learning rate is found: by the same rule for all, on held-back training rows."""

    held_back: float = Field(0.2, gt=0, lt=1, description="share of the training rows that rates are judged on")
    rounds: float = Field(1.0, gt=0, le=1, description="length of a trial run, as a share of the setting's rounds")
    factor: float = Field(2.0, gt=1, description="between neighbouring rates")
    trials: int = Field(7, ge=3, description="rates tried for one setting, at most")


class Comparison(Settings):
    """All studies of one file."""

    title: str = "Comparison"
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1)
    search: Search = Field(default_factory=lambda: Search.model_validate({}))
    studies: list[Study] = Field(min_length=1)

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("each seed may stand there once; a run repeated adds nothing")
        return seeds


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
    listed = held.pop("study", [{"name": "comparison"}])
    if not isinstance(listed, list) or not all(isinstance(study, dict) for study in listed):
        raise MeerkatError(f"config '{file}': studies are written [[study]], with two brackets")
    if quick and not any("quick" in settings for settings in (held, *listed)):
        raise MeerkatError("--quick: needs a file with a [quick] table, which says what the short form is")
    own = {name: value for name, value in _merged(held, quick).items() if name in _FOR_ALL}
    own |= {name: value for name, value in given.items() if name in _FOR_ALL}
    overrides = {name: value for name, value in given.items() if name not in _FOR_ALL}

    def layered(study: Mapping[str, Any], quick: bool, overrides: Mapping[str, Any]) -> Study:
        shared = {name: value for name, value in _merged(held, quick).items() if name not in _FOR_ALL}
        return _study(_over(_over(shared, _merged(study, quick)), overrides))

    studies = [_claiming(layered(study, quick, overrides), layered(study, False, {})) for study in listed]
    found = validate(Comparison, {"studies": studies, **own}, f"config '{file}': " if file else "--")
    names = [study.name for study in found.studies]
    if len(set(names)) < len(names):
        raise MeerkatError(f"config '{file}': two studies have the same name; give each its own")
    for study in found.studies:
        for setting in study.settings():
            config = study.config(setting, found.seeds[0])
            if study.searches(setting) and config.held_back:
                raise MeerkatError(
                    f"study '{study.name}': held_back {config.held_back:g}: learning rates are chosen on held-back "
                    "rows, which runs must not be judged on as well; leave it out ('search' says how many), or give lr"
                )
    return found


def _merged(held: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """Settings with their `quick` table merged in, or dropped."""
    shorter = held.get("quick", {})
    if not isinstance(shorter, dict):
        raise MeerkatError(f"quick {shorter!r}: must be a table of settings, such as [quick] with lines below it")
    plain = {name: value for name, value in held.items() if name != "quick"}
    return _over(plain, shorter) if quick else plain


def _over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Settings overridden by others; `rounds` and `total_steps` say the same thing, so that each overrides both."""
    lower, upper = with_names_of_today(lower), with_names_of_today(upper)
    gone = {"rounds"} if upper.get("total_steps") else {"total_steps"} if "rounds" in upper else set()
    merged = {**{name: value for name, value in lower.items() if name not in gone}, **upper}
    if isinstance(lower.get("search"), dict) and isinstance(upper.get("search"), dict):
        merged["search"] = {**lower["search"], **upper["search"]}
    return merged


def _study(held: dict[str, Any]) -> Study:
    named = ("name", "title", "note", "check", "total_steps")
    own: dict[str, Any] = {name: held.pop(name) for name in named if name in held}
    spell = f"study '{own.get('name', '')}': "
    if "seed" in held:
        raise MeerkatError(f"{spell}takes 'seeds', a list at the top of the file, in place of 'seed'")
    if misplaced := held.keys() & {*_FOR_ALL}:
        raise MeerkatError(f"{spell}'{misplaced.pop()}' is for all studies alike; give it at the top of the file")
    if own.get("total_steps") and "rounds" in held:
        raise MeerkatError(f"{spell}rounds and total_steps are given, and one follows from the other; give one")
    axes = {name: _axis(name, value, spell) for name, value in held.items() if _is_axis(name, value)}
    if "problem" in axes:
        raise MeerkatError(f"{spell}problem is no axis: problems have scores of their own; give each a study")
    if (count := math.prod(map(len, axes.values()))) > _MOST_SETTINGS:
        raise MeerkatError(f"{spell}its axes make {count:,} settings: at most {_MOST_SETTINGS:,}; give fewer values")
    shared = {name: value for name, value in held.items() if name not in axes}
    shared |= {"lr": _value("lr", shared["lr"], spell)} if "lr" in shared else {}
    return validate(Study, {"axes": axes, "shared": shared, **own}, spell)


def _is_axis(name: str, value: Any) -> bool:
    # parameters to exclude are a list themselves
    return isinstance(value, list) and (name != "exclude" or any(isinstance(part, list) for part in value))


def _value(name: str, value: Any, spell: str) -> Any:
    """A setting's value as a run or, of a learning rate, as a study holds it."""
    if name != "lr":
        return make_value(name, value, spell)
    try:
        return SEARCH if value == SEARCH else make_value(name, value)
    except MeerkatError:
        raise MeerkatError(f"{spell}lr {value}: must be search, auto or a number above 0") from None


def _axis(name: str, values: list[Any], spell: str) -> list[Any]:
    """An axis' values as runs hold them, so that 10 and "10" are the same."""
    found = [_value(name, value, spell) for value in values]
    if not found:
        raise MeerkatError(f"{spell}{name} []: needs at least one value")
    if twice := [value for i, value in enumerate(found) if value in found[:i]]:
        raise MeerkatError(f"{spell}{name}: {twice[0]} stands there twice; give each value once")
    return found


def _claiming(study: Study, full: Study) -> Study:
    """A study with its claims about those values that it has, of those that it has in `full`, its long form.

    Raises:
        MeerkatError: a claim is about nothing that the study ever has.
    """
    known = {name: list(values) for name, values in full.axes.items()}
    for name, values in study.axes.items():
        known.setdefault(name, []).extend(value for value in values if value not in full.axes.get(name, []))
    kept = []
    for check in study.check:
        still = _still_checked(study, _settled(check, known, f"study '{study.name}': check '{check.claim}'"))
        if still is None:
            say(f"note: study '{study.name}': not checked, as its settings are left out: {check.claim}")
        else:
            kept.append(still)
    return study.model_copy(update={"check": kept})


def _settled(check: Check, known: Mapping[str, list[Any]], spell: str) -> Check:
    """A claim with its values as the axes hold them."""

    def value_of(axis: str, value: Any) -> Any:
        if axis not in known:
            raise MeerkatError(f"{spell}: {axis} is no axis of the study, which has {', '.join(known) or 'none'}")
        found = _value(axis, value, f"{spell}: ")
        if found not in known[axis]:
            raise MeerkatError(
                f"{spell}: {axis} {value!r} is not among the study's: {', '.join(map(str, known[axis]))}"
            )
        return found

    axis, where = OLDER_NAMES.get(check.axis, check.axis), with_names_of_today(check.where)
    check = check.model_copy(update={"axis": axis, "where": where})
    if (check.better is None) == (not check.equal) or (check.better is None) != (not check.than):
        raise MeerkatError(f"{spell}: needs either better and than, or equal")
    if check.equal and len(check.equal) != 2:
        raise MeerkatError(f"{spell}: equal takes two values")
    if check.axis in check.where:
        raise MeerkatError(f"{spell}: where speaks of {check.axis}, which is the axis; give other axes")
    found = check.model_copy(
        update={
            "better": None if check.better is None else value_of(check.axis, check.better),
            "than": [value_of(check.axis, value) for value in check.than],
            "equal": [value_of(check.axis, value) for value in check.equal],
            "where": {axis: value_of(axis, value) for axis, value in check.where.items()},
        }
    )
    if found.better in found.than or (found.equal and found.equal[0] == found.equal[1]):
        raise MeerkatError(f"{spell}: compares a value with itself")
    return found


def _still_checked(study: Study, check: Check) -> Check | None:
    """A claim about those values that a study has; None where nothing is left of it."""
    have = study.axes.get(check.axis, [])
    than = [value for value in check.than if value in have]
    whole = all(value in have for value in check.equal) and all(
        value in study.axes.get(axis, []) for axis, value in check.where.items()
    )
    return (
        check.model_copy(update={"than": than}) if whole and (check.equal or (check.better in have and than)) else None
    )


def axis_words(setting: Setting) -> str:
    """A setting in words."""
    return ", ".join(f"{name} {value}" for name, value in spelled(setting).items()) or "all settings"


def spelled(setting: Setting) -> dict[str, Any]:
    """A setting's values as a table shows them."""
    return {name: _word(name, value) for name, value in setting.items()}


def _word(axis: str, value: Any) -> Any:
    if axis == "exclude":
        return ",".join(value) or "none"
    return Path(value).name if axis == "mask" else value
