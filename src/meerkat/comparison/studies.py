"""What a comparison compares: studies, each a grid of settings, from one TOML file. See docs/formats.md.

Any setting of a run may be given as a list: it is then an axis, and a study's settings are the product of its axes.
"""

import functools
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
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
    total_steps: int = Field(0, ge=1)
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


def with_studies(comparison: Comparison, names: Sequence[str]) -> Comparison:
    """A comparison with only some of its studies, in the file's order. Raises MeerkatError: it has no such study."""
    known = [study.name for study in comparison.studies]
    if unknown := [name for name in names if name not in known]:
        raise MeerkatError(f"--studies {','.join(names)}: no study is called '{unknown[0]}'; give {', '.join(known)}")
    return comparison.model_copy(update={"studies": [one for one in comparison.studies if one.name in names]})


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
    content = read_toml(file) if file else {}
    tables = content.pop("study", [{"name": "comparison"}])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise MeerkatError(f"config '{file}': studies are written [[study]], with two brackets")
    if quick and not any("quick" in settings for settings in (content, *tables)):
        raise MeerkatError("--quick: needs a file with a [quick] table, which says what the short form is")

    def study_of(table: Mapping[str, Any], quick: bool, given: Mapping[str, Any]) -> Study:
        layers = _of_studies(_with_quick(content, quick)), _with_quick(table, quick), _of_studies(given)
        return _study(functools.reduce(_override, layers))

    studies = [_with_claims(study_of(table, quick, given), full=study_of(table, False, {})) for table in tables]
    top = {**_with_quick(content, quick), **given}
    for_all = {name: top[name] for name in _FOR_ALL if name in top}
    comparison = validate(Comparison, {"studies": studies, **for_all}, f"config '{file}': " if file else "--")
    if len({study.name for study in studies}) < len(studies):
        raise MeerkatError(f"config '{file}': two studies have the same name; give each its own")
    configs = []
    for study in studies:
        for setting in study.settings():
            configs.append(config := study.config(setting, comparison.seeds[0]))
            if study.searches(setting) and config.held_back:
                raise MeerkatError(
                    f"study '{study.name}': held_back {config.held_back:g}: learning rates are chosen on held-back "
                    "rows, which runs must not be judged on as well; leave it out ('search' says how many), or give lr"
                )
    _check_none_idle(configs, given if given or quick else None, f"config '{file}': ")
    return comparison


def _check_none_idle(configs: Sequence[RunConfig], flags: Collection[str] | None, where: str) -> None:
    """Raise MeerkatError for a setting that no run uses.

    Args:
        flags: settings that were given beside the file, which may leave its own without use; None for the file alone.
        where: stands before what is said of the file.
    """
    idle = [config.idle() for config in configs]
    for name, line in {name: line for lines in idle for name, line in lines.items()}.items():
        default = RunConfig.model_fields[name].default
        used = any(
            getattr(config, name) != default for config, lines in zip(configs, idle, strict=True) if name not in lines
        )
        if not used and (flags is None or name in flags):
            raise MeerkatError(line if flags else where + line)


