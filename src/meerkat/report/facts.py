"""What the folders of runs and comparisons hold, read once for their pages."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.rounds import RoundRecord
from meerkat.comparison.results import FILE, FORMAT
from meerkat.comparison.studies import spelled
from meerkat.errors import MeerkatError, RunFailed
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.problem import Better
from meerkat.record import history
from meerkat.record.files import check_no_links
from meerkat.record.run_folder import Metric, RunFolder
from meerkat.report.page import file_name
from meerkat.run.metrics import EvaluationMetric, metric_of
from meerkat.run.summary import without_budget
from meerkat.settings.config import RunConfig

_SYMBOLS = {"local_steps": "T", "density": "u", "directions": "P", "clients": "K", "lr": "eta"}

Row = Mapping[str, Any]
"""One setting of a study with its outcomes, as compare.json has it."""


@dataclass(frozen=True)
class RunFacts:
    """A run, finished or not."""

    config: RunConfig
    metrics: Sequence[Metric]
    """Those of records that metrics.jsonl lacks are made from the log; they have no times."""
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
            cure = f"delete it, then {folder.resumption}"
            raise RunFailed(f"{folder.summary_path}: damaged ({error}); {cure}") from None
        mask = folder.mask() if folder.mask_path.is_file() else None
        records, metrics = history.read(root), folder.metrics()
        noted = {(metric["kind"], metric["round"]) for metric in metrics}
        every: list[RoundRecord | CalibrationRecord] = [*records.rounds, *records.calibrations]
        metrics += [metric_of(record, {}) for record in every if (record.kind, record.plan.round) not in noted]
        return cls(folder.config(), metrics, summary, mask, records, without_budget(folder))

    @cached_property
    def rounds(self) -> int:
        """Closed rounds."""
        in_metrics: list[int] = [metric["round"] + 1 for metric in self.of_kind("round")]
        return max([0, *in_metrics, *(record.plan.round + 1 for record in self.records.rounds)])

    @cached_property
    def evaluations(self) -> list[EvaluationMetric]:
        """The evaluations, in order of rounds."""
        return EvaluationMetric.all_of(self.metrics)

    def of_kind(self, kind: str) -> list[Metric]:
        """Metrics of one kind, in order of rounds."""
        return sorted((m for m in self.metrics if m["kind"] == kind), key=lambda m: m["round"])

    def payload(
        self,
        kinds: Collection[str] = ("round", "calibration"),
        ways: Collection[str] = ("up", "down"),
        before: float = math.inf,
    ) -> float:
        """Mean bytes of payload a client, in rounds or calibrations, up or down, before a round."""
        counted = [m for m in self.metrics if m["kind"] in kinds and m["round"] < before]
        return float(sum(m[f"bytes_{way}"] for m in counted for way in ways)) / self.config.clients

    @cached_property
    def split(self) -> tuple[list[str], np.ndarray] | None:
        """Labels, and each client's rows of each, int64 [K, C]; None for a federation, whose server cannot know."""
        splits = self.of_kind("split")
        return (list(map(str, splits[-1]["labels"])), np.array(splits[-1]["counts"], np.int64)) if splits else None

    @cached_property
    def extreme(self) -> tuple[int, ...] | None:
        """Clients that have only one label; None where the split is not known."""
        return self.split and tuple(np.flatnonzero((self.split[1] > 0).sum(1) == 1).tolist())

    @cached_property
    def stopped(self) -> tuple[int, ...]:
        """Clients that made one step a round at the end."""
        calibrations = self.records.calibrations
        return calibrations[-1].early_stopped if calibrations else ()


