"""Figures of a study: its settings side by side, seed by seed."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from meerkat.report.drawing import drawing, legend_above, plain_log, short, whole_numbers
from meerkat.report.facts import Row, Study, distinct_names, finite, mean, setting_in_words
from meerkat.report.style import BLUE, CYCLE, GREEN, GREY, INK, MARKERS, MUTED, RED

_DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), ":", (0, (8, 2)), (0, (3, 1)))


@dataclass(frozen=True)
class LineStyle:
    """How one setting is drawn in all panels of a study."""

    colour: str
    marker: str
    dashes: Any

    def plot(self, axes: Axes, x: ArrayLike, y: ArrayLike, name: str, **style: Any) -> None:
        """Draw a line: thin and grey without a name if the setting is one of many others, else in its style."""
        if self is _BACKGROUND:
            axes.plot(x, y, color=GREY, lw=0.9, zorder=2)
        else:
            axes.plot(x, y, label=short(name) if name else "_", color=self.colour, ls=self.dashes, **style)


_BACKGROUND = LineStyle(GREY, "", "-")
_STYLES = [LineStyle(*style) for style in zip(CYCLE, MARKERS, _DASHES, strict=True)]


def _styles(names: Sequence[str], best: Sequence[str]) -> dict[str, LineStyle]:
    """A style for each name, in colour for those of the best that there are colours for."""
    coloured = [name for name in names if name in best[: len(_STYLES)]]
    return dict.fromkeys(names, _BACKGROUND) | dict(zip(coloured, _STYLES, strict=False))


def _styles_by_score(study: Study) -> dict[str, LineStyle]:
    """A style for each setting within a panel, in colour for the best."""
    scores: dict[str, list[float]] = {}
    for row in study.rows:
        scores.setdefault(study.name_in_panel(row), []).append(mean(row["scores"][study.score]))
    sign = -1 if study.better[study.score] == "higher" else 1
    return _styles(list(scores), sorted(scores, key=lambda name: np.nan_to_num(sign * mean(scores[name]), nan=np.inf)))


def _legend(axes: Axes, styles: Collection[LineStyle]) -> None:
    """A legend above the plot, with the number of lines in the background."""
    if others := sum(style is _BACKGROUND for style in styles):
        axes.plot([], [], color=GREY, lw=1, label=f"{others} others")
    legend_above(axes)


def curves(study: Study, rows: Sequence[Row], score: str) -> Figure | None:
    """A score over local steps: means over seeds, and bands from the lowest to the highest.

    Returns:
        None where no run folder is there.
    """
    lines = [(study.name_in_panel(row), curve) for row in rows if (curve := study.curves(row, score)) is not None]
    if not lines:
        return None
    styles = _styles_by_score(study)
    with drawing() as (figure, axes):
        for name, (steps, values) in lines:
            style = styles[name]
            if len(values) > 1 and style is not _BACKGROUND:
                low, high = np.nanmin(values, 0), np.nanmax(values, 0)
                axes.fill_between(steps, low, high, color=style.colour, alpha=0.15, lw=0)
            style.plot(axes, steps, np.nanmean(values, 0), name, lw=1.6, zorder=3)
        axes.set(xlabel="local steps a client (rounds times T)", ylabel=score)
        if score == study.score and study.score_range:
            low, high = study.score_range
            axes.set_ylim(low - 0.06 * (high - low + 0.01), high + 0.06 * (high - low + 0.01))
        whole_numbers(axes)
        _legend(axes, [styles[name] for name, _ in lines])
    return figure


def final(study: Study) -> Figure:
    """The final score: a line a setting, a dot a seed, an upright stroke their mean."""
    rows = study.rows
    with drawing(4.4, 0.75 + 0.2 * max(len(rows), 3)) as (figure, axes):
        for place, row in enumerate(rows):
            seeds, colour = finite(row["scores"][study.score]), BLUE if row.get("best") else MUTED
            if not seeds:
                axes.annotate("diverged", (0.02, place), xycoords=axes.get_yaxis_transform(), color=RED, va="center")
                continue
            axes.plot(seeds, [place] * len(seeds), "o", color=colour, ms=4.5, alpha=0.75, mew=0)
            axes.plot([mean(seeds)] * 2, [place - 0.32, place + 0.32], color=colour, lw=2)
        _rows_down(axes, [short(setting_in_words(row["setting"]), 40) for row in rows])
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            if row.get("best"):
                label.set(fontweight="bold", color=BLUE)
        first = next(iter(study.axes)) if len(study.axes) > 1 else ""
        for place, (row, below) in enumerate(itertools.pairwise(rows)):
            if row["setting"].get(first) != below["setting"].get(first):
                axes.axhline(place + 0.5, color=MUTED, lw=0.7)
        axes.margins(x=0.06)
        axes.set_xlabel(f"final {study.score}")
    return figure


def _rows_down(axes: Axes, names: Sequence[str]) -> None:
    """A named row at each of 0, 1, ..., from the top down."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def loss_along(study: Study, rows: Sequence[Row], axis: str, by_panel: bool) -> Figure | None:
    """Final loss along a numeric axis, both on log scales: a line for each setting of the other axes, a dot a seed.

    Args:
        by_panel: the rows share a value of the first axis, which lines then do not name.
    """
    unnamed = {axis, next(iter(study.axes))} if by_panel else {axis}
    lines, of_all_panels = _losses_along(rows, axis, unnamed), _losses_along(study.rows, axis, unnamed)
    if not lines:
        return None
    best = sorted(of_all_panels, key=lambda name: min(mean(losses) for _, losses in of_all_panels[name]))
    styles, values = _styles(list(of_all_panels), best), study.axes[axis]
    with drawing() as (figure, axes):
        for name, points in lines.items():
            style, (x, losses) = styles[name], zip(*sorted(points), strict=True)
            style.plot(axes, x, list(map(mean, losses)), name, marker=style.marker)
            if style is not _BACKGROUND:
                dots = np.repeat(x, [len(each) for each in losses]), np.concatenate(losses)
                axes.plot(*dots, "o", color=style.colour, ms=2.5, alpha=0.6, mew=0)
        plain_log(axes, "x")
        if all(isinstance(value, int) for value in values) and len(values) <= 8:
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks([float(value) for value in values], [f"{value:,}" for value in values])
        plain_log(axes, "y")
        x_names = {"local_steps": "T: local steps a round", "density": "u: share that moves"}
        axes.set(xlabel=x_names.get(axis, axis), ylabel="final loss")
        _legend(axes, [styles[name] for name in lines])
    return figure


