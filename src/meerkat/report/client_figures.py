"""Figures of single clients, be they one or a thousand: their data, signals, decisions and directions.

Clients that stand out are in colour, the others in grey. A small group has a line for each client; a large one has
its median and a band.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meerkat.algorithm.alignment import Alignment
from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.extreme_clients import Selection
from meerkat.report.drawing import HEAT, drawing, heat_key, legend_above, plain_log, short, whole_numbers
from meerkat.report.style import BLUE, CYCLE, GREY, INK, MUTED, PAPER, PURPLE, RED

POINTS = 24
"""A client's line over training has at most so many points, each a mean."""
FEW = 12
"""A group of at most so many clients has a line for each; a larger one has a band."""
_MOST_BARS = 30
"""At most so many clients have a bar of their labels each; more are a heat map."""
_HATCHES = ("", "///", "", "...", "", "\\\\\\", "")


@dataclass(frozen=True)
class Group:
    """Clients that are drawn alike."""

    name: str
    clients: tuple[int, ...]
    colour: str
    dashes: str = "-"
    marker: str = "o"

    @property
    def label(self) -> str:
        """The group in a legend."""
        return f"{self.name} ({len(self.clients):,})"


def grouped(clients: Sequence[int], stopped: Sequence[int], extreme: Sequence[int] | None) -> list[Group]:
    """Clients by whether they were stopped early and, where that is known, by whether they have only one label."""
    early, one = set(stopped), set(extreme or ())
    known = "several labels, " if extreme is not None else ""

    def among(members: Collection[int]) -> tuple[int, ...]:
        return tuple(client for client in clients if client in members)

    groups = [
        Group(f"{known}continues", among({*clients} - one - early), GREY),
        Group("one label, stopped early", among(one & early), RED, "-", "X"),
        Group("one label, continues", among(one - early), PURPLE, "--", "D"),
        Group("several labels, stopped early", among(early - one), BLUE, "-.", "s"),
    ]
    if extreme is None:
        groups[1:] = [Group("stopped early", among(early), RED, "-", "X")]
    return [group for group in groups if group.clients]


