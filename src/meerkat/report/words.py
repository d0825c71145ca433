"""What a run shows a person, in words and numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meerkat.config import METHODS


def in_words(summary: dict[str, Any], folder: Path) -> str:
    """A finished run in plain words."""
    up, dense = summary["payload_bytes_up_per_client_round"], summary["dense_bytes_per_client_round"]
    whole = summary["payload_bytes_up"] / summary["clients"]
    and_more = ", calibration included" if summary["calibration_steps"] else ""
    judged = {"validation": "validation rows", "held-back": "held-back training rows"}[summary["evaluated_on"]]
    return "\n".join(
        [
            f"{summary['method']} on {summary['task']}: accuracy {summary['accuracy_before']:.3f} before, "
            f"{summary['accuracy']:.3f} after {summary['rounds']} rounds, on {judged}.",
            f"{summary['params_masked']:,} of {summary['params_total']:,} parameters moved; {_work(summary)}.",
            f"Each client sent {up} bytes a round, about {whole:,.0f} in all{and_more}. "
            f"Sending the model instead would have cost {dense:,} bytes a round, {dense // up:,} times as much.",
            f"Run folder: {folder}",
        ]
    )


def _work(summary: Mapping[str, Any]) -> str:
    first_order = METHODS[summary["method"]].update == "first-order"
    return "every client ran backpropagation" if first_order else "no client ran backpropagation"


def outcome(summary: Mapping[str, Any], sent: float, calibrating: float) -> str:
    """A finished run in a paragraph; sent and calibrating are the mean bytes that a client sent."""
    judged = {"validation": "validation rows", "held-back": "held-back training rows"}[summary["evaluated_on"]]
    spent = f", {calibrating:,.0f} of them to calibrate" if calibrating else ""
    up, dense = sent + calibrating, summary["dense_bytes_per_client_round"]
    one = summary["payload_bytes_up_per_client_round"]
    return (
        f"Accuracy on {judged} went from {summary['accuracy_before']:.3f} to {summary['accuracy']:.3f} in "
        f"{summary['rounds']:,} rounds, and the loss from {summary['loss_before']:.3f} to {summary['loss']:.3f}. "
        f"{summary['params_masked']:,} of {summary['params_total']:,} parameters moved; {_work(summary)}. "
        f"A client sent {up:,.0f} bytes in all on average{spent}, and at most {one:,} a round; sending the model "
        f"instead would have cost {dense:,} bytes a round, {dense // one:,} times as much."
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
        return f"Before the first round the model's accuracy is {judged[0]['accuracy']:.3f}."
    last = judged[-1]
    return f"Accuracy was {judged[0]['accuracy']:.3f} before and {last['accuracy']:.3f} after {last['round']:,} rounds."


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
