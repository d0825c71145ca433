"""Figures of a comparison's study: settings beside each other, seed by seed."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from meerkat.report.drawing import (
    BLUE,
    CYCLE,
    GREEN,
    INK,
    MARKERS,
    MUTED,
    RED,
    REST,
    drawing,
    legend_above,
    plain_log,
    short,
    whole_numbers,
)
from meerkat.report.study_facts import Study, finite, mean, setting_words, told_apart

Row = Mapping[str, Any]
_DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), ":", (0, (8, 2)), (0, (3, 1)))


@dataclass(frozen=True)
class Look:
    """How one setting is drawn in all panels of a study."""

    colour: str
    marker: str
    dashes: Any


_OTHERS = Look(REST, "", "-")


def looks(study: Study) -> dict[str, Look]:
    """A look for each setting within a panel: of many, the most accurate have a colour and the others are grey."""
    scores: dict[str, list[float]] = {}
    for row in study.rows:
        scores.setdefault(study.within(row), []).append(mean(row["accuracy"]))
    ranked = sorted(scores, key=lambda name: -np.nan_to_num(np.nanmean(scores[name]) if finite(scores[name]) else 0.0))
    coloured = [name for name in scores if name in ranked[: len(CYCLE)]]
    own = {name: Look(CYCLE[i], MARKERS[i], _DASHES[i]) for i, name in enumerate(coloured)}
    return {name: own.get(name, _OTHERS) for name in scores}


def _legend(axes: Axes, others: int) -> None:
    if others:
        axes.plot([], [], color=REST, lw=1, label=f"{others} others")
    legend_above(axes)


def curves(study: Study, rows: Sequence[Row], what: str) -> Figure | None:
    """Accuracy over local steps: the mean over seeds in a band from the lowest to the highest; None without runs."""
    held = [(row, found) for row in rows if (found := study.curves(row, what)) is not None]
    if not held:
        return None
    shown = looks(study)
    with drawing() as (figure, axes):
        for row, (steps, values) in held:
            look = shown[study.within(row)]
            middle = np.nanmean(values, 0)
            plain = look is _OTHERS
            if len(values) > 1 and not plain:
                low, high = np.nanmin(values, 0), np.nanmax(values, 0)
                axes.fill_between(steps, low, high, color=look.colour, alpha=0.15, lw=0)
            style = {"color": look.colour, "lw": 0.9 if plain else 1.6, "ls": look.dashes, "zorder": 2 if plain else 3}
            axes.plot(steps, middle, label="_" if plain else short(study.within(row)), **style)
        axes.set(xlabel="local steps a client (rounds times T)", ylabel=what)
        if what == "accuracy" and study.accuracies:
            low, high = study.accuracies
            axes.set_ylim(low - 0.06 * (high - low + 0.01), high + 0.06 * (high - low + 0.01))
        whole_numbers(axes)
        _legend(axes, sum(shown[study.within(row)] is _OTHERS for row, _ in held))
    return figure


def final(study: Study) -> Figure:
    """Final accuracy: a line a setting, a dot a seed, an upright stroke their mean."""
    rows = study.rows
    with drawing(4.4, 0.75 + 0.2 * max(len(rows), 3)) as (figure, axes):
        names = [short(setting_words(row["setting"]), 40) for row in rows]
        for place, row in enumerate(rows):
            seeds = finite(row["accuracy"])
            best = bool(row.get("best"))
            colour = BLUE if best else MUTED
            if not seeds:
                axes.annotate("diverged", (0.02, place), xycoords=axes.get_yaxis_transform(), color=RED, va="center")
                continue
            axes.plot(seeds, [place] * len(seeds), "o", color=colour, ms=4.5, alpha=0.75, mew=0)
            axes.plot([mean(seeds)] * 2, [place - 0.32, place + 0.32], color=colour, lw=2)
        axes.set_yticks(range(len(rows)), names)
        for place, row in enumerate(rows):
            if row.get("best"):
                axes.get_yticklabels()[place].set(fontweight="bold", color=BLUE)
        for height in _between(study):
            axes.axhline(height, color=MUTED, lw=0.7)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.06)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("final accuracy")
    return figure


def _between(study: Study) -> list[float]:
    """Where one value of the first axis ends and the next begins."""
    if len(study.axes) < 2:
        return []
    first = next(iter(study.axes))
    values = [row["setting"].get(first) for row in study.rows]
    return [i - 0.5 for i in range(1, len(values)) if values[i] != values[i - 1]]


def along(study: Study, rows: Sequence[Row], axis: str, parted: bool) -> Figure | None:
    """Final loss along a numeric axis, both logarithmic: a line for each setting of the other axes, a dot a seed.

    Args:
        parted: the rows share a value of the first axis, which then needs no name.
    """
    left_out = {axis, next(iter(study.axes)) if parted else axis}
    lines, everywhere = _along_lines(rows, axis, left_out), _along_lines(study.rows, axis, left_out)
    lowest = sorted(everywhere, key=lambda name: min(mean(held) for _, held in everywhere[name]))[: len(CYCLE)]
    coloured = [name for name in everywhere if name in lowest]  # the same in all panels
    if not lines:
        return None
    with drawing() as (figure, axes):
        for name, points in lines.items():
            i = coloured.index(name) if name in coloured else None
            look = _OTHERS if i is None else Look(CYCLE[i], MARKERS[i], _DASHES[i])
            _line(axes, sorted(points), name, look)
        plain_log(axes, "x")
        if all(isinstance(value, int) for value in study.axes[axis]) and len(study.axes[axis]) <= 8:
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks([float(v) for v in study.axes[axis]], [f"{v:,}" for v in study.axes[axis]])
        plain_log(axes, "y")
        axes.set(
            xlabel={
                "local_steps": "T: local steps a round",
                "density": "u: share that moves",
                "dp_epsilon": "epsilon",
            }.get(axis, axis)
        )
        axes.set_ylabel("final loss")
        _legend(axes, len(lines.keys() - set(coloured)))
    return figure


def _along_lines(
    rows: Sequence[Row], axis: str, left_out: Collection[str]
) -> dict[str, list[tuple[float, list[float]]]]:
    """By setting of the axes not left out: (value of the axis, loss of each seed) of each row."""
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for row in rows:
        rest = {name: value for name, value in row["setting"].items() if name not in left_out}
        if losses := finite(row["loss"]):
            lines.setdefault(setting_words(rest) if rest else "", []).append((float(row["setting"][axis]), losses))
    return lines


def _line(axes: Axes, points: Sequence[tuple[float, list[float]]], name: str, look: Look) -> None:
    x, means = [value for value, _ in points], [mean(held) for _, held in points]
    if look is _OTHERS:
        axes.plot(x, means, color=look.colour, lw=0.9, zorder=2)
        return
    axes.plot(x, means, color=look.colour, marker=look.marker, ls=look.dashes, label=short(name) if name else "_")
    dots = np.array([(value, loss) for value, held in points for loss in held])
    axes.plot(dots[:, 0], dots[:, 1], "o", color=look.colour, ms=2.5, alpha=0.6, mew=0)


def rates(study: Study, rows: Sequence[Row]) -> Figure | None:
    """The learning-rate search: held-back loss over rate, the rate taken in a ring; None where none was made."""
    searched = [row for row in rows if row.get("rates")]
    if not searched:
        return None
    shown, lost, any_lost = looks(study), 0, False
    with drawing() as (figure, axes):
        for row in searched:
            look = shown[study.within(row)]
            diverged = _search(axes, row, look, short(study.within(row)), lost)
            lost, any_lost = lost + (diverged and look is not _OTHERS), any_lost or diverged
        if any_lost:
            axes.plot([], [], "x", color=INK, ms=5, mew=1.5, label="diverged")
            axes.margins(y=0.2)
        plain_log(axes, "x")
        tried = sorted({float(rate) for row in searched for rate, _ in row["rates"]})
        if len(tried) <= 7:
            axes.set_xticks(tried, [f"{rate:g}" for rate in tried])
            axes.xaxis.set_minor_locator(NullLocator())
        plain_log(axes, "y")
        axes.set(xlabel="learning rate", ylabel="loss on held-back rows")
        _legend(axes, sum(shown[study.within(row)] is _OTHERS for row in searched))
    return figure


def _search(axes: Axes, row: Row, look: Look, name: str, above: int) -> bool:
    """One setting's search; crosses of diverged rates stand under those `above`. Returns whether there are any."""
    plain = look is _OTHERS
    kept = [(rate, loss) for rate, loss in row["rates"] if finite([loss])]
    lost = [rate for rate, loss in row["rates"] if not finite([loss])]
    if kept:
        x, y = zip(*kept, strict=True)
        label, width = "_" if plain else name, 0.9 if plain else 1.4
        axes.plot(x, y, color=look.colour, marker=look.marker, ls=look.dashes, lw=width, label=label, ms=3.5)
    for rate, loss in kept:
        if np.isclose(rate, row["lr"]) and not plain:
            axes.plot(rate, loss, "o", ms=9, mfc="none", mec=look.colour, mew=1.4)
    height = 0.97 - 0.05 * min(above, 8) if not plain else 0.5
    for rate in lost:
        axes.plot(rate, height, "x", color=look.colour, ms=5, mew=1.5, transform=axes.get_xaxis_transform())
    return bool(lost)


_VERDICTS = {"holds": (GREEN, "o"), "fails": (RED, "X"), "undecided": (MUTED, "s")}


def differences(check: Mapping[str, Any]) -> Figure:
    """A claim's paired differences: a mark a setting with two standard errors either way."""
    held = [d for d in check["differences"] if finite([d["mean"]])]
    with drawing(4.4, 0.75 + 0.24 * max(len(held), 2)) as (figure, axes):
        axes.axvline(0, color=INK, lw=1)
        for place, one in enumerate(held):
            colour, marker = _VERDICTS.get(one["verdict"], _VERDICTS["undecided"])
            wide = 2 * (mean([one["se"]]) if finite([one["se"]]) else 0.0)
            axes.errorbar(one["mean"], place, xerr=wide, color=colour, marker=marker, ms=5, lw=1.5, capsize=2.5)
        names = [short(name, 34) for name in told_apart([one["setting"] for one in held])]
        axes.set_yticks(range(len(held)), names)
        axes.set_ylim(len(held) - 0.4, -0.6)
        axes.margins(x=0.08)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"difference in {check.get('measure', 'accuracy')}, two standard errors either way")
    return figure
