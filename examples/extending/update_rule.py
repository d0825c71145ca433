"""An update rule: steps preconditioned by a diagonal that everyone learns from the scalars.

    meerkat simulate --extension examples/extending/update_rule.py --update-rule diagonal --lr 0.05

    v = beta_2 v + (1 - beta_2) mean_{t,p} (G z)^2        theta -= D / (sqrt(v / mean(v)) + tau)

v is a moving average of each entry's squared step (RMSProp, in the spirit of HiSo). It follows from G and z alone, so
that every client replays it, and not a byte more is sent.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from meerkat.algorithm import path
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.rounds import Update
from meerkat.algorithm.update_rules import Moments
from meerkat.settings.config import RunConfig


@dataclass(frozen=True)
class Diagonal:
    """Its settings are its fields; v is its only moment."""

    beta2: float = 0.99
    tau: float = 0.1
    carried: ClassVar[int] = 1

    def init(self, theta: Tensor) -> Moments:
        """v = 1: the first steps are plain ones."""
        return (torch.ones_like(theta),)

    def apply(self, theta: Tensor, moments: Moments, update: Update, directions: Directions) -> tuple[Tensor, Moments]:
        """theta and v after a round. Every operation is rounded by itself, so that all machines get the same bits."""
        (v,) = moments
        squares, plan = torch.zeros_like(theta), update.plan
        for step, row in enumerate(update.aggregate):
            for z, g in zip(plan.along(step, directions), row, strict=True):
                squares = squares + (z * float(g)) ** 2 * (1 / update.aggregate.size)
        v = v * self.beta2 + squares * (1 - self.beta2)
        level = np.cumsum(v.cpu().numpy(), dtype=np.float64)[-1] / len(v)  # in one order: a device has its own
        descent = path.moved(torch.zeros_like(theta), update, directions)
        return theta + descent / ((v * float(1 / level)).sqrt() + self.tau), (v,)


def diagonal(settings: RunConfig) -> Diagonal:
    """The rule, with the decay that --server-beta2 sets."""
    return Diagonal(settings.server_beta2)


UPDATE_RULES = {"diagonal": diagonal}
