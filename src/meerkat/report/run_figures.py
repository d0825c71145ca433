"""Figures of a run as a whole: its scores over time, its bytes, its mask."""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator

from meerkat.problems.problem import RANGES
from meerkat.record.files import write_atomically
from meerkat.record.run_folder import RunFolder
from meerkat.report.drawing import HEAT, byte_ticks, drawing, heat_key, legend_above, plain_log, short, whole_numbers
from meerkat.report.sentences import data_size, percent
from meerkat.report.style import BLUE, CYCLE, GREY, INK, MARKERS, MUTED, ON_HEAT, RED
from meerkat.run.metrics import EvaluationMetric


def draw_curves(folders: Sequence[Path], to: Path) -> list[Path]:
    """Draw score and loss over rounds, a line a run, as curves.png and curves.svg. Returns their paths.

    Raises:
        RunFailed: a file cannot be written.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    both, score = figure.subplots(1, 2), "loss"
    for folder in folders:
        run = RunFolder.open(folder)
        config, evaluations = run.config(), EvaluationMetric.of_run(run)
        score = evaluations[-1].score if evaluations else "loss"
        for axes, name in zip(both, (score, "loss"), strict=True):
            values = np.array([m.scores.get(name) for m in evaluations], np.float64)
            axes.plot([m.round for m in evaluations], values, marker=".", label=config.method)
            axes.set(xlabel="round", ylabel=f"{'held-back' if config.held_back else 'validation'} {name}")
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if score == "accuracy":
        both[0].set_ylim(0, 1)
    both[0].legend()
    paths = [to / "curves.png", to / "curves.svg"]
    for path in paths:
        save = partial(figure.savefig, format=path.suffix[1:], dpi=150)
        write_atomically(path, save, RunFolder(to).cure)
    return paths


Points = tuple[Sequence[float], Sequence[float]]
"""x and y of a curve."""


def over_rounds(rounds: Sequence[float], values: Sequence[float], score: str, training: Points | None = None) -> Figure:
    """The score named so over rounds, and the training loss in grey behind it."""
    with drawing() as (figure, axes):
        if training is not None:
            axes.plot(*_finite(*training), color=GREY, lw=0.9, label="training batches")
        _score(axes, rounds, values, score)
        axes.set_xlabel("round")
        whole_numbers(axes)
        if training is not None:
            axes.legend(loc="best", handlelength=1.8)
    return figure


def over_bytes(sent: Sequence[float], values: Sequence[float], score: str, calibration: float) -> Figure:
    """The score named so over the payload of a client; the bytes that a first calibration cost are shaded."""
    with drawing() as (figure, axes):
        _score(axes, sent, values, score)
        axes.set_xlabel("payload a client, up and down")
        axes.set_xlim(left=0)
        if calibration:
            axes.axvspan(0, calibration, color=RED, alpha=0.08, lw=0)
            axes.annotate("calibration", (0.015, 0.02), xycoords="axes fraction", fontsize=7.5, color=RED)
        byte_ticks(axes)
    return figure


def _score(axes: Axes, x: Sequence[float], y: Sequence[float], score: str) -> None:
    """The curve of a score, its last value beside its end, and limits that suit it."""
    x, y = _finite(x, y)
    axes.plot(x, y, color=BLUE, marker="o" if len(x) <= 30 else None, label="evaluation", zorder=4, clip_on=False)
    if x:
        above = _room_above_end(x, y, 1.0 if score == "accuracy" else max(y) - min(y), rising=score == "accuracy")
        style: dict[str, Any] = {"va": "bottom" if above else "top", "ha": "right", "fontweight": "bold", "zorder": 6}
        at: dict[str, Any] = {"xy": (x[-1], y[-1]), "xytext": (0, 6 if above else -6), "textcoords": "offset points"}
        axes.annotate(f"{y[-1]:.3f}", **at, **style)
    if score == "accuracy":
        axes.set_ylim(0, 1.02)
    else:
        axes.margins(y=0.12)
        if y and min(y) > 0 and max(y) / min(y) > 5:
            plain_log(axes, "y")
    axes.set_ylabel(score)


def _finite(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """The points with a finite y: a run that diverges has others."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    return [a for a, _ in points], [b for _, b in points]


def _room_above_end(x: Sequence[float], y: Sequence[float], span: float, rising: bool) -> bool:
    """Whether the last value is written above its point: where the curve before it leaves room."""
    near = [b for a, b in zip(x[:-1], y[:-1], strict=True) if x[-1] - a <= 0.2 * (x[-1] - x[0])] or [y[-1]]
    free_above, free_below = max(near) <= y[-1] + 0.02 * span, min(near) >= y[-1] - 0.02 * span
    return free_above if free_above != free_below else rising


def by_class(rounds: Sequence[int], classes: Mapping[str, Sequence[float]], score: str) -> Figure:
    """A score over rounds of each class, at most seven of them."""
    with drawing() as (figure, axes):
        for i, (label, values) in enumerate(classes.items()):
            marker = MARKERS[i] if len(rounds) <= 30 else None
            axes.plot(rounds, values, color=CYCLE[i], marker=marker, lw=1.3, label=short(label))
        axes.set(xlabel="round", ylabel=score)
        if score in RANGES:
            low, high = RANGES[score]
            axes.set_ylim(low - 0.02, high + 0.02)
        whole_numbers(axes)
        legend_above(axes)
    return figure


