"""Who holds which rows: splits of a training set over clients, deterministic in the seed.

The names follow Flower Datasets' partitioners. A split that leaves a client without a row is an error.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

from meerkat import seeds
from meerkat.errors import MeerkatError, UnknownName
from meerkat.problems.data import Row

FORMS = "iid, dirichlet:A (A > 0), single-label, mixed:N (N single-label clients, the rest iid), column:NAME"
_DRAWS = 10
"""How many Dirichlet splits are drawn until one leaves no client without rows."""


@dataclass(frozen=True)
class Partition:
    """A split: the rows of each client, and the clients that it makes extremely skewed."""

    rows: tuple[np.ndarray, ...]
    """Row numbers of each client, int64, ascending."""
    extreme: tuple[int, ...] = ()
    """Clients with a single label, where the split was asked for them."""


def partition(spec: str, rows: Sequence[Row], clients: int, seed: int) -> Partition:
    """Split rows over clients.

    Args:
        spec: one of `FORMS`.
        rows: each with a `label`, and a field NAME for column:NAME.

    Raises:
        MeerkatError: an unknown form, more clients than rows, or a client without a row.
    """
    name, _, argument = spec.partition(":")
    if name not in PARTITIONERS or bool(argument) != _TAKES_ARGUMENT.get(name, bool(argument)):
        raise UnknownName(f"partition '{spec}': must be one of {FORMS}, or one of an extension named by --extension")
    if not 1 <= clients <= len(rows):
        raise MeerkatError(
            f"{clients} clients: must be at least 1 and at most the number of training rows, {len(rows)}"
        )
    if name in _BY_LABEL and "label" not in rows[0]:
        raise MeerkatError(f"partition '{spec}': goes by labels, and these rows have none; use iid or column:NAME")
    made = PARTITIONERS[name](argument, rows, clients, seed)
    _check(spec, made, len(rows), clients)
    return made


def _check(spec: str, made: Partition, rows: int, clients: int) -> None:
    """Raise MeerkatError unless a split, which an extension may have made, gives each client rows of its own."""
    if not isinstance(made, Partition) or len(made.rows) != clients:
        raise MeerkatError(f"partition '{spec}': must give a Partition of {clients} clients; correct its extension")
    if empty := [client for client, rows_of in enumerate(made.rows) if not len(rows_of)]:
        raise MeerkatError(f"partition '{spec}': leaves client {empty[0]} without a row; use fewer clients")
    every = np.sort(np.concatenate(made.rows))
    if every[0] < 0 or every[-1] >= rows or (every[1:] == every[:-1]).any():
        raise MeerkatError(
            f"partition '{spec}': must give each of {rows} rows to one client at most; correct its extension"
        )


def _labels(rows: Sequence[Row]) -> np.ndarray:
    return np.array([row["label"] for row in rows], dtype=np.int64)


def _deal(order: np.ndarray, clients: int) -> list[np.ndarray]:
    return [np.sort(part) for part in np.array_split(order, clients)]


def _iid(_: str, rows: Sequence[Row], clients: int, seed: int) -> Partition:
    return Partition(tuple(_deal(seeds.permutation(len(rows), seed, "iid"), clients)))


def _dirichlet(argument: str, rows: Sequence[Row], clients: int, seed: int) -> Partition:
    """For each label, shares over the clients ~ Dirichlet(A, ..., A)."""
    alpha = _number(argument, float, "dirichlet:A needs a number A above 0, such as dirichlet:0.5")
    labels = _labels(rows)
    for draw in range(_DRAWS):
        rng = seeds.generator(seed, "dirichlet", draw)
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            of_label = np.flatnonzero(labels == label)
            of_label = of_label[seeds.permutation(len(of_label), seed, "dirichlet rows", draw, int(label))]
            cuts = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(of_label)
            for client, part in enumerate(np.split(of_label, cuts.astype(np.int64))):
                parts[client].append(part)
        joined = tuple(np.sort(np.concatenate(part)) for part in parts)
        if all(len(part) for part in joined):
            return Partition(joined)
    empty = sum(not len(part) for part in joined)
    raise MeerkatError(
        f"partition 'dirichlet:{alpha:g}' left {empty} of {clients} clients without rows in each of {_DRAWS} draws; "
        "use a larger A, fewer clients or another --seed"
    )


def _single_label(_: str, rows: Sequence[Row], clients: int, seed: int) -> Partition:
    """Each client holds rows of one label; the labels go round the clients. With too few clients, labels are unused."""
    labels = _labels(rows)
    distinct = np.unique(labels)
    parts: list[np.ndarray] = [np.array([], dtype=np.int64)] * clients
    for i, label in enumerate(distinct):
        holders = range(clients)[i :: len(distinct)]
        of_label = np.flatnonzero(labels == label)
        if len(of_label) < len(holders):
            raise MeerkatError(
                f"label {label} has {len(of_label)} rows for {len(holders)} single-label clients; use fewer clients"
            )
        if holders:
            of_label = of_label[seeds.permutation(len(of_label), seed, "single label", int(label))]
            for client, part in zip(holders, _deal(of_label, len(holders)), strict=True):
                parts[client] = part
    return Partition(tuple(parts), tuple(range(clients)))


def _mixed(argument: str, rows: Sequence[Row], clients: int, seed: int) -> Partition:
    """Clients 0 .. N-1 hold one label each; the other rows are split at random among the other clients.

    All clients get equally many rows, except single-label ones whose label has fewer left.
    """
    single = _number(argument, int, "mixed:N needs a whole number N of single-label clients, such as mixed:3")
    if not 0 < single <= clients:
        raise MeerkatError(f"partition 'mixed:{single}': N must be 1 to the number of clients, {clients}")
    labels = _labels(rows)
    distinct = np.unique(labels)
    size = len(rows) // clients
    order = seeds.permutation(len(rows), seed, "mixed")
    free = np.ones(len(rows), dtype=bool)
    parts: list[np.ndarray] = []
    for client in range(single):
        label = distinct[client % len(distinct)]
        taken = order[free[order] & (labels[order] == label)][:size]
        if not len(taken):
            raise MeerkatError(
                f"partition 'mixed:{single}': label {label} has no rows left for client {client}; use a smaller N"
            )
        free[taken] = False
        parts.append(np.sort(taken))
    rest = np.flatnonzero(free)
    rest = rest[seeds.permutation(len(rest), seed, "mixed rest")]
    if clients > single:
        # single-label clients may have taken more of some labels than of others: iid over what is left
        parts += _deal(rest, clients - single)
    return Partition(tuple(parts), tuple(range(single)))


def _column(argument: str, rows: Sequence[Row], clients: int, _: int) -> Partition:
    """Rows with the same value of a column stay together; each value goes to the client with the fewest rows so far."""
    if missing := next((number for number, row in enumerate(rows, 1) if row.get(argument) is None), 0):
        raise MeerkatError(f"partition 'column:{argument}': training row {missing} has no field '{argument}'")
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        groups[str(row[argument])].append(number)
    if len(groups) < clients:
        raise MeerkatError(
            f"partition 'column:{argument}': {len(groups)} different values for {clients} clients; "
            f"use --clients {len(groups)} or fewer"
        )
    parts: list[list[int]] = [[] for _ in range(clients)]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(parts, key=len).extend(group)
    return Partition(tuple(np.sort(np.array(part, dtype=np.int64)) for part in parts))


_TAKES_ARGUMENT = {"iid": False, "dirichlet": True, "single-label": False, "mixed": True, "column": True}
_BY_LABEL = ("dirichlet", "single-label", "mixed")

_Number = TypeVar("_Number", int, float)


def _number(text: str, kind: Callable[[str], _Number], need: str) -> _Number:
    try:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
    except ValueError:
        raise MeerkatError(f"partition argument '{text}': {need}") from None
    return value


PARTITIONERS: dict[str, Callable[[str, Sequence[Row], int, int], Partition]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "single-label": _single_label,
    "mixed": _mixed,
    "column": _column,
}


_permutation = lru_cache(maxsize=4096)(seeds.permutation)


@dataclass(frozen=True)
class ClientRows:
    """One client's rows and the order of its batches: a batch is a function of (seed, client, step)."""

    client: int
    rows: np.ndarray
    batch_size: int
    seed: int

    def batch(self, step: int) -> np.ndarray:
        """Row numbers of the step-th batch since the run began, int64: epoch after epoch, each in a new order.

        A client with fewer rows than a batch uses them all.
        """
        size = min(self.batch_size, len(self.rows))
        first, last = step * size, (step + 1) * size
        epochs = range(first // len(self.rows), (last - 1) // len(self.rows) + 1)
        orders = [_permutation(len(self.rows), self.seed, "batches", self.client, epoch) for epoch in epochs]
        stream = np.concatenate([self.rows[order] for order in orders])
        offset = epochs[0] * len(self.rows)
        return stream[first - offset : last - offset]
