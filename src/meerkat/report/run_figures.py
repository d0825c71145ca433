"""Figures of a run as a whole: how it went, what it cost, what moves."""

import math
import re
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator

from meerkat.report.drawing import (
    BLUE,
    CYCLE,
    HEAT,
    INK,
    MARKERS,
    MUTED,
    ON_HEAT,
    RED,
    REST,
    byte_ticks,
    data_size,
    drawing,
    heat_key,
    legend_above,
    plain_log,
    short,
    whole_numbers,
)


def curve(
    x: Sequence[float],
    y: Sequence[float],
    name: str,
    *,
    over: str,
    beside: tuple[Sequence[float], Sequence[float]] | None = None,
    spent: float = 0.0,
) -> Figure:
    """Accuracy or loss over rounds or over bytes.

    Args:
        name: "accuracy" or "loss".
        over: "round" or "bytes".
        beside: the training loss, drawn pale behind.
        spent: bytes that calibration cost, shaded.
    """
    x, y = _finite(x, y)
    with drawing() as (figure, axes):
        if beside is not None:
            axes.plot(*_finite(*beside), color=REST, lw=0.9, label="training batches")
        axes.plot(x, y, color=BLUE, marker="o" if len(x) <= 30 else None, label="evaluation", zorder=4, clip_on=False)
        if x:
            above = _above(x, y, 1.0 if name == "accuracy" else max(y) - min(y), name == "accuracy")
            axes.annotate(
                f"{y[-1]:.3f}",
                (x[-1], y[-1]),
                xytext=(0, 6 if above else -6),
                textcoords="offset points",
                ha="right",
                va="bottom" if above else "top",
                fontweight="bold",
                zorder=6,
            )
        if name == "accuracy":
            axes.set_ylim(0, 1.02)
        else:
            axes.margins(y=0.12)
            if y and min(y) > 0 and max(y) / min(y) > 5:
                plain_log(axes, "y")
        if over == "bytes":
            axes.set_xlabel("payload a client, up and down")
            axes.set_xlim(left=0)
            if spent:
                axes.axvspan(0, spent, color=RED, alpha=0.08, lw=0)
                axes.annotate("calibration", (0.015, 0.02), xycoords="axes fraction", fontsize=7.5, color=RED)
            byte_ticks(axes)
        else:
            axes.set_xlabel("round")
            whole_numbers(axes)
        axes.set_ylabel(name)
        if beside is not None:
            axes.legend(loc="best", handlelength=1.8)
    return figure


