"""What the folders of runs and comparisons hold, read once for their pages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from meerkat.errors import MeerkatError, RunFailed
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.problem import Better
from meerkat.record import history
from meerkat.record.run_folder import Metric, RunFolder
from meerkat.report.page import file_name
from meerkat.run.metrics import EvaluationMetric
from meerkat.run.summary import without_budget
from meerkat.settings.config import RunConfig

COMPARISON_FILE = "compare.json"
COMPARISON_FORMAT = 2
_SYMBOLS = {"local_steps": "T", "density": "u", "directions": "P", "clients": "K", "lr": "eta"}

Row = Mapping[str, Any]
"""One setting of a study with its outcomes, as compare.json has it."""


@dataclass(frozen=True)
class RunFacts:
    """A run, finished or not."""

    config: RunConfig
    metrics: Sequence[Metric]
    summary: dict[str, Any] | None
    """None where the run is not finished."""
    mask: SparseMask | None
    """None where the run ended before it had one."""
    records: history.Records
    without_budget: Sequence[int] = ()
    """Clients whose privacy budget does not last to the end of the run."""

    @classmethod
    def read(cls, root: Path) -> "RunFacts":
        """Read a run folder.

        Raises:
            MeerkatError: there is no run in it.
            RunFailed: a file in it is damaged.
        """
        folder = RunFolder.open(root)
        try:
            summary = folder.summary()
        except ValueError as error:
            raise RunFailed(
                f"{folder.summary_path}: damaged ({error}); delete it, then 'meerkat resume {root}'"
            ) from None
        mask = folder.mask() if folder.mask_path.is_file() else None
        return cls(folder.config(), folder.metrics(), summary, mask, history.read(root), without_budget(folder))

    @property
    def first_order(self) -> bool:
        """Whether clients sent weights, not scalars."""
        return not self.config.recipe.sends_scalars

    @property
    def early_stop(self) -> str:
        """Which clients calibration stops early: "none", "vp" (the extreme ones) or "random"."""
        chosen = self.config.early_stop
        return self.config.recipe.early_stop if chosen == "by-method" else chosen

    @cached_property
    def rounds(self) -> int:
        """Closed rounds."""
        in_metrics: list[int] = [metric["round"] + 1 for metric in self.metrics if metric["kind"] == "round"]
        in_log = [record.plan.round + 1 for record in self.records.rounds]
        return max([0, *in_metrics, *in_log])

    @cached_property
    def evaluations(self) -> list[EvaluationMetric]:
        """The evaluations, in order of rounds."""
        return [EvaluationMetric.from_json(metric) for metric in self.of_kind(EvaluationMetric.kind)]

    def of_kind(self, kind: str) -> list[Metric]:
        """Metrics of one kind, in order of rounds."""
        return sorted((m for m in self.metrics if m["kind"] == kind), key=lambda m: m["round"])

    def payload(self, before: int | None = None, kinds: Sequence[str] = ("round", "calibration")) -> float:
        """Mean bytes of payload a client, up and down, before a round; None for the whole run."""
        counted = [m for m in self.metrics if m["kind"] in kinds and (before is None or m["round"] < before)]
        return float(sum(m["bytes_up"] + m["bytes_down"] for m in counted)) / self.config.clients

    def sent(self, way: str, kind: str) -> float:
        """Mean bytes of payload a client "up" or "down", in metrics of the kind "round" or "calibration"."""
        return float(sum(m[f"bytes_{way}"] for m in self.metrics if m["kind"] == kind)) / self.config.clients

    @cached_property
    def split(self) -> tuple[list[str], np.ndarray] | None:
        """Labels, and each client's rows of each, int64 [K, C]; None for a federation, whose server cannot know."""
        splits = self.of_kind("split")
        if not splits:
            return None
        return [str(label) for label in splits[-1]["labels"]], np.array(splits[-1]["counts"], np.int64)

    @cached_property
    def extreme(self) -> tuple[int, ...] | None:
        """Clients that hold one label alone; None where the split is not known."""
        if self.split is None:
            return None
        return tuple(int(k) for k in np.flatnonzero((self.split[1] > 0).sum(1) == 1))

    @cached_property
    def stopped(self) -> tuple[int, ...]:
        """Clients that made one step a round at the end."""
        calibrations = self.records.calibrations
        return calibrations[-1].early_stopped if calibrations else ()


