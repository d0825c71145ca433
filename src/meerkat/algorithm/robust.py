"""Robust aggregation: a round's G from its replies, where up to f of them may be anything.

All clients share z, so an update is its scalars: rules made for vectors of parameters work here on the joint matrix,
clients x (T P). docs/robustness.md says what each needs and withstands. The rules but the mean count clients equally.

**Steps that a client did not make** are not votes for zero. Each run of steps that the same m of K clients made is
aggregated over those m, by the plain median where m is too few for the rule and f. It counts m / K, as if the others'
weights had stood still and been averaged with theirs (the paper's way), or 1 where `missing_steps` are left out.

Float64 throughout, in order of client id, by operations of a fixed order (elementwise, sorting, running sums): the same
bits on every machine.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

Rule = Literal["mean", "median", "trimmed-mean", "krum", "multi-krum"]
Mixing = Literal["none", "nearest-neighbour"]
Clipping = Literal["none", "median", "fixed"]
MissingSteps = Literal["zero", "left-out"]

_CHUNK = 1 << 20
"""Entries widened to float64 at a time."""


@dataclass(frozen=True)
class Aggregation:
    """How replies become one."""

    rule: Rule = "mean"
    byzantine: int = 0
    """f: replies of a round that may be anything."""
    mixing: Mixing = "none"
    clipping: Clipping = "none"
    """Whose length is bounded: by the median of all, or by `clip_norm`."""
    clip_norm: float = 0.0
    """The L2 norm of a reply's scalars, at most, where clipping is fixed."""
    missing_steps: MissingSteps = "zero"
    """What a client counts in steps that it did not make: zero, or nothing, so that the others' weights add up to 1."""
    keeps_replies: ClassVar[bool] = True
    """Whether each reply stays in the record, so that G and GradIP can be recomputed from it."""

    @property
    def needs_f(self) -> bool:
        """Whether f says anything."""
        return self.rule in ("trimmed-mean", "krum", "multi-krum") or self.mixing != "none"

    @property
    def least(self) -> int:
        """Clients that rule and mixing need."""
        if not self.needs_f:
            return 1
        return 2 * self.byzantine + (3 if self.rule in ("krum", "multi-krum") else 1)

    @property
    def weighs(self) -> bool:
        """Whether clients may count by their rows: only in the mean."""
        return self.rule == "mean"

    def invited(self, _: int, available: Collection[int] | None) -> Collection[int] | None:
        """The clients that a round may ask: those that are available, or None for everyone."""
        return available

    def combine(
        self, replies: Mapping[int, np.ndarray], weights: Mapping[int, float], shape: tuple[int, int]
    ) -> np.ndarray:
        """G before the cap, and before it is rounded: float64 [T, P].

        Args:
            replies: g_k by client id, float32 [T_k, P] with T_k <= T.
            weights: p_k, which only the mean looks at.
            shape: T, the most steps that a client was asked for, and P.
        """
        total = np.zeros(shape)
        rows = clipped({client: replies[client].astype(np.float64) for client in sorted(replies)}, self)
        if self.rule == "mean":
            shares = np.zeros((shape[0], 1))
            for client, row in rows.items():
                total[: len(row)] += weights[client] * row
                shares[: len(row)] += weights[client]
            return total if self.missing_steps == "zero" else np.divide(total, shares, out=total, where=shares > 0)
        first = 0
        for last in sorted({len(row) for row in rows.values()}):
            among = np.stack([row[first:last].ravel() for row in rows.values() if len(row) >= last])
            share = len(among) / len(rows) if self.missing_steps == "zero" else 1.0
            total[first:last] = share * robust(among, self).reshape(last - first, shape[1])
            first = last
        return total


MEAN = Aggregation()


def robust(rows: np.ndarray, by: Aggregation) -> np.ndarray:
    """One row for many: float64 [D] from float64 [K, D], by a rule that counts all equally."""
    if len(rows) < by.least:
        return median(rows)
    if by.mixing != "none":
        rows = mixed(rows, by.byzantine)
    return RULES[by.rule](rows, by.byzantine)


def median(rows: np.ndarray, _: int = 0) -> np.ndarray:
    """The middle value of each coordinate, or the mean of the middle two (Yin et al. 2018)."""
    ordered, middle = np.sort(rows, axis=0), len(rows) // 2
    values: np.ndarray = ordered[middle] if len(rows) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return values


