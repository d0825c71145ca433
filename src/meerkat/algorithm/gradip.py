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

    Args:
        gradient: the pre-training gradient at the moving entries, float32 [n] on the directions' device. Without one,
            or in a round of deltas, the answer is empty: [0, P].
    """
    if gradient is None or plan.sends == "delta":
        return np.zeros((0, plan.directions))
    inner = [[_dot(gradient, z) for z in plan.along(t, directions)] for t in range(plan.longest)]
    return np.array(inner, dtype=np.float64).reshape(-1, plan.directions)


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
    values: np.ndarray = np.einsum("...tp,tp->...t", scalars, inner[:steps]) / directions
    return values


def magnitude(scalars: np.ndarray) -> np.ndarray:
    """|g| of steps, the mean over directions: float64 [..., T]. GradIP's signal without c's noise."""
    values: np.ndarray = np.abs(scalars.astype(np.float64)).mean(-1)
    return values
