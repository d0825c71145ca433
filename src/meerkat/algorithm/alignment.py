"""How far a client's round update goes, and how much of it points where the federation goes; from scalars.

    D_k = (eta / P) sum_{t,p} g_k^{t,p} z^{t,p},    <D_j, D_k> = (eta / P)^2 g_j^T Z g_k,    Z = (<z^s, z^t>)

Once the T P x T P inner products of a round's directions are known, every client's norm and cosine cost a few
multiplications. No update is rebuilt (method, section 5).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from meerkat.algorithm.directions import Directions
from meerkat.algorithm.rounds import RoundPlan, RoundRecord

_SLICE = 1 << 16
"""Entries of all directions in memory at a time: a slice of z can be made alone."""


class Alignment(NamedTuple):
    """One client's round update beside the aggregated one."""

    norm: float
    """|D_k|, in theta's units."""
    cosine: float
    """Between D_k and the update that G makes; nan where either is zero."""


def direction_products(plan: RoundPlan, directions: Directions) -> np.ndarray:
    """<z^{s,q}, z^{t,p}> for all steps and directions of a plan: float64 [T P, T P], steps first."""
    places = [plan.place(t, p) for t in range(plan.longest) for p in range(plan.directions)]
    products = np.zeros((len(places), len(places)))
    for start in range(0, directions.count, _SLICE):
        count = min(_SLICE, directions.count - start)
        z = np.stack([directions.slice(place, start, count) for place in places]).astype(np.float64)
        products += z @ z.T
    return products


def alignments(record: RoundRecord, directions: Directions) -> Mapping[int, Alignment]:
    """Norm and cosine of each client's update in a round, by client id; none where the record keeps no scalars."""
    if not record.scalars:
        return {}
    products, rate = direction_products(record.plan, directions), float(record.plan.rate)
    together = record.aggregate.astype(np.float64).ravel()
    towards = products @ together
    length = np.sqrt(together @ towards)
    of_clients = {}
    for client, scalars in record.scalars.items():
        g = np.zeros_like(together)  # steps that the client did not make count as zero
        g[: scalars.size] = scalars.ravel()
        norm = np.sqrt(g @ products @ g)
        cosine = float(g @ towards / (norm * length)) if norm and length else float("nan")
        of_clients[client] = Alignment(rate * float(norm), cosine)
    return of_clients
