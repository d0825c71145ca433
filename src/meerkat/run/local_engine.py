"""Every client in this process, on one copy of the model.

A client keeps nothing between rounds but what follows from the log: its rows, a data pointer, and h_k where its rule
carries one. So a thousand clients need the memory of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from meerkat.algorithm.client import correction, local_steps, slopes
from meerkat.algorithm.client_rules import ZEROTH_ORDER, ClientRule
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.estimators import PLAIN, Estimator
from meerkat.algorithm.first_order import gradient_steps
from meerkat.algorithm.rounds import Reply, RoundPlan, Scalars
from meerkat.algorithm.server import ServerState
from meerkat.algorithm.zeroth_order import Loss, MaskedModel
from meerkat.privacy.mechanism import Mechanism

BatchOf = Callable[[int, int], np.ndarray]
"""(client, step since the run began) -> the rows of that batch."""

LossesOf = Callable[[Sequence[np.ndarray]], Loss]
"""Rows of each of K clients -> a loss that gives all K means at the model's present weights, float [K]."""


@dataclass(frozen=True)
class LocalEngine:
    """Runs the participants of a round.

    Where each makes one step, all stand at the same theta, and with `together` their batches go through the model as
    one. Otherwise, or at T > 1, one client follows another.
    """

    model: MaskedModel
    directions: Directions
    batch_of: BatchOf
    losses_of: LossesOf
    together: bool = True
    private: Mechanism | None = None
    """Example-level differential privacy: turns rows' slopes into one noisy slope; `losses_of` gives each row's."""
    estimator: Estimator = PLAIN
    rule: ClientRule = ZEROTH_ORDER

    def run(self, state: ServerState, plan: RoundPlan) -> list[Reply]:
        """The replies to a plan, by ascending client id."""
        if self.together and plan.sends == "scalars" and set(plan.steps.values()) == {1}:
            return self._one_step(state, plan)
        return [self._steps(state, plan, client) for client in plan.steps]

    def _steps(self, state: ServerState, plan: RoundPlan, client: int) -> Reply:
        """One client's steps."""
        losses = self._losses_along(client, state.steps_made.get(client, 0))
        if plan.sends == "delta":
            return gradient_steps(self.model, state.theta, plan, client, losses)[0]
        reply, _ = local_steps(
            self.model,
            state.theta,
            plan,
            client,
            losses,
            self.directions,
            estimator=self.estimator,
            rule=self.rule,
            h=state.carried.get(client),
            private=self.private,
        )
        return reply

    def _losses_along(self, client: int, pointer: int) -> Callable[[int], Loss]:
        def loss_at(step: int) -> Loss:
            losses = self.losses_of([self.batch_of(client, pointer + step)])
            return losses if self.private else lambda: losses()[0]

        return loss_at

    def _one_step(self, state: ServerState, plan: RoundPlan) -> list[Reply]:
        """One step of every participant, their batches together."""
        batches = [self.batch_of(client, state.steps_made.get(client, 0)) for client in plan.steps]
        losses, rows = self.losses_of(batches), [len(batch) for batch in batches]
        g, level = slopes(self.model, state.theta, plan, 0, losses, self.directions, self.estimator, self.private, rows)
        if self.rule.carries:
            for p, z in enumerate(plan.along(0, self.directions)):
                g[:, p] += [correction(plan, self.rule, state.carried.get(k), None, z) for k in plan.steps]
        scalars = g[:, None, :].astype(np.float32)
        return [Scalars(client, scalars[k], float(level[k].mean())) for k, client in enumerate(plan.steps)]
