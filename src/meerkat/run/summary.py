"""Writing a finished run's outcome into its folder."""

import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from meerkat.record.files import write_text
from meerkat.record.opening import steps_by_rows
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import LogReader
from meerkat.record.summary import Summary, as_text, outcome, work_by_kind
from meerkat.run.metrics import EvaluationMetric
from meerkat.run.run import Run
from meerkat.settings import budget
from meerkat.settings.config import RunConfig


def write_summary(run: Run, extreme: Sequence[int] = (), network: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Put a finished run's outcome into its folder, and return it as JSON.

    Args:
        extreme: clients whose data is known to be extremely skewed.
        network: what a federation's coordinator counts.
    """
    folder, config, state = run.folder, run.config, run.state
    log, digest = folder.log_path, state.replica.digest
    promised = budget.guarantee(config, steps_by_rows(log), state.round)
    summary: dict[str, Any] = Summary(
        **outcome(config, run.mask, work_by_kind(log), state.early_stopped, digest, promised),
        **evaluated(config, EvaluationMetric.of_run(folder)),
        **_cost(folder),
        extreme_clients=list(extreme),
        clients_without_budget=without_budget(folder),
        network=network,
    ).to_json()
    write_text(folder.summary_path, as_text(summary), folder.cure)
    return summary


def evaluated(config: RunConfig, evaluations: Sequence[EvaluationMetric]) -> dict[str, Any]:
    """The fields of a summary that follow from its evaluations, in order of rounds."""
    before, after = evaluations[0], evaluations[-1]
    return {
        "evaluated_on": "sites" if after.rows is not None else "held-back" if config.held_back else "validation",
        "score": after.score,
        "better": dict(after.better),
        "scores_before": dict(before.scores),
        "scores": dict(after.scores),
        "per_class": dict(after.per_class),
    }


def _cost(folder: RunFolder) -> dict[str, Any]:
    """Time and memory."""
    metrics = folder.metrics()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "wall_s": sum(m.get("wall_s", 0.0) for m in metrics),
        "forward_s": sum(m.get("forward_s", 0.0) for m in metrics if m["kind"] in ("round", "calibration")),
        "peak_rss_mb": most / (2**20 if sys.platform == "darwin" else 2**10),
    }


def without_budget(folder: RunFolder) -> list[int]:
    """Clients whose privacy budget does not last to the end of the run: as the log or a federation's sites tell."""
    opening = next(iter(LogReader(folder.log_path)), {})
    if lasting := opening.get("allowance"):
        made, early_stopped, rounds = Counter[int](), list[int](), 0
        for (client, _), steps in steps_by_rows(folder.log_path).items():
            made[client] += steps
        for record in LogReader(folder.log_path):
            rounds += record["kind"] == "round"
            early_stopped = record.get("early_stopped", early_stopped)
        return budget.not_lasting(folder.config(), lasting, made, early_stopped, rounds)
    if not opening.get("federation"):
        return []
    declined = {
        event["client"]
        for event in folder.events()
        if event.get("event") == "declined"
        and str(event.get("why")).startswith("epsilon: ")
        and type(event.get("client")) is int
    }
    return sorted(declined)
