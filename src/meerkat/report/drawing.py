"""How all figures look, and turning one into files for a paper and into SVG for a page.

Figures are drawn in a few fixed colours. In a paper they stay what they are, on white; in a page each becomes
a CSS variable, so that the same drawing is readable in light and in dark. The hues are Okabe and Ito's, which
people with any colour blindness tell apart; lines differ in dashes or markers as well.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from meerkat.record.run_folder import write_atomically

INK, MUTED, GRID, PAPER = "#1c1f24", "#666c75", "#dde0e4", "#fefefe"
BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BROWN, REST = [
    "#0069a8",
    "#cf5300",
    "#008f6b",
    "#b8568f",
    "#d99000",
    "#4da9dd",
    "#7a5230",
    "#9aa1ab",
]
ON_HEAT = "#ffffff"
"""Text on a deep shade of a heat map, in light and in dark."""
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BROWN)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
VARIABLES = {
    **{INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", REST: "rest", BLUE: "blue", RED: "red"},
    **{GREEN: "green", PURPLE: "purple", ORANGE: "orange", SKY: "sky", BROWN: "brown"},
}
"""Each colour's CSS variable, in light its own value; page.py gives the values in dark."""

HEAT = LinearSegmentedColormap.from_list("heat", [(0.05, 0.47, 0.79, 0.0), (0.05, 0.47, 0.79, 1.0)])
"""From the page's own colour to a blue that stands out in light and in dark."""

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
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
_PAPER_SVG = {"svg.fonttype": "path"}
_PAGE_SVG = {"svg.fonttype": "none"}


@contextmanager
def drawing(width: float = 4.4, height: float = 2.9) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one plot, in inches, and the style for what is drawn on it."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots()
        with _any_script():
            figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it stands: each file is drawn without laying it out again


@contextmanager
def _any_script() -> Iterator[None]:
    """No warning about a label in a script that matplotlib's font lacks: a page shows it, a PNG shows boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg, for a paper: on white, the same bytes each time."""
    paths = [stem.with_name(f"{stem.name}.{form}") for form in ("png", "svg")]
    for path in paths:
        write_atomically(path, _writer(figure, path.suffix[1:]), "make room, then try again")
    return paths


def _writer(figure: Figure, form: str) -> Any:
    said: Mapping[str, Any] = {"Date": None, "Creator": "meerkat"} if form == "svg" else {"Software": "meerkat"}

    def write(part: Path) -> None:
        with mpl.rc_context(_STYLE | _PAPER_SVG), _any_script():
            figure.savefig(part, format=form, facecolor="white", metadata=dict(said))

    return write


def inline(figure: Figure, name: str, label: str) -> str:
    """The figure as an SVG element for a page.

    Args:
        name: unlike any other in the page; ids inside begin with it.
        label: what a screen reader says; HTML-escaped already.
    """
    held = io.StringIO()
    with mpl.rc_context(_STYLE | _PAGE_SVG), _any_script():
        figure.savefig(held, format="svg", transparent=True, metadata={"Date": None})
    text = held.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = _own_ids(text, name)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"(font: |font-family: )([^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1\2var(--font)", text)
    text = re.sub(r' (d|x|y)="[^"]*"', lambda held: _LONG.sub(_shorter, held.group()), text)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box
    opening = f'<svg viewBox="{box.group(1)}" role="img" aria-label="{label}">'
    return re.sub(r"\n\s*", "\n", re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)).strip()


_LONG = re.compile(r"-?\d+\.\d{3,}")


def _shorter(number: re.Match[str]) -> str:
    return f"{float(number.group()):.2f}"


def _own_ids(text: str, name: str) -> str:
    """Ids that something points to get the figure's name in front; all others go."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(
        r' id="([^"]*)"', lambda found: f' id="{name}-{found.group(1)}"' if found.group(1) in used else "", text
    )
    text = re.sub(r'xlink:href="#', 'href="#', text)
    text = re.sub(r"xlink:href=", "href=", text)
    return re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)


def plain_log(axes: Axes, which: str) -> None:
    """A log scale with plain numbers at 1, 2 and 5 of as many decades as there are."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    low, high = axis.get_view_interval()
    ratio = abs(high / low) if low > 0 else 10.0
    if ratio < 3:  # round numbers, as 1, 2 and 5 would leave one tick or none
        axis.set_major_locator(MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(
            LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if ratio < 6 else (1, 2, 5) if ratio < 300 else (1,), numticks=12)
        )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"))
    axis.set_minor_formatter(NullFormatter())


def whole_numbers(axes: Axes, which: str = "x") -> None:
    """Ticks at whole numbers, few enough to read."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def short(text: str, most: int = 30) -> str:
    """A name for a legend or a tick, cut where it is long; matplotlib would hide one that begins with "_"."""
    text = " " + text if text.startswith("_") else text
    return text if len(text) <= most else text[: most - 1] + "…"


def legend_above(axes: Axes) -> None:
    """The legend above the plot, in as many columns as its names leave room for."""
    handles, names = axes.get_legend_handles_labels()
    if not names:
        return
    assert isinstance(axes.figure, Figure)
    columns = next((c for c in (5, 4, 3, 2) if _legend_width(names, c) <= axes.figure.get_figwidth()), 1)
    rows = -(-len(names) // columns)
    axes.figure.set_figheight(axes.figure.get_figheight() + 0.16 * max(0, rows - 2))  # the plot keeps its room
    axes.figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=1.9, columnspacing=1.2)


def _legend_width(names: Sequence[str], columns: int) -> float:
    """About how wide a legend is, in inches; it is filled column by column."""
    rows = -(-len(names) // columns)
    return sum(0.42 + 0.066 * max(map(len, names[i : i + rows])) for i in range(0, len(names), rows))


def data_size(count: float) -> str:
    """Bytes as a person says them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def byte_ticks(axes: Axes) -> None:
    """Ticks along x as bytes."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: data_size(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if axes.get_xscale() != "log":
        axes.xaxis.set_major_locator(MaxNLocator(5))


def heat_key(axes: Axes, said: str) -> None:
    """What the shades of a heat map stand for: a bar of them, and its two ends in words, above the plot."""
    inch = 1 / (float(axes.bbox.height) / axes.figure.dpi)
    place = axes.inset_axes((0.0, 1 + 0.08 * inch, 0.22, 0.1 * inch))
    place.imshow([[i / 63 for i in range(64)]], cmap=HEAT, vmin=0, vmax=1, aspect="auto", interpolation="none")
    place.set(xticks=[], yticks=[])
    place.grid(visible=False)
    for spine in place.spines.values():
        spine.set(visible=True, linewidth=0.6)
    place.annotate(said, (1.05, 0.5), xycoords="axes fraction", va="center", fontsize=8)