def trimmed_mean(rows: np.ndarray, f: int) -> np.ndarray:
    """The mean of each coordinate's values but the f lowest and the f highest (Yin et al. 2018)."""
    return _mean(np.sort(rows, axis=0)[f : len(rows) - f])


def krum(rows: np.ndarray, f: int) -> np.ndarray:
    """The row that Krum ranks first; of equals, that of the lowest client id (Blanchard et al. 2017)."""
    row: np.ndarray = rows[_ranked(rows, f)[0]]
    return row


def multi_krum(rows: np.ndarray, f: int) -> np.ndarray:
    """The mean of the K - f rows that Krum ranks first."""
    return _mean(rows[np.sort(_ranked(rows, f)[: len(rows) - f])])


RULES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "mean": lambda rows, _: _mean(rows),
    "median": median,
    "trimmed-mean": trimmed_mean,
    "krum": krum,
    "multi-krum": multi_krum,
}
"""Rows of equals, float64 [K, D], and f -> float64 [D]."""


def mixed(rows: np.ndarray, f: int) -> np.ndarray:
    """Nearest-neighbour mixing (Allouah et al. 2023): each row the mean of the K - f nearest to it, itself among them.

    Honest rows that differ are drawn together. float64 [K, D].
    """
    near = np.argsort(_distances(rows), axis=1, kind="stable")[:, : len(rows) - f]
    return np.stack([_mean(rows[np.sort(chosen)]) for chosen in near])


def clipped(rows: Mapping[int, np.ndarray], by: Aggregation) -> dict[int, np.ndarray]:
    """Rows (float64 [T_k, P], by client id) of which none is longer than it may be.

    The median is that of root mean squares, since replies may have fewer steps. It needs no setting, follows the
    scalars down as losses fall, and lies between honest ones as long as most are; half of all replies are clipped.
    """
    if by.clipping == "none" or not rows:
        return dict(rows)
    lengths = {client: norm(row) for client, row in rows.items()}
    bounds = dict.fromkeys(rows, by.clip_norm)
    if by.clipping == "median":
        size = {client: math.sqrt(row.size) for client, row in rows.items()}
        level = float(median(np.array([lengths[client] / size[client] for client in rows])))
        bounds = {client: level * size[client] for client in rows}
    return {
        client: row * (bounds[client] / lengths[client]) if lengths[client] > bounds[client] else row
        for client, row in rows.items()
    }


def capped(total: np.ndarray, rate: np.float32, limit: float) -> np.ndarray:
    """G scaled down to where the round's step is no longer than it may be; float64 [T, P].

    The step is D = (eta / P) sum G z over n normals, so that |D|^2 is rate^2 n |G|^2 in expectation, and rate |G| is
    the root mean square of its entries: estimated, since every replay is to find it from the log alone.

    Args:
        rate: eta / P.
        limit: the root mean square of the step's entries, at most.
    """
    length = float(rate) * norm(total) if math.isfinite(limit) else 0.0
    return total * (limit / length) if length > limit else total


def norm(values: np.ndarray) -> float:
    """The L2 norm, the same bits everywhere: float64 sums of a fixed order."""
    flat = values.ravel()
    parts = (flat[first : first + _CHUNK].astype(np.float64) for first in range(0, len(flat), _CHUNK))
    return math.sqrt(math.fsum(float(np.cumsum(part * part)[-1]) for part in parts))


def _mean(rows: np.ndarray) -> np.ndarray:
    """The mean of rows, summed one after another: a reduction's own order may depend on the machine."""
    mean: np.ndarray = np.cumsum(rows, axis=0)[-1] / len(rows)
    return mean


def _distances(rows: np.ndarray) -> np.ndarray:
    """Squared distances between rows, float64 [K, K], each summed coordinate after coordinate."""
    return np.stack([np.cumsum((rows - row) ** 2, axis=1)[:, -1] for row in rows])


def _ranked(rows: np.ndarray, f: int) -> np.ndarray:
    """Rows by Krum's score, the sum of squared distances to the K - f - 2 nearest, best first: int64 [K]."""
    nearest = np.sort(_distances(rows), axis=1)[:, 1 : len(rows) - f - 1]  # the first is a row's own, zero
    return np.argsort(np.cumsum(nearest, axis=1)[:, -1], kind="stable")
