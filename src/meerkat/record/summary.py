"""A finished run's outcome, summary.json, and what of it follows from log, mask and settings."""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, ValidationError

from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.rounds import RoundRecord
from meerkat.masks.sparse_mask import SparseMask
from meerkat.privacy.mechanism import Guarantee
from meerkat.problems.problem import Better
from meerkat.record.run_log import LogReader
from meerkat.settings.config import CLASSIFICATION, EMBEDDED, RunConfig
from meerkat.settings.validation import form_of, requirement

_NETWORK = ("frame_bytes_down", "frame_bytes_up", "dropped", "caught_up")
"""What a federation's coordinator counts."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What came out of a run, and what it cost. Bytes are of payload."""

    method: str
    problem: str
    model: str
    task: str
    seed: int
    rounds: int
    local_steps: int
    directions: int
    clients: int
    clients_per_round: int
    partition: str
    lr: float
    eps: float
    params_total: int
    params_masked: int
    evaluated_on: Literal["sites", "held-back", "validation"]
    score: str
    """The name of the score that runs are compared by."""
    better: Mapping[str, Better]
    scores_before: Mapping[str, float | None]
    scores: Mapping[str, float | None]
    """By name, after the last round; None where no site evaluated."""
    per_class: Mapping[str, float]
    payload_bytes_up_per_client_round: int
    payload_bytes_down_per_client_round: int
    payload_bytes_up: int
    """Of all clients together."""
    payload_bytes_down: int
    client_steps: int
    calibration_steps: int
    dense_bytes_per_client_round: int
    aggregation: str
    attack: str
    attacking_clients: list[int]
    extreme_clients: list[int]
    """Clients whose data is known to be extremely skewed; a simulation knows them."""
    early_stopped_clients: list[int]
    """Clients that made one step a round at the end."""
    theta_digest: str
    wall_s: float
    forward_s: float
    peak_rss_mb: float
    privacy: Mapping[str, str | int | float | None] | None
    """The promise, as `Guarantee.to_json` has it; None without differential privacy."""
    clients_without_budget: list[int]
    """Clients whose privacy budget does not last to the end of the run."""
    network: Mapping[str, int | Mapping[str, int]] | None = None
    """What a federation's coordinator counts: `frame_bytes_down`, `frame_bytes_up`, `dropped`, `caught_up`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """All of it, with `loss` and `loss_before` beside the scores, and `accuracy` where it is one of them."""
        values = asdict(self)
        network = values.pop("network") or {}
        beside: dict[str, Any] = {"loss_before": self.scores_before.get("loss"), "loss": self.scores.get("loss")}
        if "accuracy" in self.scores:
            beside |= {"accuracy_before": self.scores_before["accuracy"], "accuracy": self.scores["accuracy"]}
        if self.score == "accuracy":
            beside["accuracy_worst_class"] = worst_class(self.per_class, self.better[self.score])
        return values | beside | network

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The summary that `to_json` wrote, checked in itself. Raises ValueError: `to_json` did not write it."""
        own = {name: values[name] for name in values if name in {field.name for field in fields(cls)} - {"network"}}
        network = {name: values[name] for name in _NETWORK if name in values}
        try:
            summary = form_of(cls).validate_json(json.dumps(own | ({"network": network} if network else {})))
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {requirement(first['msg'])}") from None
        if summary.score not in summary.better or not summary.scores.keys() <= summary.better.keys():
            raise ValueError(f"score {summary.score!r}: must be one of those in 'better'")
        again = summary.to_json()
        for name in sorted(again.keys() | values.keys()):
            if not alike(values.get(name, ...), again.get(name, ...)):
                raise ValueError(f"{name} {values.get(name, 'missing')!r}: does not follow from the rest of it")
        return summary


def as_text(summary: Mapping[str, Any]) -> str:
    """The text of summary.json: one for each outcome, and no key twice."""
    return json.dumps(summary, indent=2) + "\n"


@dataclass(frozen=True)
class Work:
    """What all clients together did and sent, in bytes of payload and local steps."""

    bytes_up: int = 0
    bytes_down: int = 0
    steps: int = 0

    @classmethod
    def of(cls, record: RoundRecord | CalibrationRecord) -> "Work":
        """Of one round or calibration: of replies that came, and of what went to all that were asked."""
        plan, clients = record.plan, len(record.plan.steps)
        made = record.made
        steps = sum(made.values())
        if plan.sends == "delta":
            payload = 4 * (len(record.aggregate) if isinstance(record, RoundRecord) else 0)
            return cls(payload * len(made), payload * clients, steps)
        down = 4 * plan.longest * plan.directions * clients if plan.phase == "training" else 0
        return cls(4 * steps * plan.directions, down, steps)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes_up + other.bytes_up, self.bytes_down + other.bytes_down, self.steps + other.steps)


def work_by_kind(log: Path) -> Mapping[str, Work]:
    """The work of a log's rounds and of its calibrations, by kind of record."""
    work: dict[str, Work] = defaultdict(Work)
    kinds = {kind.kind: kind for kind in (RoundRecord, CalibrationRecord)}
    for record in LogReader(log):
        if (kind := kinds.get(record["kind"])) is not None:
            work[kind.kind] += Work.of(kind.from_json(record))
    return work


def outcome(
    config: RunConfig,
    mask: SparseMask,
    work: Mapping[str, Work],
    early_stopped: Collection[int],
    digest: str,
    promised: Guarantee | None,
) -> dict[str, Any]:
    """The fields of a summary that follow from settings, mask and log.

    Args:
        work: by kind of record.
        digest: theta's.
    """
    settings = {field.name: getattr(config, field.name) for field in fields(Summary) if field.name in _SETTINGS}
    payload = 4 * (config.local_steps * config.directions if config.recipe.sends_scalars else len(mask))
    total = sum(work.values(), Work())
    return {
        **settings,
        "model": "" if config.problem != CLASSIFICATION and config.model == EMBEDDED else config.model,
        "params_total": mask.total,
        "params_masked": len(mask),
        "payload_bytes_up_per_client_round": payload,
        "payload_bytes_down_per_client_round": payload,
        "payload_bytes_up": total.bytes_up,
        "payload_bytes_down": total.bytes_down,
        "client_steps": total.steps,
        "calibration_steps": work.get(CalibrationRecord.kind, Work()).steps,
        "dense_bytes_per_client_round": 4 * mask.total,
        "attacking_clients": list(config.attacking_clients),
        "early_stopped_clients": sorted(early_stopped),
        "theta_digest": digest,
        "privacy": None if promised is None else promised.to_json(),
    }


_SETTINGS = {field.name for field in fields(Summary)} & RunConfig.model_fields.keys() - {"calibration_steps"}


def worst_class(per_class: Mapping[str, float], better: Better) -> float | None:
    """The score of the label that does worst; None where there are no labels."""
    return (min if better == "higher" else max)(per_class.values(), default=None)


def alike(recorded: Any, expected: Any, within: float = 1e-9) -> bool:
    """Whether two JSON values are the same, fractions within a relative (and, below 1, absolute) difference."""
    if isinstance(expected, Mapping):
        same_names = isinstance(recorded, Mapping) and recorded.keys() == expected.keys()
        return same_names and all(alike(recorded[name], expected[name], within) for name in expected)
    if type(expected) is float and type(recorded) in (int, float):
        return math.isclose(recorded, expected, rel_tol=within, abs_tol=within)
    return type(recorded) is type(expected) and bool(recorded == expected)
