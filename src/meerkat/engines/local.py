"""Every client in this process, on one copy of the model.

A client keeps nothing between rounds: it is its rows, and a data pointer that follows from the log. So
a thousand clients need the memory of one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from meerkat.client import local_steps
from meerkat.directions import Directions
from meerkat.rounds import Reply, RoundPlan
from meerkat.zeroth_order import Loss, MaskedModel, projected_gradient

BatchOf = Callable[[int, int], np.ndarray]
"""(client, step since the run began) -> the rows of that batch."""

LossesOf = Callable[[Sequence[np.ndarray]], Loss]
"""Rows of each of K clients -> a loss that gives all K means at the model's present weights, float [K]."""


@dataclass(frozen=True)
class LocalEngine:
    """Runs the participants of a round.

    Where each makes one step they all stand at the same theta, and with `together` their batches go
    through the model as one; otherwise, or at T > 1, one client follows another.
    """

    model: MaskedModel
    directions: Directions
    batch_of: BatchOf
    losses_of: LossesOf
    together: bool = True

    def run(self, theta: Tensor, plan: RoundPlan, pointers: Mapping[int, int]) -> list[Reply]:
        """The replies to a plan, by ascending client id. `pointers` are steps made before, by client."""
        if self.together and set(plan.steps.values()) == {1}:
            return self._one_step(theta, plan, pointers)
        replies = []
        for client in plan.steps:
            reply, _ = local_steps(
                self.model, theta, plan, client, self._losses_along(client, pointers.get(client, 0)), self.directions
            )
            replies.append(reply)
        return replies

    def _losses_along(self, client: int, pointer: int) -> Callable[[int], Loss]:
        def loss_at(step: int) -> Loss:
            losses = self.losses_of([self.batch_of(client, pointer + step)])
            return lambda: losses()[0]

        return loss_at

    def _one_step(self, theta: Tensor, plan: RoundPlan, pointers: Mapping[int, int]) -> list[Reply]:
        losses = self.losses_of([self.batch_of(client, pointers.get(client, 0)) for client in plan.steps])
        scalars = np.zeros((len(plan.steps), 1, plan.directions), dtype=np.float32)
        levels = np.zeros((len(plan.steps), plan.directions))
        for p in range(plan.directions):
            z = self.directions(plan.place(0, p))
            self.directions.prepare(plan.place_after(0, p))
            g, level = projected_gradient(self.model, theta, z, plan.eps, losses)
            scalars[:, 0, p], levels[:, p] = g, level
        return [Reply(client, scalars[k], float(levels[k].mean())) for k, client in enumerate(plan.steps)]
