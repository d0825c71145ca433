"""Figures of what single clients did: their data, their signals, the decision on them, where their updates point."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meerkat.algorithm.alignment import Alignment
from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.report.clients import FEW, Group, draw_lines, groups, name_ends, names, thinned
from meerkat.report.drawing import (
    CYCLE,
    HEAT,
    INK,
    MUTED,
    RED,
    drawing,
    heat_key,
    legend_above,
    plain_log,
    short,
    whole_numbers,
)

POINTS = 24
"""A client's line has at most so many points in training, each a mean."""
_BARS = 30
"""Up to so many clients have a bar of their labels each; more are a picture."""


def split(labels: Sequence[str], counts: np.ndarray, extreme: Sequence[int]) -> Figure:
    """Who holds which labels: a bar a client, or for many clients or labels a picture of their shares."""
    if len(counts) <= _BARS and len(labels) <= len(CYCLE):
        return _bars(labels, counts, extreme)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    order = np.lexsort((-shares.max(1), shares.argmax(1)))
    with drawing(9.6, min(1.3 + 0.22 * len(labels), 5)) as (figure, axes):
        axes.imshow(shares[order].T, cmap=HEAT, vmin=0, vmax=1, aspect="auto", interpolation="none")
        axes.grid(visible=False)
        axes.set_xlabel(f"{len(counts):,} clients, sorted by their most frequent label")
        axes.set_xticks([])
        if len(labels) <= 25:
            axes.set_yticks(range(len(labels)), [short(label) for label in labels])
        else:
            axes.set_ylabel("label")
        heat_key(axes, "0 to 100% of a client's rows")
    return figure


def _bars(labels: Sequence[str], counts: np.ndarray, extreme: Sequence[int]) -> Figure:
    clients = len(counts)
    with drawing(4.4, 1.15 + 0.2 * max(clients, 4)) as (figure, axes):
        left = np.zeros(clients)
        hatches = ("", "///", "", "...", "", "\\\\\\", "")
        for c, label in enumerate(labels):
            bars = axes.barh(range(clients), counts[:, c], left=left, color=CYCLE[c], height=0.72, label=short(label))
            for bar in bars:
                bar.set(hatch=hatches[c], edgecolor="none" if not hatches[c] else "#fefefe", linewidth=0)
            left += counts[:, c]
        axes.set_yticks(range(clients), [f"client {k}" for k in range(clients)])
        for k in extreme:
            axes.get_yticklabels()[k].set(color=RED, fontweight="bold")
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("rows")
        whole_numbers(axes)
        legend_above(axes)
    return figure


def signal(
    x: np.ndarray,
    values: np.ndarray,
    clients: Sequence[int],
    kinds: Sequence[Group],
    *,
    x_name: str,
    y_name: str,
) -> Figure:
    """A positive signal of every client on a log scale: float64 [clients, points]."""
    with drawing() as (figure, axes):
        ends = draw_lines(axes, x, values, clients, kinds, log=True)
        axes.set(xlabel=x_name, ylabel=y_name)
        axes.margins(x=0.01)
        _from_the_bulk(axes, values, clients, kinds)
        plain_log(axes, "y")
        whole_numbers(axes)
        names(axes, kinds)
        name_ends(axes, ends)
    return figure


def _from_the_bulk(axes: Axes, values: np.ndarray, clients: Sequence[int], kinds: Sequence[Group]) -> None:
    """Limits of a log scale that no group falls out of, and that a few values near zero do not stretch."""
    row = {client: i for i, client in enumerate(clients)}
    lows, highs = [], []
    for group in kinds:
        held = values[[row[client] for client in group.clients]]
        held = held[np.isfinite(held) & (held > 0)]
        if len(held):
            low, high = np.quantile(held, (0.02, 0.98) if len(group.clients) > FEW else (0.02, 1.0))
            lows.append(low)
            highs.append(high)
    if lows:
        axes.set_ylim(min(lows) / 1.4, max(highs) * 1.4)