def _losses_along(
    rows: Sequence[Row], axis: str, unnamed: Collection[str]
) -> dict[str, list[tuple[float, list[float]]]]:
    """By setting of the other axes: (value of the axis, loss of each seed) of each row with a finite loss."""
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for row in rows:
        others = {name: value for name, value in row["setting"].items() if name not in unnamed}
        if losses := finite(row["loss"]):
            name = setting_in_words(others) if others else ""
            lines.setdefault(name, []).append((float(row["setting"][axis]), losses))
    return lines


def rate_search(study: Study, rows: Sequence[Row]) -> Figure | None:
    """The learning-rate search: held-back loss over rate, the chosen rate in a ring; None where there was none."""
    searched = [row for row in rows if row.get("rates")]
    if not searched:
        return None
    styles, crossed, any_diverged = _styles_by_score(study), 0, False
    with drawing() as (figure, axes):
        for row in searched:
            name = study.name_in_panel(row)
            diverged = _draw_search(axes, row, styles[name], name, crossed)
            any_diverged |= diverged
            crossed += diverged and styles[name] is not _BACKGROUND
        if any_diverged:
            axes.plot([], [], "x", color=INK, ms=5, mew=1.5, label="diverged")
            axes.margins(y=0.2)
        plain_log(axes, "x")
        tried = sorted({float(rate) for row in searched for rate, _ in row["rates"]})
        if len(tried) <= 7:
            axes.set_xticks(tried, [f"{rate:g}" for rate in tried])
            axes.xaxis.set_minor_locator(NullLocator())
        plain_log(axes, "y")
        axes.set(xlabel="learning rate", ylabel="loss on held-back rows")
        _legend(axes, [styles[study.name_in_panel(row)] for row in searched])
    return figure


def _draw_search(axes: Axes, row: Row, style: LineStyle, name: str, crossed: int) -> bool:
    """One setting's search. Rates that diverged are crosses, below those of the settings already `crossed`.

    Returns:
        Whether any rate diverged.
    """
    finished = [(rate, loss) for rate, loss in row["rates"] if finite([loss])]
    diverged = [rate for rate, loss in row["rates"] if not finite([loss])]
    if finished:
        x, y = zip(*finished, strict=True)
        style.plot(axes, x, y, name, marker=style.marker, lw=1.4, ms=3.5)
    for rate, loss in finished:
        if np.isclose(rate, row["lr"]) and style is not _BACKGROUND:
            axes.plot(rate, loss, "o", ms=9, mfc="none", mec=style.colour, mew=1.4)
    height = 0.5 if style is _BACKGROUND else 0.97 - 0.05 * min(crossed, 8)
    for rate in diverged:
        axes.plot(rate, height, "x", color=style.colour, ms=5, mew=1.5, transform=axes.get_xaxis_transform())
    return bool(diverged)


_VERDICTS = {"holds": (GREEN, "o"), "fails": (RED, "X"), "undecided": (MUTED, "s")}


def differences(claim: Mapping[str, Any]) -> Figure:
    """A claim's paired differences: a mark a setting, with its 90% interval."""
    pairs = [pair for pair in claim["differences"] if finite([pair["mean"]])]
    with drawing(4.4, 0.75 + 0.24 * max(len(pairs), 2)) as (figure, axes):
        axes.axvline(0, color=INK, lw=1)
        for place, pair in enumerate(pairs):
            colour, marker = _VERDICTS.get(pair["verdict"], _VERDICTS["undecided"])
            error = sum(finite([pair.get("limit")]))
            axes.errorbar(pair["mean"], place, xerr=error, color=colour, marker=marker, ms=5, lw=1.5, capsize=2.5)
        _rows_down(axes, [short(name, 34) for name in distinct_names([pair["setting"] for pair in pairs])])
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"difference in {claim['measure']}, with its 90% interval")
    return figure