def _with_quick(settings: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """Settings with their `quick` table merged in, or dropped."""
    shorter = settings.get("quick", {})
    if not isinstance(shorter, dict):
        raise MeerkatError(f"quick {shorter!r}: must be a table of settings, such as [quick] with lines below it")
    plain = {name: value for name, value in settings.items() if name != "quick"}
    return _override(plain, shorter) if quick else plain


def _of_studies(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _FOR_ALL}


def _override(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Settings overridden by others; `rounds` and `total_steps` say the same thing, so that each overrides both."""
    lower, upper = with_names_of_today(lower), with_names_of_today(upper)
    dropped = "rounds" if "total_steps" in upper else "total_steps" if "rounds" in upper else None
    merged = {name: value for name, value in lower.items() if name != dropped} | upper
    if isinstance(lower.get("search"), dict) and isinstance(upper.get("search"), dict):
        merged["search"] = {**lower["search"], **upper["search"]}
    return merged


def _study(settings: Mapping[str, Any]) -> Study:
    named = {name: settings[name] for name in ("name", "title", "note", "check", "total_steps") if name in settings}
    of_runs = {name: value for name, value in settings.items() if name not in named}
    where = f"study '{named.get('name', '')}': "
    if misplaced := of_runs.keys() & {*_FOR_ALL}:
        raise MeerkatError(f"{where}'{misplaced.pop()}' is for all studies alike; give it at the top of the file")
    if "seed" in of_runs:
        raise MeerkatError(f"{where}takes 'seeds', a list at the top of the file, in place of 'seed'")
    if named.get("total_steps") and "rounds" in of_runs:
        raise MeerkatError(f"{where}rounds and total_steps are given, and one follows from the other; give one")
    axes = {name: _axis(name, value, where) for name, value in of_runs.items() if _is_axis(name, value)}
    if "problem" in axes:
        raise MeerkatError(f"{where}problem is no axis: problems have scores of their own; give each a study")
    if (count := math.prod(map(len, axes.values()))) > _MOST_SETTINGS:
        raise MeerkatError(f"{where}its axes make {count:,} settings: at most {_MOST_SETTINGS:,}; give fewer values")
    shared = {name: value for name, value in of_runs.items() if name not in axes}
    if "lr" in shared:
        shared["lr"] = _value("lr", shared["lr"], where)
    return validate(Study, {**named, "axes": axes, "shared": shared}, where)


def _is_axis(name: str, value: Any) -> bool:
    # parameters to exclude are a list themselves
    return isinstance(value, list) and (name != "exclude" or any(isinstance(part, list) for part in value))


def _value(name: str, value: Any, where: str) -> Any:
    """A setting's value as a run or, of a learning rate, as a study has it."""
    if name != "lr":
        return make_value(name, value, where)
    try:
        return SEARCH if value == SEARCH else make_value(name, value)
    except MeerkatError:
        raise MeerkatError(f"{where}lr {value}: must be search, auto or a number above 0") from None


def _axis(name: str, given: list[Any], where: str) -> list[Any]:
    """An axis' values as runs have them, so that 10 and "10" are the same."""
    values = [_value(name, value, where) for value in given]
    if not values:
        raise MeerkatError(f"{where}{name} []: needs at least one value")
    if repeated := [value for i, value in enumerate(values) if value in values[:i]]:
        raise MeerkatError(f"{where}{name}: {repeated[0]} stands there twice; give each value once")
    return values


def _with_claims(study: Study, full: Study) -> Study:
    """A study with its claims reduced to the values that it has; they may also name values of `full`, its long form.

    Raises:
        MeerkatError: a claim is about nothing that the study ever has.
    """
    known = {axis: list(values) for axis, values in full.axes.items()}
    for axis, values in study.axes.items():
        known.setdefault(axis, []).extend(value for value in values if value not in full.axes.get(axis, []))
    checks = []
    for given in study.check:
        check = _checked(given, known, f"study '{study.name}': check '{given.claim}': ")
        than = [value for value in check.than if value in study.axes.get(check.axis, [])]
        needed = [*((check.axis, value) for value in check.equal or [check.better]), *check.where.items()]
        if (check.equal or than) and all(value in study.axes.get(axis, []) for axis, value in needed):
            checks.append(check.model_copy(update={"than": than}))
        else:
            say(f"note: study '{study.name}': not checked, as its settings are left out: {check.claim}")
    return study.model_copy(update={"check": checks})


def _checked(given: Check, known: Mapping[str, list[Any]], where: str) -> Check:
    """A claim with its values as the axes have them."""

    def value_of(axis: str, value: Any) -> Any:
        if axis not in known:
            raise MeerkatError(f"{where}{axis} is no axis of the study, which has {', '.join(known) or 'none'}")
        if (valid := _value(axis, value, where)) not in known[axis]:
            raise MeerkatError(f"{where}{axis} {value!r} is not among the study's: {', '.join(map(str, known[axis]))}")
        return valid

    axis, others = OLDER_NAMES.get(given.axis, given.axis), with_names_of_today(given.where)
    if (given.better is None) == (not given.equal) or (given.better is None) != (not given.than):
        raise MeerkatError(f"{where}needs either better and than, or equal")
    if given.equal and len(given.equal) != 2:
        raise MeerkatError(f"{where}equal takes two values")
    if axis in others:
        raise MeerkatError(f"{where}where speaks of {axis}, which is the axis; give other axes")
    better = None if given.better is None else value_of(axis, given.better)
    than, equal = ([value_of(axis, value) for value in values] for values in (given.than, given.equal))
    others = {name: value_of(name, value) for name, value in others.items()}
    if better in than or (equal and equal[0] == equal[1]):
        raise MeerkatError(f"{where}compares a value with itself")
    return given.model_copy(update={"axis": axis, "better": better, "than": than, "equal": equal, "where": others})


def axis_words(setting: Setting) -> str:
    """A setting in words."""
    return ", ".join(f"{name} {value}" for name, value in spelled(setting).items()) or "all settings"


def spelled(setting: Setting) -> dict[str, Any]:
    """A setting's values as a table shows them; what is spelled already stays as it is."""
    values = dict(setting)
    if not isinstance(values.get("exclude", ""), str):
        values["exclude"] = ",".join(values["exclude"]) or "none"
    if "mask" in values:
        parts = Path(values["mask"]).parts
        of_a_run = parts[-1:] == ("mask.safetensors",)  # as runs call theirs
        values["mask"] = "/".join(parts[-2:] if of_a_run else parts[-1:])
    return values
