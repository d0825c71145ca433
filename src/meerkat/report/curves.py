"""The picture that every command leaves in a run folder: accuracy and loss over rounds."""

from collections.abc import Sequence
from pathlib import Path

from meerkat.record.run_folder import RunFolder


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
