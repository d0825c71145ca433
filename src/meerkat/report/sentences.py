"""A run in sentences, and numbers as a person reads them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meerkat.progress import number_of
from meerkat.run.metrics import EvaluationMetric
from meerkat.settings.methods import METHODS

_EVALUATED_ON = {
    "validation": "validation rows",
    "held-back": "held-back training rows",
    "sites": "the sites' own validation rows",
}
_UNITS = ("B", "kB", "MB", "GB", "TB")


def three_decimals(score: float | None) -> str:
    """A score; None, where the model was not evaluated, in words."""
    return "(not evaluated)" if score is None else f"{score:.3f}"


def percent(share: float) -> str:
    """A share with two significant digits, however small: 12%, 1.3%, 0.004%."""
    if not share:
        return "0%"
    digits = max(0, 1 - math.floor(math.log10(share * 100))) if share < 0.0995 else 0
    text = f"{share * 100:.{min(digits, 8)}f}"
    return (text.rstrip("0").rstrip(".") if digits else text) + "%"


def data_size(count: float) -> str:
    """A number of bytes in the unit that suits it: 999 B, 1.6 kB, 2.21 MB."""
    power = 0
    while abs(count) >= 1000 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:,.0f} {_UNITS[power]}" if not power or count >= 100 else f"{count:.3g} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def as_sentence(text: str) -> str:
    """The text with a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def summary_in_words(summary: Mapping[str, Any], folder: Path) -> str:
    """A finished run's summary.json in a few lines, for the terminal."""
    sent = summary["payload_bytes_up"] / summary["clients"]
    calibration = ", calibration included" if summary["calibration_steps"] else ""
    score, before, after = _primary(summary)
    return "\n".join(
        [
            f"{summary['method']} on {summary['task'] or summary['problem']}: {score} {before} before, "
            f"{after} after {number_of(summary['rounds'], 'round')}, on {_EVALUATED_ON[summary['evaluated_on']]}.",
            _moved(summary),
            f"A client sent at most {summary['payload_bytes_up_per_client_round']} bytes a round, on average about "
            f"{sent:,.0f} in all{calibration}. {_dense(summary)}",
            *_privacy(summary),
            f"Run folder: {folder}",
        ]
    )


def _primary(summary: Mapping[str, Any]) -> tuple[str, str, str]:
    """The primary score's name, and its values before and after the run."""
    score = summary["score"]
    return score, three_decimals(summary["scores_before"][score]), three_decimals(summary["scores"][score])


def _moved(summary: Mapping[str, Any]) -> str:
    first_order = not METHODS[summary["method"]].sends_scalars
    work = "every client ran backpropagation" if first_order else "no client ran backpropagation"
    return f"{summary['params_masked']:,} of {summary['params_total']:,} parameters moved; {work}."


def _dense(summary: Mapping[str, Any]) -> str:
    up, dense = summary["payload_bytes_up_per_client_round"], summary["dense_bytes_per_client_round"]
    return f"Sending the model instead would have cost {dense:,} bytes a round, {dense // up:,} times as much."


def _privacy(summary: Mapping[str, Any]) -> list[str]:
    return [f"Differential privacy: {summary['privacy']['in_words']}."] if summary.get("privacy") else []


def outcome(summary: Mapping[str, Any], sent: float, sent_to_calibrate: float) -> str:
    """A finished run in a paragraph, for its page.

    Args:
        sent: mean bytes that a client sent in rounds.
        sent_to_calibrate: mean bytes that a client sent in calibrations.
    """
    score, before, after = _primary(summary)
    losses = [summary["loss_before"], summary["loss"]]
    loss = ", and the loss from {:.3f} to {:.3f}".format(*losses) if None not in losses and score != "loss" else ""
    calibration = f", {sent_to_calibrate:,.0f} of them to calibrate" if sent_to_calibrate else ""
    return " ".join(
        [
            as_sentence(
                f"{score} on {_EVALUATED_ON[summary['evaluated_on']]} went from {before} to {after} "
                f"in {number_of(summary['rounds'], 'round')}{loss}"
            ),
            _moved(summary),
            f"On average a client sent {sent + sent_to_calibrate:,.0f} bytes in all{calibration}, and at most "
            f"{summary['payload_bytes_up_per_client_round']:,} a round.",
            _dense(summary),
            *_privacy(summary),
        ]
    )


def unfinished(rounds: int, planned: int, diverged: str = "") -> str:
    """How far a run without an outcome got; `diverged` says how it diverged, if it did."""
    if diverged:
        return (
            f"This run diverged after {rounds:,} of {number_of(planned, 'round')} ({diverged}). "
            "This page shows what there is. Resuming the run would end the same way."
        )
    return (
        f"This run is not finished: it got to round {rounds:,} of {planned:,}. This page shows what there is so far; "
        "the run can be resumed."
    )


def score_so_far(evaluations: Sequence[EvaluationMetric]) -> str:
    """The primary score of an unfinished run, from its evaluations in order."""
    if not evaluations:
        return "The model has not been evaluated yet."
    first, last = evaluations[0], evaluations[-1]
    if len(evaluations) == 1:
        return f"Before the first round the model's {first.score} is {three_decimals(first.scores[first.score])}."
    before, after = (three_decimals(evaluation.scores[first.score]) for evaluation in (first, last))
    return as_sentence(f"{first.score} was {before} before training and {after} after {number_of(last.round, 'round')}")


def calibration_outcome(stopped: Sequence[int], clients: int, extreme: Sequence[int] | None, round: int) -> str:
    """Which of so many clients a calibration stopped early, and how right that was.

    Args:
        extreme: clients that have only one label; None where that is not known.
        round: rounds closed before it.
    """
    when = f"After {number_of(round, 'round')}" if round else "Before the first round"
    count = f"{len(stopped):,}" if stopped else "none"
    text = f"{when}, calibration stopped {count} of {number_of(clients, 'client')} early"
    if stopped:
        named = f" ({', '.join(map(str, stopped))})" if len(stopped) <= 12 else ""
        text += f"{named}: from then on each makes one local step a round"
    if extreme is None:
        return f"{text}."
    if not extreme:
        return f"{text}. No client has only one label."
    right = len(set(stopped) & set(extreme))
    return (
        f"{text}. It stopped {right:,} of the {len(extreme):,} that have only one label, "
        f"and {len(stopped) - right:,} of the others."
    )
