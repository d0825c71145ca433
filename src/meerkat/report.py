"""What a run shows a person: an outcome in plain words and a picture of its curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meerkat.runfolder import RunFolder


def in_words(summary: dict[str, Any], folder: Path, picture: Path) -> str:
    """A finished run in plain words."""
    up, dense = summary["payload_bytes_up_per_client_round"], summary["dense_bytes_per_client_round"]
    sent = up * summary["rounds"] * summary["clients_per_round"] // summary["clients"]
    return "\n".join(
        [
            f"{summary['method']} on {summary['task']}: accuracy {summary['accuracy_before']:.3f} before, "
            f"{summary['accuracy']:.3f} after {summary['rounds']} rounds ({summary['evaluated_on']} rows).",
            f"Only {summary['params_masked']:,} of {summary['params_total']:,} parameters moved, without backpropagation.",
            f"Each client sent about {sent:,} bytes in all, {up} a round; sending the model instead would have cost "
            f"{dense:,} a round, {dense // up:,} times as much.",
            f"Run folder: {folder}   Picture: {picture}",
        ]
    )


def curves(folders: Sequence[Path], to: Path) -> list[Path]:
    """Draw accuracy and loss over rounds, one line a run, as `curves.png` and `curves.svg`. Returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [RunFolder.open(folder) for folder in folders]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for run in runs:
        judged = [m for m in run.metrics() if m["kind"] == "evaluation"]
        label = run.config().method
        for axis, name in zip(axes, ("accuracy", "loss"), strict=True):
            axis.plot([m["round"] for m in judged], [m[name] for m in judged], marker=".", label=label)
            axis.set(xlabel="round", ylabel=f"evaluation {name}")
            axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1)
    axes[0].legend(loc="lower right")
    paths = [to / "curves.png", to / "curves.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return paths
