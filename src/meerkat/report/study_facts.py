"""What a comparison's folder tells: its studies from compare.json, and the curves from its run folders."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from meerkat.errors import MeerkatError, RunFailed
from meerkat.record.run_folder import RunFolder

FILE = "compare.json"
FORMAT = 2
SYMBOLS = {"local_steps": "T", "density": "u", "directions": "P", "clients": "K", "lr": "eta"}


@dataclass(frozen=True)
class Study:
    """One study of a comparison: settings along some axes, each run at some seeds."""

    root: Path
    """The comparison's folder."""
    held: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What its figures' files are called by."""
        return "".join(c if c.isalnum() or c in "-_." else "-" for c in str(self.held["name"])) or "study"

    @property
    def axes(self) -> Mapping[str, Sequence[Any]]:
        """What is varied, and the values."""
        axes: Mapping[str, Sequence[Any]] = self.held["axes"]
        return axes

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One a setting."""
        rows: Sequence[Mapping[str, Any]] = self.held["rows"]
        return rows

    @cached_property
    def panels(self) -> list[tuple[str, list[Mapping[str, Any]]]]:
        """The rows by the first axis where there are more; else all together, under no name."""
        if len(self.axes) < 2:
            return [("", list(self.rows))]
        first = next(iter(self.axes))
        found = [
            (value_words(first, value), [row for row in self.rows if row["setting"].get(first) == value])
            for value in self.axes[first]
        ]
        return [(name, rows) for name, rows in found if rows]

    @cached_property
    def accuracies(self) -> tuple[float, float] | None:
        """The lowest and the highest accuracy of all curves, so that panels can share a scale; None without curves."""
        found = [held[1] for row in self.rows if (held := self.curves(row, "accuracy")) is not None]
        if not found:
            return None
        return min(float(np.nanmin(one)) for one in found), max(float(np.nanmax(one)) for one in found)

    def within(self, row: Mapping[str, Any]) -> str:
        """A row's setting in words, beside the others of its panel."""
        names = list(self.axes)[1:] if len(self.axes) > 1 else list(self.axes)
        return setting_words({name: row["setting"][name] for name in names if name in row["setting"]})

    def curves(self, row: Mapping[str, Any], what: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Accuracy or loss over local steps: (steps [S], values [seeds, S]; nan where a seed has none).

        None where none of its run folders is there.
        """
        found = []
        for run in row.get("runs", []):
            folder = RunFolder(self.root / run)
            judged = [m for m in folder.metrics() if m["kind"] == "evaluation"]
            if judged:
                found.append({m["round"] * row["local_steps"]: float(m[what]) for m in judged})
        if not found:
            return None
        steps = sorted(set().union(*found))
        return np.array(steps), np.array([[one.get(step, np.nan) for step in steps] for one in found])


def read_studies(root: Path) -> tuple[Mapping[str, Any], list[Study]]:
    """A comparison's file and its studies.

    Raises:
        MeerkatError: there is no comparison in the folder, or one of another format.
        RunFailed: its file is damaged.
    """
    path = root / FILE
    if not path.is_file():
        raise MeerkatError(f"comparison '{root}': no {FILE} in it; give a folder that 'meerkat compare' wrote")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["format"] != FORMAT:
            raise MeerkatError(
                f"{path}: format {held['format']!r} is not known, only {FORMAT}; use the version that wrote it"
            )
        return held, [Study(root, study) for study in held["studies"]]
    except (KeyError, TypeError, ValueError) as error:
        raise RunFailed(f"{path}: damaged ({error}); make it again with 'meerkat compare'") from None


def value_words(axis: str, value: Any) -> str:
    """One value of an axis in words: "T = 10", "u = 0.001", "iid"."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Path(str(value)).name if axis == "mask" else str(value)
    return (
        f"{SYMBOLS.get(axis, axis)} = {value:,}" if isinstance(value, int) else f"{SYMBOLS.get(axis, axis)} = {value:g}"
    )


def setting_words(setting: Mapping[str, Any]) -> str:
    """A setting in words."""
    return ", ".join(value_words(axis, value) for axis, value in setting.items()) or "all"


def told_apart(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings in words, without what all of them share."""
    shared = {name for name in settings[0] if all(one.get(name) == settings[0][name] for one in settings)}
    if len(settings) == 1 or all(set(one) == shared for one in settings):
        return [setting_words(one) for one in settings]
    return [setting_words({k: v for k, v in one.items() if k not in shared}) for one in settings]


def finite(values: Sequence[float | None]) -> list[float]:
    """What is a number of what seeds gave: a diverged one gave none."""
    return [float(value) for value in values if value is not None and np.isfinite(value)]


def mean(values: Sequence[float | None]) -> float:
    """Over what is a number; nan of none."""
    held = finite(values)
    return float(np.mean(held)) if held else float("nan")


def spread(values: Sequence[float | None]) -> float:
    """Standard deviation over seeds; nan of fewer than two."""
    held = finite(values)
    return float(np.std(held, ddof=1)) if len(held) > 1 else float("nan")


def numeric(values: Sequence[Any]) -> bool:
    """Whether an axis can be drawn on a log scale."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
    return len(numbers) == len(values) > 1 and any(a != b for a, b in pairwise(numbers))
