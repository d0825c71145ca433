"""Drawing what every client did, be they one or a thousand: who stands out in colour, the others in grey."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from meerkat.report.drawing import BLUE, MUTED, PURPLE, RED, REST, legend_above

End = tuple[float, float, int, str]
"""Height and place along x at which a line ends, its client, its colour."""
FEW = 12
"""Up to so many clients of a group have a line each; more have a band."""


@dataclass(frozen=True)
class Group:
    """Clients that are drawn alike."""

    name: str
    clients: tuple[int, ...]
    colour: str
    dashes: str = "-"
    marker: str = "o"


def groups(clients: Sequence[int], stopped: Sequence[int], extreme: Sequence[int] | None) -> list[Group]:
    """Clients by what is known of their data and by whether they were stopped early; the plain ones first."""
    known, short = set(extreme or ()), set(stopped)
    if extreme is None:
        kinds = [
            Group("goes on", tuple(k for k in clients if k not in short), REST),
            Group("stopped early", tuple(k for k in clients if k in short), RED, "-", "X"),
        ]
    else:
        kinds = [
            Group("several labels, goes on", tuple(k for k in clients if k not in known | short), REST),
            Group("one label, stopped early", tuple(k for k in clients if k in known & short), RED, "-", "X"),
            Group("one label, goes on", tuple(k for k in clients if k in known - short), PURPLE, "--", "D"),
            Group("several labels, stopped early", tuple(k for k in clients if k in short - known), BLUE, "-.", "s"),
        ]
    return [group for group in kinds if group.clients]


def draw_lines(
    axes: Axes, x: np.ndarray, values: np.ndarray, clients: Sequence[int], kinds: Sequence[Group], *, log: bool
) -> list[End]:
    """One line a client in small groups; in large ones the median and two bands of clients.

    Args:
        values: float64 [clients, points]; nan where a client has none.

    Returns:
        Where the single lines that stand out end, to be named once the axes' limits stand.
    """
    row = {client: i for i, client in enumerate(clients)}
    ends: list[End] = []
    for above, group in enumerate(kinds):
        held = values[[row[client] for client in group.clients]]
        if log:
            held = np.where(held > 0, held, np.nan)
        count = len(group.clients)
        label = f"{group.name} ({count:,})"
        if count > FEW:
            _bands(axes, x, held, group, label)
            continue
        for row_in_group, line in enumerate(held):
            seen = np.isfinite(line)
            width = 1.1 if group.colour == REST else 1.6
            dot = "." if seen.sum() < 3 else None  # a line of one point would not be seen
            axes.plot(
                x[seen],
                line[seen],
                group.dashes,
                marker=dot,
                color=group.colour,
                lw=width,
                zorder=3 + above,
                label=label,
            )
            label = "_"
            if group.colour != REST and seen.any():
                ends.append((float(line[seen][-1]), float(x[seen][-1]), group.clients[row_in_group], group.colour))

    return ends


def name_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Client ids at the right of lines that stand out, moved apart where they would overlap; the limits stand."""
    if len(ends) > 6:
        return
    height, right = -1.0, axes.get_xlim()[1]
    scale = axes.transData + axes.transAxes.inverted()
    for value, x, client, colour in sorted(ends):
        across, up = (float(part) for part in scale.transform((x, value)))
        if x < 0.85 * right:  # it ends early: its name stands there
            place = (across + 0.012, min(max(up, 0.0), 1.0))
        else:
            height = max(min(max(up, 0.0), 1.0), height + 0.05)
            place = (1.012, height)
        axes.annotate(str(client), place, xycoords="axes fraction", fontsize=7.5, color=colour, va="center")


def _bands(axes: Axes, x: np.ndarray, held: np.ndarray, group: Group, label: str) -> None:
    seen = np.isfinite(held).any(0)
    low, quarter, middle, three, high = np.nanquantile(held[:, seen], (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
    if group.colour == REST:  # a second pale band would hide the first
        axes.fill_between(x[seen], low, high, color=group.colour, alpha=0.2, lw=0)
    axes.fill_between(x[seen], quarter, three, color=group.colour, alpha=0.3, lw=0)
    colour = MUTED if group.colour == REST else group.colour
    axes.plot(x[seen], middle, group.dashes, color=colour, lw=1.4, label=label)


def how_drawn(kinds: Sequence[Group]) -> str:
    """For a caption: what a line or a band is."""
    if all(len(group.clients) <= FEW for group in kinds):
        return "one line a client"
    return f"groups of more than {FEW} are a median with a band of half their clients, and of nine tenths in pale grey"


def names(axes: Axes, kinds: Sequence[Group]) -> None:
    """The legend, above the plot: a line a group, never a line a client."""
    if len(kinds) > 1 or kinds[0].colour != REST:
        legend_above(axes)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` steps around each step, fewer at the ends: float64 [..., S]."""
    steps = values.shape[-1]
    total = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, -1)], -1)
    at = np.arange(steps)
    first, last = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, steps)
    found: np.ndarray = (total[..., last] - total[..., first]) / (last - first)
    return found


def thinned(x: np.ndarray, values: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over neighbours, so that at most so many points are left: x [S], values [clients, S]; nan is absent."""
    if len(x) <= points:
        return x, values
    parts = np.array_split(np.arange(len(x)), points)
    counts = np.stack([np.isfinite(values[:, part]).sum(1) for part in parts], 1)
    sums = np.stack([np.nansum(values[:, part], 1) for part in parts], 1)
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return np.array([x[part].mean() for part in parts]), means


def binned(steps: Sequence[np.ndarray], values: Sequence[np.ndarray], bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Each series' means over equal stretches of steps: (middles [bins], float64 [series, bins]; nan where none)."""
    end = max(int(part[-1]) for part in steps) + 1
    edges = np.linspace(0, end, min(bins, end) + 1)
    found = np.full((len(steps), len(edges) - 1), np.nan)
    for row, (at, held) in enumerate(zip(steps, values, strict=True)):
        place = np.minimum(np.searchsorted(edges, at, side="right") - 1, len(edges) - 2)
        counts = np.bincount(place, minlength=len(edges) - 1)
        sums = np.bincount(place, weights=held, minlength=len(edges) - 1)
        found[row, counts > 0] = sums[counts > 0] / counts[counts > 0]
    return (edges[:-1] + edges[1:]) / 2, found