def lines_or_bands(groups: Sequence[Group]) -> str:
    """For a caption: whether each client has a line, or groups have bands."""
    if all(len(group.clients) <= FEW for group in groups):
        return "one line a client"
    return (
        f"a group of more than {FEW} is a median and a band with half of its clients, in grey also one with nine tenths"
    )


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` steps around each step, fewer at the ends: float64 [..., S]."""
    total = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, -1)], -1)
    at, steps = np.arange(values.shape[-1]), values.shape[-1]
    first, last = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, steps)
    means: np.ndarray = (total[..., last] - total[..., first]) / (last - first)
    return means


def thinned(x: np.ndarray, values: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over neighbours, at most so many: x [S], values [clients, S], where nan is left out of the mean."""
    if len(x) <= points:
        return x, values
    parts = np.array_split(np.arange(len(x)), points)
    counts = np.stack([np.isfinite(values[:, part]).sum(1) for part in parts], 1)
    sums = np.stack([np.nansum(values[:, part], 1) for part in parts], 1)
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return np.array([x[part].mean() for part in parts]), means


def binned(steps: Sequence[np.ndarray], values: Sequence[np.ndarray], bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of each series over equal bins of steps: (middles [bins], float64 [series, bins]; nan in empty bins)."""
    end = max(int(part[-1]) for part in steps) + 1
    edges = np.linspace(0, end, min(bins, end) + 1)
    means = np.full((len(steps), len(edges) - 1), np.nan)
    for row, (at, series) in enumerate(zip(steps, values, strict=True)):
        places = np.minimum(np.searchsorted(edges, at, side="right") - 1, len(edges) - 2)
        counts = np.bincount(places, minlength=len(edges) - 1)
        sums = np.bincount(places, weights=series, minlength=len(edges) - 1)
        means[row, counts > 0] = sums[counts > 0] / counts[counts > 0]
    return (edges[:-1] + edges[1:]) / 2, means


def split(labels: Sequence[str], counts: np.ndarray, extreme: Sequence[int]) -> Figure:
    """Each client's rows by label: a bar a client or, for many clients or labels, a heat map.

    Args:
        counts: rows of each client and label, int64 [K, C].
        extreme: clients whose names are in bold orange.
    """
    if len(counts) <= _MOST_BARS and len(labels) <= len(CYCLE):
        return _bars(labels, counts, extreme)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    order = np.lexsort((*-shares.T[::-1], -shares.max(1), shares.argmax(1)))
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
        for label, rows, colour, hatch in zip(labels, counts.T, CYCLE, _HATCHES, strict=False):
            bars = axes.barh(range(clients), rows, left=left, color=colour, height=0.72, label=short(label))
            for bar in bars:
                bar.set(hatch=hatch, edgecolor=PAPER if hatch else "none", linewidth=0)
            left += rows
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


Signals = Mapping[int, np.ndarray]
"""A signal of each client, by its id: float64 [points], nan where it has none."""


def signal(
    x: np.ndarray,
    values: Signals,
    groups: Sequence[Group],
    x_name: str,
    y_name: str,
    *,
    cosine: bool = False,
    margin: float = 0.01,
) -> Figure:
    """A signal of every client, a cosine or a positive one on a log scale: x [points]; margin is a share of x."""
    with drawing() as (figure, axes):
        ends = _draw_lines(axes, x, values, groups, log=not cosine)
        axes.set(xlabel=x_name, ylabel=y_name)
        axes.margins(x=margin)
        if cosine:
            axes.axhline(0, color=MUTED, lw=0.9)
            axes.set_ylim(-1.05, 1.05)
        else:
            _fit_log_scale(axes, values, groups)
        whole_numbers(axes)
        if len(groups) > 1 or groups[0].colour != GREY:
            legend_above(axes)
        _name_ends(axes, ends)
    return figure


class _LineEnd(NamedTuple):
    y: float
    x: float
    client: int
    colour: str


def _draw_lines(axes: Axes, x: np.ndarray, values: Signals, groups: Sequence[Group], *, log: bool) -> list[_LineEnd]:
    """A line a client in small groups, the median and bands in large ones.

    Returns:
        The ends of single lines in colour, for `_name_ends` once the limits are final.
    """
    ends: list[_LineEnd] = []
    for above, group in enumerate(groups):
        lines = np.stack([values[client] for client in group.clients])
        if log:
            lines = np.where(lines > 0, lines, np.nan)
        if len(group.clients) > FEW:
            _draw_bands(axes, x, lines, group)
            continue
        style: dict[str, Any] = {"color": group.colour, "lw": 1.1 if group.colour == GREY else 1.6, "zorder": 3 + above}
        for i, (client, line) in enumerate(zip(group.clients, lines, strict=True)):
            known = np.isfinite(line)
            dot = "." if known.sum() < 3 else None  # a line of one point would not be seen
            axes.plot(x[known], line[known], group.dashes, marker=dot, label="_" if i else group.label, **style)
            if group.colour != GREY and known.any():
                ends.append(_LineEnd(float(line[known][-1]), float(x[known][-1]), client, group.colour))
    return ends


def _draw_bands(axes: Axes, x: np.ndarray, lines: np.ndarray, group: Group) -> None:
    known = np.isfinite(lines).any(0)
    x, lines = x[known], lines[:, known]
    if len(x) == 1:  # as wide as a step: a band of one point would not be seen
        x, lines = x + np.array([-0.5, 0.5]), np.repeat(lines, 2, axis=1)
    low, quarter, median, three_quarters, high = np.nanquantile(lines, (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
    if group.colour == GREY:  # a second pale band would hide the first
        axes.fill_between(x, low, high, color=group.colour, alpha=0.2, lw=0)
    axes.fill_between(x, quarter, three_quarters, color=group.colour, alpha=0.3, lw=0)
    colour = MUTED if group.colour == GREY else group.colour
    axes.plot(x, median, group.dashes, color=colour, lw=1.4, label=group.label)


def _name_ends(axes: Axes, ends: Sequence[_LineEnd]) -> None:
    """Client ids at the right of up to six lines, moved apart where they would overlap."""
    if len(ends) > 6:
        return
    height, right = -1.0, axes.get_xlim()[1]
    scale = axes.transData + axes.transAxes.inverted()
    for end in sorted(ends):
        across, up = (float(part) for part in scale.transform((end.x, end.y)))
        up = min(max(up, 0.0), 1.0)
        if end.x < 0.85 * right:  # it ends early: its name is there
            place = (across + 0.012, up)
        else:
            height = max(up, height + 0.05)
            place = (1.012, height)
        axes.annotate(str(end.client), place, xycoords="axes fraction", fontsize=7.5, color=end.colour, va="center")


def _fit_log_scale(axes: Axes, values: Signals, groups: Sequence[Group]) -> None:
    """A log scale with every group in it, which a few values near zero do not stretch."""
    limits = []
    for group in groups:
        drawn = np.stack([values[client] for client in group.clients])
        drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
        if len(drawn):
            limits.append(np.quantile(drawn, (0.02, 0.98) if len(group.clients) > FEW else (0.02, 1.0)))
    if limits:
        axes.set_ylim(np.min(limits) / 1.4, np.max(limits) * 1.4)
    plain_log(axes, "y")


def decision(record: CalibrationRecord, extreme: Sequence[int] | None, automatic: bool) -> Figure:
    """What a calibration decided on: each client's decay against its later level, and the thresholds."""
    selection = record.selection
    groups = grouped(selection.clients, record.early_stopped, extreme)
    levels = selection.later if automatic else selection.rho_quie
    points = dict(zip(selection.clients, zip(selection.rho_later, levels, strict=True), strict=True))
    with drawing(4.4, 3.3) as (figure, axes):
        for above, group in enumerate(groups):
            x, y = zip(*(points[client] for client in group.clients), strict=True)
            style: dict[str, Any] = {"color": group.colour, "marker": group.marker, "linewidths": 0}
            axes.scatter(x, y, s=28 if len(points) < 100 else 12, label=group.label, zorder=3 + above, **style)
        axes.margins(0.09)
        axes.set_xlabel("decay: initial mean over later mean")
        _mark_extreme(axes, selection, automatic)
        for group in groups:  # in small groups in colour, or in all where clients are few
            if len(points) <= FEW or (len(group.clients) <= FEW and group is not groups[0]):
                label: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "color": MUTED}
                for client in group.clients:
                    axes.annotate(str(client), points[client], xytext=(4, 3), **label)
        legend_above(axes)
    return figure


def _mark_extreme(axes: Axes, selection: Selection, automatic: bool) -> None:
    """Scales, the thresholds as dashed lines, and the ground on which a client is extreme shaded."""
    decay, level = selection.rho_later_above, selection.quiet_below if automatic else selection.rho_quie_from
    line: dict[str, Any] = {"color": INK, "lw": 1, "ls": "--"}
    axes.axvline(decay, **line)
    plain_log(axes, "x")
    if automatic:
        axes.set_ylabel("later mean of |g|")
        plain_log(axes, "y")
    else:
        axes.set(ylabel="share of quiescent later steps", ylim=(-0.04, 1.04))
    if level > 0 or not automatic:
        axes.axhline(level, **line)
    (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.set(xlim=(low, high), ylim=(bottom, top))
    shade: dict[str, Any] = {"color": RED, "alpha": 0.07, "lw": 0, "zorder": 0}
    axes.fill_between([decay, high], bottom if automatic else level, top, **shade)
    if automatic:
        x = np.geomspace(low, max(low, min(decay, high)), 100)
        loud = selection.loud_above / x  # the initial mean is the decay times the later mean
        axes.plot(x, loud, **line)
        if level > bottom:
            axes.fill_between(x, bottom, np.minimum(level, loud), **shade)
        axes.fill_between(x, np.clip(loud, bottom, top), top, **shade)


def alignment(
    rounds: Sequence[tuple[int, Mapping[int, Alignment]]], groups: Sequence[Group], measure: str, y_name: str
) -> Figure:
    """The "cosine" or the "norm" of each client's update over some rounds, given by number."""
    clients = [client for group in groups for client in group.clients]
    values = [[getattr(updates[k], measure) if k in updates else np.nan for _, updates in rounds] for k in clients]
    x, means = thinned(np.array([number + 1 for number, _ in rounds]), np.array(values, np.float64), POINTS)
    by_client = dict(zip(clients, means, strict=True))
    return signal(x, by_client, groups, "round", y_name, cosine=measure == "cosine", margin=0.05)


def agreement(rounds: np.ndarray, shares: np.ndarray) -> Figure:
    """The share of clients whose update has the sign of the federation's, over rounds."""
    with drawing() as (figure, axes):
        axes.plot(rounds, shares, color=CYCLE[0], marker="." if len(rounds) <= 40 else None, lw=1.4)
        axes.axhline(0.5, color=MUTED, lw=1, ls="--")
        axes.set(xlabel="round", ylabel="clients that agree", ylim=(0, 1.04))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        whole_numbers(axes)
    return figure
