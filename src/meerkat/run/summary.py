"""A finished run's outcome: summary.json."""

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.problem import Better
from meerkat.record.files import write_text
from meerkat.record.opening import steps_by_rows
from meerkat.record.run_folder import Metric, RunFolder
from meerkat.record.run_log import LogReader
from meerkat.run.metrics import EvaluationMetric
from meerkat.run.run import Run
from meerkat.settings import budget
from meerkat.settings.config import CLASSIFICATION, EMBEDDED, RunConfig


@dataclass(frozen=True)
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
    attacking_clients: Sequence[int]
    extreme_clients: Sequence[int]
    """Clients whose data is known to be extremely skewed; a simulation knows them."""
    early_stopped_clients: Sequence[int]
    """Clients that made one step a round at the end."""
    theta_digest: str
    wall_s: float
    forward_s: float
    peak_rss_mb: float

    @classmethod
    def of(
        cls,
        config: RunConfig,
        mask: SparseMask,
        extreme: Sequence[int],
        early_stopped: Sequence[int],
        metrics: Sequence[Metric],
        digest: str,
    ) -> Self:
        """Of a finished run's settings and metrics; `digest` is theta's."""
        evaluations = [EvaluationMetric.from_json(m) for m in metrics if m["kind"] == EvaluationMetric.kind]
        evaluations.sort(key=lambda metric: metric.round)
        before, after = evaluations[0], evaluations[-1]
        worked = [m for m in metrics if m["kind"] in ("round", "calibration")]
        payload = 4 * (config.local_steps * config.directions if config.recipe.sends_scalars else len(mask))
        settings = {f.name: getattr(config, f.name) for f in fields(cls) if f.name in RunConfig.model_fields}
        settings["model"] = "" if config.problem != CLASSIFICATION and config.model == EMBEDDED else config.model
        settings["calibration_steps"] = sum(m["steps"] for m in worked if m["kind"] == "calibration")
        return cls(
            **settings,
            params_total=mask.total,
            params_masked=len(mask),
            evaluated_on="sites" if after.rows is not None else "held-back" if config.held_back else "validation",
            score=after.score,
            better=after.better,
            scores_before=before.scores,
            scores=after.scores,
            per_class=after.per_class,
            payload_bytes_up_per_client_round=payload,
            payload_bytes_down_per_client_round=payload,
            payload_bytes_up=sum(m["bytes_up"] for m in worked),
            payload_bytes_down=sum(m["bytes_down"] for m in worked),
            client_steps=sum(m["steps"] for m in worked),
            dense_bytes_per_client_round=4 * mask.total,
            attacking_clients=list(config.attacking_clients),
            extreme_clients=list(extreme),
            early_stopped_clients=list(early_stopped),
            theta_digest=digest,
            wall_s=sum(m.get("wall_s", 0.0) for m in metrics),
            forward_s=sum(m["forward_s"] for m in worked),
            peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            / (2**20 if sys.platform == "darwin" else 2**10),
        )

    def to_json(self) -> dict[str, Any]:
        """All of it, with `loss` and `loss_before` beside the scores, and `accuracy` where it is one of them."""
        beside: dict[str, Any] = {"loss_before": self.scores_before.get("loss"), "loss": self.scores.get("loss")}
        if "accuracy" in self.scores:
            beside |= {"accuracy_before": self.scores_before["accuracy"], "accuracy": self.scores["accuracy"]}
        if self.score == "accuracy":
            beside["accuracy_worst_class"] = worst_class(self.per_class, self.better[self.score])
        return asdict(self) | beside


def worst_class(per_class: Mapping[str, float], better: Better) -> float | None:
    """The score of the label that does worst; None where there are no labels."""
    return (min if better == "higher" else max)(per_class.values(), default=None)


def write_summary(run: Run, extreme: Sequence[int] = (), facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Put a finished run's outcome into its folder, and return it as JSON.

    Args:
        extreme: clients whose data is known to be extremely skewed.
        facts: what else the summary is to hold.
    """
    folder, config, state = run.folder, run.config, run.state
    stopped, digest = sorted(state.early_stopped), state.replica.digest
    summary = Summary.of(config, run.mask, extreme, stopped, folder.metrics(), digest).to_json()
    promised = budget.guarantee(config, steps_by_rows(folder.log_path), state.round)
    summary["privacy"] = None if promised is None else promised.to_json()
    summary["clients_without_budget"] = without_budget(folder)
    summary |= facts or {}
    write_text(folder.summary_path, json.dumps(summary, indent=2) + "\n", folder.cure)
    return summary


def without_budget(folder: RunFolder) -> list[int]:
    """Clients whose privacy budget does not last to the end of the run: as the log or a federation's sites tell."""
    opening = next(iter(LogReader(folder.log_path)), {})
    lasting = opening.get("allowance") or []
    declined = {
        event["client"]
        for event in folder.events()
        if event.get("event") == "declined"
        and str(event.get("why")).startswith("epsilon: ")
        and isinstance(event.get("client"), int)
    }
    return sorted(declined.union(budget.ending_early(folder.config(), lasting) if lasting else []))
