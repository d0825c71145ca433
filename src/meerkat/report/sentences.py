"""What a run shows a person, in words and numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meerkat.settings.methods import METHODS

_JUDGED = {
    "validation": "validation rows",
    "held-back": "held-back training rows",
    "sites": "the sites' own validation rows",
}


def in_digits(value: float | None) -> str:
    """An accuracy or a loss; where nobody judged, that is said."""
    return "(not judged)" if value is None else f"{value:.3f}"


def in_words(summary: dict[str, Any], folder: Path) -> str:
    """A finished run in plain words."""
    up, dense = summary["payload_bytes_up_per_client_round"], summary["dense_bytes_per_client_round"]
    whole = summary["payload_bytes_up"] / summary["clients"]
    and_more = ", calibration included" if summary["calibration_steps"] else ""
    judged = _JUDGED[summary["evaluated_on"]]
    return "\n".join(
        [
            f"{summary['method']} on {summary['task']}: accuracy {in_digits(summary['accuracy_before'])} before, "
            f"{in_digits(summary['accuracy'])} after {summary['rounds']} rounds, on {judged}.",
            f"{summary['params_masked']:,} of {summary['params_total']:,} parameters moved; {_work(summary)}.",
            f"Each client sent {up} bytes a round, about {whole:,.0f} in all{and_more}. "
            f"Sending the model instead would have cost {dense:,} bytes a round, {dense // up:,} times as much.",
            *([f"Differential privacy: {_promised(summary)}."] if summary.get("privacy") else []),
            f"Run folder: {folder}",
        ]
    )


def _promised(summary: Mapping[str, Any]) -> str:
    return str(summary["privacy"]["in_words"])


def _work(summary: Mapping[str, Any]) -> str:
    first_order = METHODS[summary["method"]].update == "first-order"
    return "every client ran backpropagation" if first_order else "no client ran backpropagation"


def outcome(summary: Mapping[str, Any], sent: float, calibrating: float) -> str:
    """A finished run in a paragraph; sent and calibrating are the mean bytes that a client sent."""
    judged = _JUDGED[summary["evaluated_on"]]
    losses = (summary["loss_before"], summary["loss"])
    loss = "" if None in losses else f", and the loss from {in_digits(losses[0])} to {in_digits(losses[1])}"
    spent = f", {calibrating:,.0f} of them to calibrate" if calibrating else ""
    up, dense = sent + calibrating, summary["dense_bytes_per_client_round"]
    one = summary["payload_bytes_up_per_client_round"]
    return (
        f"Accuracy on {judged} went from {in_digits(summary['accuracy_before'])} to {in_digits(summary['accuracy'])} "
        f"in {summary['rounds']:,} rounds{loss}. "
        f"{summary['params_masked']:,} of {summary['params_total']:,} parameters moved; {_work(summary)}. "
        f"A client sent {up:,.0f} bytes in all on average{spent}, and at most {one:,} a round; sending the model "
        f"instead would have cost {dense:,} bytes a round, {dense // one:,} times as much."
        + (f" Differential privacy: {_promised(summary)}." if summary.get("privacy") else "")
    )


def unfinished(done: int, planned: int) -> str:
    """How far a run got that has no outcome."""
    return (
        f"This run is not finished: it got to round {done:,} of {planned:,}. What follows is as far as it got; "
        "'meerkat resume' goes on with it."
    )


def so_far(judged: Sequence[Mapping[str, Any]]) -> str:
    """How an unfinished run stands; judged are its evaluations, in order."""
    if not judged:
        return "The model was not judged yet."
    if len(judged) == 1:
        return f"Before the first round the model's accuracy is {in_digits(judged[0]['accuracy'])}."
    last = judged[-1]
    first, now = in_digits(judged[0]["accuracy"]), in_digits(last["accuracy"])
    return f"Accuracy was {first} before and {now} after {last['round']:,} rounds."


def found_out(stopped: Sequence[int], clients: int, extreme: Sequence[int] | None, round: int) -> str:
    """Whom a calibration stopped, and how right that was where it is known."""
    when = "Before the first round" if not round else f"After {round:,} rounds"
    if not stopped:
        said = f"{when}, calibration stopped none of {clients:,} clients early."
    else:
        named = f" ({', '.join(map(str, stopped))})" if len(stopped) <= 12 else ""
        said = (
            f"{when}, calibration stopped {len(stopped):,} of {clients:,} clients early{named}: "
            "from then on each makes one local step a round."
        )
    if extreme is None:
        return said
    if not extreme:
        return said + " None holds one label alone."
    right = len(set(stopped) & set(extreme))
    return (
        f"{said} Of {len(extreme):,} that hold one label alone it stopped {right:,}, "
        f"and {len(stopped) - right:,} of the others."
    )
