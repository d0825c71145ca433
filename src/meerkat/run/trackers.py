"""Trackers: a run's metrics, shown elsewhere while it goes on; metrics.jsonl remains their record."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np

from meerkat.errors import MeerkatError
from meerkat.record.files import make_folder
from meerkat.record.run_folder import Metric

Name = Literal["none", "tensorboard"]


def check_tracker(name: Name) -> None:
    """Raise MeerkatError if a tracker is not installed."""
    if name == "none":
        return
    try:
        import_module("torch.utils.tensorboard")
    except ImportError:
        raise MeerkatError("tracker tensorboard: not installed; pip install 'meerkat-fl[tensorboard]'") from None


@contextmanager
def tracking(name: Name, folder: Path, rounds: int) -> Iterator[Callable[[Metric], None]]:
    """A function that takes each metric, for as long as the run goes on.

    Args:
        folder: the run's; "tensorboard" writes to its folder `tensorboard`, for `tensorboard --logdir`.
        rounds: closed so far; metrics that were tracked of later ones are hidden.

    Raises:
        MeerkatError: the tracker is not installed.
    """
    check_tracker(name)
    if name == "none":
        yield lambda _: None
        return
    from torch.utils.tensorboard import SummaryWriter

    make_folder(folder / "tensorboard")
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=rounds + 1 if rounds else None)
    try:
        yield lambda metric: _write(writer.add_scalar, metric)
    finally:
        writer.close()


def _write(add: Callable[[str, float, int], object], metric: Metric) -> None:
    """One metric's scalars, at the number of rounds closed."""
    kind = metric["kind"]
    if kind == "evaluation":
        shown = {f"evaluation/{name}": value for name, value in metric["scores"].items()}
    elif kind == "round":
        shown = {
            "round/loss": metric["loss"],
            "round/lr": metric["lr"],
            "round/abs_g": float(np.mean(np.concatenate(metric["abs_g"]))) if metric.get("abs_g") else None,
            "round/clients": len(metric["clients"]) if metric.get("clients") else None,
            "round/seconds": metric.get("round_s", metric["wall_s"]),
            "bytes/up": metric["bytes_up"],
            "bytes/down": metric["bytes_down"],
        }
    else:
        return
    for name, value in shown.items():
        if value is not None:
            add(name, value, metric["round"] + (kind == "round"))
