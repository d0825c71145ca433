"""What all figures share: style, axes, and the way to a file or into a page.

In a figure's files its colours stay as they are, on white; in a page each becomes a CSS variable, so that one drawing
suits light and dark.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from meerkat.record.files import write_atomically
from meerkat.report.sentences import data_size
from meerkat.report.style import GRID, INK, MUTED, VARIABLES

HEAT = LinearSegmentedColormap.from_list("heat", [(0.05, 0.47, 0.79, 0.0), (0.05, 0.47, 0.79, 1.0)])
"""From transparent to a blue that stands out in light and in dark."""

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "savefig.dpi": 200,
    "svg.hashsalt": "meerkat",
    "text.parse_math": False,  # a label may hold dollar signs
}


@contextmanager
def drawing(width: float = 4.4, height: float = 2.9) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one plot, in the common style; width and height in inches."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots()
        with _missing_glyphs_ignored():
            figure.draw_without_rendering()
        figure.set_layout_engine("none")  # final: saving does not lay it out again


@contextmanager
def _missing_glyphs_ignored() -> Iterator[None]:
    """No warning about characters that matplotlib's font lacks: a page shows them, a PNG shows boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def save(figure: Figure, stem: Path) -> None:
    """Write stem.png and stem.svg on white, the same bytes each time.

    Raises:
        RunFailed: a file cannot be written.
    """
    for form, metadata in (("png", {"Software": "meerkat"}), ("svg", {"Date": None, "Creator": "meerkat"})):
        options: dict[str, Any] = {"format": form, "metadata": metadata, "facecolor": "white"}
        with mpl.rc_context(_STYLE | {"svg.fonttype": "path"}), _missing_glyphs_ignored():
            path = stem.with_name(f"{stem.name}.{form}")
            write_atomically(path, partial(figure.savefig, **options), "make room, then try again")


def inline(figure: Figure, name: str, label: str) -> str:
    """The figure as an SVG element for a page.

    Args:
        name: unique in the page; ids in the element begin with it.
        label: what a screen reader says, as escaped HTML.
    """
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE | {"svg.fonttype": "none"}), _missing_glyphs_ignored():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = _with_unique_ids(text, name)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"(font: |font-family: )([^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1\2var(--font)", text)
    text = re.sub(r' (d|x|y)="[^"]*"', lambda attribute: _two_decimals(attribute.group()), text)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box
    opening = f'<svg viewBox="{box.group(1)}" role="img" aria-label="{label}">'
    return re.sub(r"\n\s*", "\n", re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)).strip()


def _two_decimals(text: str) -> str:
    return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number.group()):.2f}", text)


def _with_unique_ids(text: str, name: str) -> str:
    """Prefix the ids that something refers to with the figure's name, and drop all others."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda id_: f' id="{name}-{id_[1]}"' if id_[1] in used else "", text)
    text = text.replace("xlink:href=", "href=")
    return re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)


def plain_log(axes: Axes, which: str) -> None:
    """A log scale along "x" or "y" with plain numbers at 1, 2 and 5, or only at decades where there are many."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    low, high = axis.get_view_interval()
    ratio = abs(high / low) if low > 0 else 10.0
    if ratio < 3:  # 1, 2 and 5 would leave one tick or none
        axis.set_major_locator(MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
    else:
        subs = (1, 1.5, 2, 3, 5, 7) if ratio < 6 else (1, 2, 5) if ratio < 300 else (1,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}")
    axis.set_minor_formatter(NullFormatter())


def whole_numbers(axes: Axes) -> None:
    """Ticks along x at whole numbers, few enough to read."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def short(text: str, most: int = 30) -> str:
    """A name cut to fit a legend or a tick; matplotlib hides a name that begins with "_"."""
    text = " " + text if text.startswith("_") else text
    return text if len(text) <= most else text[: most - 1] + "…"


def legend_above(axes: Axes) -> None:
    """A legend above the plot, in as many columns as fit."""
    handles, names = axes.get_legend_handles_labels()
    if not names:
        return
    assert isinstance(axes.figure, Figure)
    columns = next((c for c in (5, 4, 3, 2) if _legend_width(names, c) <= axes.figure.get_figwidth()), 1)
    rows = -(-len(names) // columns)
    axes.figure.set_figheight(axes.figure.get_figheight() + 0.16 * max(0, rows - 2))  # the plot keeps its size
    axes.figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=1.9, columnspacing=1.2)


def _legend_width(names: Sequence[str], columns: int) -> float:
    """A legend's approximate width in inches; it is filled column by column."""
    rows = -(-len(names) // columns)
    return sum(0.42 + 0.066 * max(map(len, names[i : i + rows])) for i in range(0, len(names), rows))


def byte_ticks(axes: Axes) -> None:
    """Ticks along x in bytes."""
    axes.xaxis.set_major_formatter(lambda value, _: data_size(value))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if axes.get_xscale() != "log":
        axes.xaxis.set_major_locator(MaxNLocator(5))


def heat_key(axes: Axes, meaning: str) -> None:
    """The key of a heat map, above the plot: a bar of its shades, and what its two ends mean."""
    inch = 1 / (float(axes.bbox.height) / axes.figure.dpi)
    bar = axes.inset_axes((0.0, 1 + 0.08 * inch, 0.22, 0.1 * inch))
    bar.imshow([[i / 63 for i in range(64)]], cmap=HEAT, vmin=0, vmax=1, aspect="auto", interpolation="none")
    bar.set(xticks=[], yticks=[])
    bar.grid(visible=False)
    for spine in bar.spines.values():
        spine.set(visible=True, linewidth=0.6)
    bar.annotate(meaning, (1.05, 0.5), xycoords="axes fraction", va="center", fontsize=8)
