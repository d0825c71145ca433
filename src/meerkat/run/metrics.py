"""What is noted of a run for people: a line a round, a calibration or an evaluation, and the summary at its end.

Nothing of the run is computed from these; the log alone is the record.
"""

import itertools
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.gradip import gradip, magnitude
from meerkat.algorithm.rounds import Reply, RoundPlan, RoundRecord
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.causal_lm import Evaluation
from meerkat.progress import number_of
from meerkat.record.run_folder import Metric, RunFolder
from meerkat.record.run_log import LogReader
from meerkat.settings import budget
from meerkat.settings.config import RunConfig


def round_metric(record: RoundRecord, replies: Sequence[Reply]) -> dict[str, Any]:
    """A closed round: mean training loss, and each client's GradIP and |g| at every step."""
    return {
        "kind": "round",
        "round": record.plan.round,
        "loss": _mean_loss(record, replies),
        "lr": record.plan.lr,
        **_traces(record.plan, record.scalars, record.inner),
        **_payload(record.plan, len(record.aggregate) if record.plan.sends == "delta" else None),
    }


def kind_of(record: RoundRecord | CalibrationRecord) -> str:
    """The kind of a record's metric."""
    return "calibration" if isinstance(record, CalibrationRecord) else "round"


def metric_of(record: RoundRecord | CalibrationRecord) -> dict[str, Any]:
    """What a record alone tells: all but a round's training loss, which only a simulation knows."""
    return calibration_metric(record) if isinstance(record, CalibrationRecord) else round_metric(record, ())


def _mean_loss(record: RoundRecord, replies: Sequence[Reply]) -> float | None:
    """The participants' mean training loss, by weight; None where it is not known: no site tells its own, and no
    noise covers it.
    """
    if not replies or (record.plan.sends == "scalars" and not record.scalars):
        return None
    mean: float = sum(record.weights[reply.client] * reply.loss for reply in replies if reply.steps)
    return mean if math.isfinite(mean) else None


def calibration_metric(record: CalibrationRecord) -> dict[str, Any]:
    """A calibration: each client's trace, the decision and the numbers that led to it."""
    found = record.selection
    return {
        "kind": "calibration",
        "round": record.plan.round,
        **_traces(record.plan, record.scalars, record.inner),
        "rho_later": _rounded(found.rho_later),
        "rho_quie": _rounded(found.rho_quie),
        "later": _rounded(found.later),
        "thresholds": {
            "rho_later": found.rho_later_above,
            "rho_quie": found.rho_quie_from,
            "quiet": found.quiet_below,
            "loud": found.loud_above,
        },
        "extreme": list(found.extreme),
        "early_stopped": list(record.early_stopped),
        **_payload(record.plan, None),
    }


def evaluation_metric(found: Evaluation, rounds: int) -> dict[str, Any]:
    """How the model stood after so many rounds."""
    return {
        "kind": "evaluation",
        "round": rounds,
        "accuracy": found.accuracy,
        "loss": found.loss,
        "per_class": found.per_class,
    }


def counts_metric(correct: int, total: int, rounds: int) -> dict[str, Any]:
    """How the model stood on the sites' own rows, of which they tell nothing but how many are right."""
    accuracy = correct / total if total else None
    return {"kind": "evaluation", "round": rounds, "accuracy": accuracy, "loss": None, "per_class": {}, "rows": total}


def split_metric(labels: Sequence[str], counts: np.ndarray) -> dict[str, Any]:
    """Who holds what: each client's rows of each label, int [K, C]. A simulation knows it; a server does not."""
    return {"kind": "split", "round": 0, "labels": list(labels), "counts": counts.tolist()}


def _traces(plan: RoundPlan, scalars: Mapping[int, np.ndarray], inner: np.ndarray) -> dict[str, Any]:
    if plan.sends == "delta":
        return {}
    together = np.concatenate([np.zeros((0, plan.directions), np.float32), *scalars.values()])
    ends = [0, *itertools.accumulate(map(len, scalars.values()))]
    levels = _rounded(magnitude(together))
    noted: dict[str, Any] = {
        "clients": list(scalars),
        "abs_g": [levels[first:last] for first, last in itertools.pairwise(ends)],
    }
    if len(inner):
        noted["gradip"] = [_rounded(gradip(g, inner)) for g in scalars.values()]
    return noted


def _payload(plan: RoundPlan, delta: int | None) -> dict[str, int]:
    """Bytes of payload of all clients together, up and down, and local steps made."""
    steps = sum(plan.steps.values())
    if delta is not None:
        return {"bytes_up": 4 * delta * len(plan.steps), "bytes_down": 4 * delta * len(plan.steps), "steps": steps}
    down = 0 if plan.phase == "calibration" else 4 * plan.longest * plan.directions * len(plan.steps)
    return {"bytes_up": 4 * steps * plan.directions, "bytes_down": down, "steps": steps}


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in np.asarray(values).tolist()]


def without_budget(folder: RunFolder) -> list[int]:
    """Clients whose privacy budget does not last to the end of the run: by the log, or as a federation's sites said."""
    opening = next(iter(LogReader(folder.log_path)), {})
    lasting = opening.get("allowance") or []
    said = {
        event["client"]
        for event in folder.events()
        if event.get("event") == "declined"
        and str(event.get("why")).startswith("epsilon: ")
        and isinstance(event.get("client"), int)
    }
    return sorted(said.union(budget.ending_early(folder.config(), lasting) if lasting else []))


