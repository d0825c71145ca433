"""What a run shows a person: an outcome in plain words and a picture of its curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meerkat.config import METHODS
from meerkat.runfolder import RunFolder


def in_words(summary: dict[str, Any], folder: Path) -> str:
    """A finished run in plain words."""
    up, dense = summary["payload_bytes_up_per_client_round"], summary["dense_bytes_per_client_round"]
    whole = summary["payload_bytes_up"] / summary["clients"]
    clients = "every" if METHODS[summary["method"]].update == "first-order" else "no"
    judged = {"validation": "validation rows", "held-back": "held-back training rows"}[summary["evaluated_on"]]
    return "\n".join(
        [
            f"{summary['method']} on {summary['task']}: accuracy {summary['accuracy_before']:.3f} before, "
            f"{summary['accuracy']:.3f} after {summary['rounds']} rounds, on {judged}.",
            f"{summary['params_masked']:,} of {summary['params_total']:,} parameters moved; "
            f"{clients} client ran backpropagation.",
            f"Each client sent {up} bytes a round, about {whole:,.0f} in all. "
            f"Sending the model instead would have cost {dense:,} bytes a round, {dense // up:,} times as much.",
            f"Run folder: {folder}",
        ]
    )


def curves(folders: Sequence[Path], to: Path) -> list[Path]:
    """Draw accuracy and loss over rounds, one line a run, as `curves.png` and `curves.svg`. Returns their paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for folder in folders:
        run = RunFolder.open(folder)
        config = run.config()
        judged = [m for m in run.metrics() if m["kind"] == "evaluation"]
        for axis, name in zip(axes, ("accuracy", "loss"), strict=True):
            axis.plot([m["round"] for m in judged], [m[name] for m in judged], marker=".", label=config.method)
            axis.set(xlabel="round", ylabel=f"{'held-back' if config.held_back else 'validation'} {name}")
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylim(0, 1)
    axes[0].legend(loc="lower right")
    paths = [to / "curves.png", to / "curves.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
