"""Update rules: what everyone makes of a round's pseudo-gradient D in theta space (method, section 5).

    D = (eta / P) sum_{t,p} G z
    FedAvg:   theta -= D
    FedAvgM:  theta -= eta_s m,                           m = beta_1 m + D
    FedAdam:  theta -= eta_s eta m / (sqrt(v) + tau),     m = beta_1 m + (1 - beta_1) D, v so of D^2 by beta_2
    FedDyn:   theta -= D + h / alpha,                     h = h + alpha s D

D follows from scalars that everyone has, so every client replays any of them at no cost in bytes. Each operation is
rounded by itself, as in path.py. Sources: McMahan et al. 2017 (FedAvg), Hsu et al. 2019 (FedAvgM), Reddi et al. 2021
(FedAdam, without bias correction), Acar et al. 2021 (FedDyn; s is the share of all clients' weight that took part).
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from meerkat.algorithm import path
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.rounds import Update

Moments = tuple[Tensor, ...]
"""What a rule carries from round to round, float32 [n] each: (), (m,), (m, v), (h,)."""


class UpdateRule(Protocol):
    """How theta follows from a round's update. A rule is a value: its settings are its fields."""

    @property
    def carried(self) -> int:
        """How many vectors of n floats it carries from round to round."""

    def init(self, theta: Tensor) -> Moments:
        """What it carries before the first round, `carried` vectors: zeros, unless a rule says otherwise."""
        return tuple(torch.zeros_like(theta) for _ in range(self.carried))

    def apply(self, theta: Tensor, moments: Moments, update: Update, directions: Directions) -> tuple[Tensor, Moments]:
        """theta (float32 [n]) and moments after a round, as new tensors, to the same bits on every machine.

        Args:
            update: the round's G, with `update.plan.place(t, p)` for the z that it goes with.
        """


def descent(theta: Tensor, update: Update, directions: Directions) -> Tensor:
    """-D, float32 [n]; theta gives only the shape and device."""
    return path.moved(torch.zeros_like(theta), update, directions)


@dataclass(frozen=True)
class FedAvg(UpdateRule):
    """The plain step."""

    carried: ClassVar[int] = 0

    def apply(self, theta: Tensor, moments: Moments, update: Update, directions: Directions) -> tuple[Tensor, Moments]:
        """theta - D"""
        return path.moved(theta, update, directions), moments


@dataclass(frozen=True)
class FedAvgM(UpdateRule):
    """Server momentum."""

    lr: float
    """eta_s"""
    beta1: float = 0.9
    carried: ClassVar[int] = 1

    def apply(self, theta: Tensor, moments: Moments, update: Update, directions: Directions) -> tuple[Tensor, Moments]:
        """theta - eta_s m"""
        (m,) = moments
        m = (m * self.beta1) - descent(theta, update, directions)
        return theta - m * self.lr, (m,)


@dataclass(frozen=True)
class FedAdam(UpdateRule):
    """Adam on the server."""

    lr: float
    """eta_s. D's length cancels in the step, so eta_s multiplies the round's eta: its schedule reaches the step."""
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-9
    carried: ClassVar[int] = 2

    def apply(self, theta: Tensor, moments: Moments, update: Update, directions: Directions) -> tuple[Tensor, Moments]:
        """theta - eta_s eta m / (sqrt(v) + tau)"""
        m, v = moments
        down = descent(theta, update, directions)
        m = (m * self.beta1) - (down * (1 - self.beta1))
        v = (v * self.beta2) + ((down * down) * (1 - self.beta2))
        return theta - (m / (v.sqrt() + self.tau)) * (self.lr * update.plan.lr), (m, v)


@dataclass(frozen=True)
class FedDyn(UpdateRule):
    """The server's half of FedDyn; the other is `client_rules.FedDynClient`."""

    alpha: float
    carried: ClassVar[int] = 1

    def apply(self, theta: Tensor, moments: Moments, update: Update, directions: Directions) -> tuple[Tensor, Moments]:
        """theta - D - h / alpha"""
        (h,) = moments
        down = descent(theta, update, directions)
        h = h - down * (self.alpha * update.share)
        # by a tensor: on a GPU, to divide by a number is to multiply by its rounded reciprocal
        return (theta + down) - h / torch.tensor(self.alpha, dtype=h.dtype, device=h.device), (h,)


FEDAVG = FedAvg()