def rho_plane(record: CalibrationRecord, extreme: Sequence[int] | None, automatic: bool) -> Figure:
    """What the decision looked at: each client's decay against its later level, and the thresholds."""
    found = record.selection
    at = {client: i for i, client in enumerate(found.clients)}
    x = np.array(found.rho_later)
    y = np.array(found.later if automatic else found.rho_quie)
    kinds = groups(found.clients, record.early_stopped, extreme)
    with drawing(4.4, 3.3) as (figure, axes):
        for above, group in enumerate(kinds):
            rows = [at[client] for client in group.clients]
            label, size = f"{group.name} ({len(rows):,})", 28 if len(at) < 100 else 12
            plot: dict[str, Any] = {
                "s": size,
                "color": group.colour,
                "marker": group.marker,
                "linewidths": 0,
                "zorder": 3 + above,
            }
            axes.scatter(x[rows], y[rows], label=label, **plot)
        axes.margins(0.09)
        axes.axvline(found.rho_later_above, color=INK, lw=1, ls="--")
        axes.set_xlabel(r"decay: initial mean over later mean")
        plain_log(axes, "x")
        level = found.quiet_below if automatic else found.rho_quie_from
        if automatic:
            axes.set_ylabel("later mean of |g|")
            plain_log(axes, "y")
        else:
            axes.set(ylabel="share of quiescent later steps", ylim=(-0.04, 1.04))
        if level > 0 or not automatic:
            axes.axhline(level, color=INK, lw=1, ls="--")
        low, high = axes.get_xlim()
        bottom, top = axes.get_ylim()
        axes.set(xlim=(low, high), ylim=(bottom, top))
        region: dict[str, Any] = {"color": RED, "alpha": 0.07, "lw": 0, "zorder": 0}
        if automatic:
            axes.fill_between([found.rho_later_above, high], bottom, top, **region)
            rest = np.geomspace(low, max(low, min(found.rho_later_above, high)), 100)
            loud = found.loud_above / rest  # an initial mean is decay times later mean
            axes.plot(rest, loud, color=INK, lw=1, ls="--")
            if level > bottom:
                axes.fill_between(rest, bottom, np.minimum(level, loud), **region)
            axes.fill_between(rest, np.clip(loud, bottom, top), top, **region)
        else:
            axes.fill_between([found.rho_later_above, high], level, top, **region)
        _name_points(axes, x, y, kinds)
        legend_above(axes)
    return figure


def _name_points(axes: Axes, x: np.ndarray, y: np.ndarray, kinds: Sequence[Group]) -> None:
    """Client ids beside the points of small groups that stand out, or of all where clients are few."""
    few = len(x) <= FEW
    order = {client: i for i, client in enumerate(sorted(k for group in kinds for k in group.clients))}
    for group in kinds:
        if few or (len(group.clients) <= FEW and group is not kinds[0]):
            for client in group.clients:
                place = (x[order[client]], y[order[client]])
                axes.annotate(str(client), place, xytext=(4, 3), textcoords="offset points", fontsize=7, color=MUTED)


def cosines(
    found: Sequence[tuple[int, Mapping[int, Alignment]]], kinds: Sequence[Group], what: str, y_name: str
) -> Figure:
    """Cosine or norm of each client's update over the rounds looked at."""
    rounds = np.array([number + 1 for number, _ in found])
    clients = sorted(k for group in kinds for k in group.clients)
    values = np.full((len(clients), len(rounds)), np.nan)
    for column, (_, held) in enumerate(found):
        for row, client in enumerate(clients):
            if client in held:
                values[row, column] = getattr(held[client], what)
    rounds, values = thinned(rounds, values, POINTS)
    with drawing() as (figure, axes):
        ends = draw_lines(axes, rounds, values, clients, kinds, log=what == "norm")
        if what == "cosine":
            axes.axhline(0, color=MUTED, lw=0.9)
            axes.set_ylim(-1.05, 1.05)
        else:
            _from_the_bulk(axes, values, clients, kinds)
            plain_log(axes, "y")
        axes.set(xlabel="round", ylabel=y_name)
        whole_numbers(axes)
        names(axes, kinds)
        name_ends(axes, ends)
    return figure


def agreement(rounds: np.ndarray, shares: np.ndarray) -> Figure:
    """The share of clients whose update points the way of the federation's, over the rounds looked at."""
    with drawing() as (figure, axes):
        axes.plot(rounds, shares, color=CYCLE[0], marker="." if len(rounds) <= 40 else None, lw=1.4)
        axes.axhline(0.5, color=MUTED, lw=1, ls="--")
        axes.set(xlabel="round", ylabel="clients that agree", ylim=(0, 1.04))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        whole_numbers(axes)
    return figure