@dataclass(frozen=True)
class Study:
    """One study of a comparison: settings along some axes, each run at some seeds."""

    root: Path
    """The comparison's folder."""
    content: Mapping[str, Any]
    """The study as compare.json has it."""

    @property
    def name(self) -> str:
        """The name, fit for file names."""
        return file_name(str(self.content["name"])) or "study"

    @property
    def axes(self) -> Mapping[str, Sequence[Any]]:
        """The values of each setting that is varied."""
        axes: Mapping[str, Sequence[Any]] = self.content["axes"]
        return axes

    @property
    def rows(self) -> Sequence[Row]:
        """One row a setting."""
        rows: Sequence[Row] = self.content["rows"]
        return rows

    @cached_property
    def panels(self) -> list[tuple[str, list[Row]]]:
        """Rows by value of the first axis, each under that value's name; with one axis all rows, under no name."""
        if len(self.axes) < 2:
            return [("", list(self.rows))]
        first = next(iter(self.axes))
        panels = [
            (value_in_words(first, value), [row for row in self.rows if row["setting"].get(first) == value])
            for value in self.axes[first]
        ]
        return [(name, rows) for name, rows in panels if rows]

    @property
    def score(self) -> str:
        """The name of the score that settings are compared by."""
        return str(self.content["score"])

    @property
    def better(self) -> Mapping[str, Better]:
        """Every score's name, and which of its values are better."""
        better: Mapping[str, Better] = self.content["better"]
        return better

    @cached_property
    def score_range(self) -> tuple[float, float] | None:
        """Lowest and highest score of all curves, so that panels can share a scale; None without curves."""
        curves = [curve[1] for row in self.rows if (curve := self.curves(row, self.score)) is not None]
        if not curves:
            return None
        return min(float(np.nanmin(values)) for values in curves), max(float(np.nanmax(values)) for values in curves)

    def name_in_panel(self, row: Row) -> str:
        """A row's setting in words, without the first axis, which names the panel."""
        names = list(self.axes)[1:] if len(self.axes) > 1 else list(self.axes)
        return setting_in_words({name: row["setting"][name] for name in names if name in row["setting"]})

    def curves(self, row: Row, score: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A score over local steps: (steps int64 [S], values float64 [seeds, S]; nan where a seed has none).

        Returns:
            None where none of the row's run folders is there.
        """
        runs = []
        for run in row.get("runs", []):
            evaluations = [m for m in RunFolder(self.root / run).metrics() if m["kind"] == EvaluationMetric.kind]
            if evaluations:
                runs.append({m["round"] * row["local_steps"]: float(m["scores"][score]) for m in evaluations})
        if not runs:
            return None
        steps = sorted(set().union(*runs))
        return np.array(steps), np.array([[run.get(step, np.nan) for step in steps] for run in runs])


def read_comparison(root: Path) -> tuple[Mapping[str, Any], list[Study]]:
    """A comparison's compare.json and its studies.

    Raises:
        MeerkatError: there is no comparison in the folder, or one of another format.
        RunFailed: compare.json is damaged.
    """
    path = root / COMPARISON_FILE
    if not path.is_file():
        raise MeerkatError(
            f"comparison '{root}': no {COMPARISON_FILE} in it; give a folder that 'meerkat compare' wrote"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != COMPARISON_FORMAT:
            raise MeerkatError(
                f"{path}: format {content['format']!r} is not known, only {COMPARISON_FORMAT}; "
                "use the version that wrote it"
            )
        return content, [Study(root, study) for study in content["studies"]]
    except (KeyError, TypeError, ValueError) as error:
        raise RunFailed(f"{path}: damaged ({error}); make it again with 'meerkat compare'") from None


def value_in_words(axis: str, value: Any) -> str:
    """One value of an axis: "T = 10", "u = 0.001", "iid"."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Path(str(value)).name if axis == "mask" else str(value)
    return f"{_SYMBOLS.get(axis, axis)} = " + (f"{value:,}" if isinstance(value, int) else f"{value:g}")


def setting_in_words(setting: Mapping[str, Any]) -> str:
    """A setting's values: "iid, T = 10"."""
    return ", ".join(value_in_words(axis, value) for axis, value in setting.items()) or "all"


def distinct_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings in words, without the values that all of them share."""
    shared = {name for name in settings[0] if all(one.get(name) == settings[0][name] for one in settings)}
    if len(settings) == 1 or all(set(one) == shared for one in settings):
        return [setting_in_words(one) for one in settings]
    return [setting_in_words({k: v for k, v in one.items() if k not in shared}) for one in settings]


def finite(values: Sequence[float | None]) -> list[float]:
    """The finite values; a seed that diverged has none."""
    return [float(value) for value in values if value is not None and np.isfinite(value)]


def mean(values: Sequence[float | None]) -> float:
    """The mean of the finite values; nan where there are none."""
    numbers = finite(values)
    return float(np.mean(numbers)) if numbers else float("nan")


def deviation(values: Sequence[float | None]) -> float:
    """The standard deviation of the finite values; nan where there are fewer than two."""
    numbers = finite(values)
    return float(np.std(numbers, ddof=1)) if len(numbers) > 1 else float("nan")


def has_log_scale(values: Sequence[Any]) -> bool:
    """Whether an axis' values are positive numbers, and not all the same."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
    return len(numbers) == len(values) and len(set(numbers)) > 1