def _finite(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """The points that can be drawn: a run that diverges has others."""
    kept = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    return [a for a, _ in kept], [b for _, b in kept]


def _above(x: Sequence[float], y: Sequence[float], span: float, rising: bool) -> bool:
    """Whether the last value is written above its point: where the curve that leads to it leaves room."""
    near = [b for a, b in zip(x[:-1], y[:-1], strict=True) if x[-1] - a <= 0.2 * (x[-1] - x[0])] or [y[-1]]
    free_above, free_below = max(near) <= y[-1] + 0.02 * span, min(near) >= y[-1] - 0.02 * span
    return free_above if free_above != free_below else rising


def by_class(rounds: Sequence[int], series: dict[str, list[float]]) -> Figure:
    """Accuracy of each class over rounds; of up to seven."""
    with drawing() as (figure, axes):
        for i, (label, values) in enumerate(series.items()):
            marker = MARKERS[i] if len(rounds) <= 30 else None
            axes.plot(rounds, values, color=CYCLE[i], marker=marker, lw=1.3, label=short(label))
        axes.set(xlabel="round", ylabel="accuracy", ylim=(-0.02, 1.02))
        whole_numbers(axes)
        legend_above(axes)
    return figure


def traffic(amounts: Sequence[tuple[str, float]], dense: str) -> Figure:
    """Bytes of payload on a log scale, a bar each; the one named `dense` is what was not sent."""
    shown = [(name, amount) for name, amount in amounts if amount > 0]
    with drawing(4.4, 0.7 + 0.32 * len(shown)) as (figure, axes):
        colours = [REST if name == dense else BLUE for name, _ in shown]
        low = min(amount for _, amount in shown) / 3
        axes.barh(range(len(shown)), [a - low for _, a in shown], left=low, color=colours, height=0.66)
        axes.set_xscale("log")
        for row, (_, amount) in enumerate(shown):
            axes.annotate(
                data_size(amount),
                (amount, row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontweight="bold",
            )
        axes.set_yticks(range(len(shown)), [name for name, _ in shown])
        axes.set_xlim(low, max(amount for _, amount in shown) * 40)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", which="minor", length=0)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        byte_ticks(axes)
    return figure


def place_of(name: str) -> tuple[int | None, str]:
    """A parameter's layer and kind from its name: (3, "self_attn.q_proj"), or (None, "embed_tokens")."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if number is None:
        kind = ".".join(part for part in parts if part not in ("model", "transformer", "decoder", "weight"))
        return None, kind or name
    return int(parts[number]), re.sub(r"\.weight$", "", ".".join(parts[number + 1 :])) or name


def mask_map(counts: Sequence[tuple[str, int, int]]) -> Figure | None:
    """Where the moving entries sit: layers by tensor kinds, as the share of each tensor on a log scale.

    Args:
        counts: name, moving entries and all entries of each tensor that has any moving.

    Returns:
        None where no tensor stands in a layer.
    """
    placed = [(*place_of(name), moving, size) for name, moving, size in counts if moving]
    layered = [(layer, kind, moving / size) for layer, kind, moving, size in placed if layer is not None]
    if not layered:
        return None
    kinds = sorted({kind for _, kind, _ in layered})
    layers = max(layer for layer, _, _ in layered) + 1
    shares = np.full((layers, len(kinds)), np.nan)
    for layer, kind, share in layered:
        shares[layer, kinds.index(kind)] = share
    low, high = float(np.nanmin(shares)), float(np.nanmax(shares))
    norm = LogNorm(low / 2 if low < high else low / 10, high)
    written = shares.size <= 130
    with drawing(9.6 if len(kinds) > 5 else 4.4, 1.5 + 0.26 * min(max(layers, 3), 30)) as (figure, axes):
        axes.imshow(shares, cmap=HEAT, norm=norm, aspect="auto", interpolation="none")
        if written:
            for (row, column), share in np.ndenumerate(shares):
                text = "none" if math.isnan(share) else percent(share)
                colour = MUTED if math.isnan(share) else ON_HEAT if norm(share) > 0.6 else INK
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
        axes.grid(visible=False)
        axes.set_xticks(range(len(kinds)), [kind.replace(".", ".\n", 1) for kind in kinds], fontsize=7.5)
        if len(kinds) > 6:
            axes.tick_params(axis="x", rotation=30 if len(kinds) > 10 else 0)
        axes.set_ylabel("layer")
        axes.yaxis.set_major_locator(FixedLocator(range(0, layers, max(1, math.ceil(layers / 16)))))
        axes.tick_params(length=0)
        heat_key(axes, f"{percent(low)} to {percent(high)} of the tensor moves")
    return figure


def percent(share: float) -> str:
    """A share as a person says it, small ones too: 12%, 1.3%, 0.004%."""
    if not share:
        return "0%"
    digits = max(0, 1 - math.floor(math.log10(share * 100))) if share < 0.0995 else 0
    said = f"{share * 100:.{min(digits, 8)}f}"
    return (said.rstrip("0").rstrip(".") if digits else said) + "%"


def concentration(points: Sequence[tuple[float, float]], density: float) -> Figure:
    """How much of all sensitivity the most sensitive entries hold; density is the mask's share of those ranked."""
    x, y = np.array(points).T
    with drawing() as (figure, axes):
        axes.plot(x, y, color=BLUE, label="sensitivity")
        axes.plot(x, x, color=MUTED, lw=1, ls="--", label="were all alike")
        plain_log(axes, "x")
        axes.xaxis.set_major_formatter(lambda value, _: percent(value))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set(xlabel="most sensitive entries, as a share", ylabel="share of the sum", ylim=(0, 1.02))
        if x[0] <= density < 1:
            held = float(np.interp(math.log(density), np.log(x), y))
            axes.plot([density, density, x[0]], [0, held, held], color=RED, lw=1.1, ls=":")
            axes.plot([density], [held], "o", color=RED)
            said = f"the top {percent(density)} hold {held:.0%}"
            axes.annotate(said, (density, held), xytext=(-6, 6), textcoords="offset points", ha="right", color=RED)
        legend_above(axes)
    return figure
