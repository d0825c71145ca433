"""Lines of metrics.jsonl: one a round, a calibration or an evaluation, and one of which client has which labels.

They are for people: the log alone is the record, and nothing of the run is computed from them.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self

import numpy as np

from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.gradip import gradip, magnitude
from meerkat.algorithm.replies import Reply
from meerkat.algorithm.rounds import RoundRecord
from meerkat.problems.problem import Better, Evaluation, primary
from meerkat.record.run_folder import Metric, RunFolder
from meerkat.record.summary import Work
from meerkat.settings.validation import form_of


@dataclass(frozen=True)
class EvaluationMetric:
    """How the model did after so many rounds."""

    round: int
    """Rounds closed before."""
    scores: Mapping[str, float | None]
    """By name, the primary score first; None where no site evaluated."""
    better: Mapping[str, Better]
    """Which values of each score are better."""
    per_class: Mapping[str, float] = field(default_factory=dict)
    rows: int | None = None
    """Rows of the sites that evaluated on their own; None where the rows are at hand."""
    facts: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """Written beside the other fields: the seconds that it took."""

    kind: ClassVar[str] = "evaluation"

    @property
    def score(self) -> str:
        """The primary score's name."""
        return primary(self.scores)

    @property
    def loss(self) -> float | None:
        """The mean loss, where it is known."""
        return self.scores.get("loss")

    @classmethod
    def of(cls, evaluation: Evaluation, better: Mapping[str, Better], rounds: int) -> Self:
        """Of an evaluation on rows at hand."""
        return cls(rounds, {name: evaluation.scores[name] for name in better}, better, evaluation.per_class)

    @classmethod
    def of_sites(cls, scores: Sequence[tuple[float, int]], better: Mapping[str, Better], rounds: int) -> Self:
        """Of sites' evaluations: each one's mean primary score, and its number of rows."""
        rows = sum(count for _, count in scores)
        mean = sum(score * count for score, count in scores) / rows if rows else None
        return cls(rounds, {primary(better): mean}, better, rows=rows)

    def to_json(self) -> dict[str, Any]:
        """The line, with accuracy and loss beside the scores as well; without `rows` where it is None."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "facts"}
        known = {name: value for name, value in values.items() if value is not None}
        accuracy = {"accuracy": self.scores["accuracy"]} if "accuracy" in self.scores else {}
        return {"kind": self.kind, **known, **self.facts, **accuracy, "loss": self.loss}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Self:
        """The record that `to_json` wrote. Raises TypeError: a field is missing."""
        names = {f.name for f in fields(cls)}
        facts = {name: value for name, value in line.items() if name not in names | {"kind", "accuracy", "loss"}}
        return cls(**{name: value for name, value in line.items() if name in names}, facts=facts)

    @classmethod
    def all_of(cls, metrics: Iterable[Metric]) -> list[Self]:
        """The evaluations among a run's metrics, in order of rounds."""
        return sorted((cls.from_json(m) for m in metrics if m["kind"] == cls.kind), key=lambda m: m.round)

    @classmethod
    def of_run(cls, folder: RunFolder) -> list[Self]:
        """A run's evaluations, in order of rounds. Raises RunFailed: a line is damaged."""
        checked = form_of(cls)
        try:
            evaluations = [checked.validate_python(asdict(one)) for one in cls.all_of(folder.metrics())]
        except (TypeError, ValueError):
            raise folder.damaged_metrics() from None
        if any(not one.scores or not one.scores.keys() <= one.better.keys() for one in evaluations):
            raise folder.damaged_metrics()
        return evaluations


def split_metric(labels: Sequence[str], counts: np.ndarray) -> Metric:
    """The line of which client has which labels, which a simulation knows and a server does not.

    Args:
        labels: their names.
        counts: rows of each label at each client, int [K, labels].
    """
    return {"kind": "split", "round": 0, "labels": list(labels), "counts": counts.tolist()}


def metric_of(
    record: RoundRecord | CalibrationRecord, facts: Mapping[str, Any], replies: Sequence[Reply] = ()
) -> Metric:
    """The line of a record, with `facts` such as seconds; a round's training loss is None without replies."""
    work = {"kind": record.kind, "round": record.plan.round, **asdict(Work.of(record)), **_traces(record)}
    if isinstance(record, RoundRecord):
        return {**work, "loss": _mean_loss(record, replies), "lr": record.plan.lr, **facts}
    selection = record.selection
    return {
        **work,
        "rho_later": _rounded(selection.rho_later),
        "rho_quie": _rounded(selection.rho_quie),
        "later": _rounded(selection.later),
        "thresholds": {
            "rho_later": selection.rho_later_above,
            "rho_quie": selection.rho_quie_from,
            "quiet": selection.quiet_below,
            "loud": selection.loud_above,
        },
        "extreme": list(selection.extreme),
        "early_stopped": list(record.early_stopped),
        **facts,
    }


def _mean_loss(record: RoundRecord, replies: Sequence[Reply]) -> float | None:
    """The participants' mean training loss, by weight. None where it is not known: sites do not send theirs, which no
    noise covers.
    """
    if not replies or (record.plan.sends == "scalars" and not record.scalars):
        return None
    mean: float = sum(record.weights[reply.client] * reply.loss for reply in replies if reply.steps)
    return mean if math.isfinite(mean) else None


def _traces(record: RoundRecord | CalibrationRecord) -> dict[str, Any]:
    """|g| at every step of each client, and GradIP where there is a pre-training gradient. They are of scalars alone:
    first-order methods have none.
    """
    plan, scalars = record.plan, record.scalars
    if plan.sends == "delta":
        return {}
    levels = _rounded(magnitude(np.concatenate([np.zeros((0, plan.directions), np.float32), *scalars.values()])))
    ends = itertools.accumulate(map(len, scalars.values()), initial=0)
    traces = {"clients": [*scalars], "abs_g": [levels[first:last] for first, last in itertools.pairwise(ends)]}
    if not len(record.inner):
        return traces
    return {**traces, "gradip": [_rounded(gradip(g, record.inner)) for g in scalars.values()]}


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in np.asarray(values).tolist()]
