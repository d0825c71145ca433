"""Server optimisers in theta space: what the server makes of a round's pseudo-gradient D (method, section 5).

    D = (eta / P) sum_{t,p} G z
    sgd (FedAvg):        theta -= D
    momentum (FedAvgM):  theta -= eta_s m,                  m = beta_1 m + D
    adam (FedAdam):      theta -= eta_s eta m / (sqrt(v) + tau),   m = beta_1 m + (1 - beta_1) D, v so of D^2 by beta_2
    feddyn:              theta -= D + h / alpha,            h = h + alpha s D

D follows from scalars that everyone has, so every client replays any of them at no cost in bytes. Each
operation is rounded by itself, as in path.py. Sources: Hsu et al. 2019 (FedAvgM), Reddi et al. 2021
(FedAdam, without bias correction), Acar et al. 2021 (FedDyn; s is the share of all clients' weight that
took part).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from meerkat.algorithm import path
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.rounds import RoundRecord

Name = Literal["sgd", "momentum", "adam", "feddyn"]
Moments = tuple[Tensor, ...]
"""What an optimiser carries from round to round, float32 [n] each: () or (m,), (m, v), (h,)."""
_Moved = tuple[Tensor, Moments]


@dataclass(frozen=True)
class ServerOptimizer:
    """The server's step, and its settings."""

    name: Name = "sgd"
    lr: float = 1.0
    """eta_s, of momentum and adam. D's length cancels in adam's step: there eta_s multiplies the round's eta, so that
    the rate and its schedule reach it."""
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-9
    alpha: float = 0.0
    """FedDyn's alpha."""

    @property
    def carried(self) -> int:
        """How many vectors it carries from round to round."""
        return {"sgd": 0, "momentum": 1, "adam": 2, "feddyn": 1}[self.name]


def advance(
    optimizer: ServerOptimizer,
    theta: Tensor,
    moments: Moments,
    record: RoundRecord,
    share: float,
    directions: Directions,
) -> tuple[Tensor, Moments]:
    """theta (float32 [n]) and moments after a round, as new tensors.

    Args:
        moments: empty before the first round.
        share: s, the weight of the clients that took part over that of all; in (0, 1].
    """
    if optimizer.name == "sgd":
        return path.advance(theta, record, directions), ()
    descent = path.advance(torch.zeros_like(theta), record, directions)  # -D
    if optimizer.name == "adam":
        optimizer = replace(optimizer, lr=optimizer.lr * record.plan.lr)
    return _RULES[optimizer.name](optimizer, theta, moments, descent, share)


def _momentum(by: ServerOptimizer, theta: Tensor, moments: Moments, descent: Tensor, _: float) -> _Moved:
    (m,) = moments or (torch.zeros_like(theta),)
    m = (m * by.beta1) - descent
    return theta - m * by.lr, (m,)


def _adam(by: ServerOptimizer, theta: Tensor, moments: Moments, descent: Tensor, _: float) -> _Moved:
    m, v = moments or (torch.zeros_like(theta), torch.zeros_like(theta))
    m = (m * by.beta1) - (descent * (1 - by.beta1))
    v = (v * by.beta2) + ((descent * descent) * (1 - by.beta2))
    return theta - (m / (v.sqrt() + by.tau)) * by.lr, (m, v)


def _feddyn(by: ServerOptimizer, theta: Tensor, moments: Moments, descent: Tensor, share: float) -> _Moved:
    (h,) = moments or (torch.zeros_like(theta),)
    h = h - descent * (by.alpha * share)
    return (theta + descent) - h / by.alpha, (h,)


_RULES: dict[str, Callable[[ServerOptimizer, Tensor, Moments, Tensor, float], _Moved]] = {
    "momentum": _momentum,
    "adam": _adam,
    "feddyn": _feddyn,
}