def traffic(amounts: Mapping[str, float], dense: str) -> Figure:
    """A bar for each amount of bytes above 0, on a log scale; the bar named `dense`, which was not sent, is grey."""
    bars = [(name, amount) for name, amount in amounts.items() if amount > 0]
    least, most = min(amount for _, amount in bars) / 3, max(amount for _, amount in bars)
    with drawing(4.4, 0.7 + 0.32 * len(bars)) as (figure, axes):
        colours = [GREY if name == dense else BLUE for name, _ in bars]
        axes.barh(range(len(bars)), [a - least for _, a in bars], left=least, color=colours, height=0.66)
        axes.set_xscale("log")
        style: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontweight": "bold"}
        for row, (_, amount) in enumerate(bars):
            axes.annotate(data_size(amount), (amount, row), **style)
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.set_xlim(least, most * 40)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", which="minor", length=0)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        byte_ticks(axes)
    return figure


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """A parameter's layer and kind from its name: (3, "self_attn.q_proj"), or (None, "embed_tokens")."""
    parts = name.split(".")
    layer = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if layer is None:
        kind = ".".join(part for part in parts if part not in ("model", "transformer", "decoder", "weight"))
        return None, kind or name
    return int(parts[layer]), ".".join(parts[layer + 1 :]).removesuffix(".weight") or name


def mask_map(counts: Sequence[tuple[str, int, int]]) -> Figure | None:
    """The share of each tensor that moves, on a log scale: layers downwards, kinds of tensor across.

    Args:
        counts: name, moving entries and all entries of each tensor.

    Returns:
        None where no tensor with moving entries is in a layer.
    """
    placed = [(*layer_and_kind(name), moving / size) for name, moving, size in counts if moving]
    cells = [(layer, kind, share) for layer, kind, share in placed if layer is not None]
    if not cells:
        return None
    kinds = sorted({kind for _, kind, _ in cells})
    layers = max(layer for layer, _, _ in cells) + 1
    shares = np.full((layers, len(kinds)), np.nan)
    for layer, kind, share in cells:
        shares[layer, kinds.index(kind)] = share
    low, high = float(np.nanmin(shares)), float(np.nanmax(shares))
    norm = LogNorm(low / 2 if low < high else low / 10, high)
    with drawing(9.6 if len(kinds) > 5 else 4.4, 1.5 + 0.26 * min(max(layers, 3), 30)) as (figure, axes):
        axes.imshow(shares, cmap=HEAT, norm=norm, aspect="auto", interpolation="none")
        if shares.size <= 130:
            _write_shares(axes, shares, norm)
        axes.grid(visible=False)
        # in two lines: broken at the first dot, or at the last underscore
        names = [re.sub(r"\.|_(?=[^_.]*$)", r"\g<0>\n", kind, count=1) for kind in kinds]
        axes.set_xticks(range(len(kinds)), names, fontsize=7.5)
        if len(kinds) > 6:
            axes.tick_params(axis="x", rotation=30 if len(kinds) > 10 else 0)
        axes.set_ylabel("layer")
        axes.yaxis.set_major_locator(FixedLocator(range(0, layers, max(1, math.ceil(layers / 16)))))
        axes.tick_params(length=0)
        heat_key(axes, f"{percent(low)} to {percent(high)} of the tensor moves")
    return figure


def _write_shares(axes: Axes, shares: np.ndarray, norm: LogNorm) -> None:
    for (row, column), share in np.ndenumerate(shares):
        text = "none" if math.isnan(share) else percent(share)
        colour = MUTED if math.isnan(share) else ON_HEAT if norm(share) > 0.6 else INK
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)


def concentration(points: Sequence[tuple[float, float]], density: float) -> Figure:
    """The share of all sensitivity that the most sensitive entries hold.

    Args:
        points: shares of the ranked entries, ascending, and of the sum of sensitivities.
        density: the mask's share of the ranked entries.
    """
    x, y = np.array(points).T
    with drawing() as (figure, axes):
        axes.plot(x, y, color=BLUE, label="sensitivity")
        axes.plot(x, x, color=MUTED, lw=1, ls="--", label="if all were equal")
        plain_log(axes, "x")
        axes.xaxis.set_major_formatter(lambda value, _: percent(value))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set(xlabel="most sensitive entries, as a share", ylabel="share of the sum", ylim=(0, 1.02))
        if x[0] <= density < 1:
            share = float(np.interp(math.log(density), np.log(x), y))
            axes.plot([density, density, x[0]], [0, share, share], color=RED, lw=1.1, ls=":")
            axes.plot([density], [share], "o", color=RED)
            text = f"the top {percent(density)} hold {share:.0%}"
            axes.annotate(text, (density, share), xytext=(-6, 6), textcoords="offset points", ha="right", color=RED)
        legend_above(axes)
    return figure


def perturbation(eps: Sequence[float], errors: Sequence[float], chosen: float) -> Figure:
    """The error of projected gradients, as a share of the exact slopes, by the size of the perturbation."""
    with drawing() as (figure, axes):
        axes.plot(eps, errors, color=BLUE, marker="o", ms=4)
        plain_log(axes, "x")
        plain_log(axes, "y")
        axes.yaxis.set_major_formatter(lambda value, _: percent(value))
        axes.axvline(chosen, color=RED, lw=1.1, ls=":")
        axes.set(xlabel="eps", ylabel="error of g")
        note: dict[str, Any] = {"xytext": (5, -10), "textcoords": "offset points", "color": RED}
        axes.annotate(f"eps = {chosen:g}", (chosen, max(errors)), **note)
    return figure