@dataclass(frozen=True)
class Study:
    """One study of a comparison, as compare.json has it: settings along some axes, each run at some seeds."""

    root: Path
    """The comparison's folder."""
    name: str
    axes: Mapping[str, Sequence[Any]]
    """The values of each setting that is varied."""
    rows: Sequence[Row]
    """One row a setting."""
    score: str
    """The name of the score that settings are compared by."""
    better: Mapping[str, Better]
    """Every score's name, and which of its values are better."""
    title: str = ""
    note: str = ""
    checks: Sequence[Mapping[str, Any]] = ()
    """The claims, with their verdicts and differences."""

    @property
    def stem(self) -> str:
        """The name, fit for file names."""
        return file_name(self.name) or "study"

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

    @cached_property
    def score_range(self) -> tuple[float, float] | None:
        """Lowest and highest score of all curves, so that panels can share a scale; None without curves."""
        curves = [curve[1] for row in self.rows if (curve := self.curves(row, self.score)) is not None]
        return (min(map(np.nanmin, curves)), max(map(np.nanmax, curves))) if curves else None

    def has_log_scale(self, axis: str) -> bool:
        """Whether an axis' values are positive numbers, and not all the same."""
        values = self.axes.get(axis, [])
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
        return len(numbers) == len(values) and len(set(numbers)) > 1

    def name_in_panel(self, row: Row) -> str:
        """A row's setting in words, without the first axis, which names the panel."""
        names = list(self.axes)[1:] if len(self.axes) > 1 else list(self.axes)
        return setting_in_words({name: row["setting"][name] for name in names if name in row["setting"]})

    def curves(self, row: Row, score: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A score over local steps: (steps int64 [S], values float64 [seeds, S]; nan where a seed has none).

        Returns:
            None where none of the row's run folders is there.
        """
        every = [EvaluationMetric.of_run(RunFolder(self.root / run)) for run in row.get("runs", [])]
        runs = [{m.round * row["local_steps"]: m.scores[score] for m in run} for run in every if run]
        if not runs:
            return None
        steps = sorted(set().union(*runs))
        return np.array(steps), np.array([[run.get(step) for step in steps] for run in runs], np.float64)


def read_comparison(root: Path) -> tuple[Mapping[str, Any], list[Study]]:
    """A comparison's compare.json and its studies.

    Raises:
        MeerkatError: there is no comparison in the folder, or one of another format, or a link.
        RunFailed: compare.json is damaged.
    """
    path = root / FILE
    if not path.is_file():
        raise MeerkatError(f"comparison '{root}': no {FILE} in it; give a folder that 'meerkat compare' wrote")
    check_no_links(root)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            known = f"is not known, only {FORMAT}; use the version that wrote it"
            raise MeerkatError(f"{path}: format {content['format']!r} {known}")
        studies = [Study(root, **study) for study in content["studies"]]
        for run in (Path(run) for study in studies for row in study.rows for run in row.get("runs", [])):
            if run.is_absolute() or ".." in run.parts:
                raise ValueError(f"run '{run}' is not in its folder")
        return content, studies
    except (KeyError, TypeError, ValueError) as error:
        raise RunFailed(f"{path}: damaged ({error}); make it again with 'meerkat compare'") from None


def value_in_words(axis: str, value: Any) -> str:
    """One value of an axis: "T = 10", "u = 0.001", "iid"."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(spelled({axis: value})[axis])
    return f"{_SYMBOLS.get(axis, axis)} = " + (f"{value:,}" if isinstance(value, int) else f"{value:g}")


def setting_in_words(setting: Mapping[str, Any]) -> str:
    """A setting's values: "iid, T = 10"."""
    return ", ".join(value_in_words(axis, value) for axis, value in setting.items()) or "all"


def distinct_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings in words, without the values that all of them share."""
    shared = {name for name in settings[0] if all(one.get(name) == settings[0][name] for one in settings)}
    if len(settings) == 1 or all(set(one) == shared for one in settings):
        shared = set()
    return [setting_in_words({k: v for k, v in one.items() if k not in shared}) for one in settings]


def finite(values: Sequence[float | None]) -> list[float]:
    """The finite values; a seed that diverged has none."""
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def mean(values: Sequence[float | None]) -> float:
    """The mean of the finite values; nan where there are none."""
    return float(np.mean(numbers)) if (numbers := finite(values)) else math.nan
