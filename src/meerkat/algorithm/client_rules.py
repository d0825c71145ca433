"""Client rules: what a client adds to its slopes, and what it carries from round to round.

The paper's client adds and carries nothing. FedDyn's (Acar et al. 2021; method, section 8) is, in scalars,

    g += <alpha (theta - theta_r) - h_k, z>,    h_k <- h_k - alpha (theta_k - theta_r) after a round that it counted in

h_k follows from the client's own scalars, so the server, which knows them, can rebuild it.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from meerkat.algorithm.rounds import Sends


@dataclass(frozen=True)
class ClientRule:
    """How a client makes its local steps. This one adds and carries nothing: the paper's, or backpropagation."""

    sends: Sends = field(default="scalars", kw_only=True)
    """What it replies with."""
    carries: ClassVar[bool] = False
    """Whether it carries a vector h_k from round to round."""

    def correction(self, _h: Tensor | None, _drift: Tensor | None, _z: Tensor, /) -> float:
        """What is added to a projected gradient along z: here, nothing.

        Args:
            _h: what the client carries, float32 [n]; None for zero, before its first round.
            _drift: theta - theta_r, float32 [n]; None for zero, at its first local step.
            _z: the direction, float32 [n].
        """
        return 0.0

    def carry(self, _h: Tensor | None, drift: Tensor, /) -> Tensor:
        """What the client carries after a round that its reply counted in, float32 [n]: here, zero.

        Args:
            drift: theta_k - theta_r after all its steps, float32 [n].
        """
        return torch.zeros_like(drift)


@dataclass(frozen=True)
class FedDynClient(ClientRule):
    """The client's half of FedDyn."""

    alpha: float
    carries: ClassVar[bool] = True

    def correction(self, h: Tensor | None, drift: Tensor | None, z: Tensor) -> float:
        """<alpha (theta - theta_r) - h_k, z>, in float64."""
        wide, added = z.double(), 0.0
        if drift is not None:
            added += self.alpha * (drift.double() @ wide).item()
        if h is not None:
            added -= (h.double() @ wide).item()
        return added

    def carry(self, h: Tensor | None, drift: Tensor) -> Tensor:
        """h_k - alpha (theta_k - theta_r)"""
        return (torch.zeros_like(drift) if h is None else h) - drift * self.alpha


ZEROTH_ORDER = ClientRule()
FIRST_ORDER = ClientRule(sends="delta")
