"""A replica: theta and all that moves with it, equal to the bit wherever the same rounds were followed (section 5).

The coordinator, every site, and whoever replays a log keep one each. A client that was away follows the rounds that it
missed, or takes over a whole replica, packed as float32 values: theta, the update rule's moments, and h_k where the
client rule carries one.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from meerkat.algorithm import path
from meerkat.algorithm.client_rules import ZEROTH_ORDER, ClientRule
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.rounds import RoundPlan, Update
from meerkat.algorithm.update_rules import FEDAVG, Moments, UpdateRule


class Rules(NamedTuple):
    """How a federation's replicas move."""

    update: UpdateRule = FEDAVG
    client: ClientRule = ZEROTH_ORDER

    @property
    def vectors(self) -> int:
        """Vectors of n floats in a client's replica."""
        return 1 + self.update.carried + self.client.carries


PAPER = Rules()


@dataclass(frozen=True)
class Replica:
    """theta after so many rounds, and what the next ones need beside it. A value: tensors are never written into."""

    round: int
    """Rounds followed: the number of the next one."""
    theta: Tensor
    """float32 [n]"""
    moments: Moments = ()
    """The update rule's; empty before the first round."""
    h: Tensor | None = None
    """What a client carries under its rule, float32 [n]; None for zero, or where it is nobody's."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of theta, hexadecimal."""
        return path.digest(self.theta)

    def follow(
        self, update: Update, rules: Rules, directions: Directions, scalars: np.ndarray | None = None
    ) -> "Replica":
        """The replica after a round; `scalars` are a client's own, float32 [T_k, P], where they counted in it."""
        moments = self.moments or rules.update.init(self.theta)
        theta, moments = rules.update.apply(self.theta, moments, update, directions)
        h = self.h
        if rules.client.carries and scalars is not None:
            h = carried(rules.client, h, update.plan, scalars, directions)
        return Replica(self.round + 1, theta, moments, h)

    def pack(self, rules: Rules) -> np.ndarray:
        """All of it as values: float32 [vectors * n]."""
        vectors = [self.theta, *(self.moments or rules.update.init(self.theta))]
        if rules.client.carries:
            vectors.append(torch.zeros_like(self.theta) if self.h is None else self.h)
        return torch.cat(vectors).cpu().numpy()

    @classmethod
    def unpack(cls, values: np.ndarray, round: int, rules: Rules, device: torch.device) -> "Replica":
        """The replica after so many rounds that `pack` wrote.

        Raises:
            ValueError: there are not as many vectors as the rules call for.
        """
        vectors = torch.from_numpy(values).to(device).reshape(rules.vectors, -1).unbind()
        last = 1 + rules.update.carried
        return cls(round, vectors[0], vectors[1:last], vectors[last] if rules.client.carries else None)


def carried(rule: ClientRule, h: Tensor | None, plan: RoundPlan, scalars: np.ndarray, directions: Directions) -> Tensor:
    """What a client carries after a round that its scalars (float32 [T_k, P]) counted in: float32 [n]."""
    none = torch.zeros(directions.count, device=directions.device)
    *_, drift = path.walk(none, plan, scalars, directions)
    return rule.carry(h, drift)
