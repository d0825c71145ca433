"""Records of metrics.jsonl: a line a round, a calibration or an evaluation, and one of which client has which labels.

They are for people: nothing of the run is computed from them, and the log alone is the record.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import numpy as np

from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.gradip import gradip, magnitude
from meerkat.algorithm.rounds import Reply, RoundPlan, RoundRecord
from meerkat.problems.problem import Better, Evaluation, primary
from meerkat.record.run_folder import Metric


@dataclass(frozen=True)
class _Record:
    """One line. `facts` are written beside the fields: seconds, and what a federation tells of a round."""

    round: int
    """Rounds closed before; of a round, its own number."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The line; fields that are None for not known are left out, but for a round's loss."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("round", "facts")}
        known = {name: value for name, value in values.items() if value is not None or name == "loss"}
        return {"kind": self.kind, "round": self.round, **known, **getattr(self, "facts", {})}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Self:
        """The record that `to_json` wrote.

        Raises:
            TypeError: a field is missing.
        """
        names = {f.name for f in fields(cls)}
        known = {name: value for name, value in line.items() if name in names}
        if "facts" in names:
            known["facts"] = {name: value for name, value in line.items() if name not in names | {"kind"}}
        return cls(**known)


@dataclass(frozen=True)
class RoundMetric(_Record):
    """A closed round. Traces are of scalars alone, by client: first-order methods have none."""

    loss: float | None
    """Participants' mean training loss, by weight; None where it is not known."""
    lr: float
    bytes_up: int
    """Of all clients together."""
    bytes_down: int
    steps: int
    """Local steps of all clients."""
    clients: list[int] | None = None
    abs_g: list[list[float]] | None = None
    """|g| at every step of each of the clients."""
    gradip: list[list[float]] | None = None
    """GradIP likewise, where there is a pre-training gradient."""
    facts: Mapping[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "round"

    @classmethod
    def of(cls, record: RoundRecord, replies: Sequence[Reply] = (), facts: Mapping[str, Any] | None = None) -> Self:
        """Of a round's record; its training loss is known from the replies of a simulation alone."""
        return cls(
            record.plan.round,
            _mean_loss(record, replies),
            record.plan.lr,
            **_payload(record.plan, len(record.aggregate) if record.plan.sends == "delta" else None),
            **_traces(record.plan, record.scalars, record.inner),
            facts=facts or {},
        )


@dataclass(frozen=True)
class CalibrationMetric(_Record):
    """A calibration: each client's trace, the decision and the numbers that led to it."""

    rho_later: list[float]
    rho_quie: list[float]
    later: list[float]
    thresholds: Mapping[str, float]
    extreme: list[int]
    early_stopped: list[int]
    bytes_up: int
    bytes_down: int
    steps: int
    clients: list[int] | None = None
    abs_g: list[list[float]] | None = None
    gradip: list[list[float]] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "calibration"

    @classmethod
    def of(cls, record: CalibrationRecord, facts: Mapping[str, Any] | None = None) -> Self:
        """Of a calibration's record."""
        selection = record.selection
        return cls(
            record.plan.round,
            rho_later=_rounded(selection.rho_later),
            rho_quie=_rounded(selection.rho_quie),
            later=_rounded(selection.later),
            thresholds={
                "rho_later": selection.rho_later_above,
                "rho_quie": selection.rho_quie_from,
                "quiet": selection.quiet_below,
                "loud": selection.loud_above,
            },
            extreme=list(selection.extreme),
            early_stopped=list(record.early_stopped),
            **_payload(record.plan, None),
            **_traces(record.plan, record.scalars, record.inner),
            facts=facts or {},
        )


@dataclass(frozen=True)
class EvaluationMetric(_Record):
    """How the model did after so many rounds."""

    scores: Mapping[str, float | None]
    """By name, the primary score first; None where no site evaluated."""
    better: Mapping[str, Better]
    """Which values of each score are better."""
    per_class: Mapping[str, float] = field(default_factory=dict)
    rows: int | None = None
    """Rows of the sites that evaluated on their own; None where the rows are at hand."""
    facts: Mapping[str, Any] = field(default_factory=dict)

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
        """Of the mean primary score and the number of rows that each site sends."""
        rows = sum(count for _, count in scores)
        mean = sum(value * count for value, count in scores) / rows if rows else None
        return cls(rounds, {primary(better): mean}, better, rows=rows)

    def to_json(self) -> dict[str, Any]:
        """The line, with accuracy and loss beside the scores as well."""
        line = super().to_json()
        beside = {name: self.scores[name] for name in ("accuracy",) if name in self.scores}
        return {**line, **beside, "loss": self.loss}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Self:
        """The record that `to_json` wrote."""
        return super().from_json({name: value for name, value in line.items() if name not in ("accuracy", "loss")})

    @classmethod
    def all_of(cls, metrics: Iterable[Metric]) -> list[Self]:
        """The evaluations among a run's metrics, in order of rounds."""
        return sorted((cls.from_json(m) for m in metrics if m["kind"] == cls.kind), key=lambda m: m.round)


@dataclass(frozen=True)
class SplitMetric(_Record):
    """Which client has which labels. A simulation knows it; a server does not."""

    labels: list[str]
    counts: list[list[int]]
    """Rows of each label at each client, [K][labels]"""

    kind: ClassVar[str] = "split"

    @classmethod
    def of(cls, labels: Sequence[str], counts: np.ndarray) -> Self:
        """Of the labels' names, and counts int [K, labels]."""
        return cls(0, list(labels), counts.tolist())


def kind_of(record: RoundRecord | CalibrationRecord) -> str:
    """The kind of a record's metric."""
    return CalibrationMetric.kind if isinstance(record, CalibrationRecord) else RoundMetric.kind


def metric_of(
    record: RoundRecord | CalibrationRecord, facts: Mapping[str, Any], replies: Sequence[Reply] = ()
) -> Metric:
    """The line of a record; without replies a round's training loss is not known."""
    if isinstance(record, CalibrationRecord):
        return CalibrationMetric.of(record, facts).to_json()
    return RoundMetric.of(record, replies, facts).to_json()


def _mean_loss(record: RoundRecord, replies: Sequence[Reply]) -> float | None:
    """The participants' mean training loss, by weight; None where it is not known: sites do not tell theirs, which no
    noise covers.
    """
    if not replies or (record.plan.sends == "scalars" and not record.scalars):
        return None
    mean: float = sum(record.weights[reply.client] * reply.loss for reply in replies if reply.steps)
    return mean if math.isfinite(mean) else None


def _traces(plan: RoundPlan, scalars: Mapping[int, np.ndarray], inner: np.ndarray) -> dict[str, Any]:
    if plan.sends == "delta":
        return {}
    together = np.concatenate([np.zeros((0, plan.directions), np.float32), *scalars.values()])
    ends = [0, *itertools.accumulate(map(len, scalars.values()))]
    levels = _rounded(magnitude(together))
    traces: dict[str, Any] = {
        "clients": list(scalars),
        "abs_g": [levels[first:last] for first, last in itertools.pairwise(ends)],
    }
    if len(inner):
        traces["gradip"] = [_rounded(gradip(g, inner)) for g in scalars.values()]
    return traces


def _payload(plan: RoundPlan, delta: int | None) -> dict[str, Any]:
    """Bytes of payload of all clients together, up and down, and local steps made."""
    steps = sum(plan.steps.values())
    if delta is not None:
        return {"bytes_up": 4 * delta * len(plan.steps), "bytes_down": 4 * delta * len(plan.steps), "steps": steps}
    down = 0 if plan.phase == "calibration" else 4 * plan.longest * plan.directions * len(plan.steps)
    return {"bytes_up": 4 * steps * plan.directions, "bytes_down": down, "steps": steps}


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in np.asarray(values).tolist()]