def budgets_in_words(clients: Sequence[int], of: int) -> str:
    """Whose privacy budgets do not last, of so many clients; at most ten are named."""
    return (
        f"privacy budgets that do not last to the end of the run: {clients_in_words(clients)} ({len(clients)} of {of})"
    )


def defence_in_words(config: RunConfig) -> str:
    """Who attacks, and how replies become one, where it is not plainly the mean; else empty."""
    by, words = config.rule, []
    if config.attack != "none":
        words.append(f"attack {config.attack} by {clients_in_words(config.attacking_clients)}")
    if config.attack != "none" or by.rule != "mean":
        words.append(f"aggregation {by.rule}" + f" with f = {by.byzantine}" * by.needs_f)
    if by.mixing != "none":
        words.append(f"mixing {by.mixing}")
    if by.clipping != "none":
        words.append(f"clipping {by.clipping}" + f" at {by.clip_norm:g}" * (by.clipping == "fixed"))
    return ", ".join(words)


def evaluation_in_words(found: Metric, rounds: int) -> str:
    """How the model stands, of so many rounds in all."""
    loss = "" if found["loss"] is None else f", loss {found['loss']:.3f}"
    accuracy = "not judged by anyone" if found["accuracy"] is None else f"accuracy {found['accuracy']:.3f}"
    return f"round {found['round']:>4} of {rounds}: {accuracy}{loss}"


def plan_in_words(config: RunConfig, mask: SparseMask, sizes: Sequence[int]) -> str:
    """What is about to run; sizes are the clients' numbers of rows."""
    most, alone = number_of(max(sizes), "row"), config.clients == 1
    rows = f"{min(sizes)} to {most}" if min(sizes) < max(sizes) else most if alone else f"{most} each"
    return (
        f"{config.method}: {len(mask):,} of {mask.total:,} parameters move, learning rate {config.lr:g}; "
        f"{number_of(config.clients, 'client')} ({config.partition}) hold{'s' * alone} {rows}; "
        f"{number_of(config.rounds, 'round')} of {number_of(config.local_steps, 'local step')}"
    )


def clients_in_words(clients: Sequence[int]) -> str:
    """Clients by their numbers; at most ten are named."""
    return f"client{'s' * (len(clients) > 1)} {_named(clients)}"


def _named(clients: Sequence[int]) -> str:
    return ", ".join(map(str, clients[:10])) + (", ..." if len(clients) > 10 else "")


def stopped_in_words(early_stopped: Sequence[int], clients: int) -> str:
    """What a calibration decided; at most ten clients are named."""
    named = _named(early_stopped)
    count = f"{len(early_stopped)} of {clients} clients make one local step a round from now on"
    return f"{count}: {named}" if named else count


def summarise(
    config: RunConfig,
    mask: SparseMask,
    extreme: Sequence[int],
    early_stopped: Sequence[int],
    metrics: Sequence[Metric],
    digest: str,
) -> dict[str, Any]:
    """A finished run in one object.

    Args:
        extreme: clients whose data is known to be extremely skewed; a simulation knows them.
        early_stopped: clients that made one step a round at the end.
    """
    judged = sorted((m for m in metrics if m["kind"] == "evaluation"), key=lambda m: m["round"])
    worked = [m for m in metrics if m["kind"] in ("round", "calibration")]
    first_order = config.recipe.update == "first-order"
    payload = 4 * (len(mask) if first_order else config.local_steps * config.directions)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {
        "method": config.method,
        "model": config.model,
        "task": config.task,
        "seed": config.seed,
        "rounds": config.rounds,
        "local_steps": config.local_steps,
        "directions": config.directions,
        "clients": config.clients,
        "clients_per_round": config.clients_per_round,
        "partition": config.partition,
        "lr": config.lr,
        "eps": config.eps,
        "params_total": mask.total,
        "params_masked": len(mask),
        "evaluated_on": "sites" if "rows" in judged[-1] else "held-back" if config.held_back else "validation",
        "accuracy_before": judged[0]["accuracy"],
        "accuracy": judged[-1]["accuracy"],
        "accuracy_worst_class": min(judged[-1]["per_class"].values(), default=None),
        "loss_before": judged[0]["loss"],
        "loss": judged[-1]["loss"],
        "per_class": judged[-1]["per_class"],
        "payload_bytes_up_per_client_round": payload,
        "payload_bytes_down_per_client_round": payload,
        "payload_bytes_up": sum(m["bytes_up"] for m in worked),
        "payload_bytes_down": sum(m["bytes_down"] for m in worked),
        "client_steps": sum(m["steps"] for m in worked),
        "calibration_steps": sum(m["steps"] for m in worked if m["kind"] == "calibration"),
        "dense_bytes_per_client_round": 4 * mask.total,
        "aggregation": config.aggregation,
        "attack": config.attack,
        "attacking_clients": list(config.attacking_clients),
        "extreme_clients": list(extreme),
        "early_stopped_clients": list(early_stopped),
        "theta_digest": digest,
        "wall_s": sum(m.get("wall_s", 0.0) for m in metrics),
        "forward_s": sum(m["forward_s"] for m in worked),
        "peak_rss_mb": peak,
    }
