"""Estimators: how a step's slopes along its directions follow from losses near theta (method, section 3).

An estimator is a value. The paper's is `PLAIN`; a run's log names the one that it used.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from meerkat.algorithm.directions import NORMAL, Law
from meerkat.errors import Diverged

LossAt = Callable[[Tensor], Tensor]
"""theta, float32 [n] -> the loss there on the step's batch: float [], or [K] for K clients or rows."""


class Slopes(NamedTuple):
    """What a step's P directions tell: float64 on the CPU, [P], or [P, K] for K clients or rows."""

    g: Tensor
    """Projected gradients."""
    loss: Tensor
    """The loss near theta, for the record of training. It is never sent."""


@dataclass(frozen=True, eq=False)
class Estimator:
    """How a step's slopes are estimated."""

    name: str
    slopes: Callable[[LossAt, Tensor, Iterable[Tensor], float], Slopes]
    """(loss_at, theta, the step's P directions z, eps) -> slopes. theta is float32 [n] and not changed, nor is z.

    Slopes must estimate <grad, z>, so that eta means the same under every estimator."""
    passes: Callable[[int], int]
    """P -> forward passes of a step."""
    law: Law = NORMAL


def two_sided(loss_at: LossAt, theta: Tensor, directions: Iterable[Tensor], eps: float) -> Slopes:
    """g = (l+ - l-) / (2 eps), from two passes a direction (SPSA; MeZO)."""
    plus, minus = [], []
    for z in directions:
        nudge = z * eps
        plus.append(loss_at(theta + nudge))
        minus.append(loss_at(theta - nudge))
    above, below = stacked(plus), stacked(minus)
    return Slopes((above - below) / (2 * eps), (above + below) / 2)


def stacked(losses: Sequence[Tensor]) -> Tensor:
    """Losses of several passes in one tensor: float64 on the CPU, [P], or [P, K]; one transfer for all of them.

    Raises:
        Diverged: one is not finite.
    """
    values = torch.stack(list(losses)).double().cpu()
    if not torch.isfinite(values).all():
        first = values.flatten()[~torch.isfinite(values.flatten())][0].item()
        cure = "start a new run with a lower --lr or --eps, or with float32 weights"
        raise Diverged(f"the loss is {first} near theta; {cure}")
    return values


PLAIN = Estimator("plain", two_sided, passes=lambda directions: 2 * directions)

ESTIMATORS: dict[str, Estimator] = {PLAIN.name: PLAIN}
"""By the name that --estimator takes. An extension adds to it: see `meerkat.extensions`."""
