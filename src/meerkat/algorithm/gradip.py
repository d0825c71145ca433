"""GradIP: how far each client's update points along the pre-training gradient (method, sections 5 and 6).

    GradIP_k^t = <grad_p, (1/P) sum_p g_k^{t,p} z^{t,p}> = (1/P) sum_p g_k^{t,p} c^{t,p},   c^{t,p} = <grad_p, z^{t,p}>

All clients share z, so one dot product a direction serves every client: each costs one multiplication.
"""

import math

import numpy as np
from torch import Tensor

from meerkat.algorithm.directions import Directions
from meerkat.algorithm.rounds import RoundPlan

_CHUNK = 1 << 20
"""Entries widened to float64 at a time."""


def inner_products(gradient: Tensor | None, plan: RoundPlan, directions: Directions) -> np.ndarray:
    """c^{t,p} = <grad_p, z^{t,p}> for all steps of a plan: float64 [T, P], summed in float64.

    `gradient` is the pre-training gradient at the moving entries, float32 [n] on the directions' device;
    without one, or in a first-order plan, the answer is empty: [0, P].
    """
    if gradient is None or not plan.directions:
        return np.zeros((0, plan.directions))
    steps = plan.longest
    found = np.zeros((steps, plan.directions))
    for t in range(steps):
        for p in range(plan.directions):
            z = directions(plan.place(t, p))
            directions.prepare(plan.place_after(t, p))
            found[t, p] = _dot(gradient, z)
    return found


def _dot(one: Tensor, other: Tensor) -> float:
    """<one, other> in float64, without a wide copy of either."""
    parts = zip(one.split(_CHUNK), other.split(_CHUNK), strict=True)
    return math.fsum((a.double() @ b.double()).item() for a, b in parts)


def gradip(scalars: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """GradIP of steps from their projected gradients: float64 [..., T].

    Args:
        scalars: g, float32 [..., T, P], of one client or of many.
        inner: c, float64 [at least T, P]; without any, the answer is nan.
    """
    if not len(inner):
        return np.full(scalars.shape[:-1], np.nan)
    steps, directions = scalars.shape[-2:]
    found: np.ndarray = np.einsum("...tp,tp->...t", scalars, inner[:steps]) / directions
    return found


def magnitude(scalars: np.ndarray) -> np.ndarray:
    """|g| of steps, the mean over directions: float64 [..., T]. GradIP's signal without c's noise."""
    found: np.ndarray = np.abs(scalars.astype(np.float64)).mean(-1)
    return found
