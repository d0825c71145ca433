"""Every client in this process, on one copy of the model.

A client keeps nothing between rounds: it is its rows, and a data pointer that follows from the log. So
a thousand clients need the memory of one. Under FedDyn each has its h_k, which follows from the log too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from meerkat.algorithm.client import correction, local_steps, noisy_slopes
from meerkat.algorithm.directions import Directions, Place
from meerkat.algorithm.first_order import gradient_steps
from meerkat.algorithm.rounds import Reply, RoundPlan, RoundRecord
from meerkat.algorithm.server import ServerState
from meerkat.algorithm.zeroth_order import Loss, MaskedModel, projected_gradient
from meerkat.privacy.mechanism import Mechanism

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
    private: Mechanism | None = None
    """Under example-level differential privacy, what makes one noisy slope of rows'; `losses_of` gives each row's."""

    def arrivals(self, _: int) -> tuple[()]:
        """Nobody comes: all clients were there from the start."""
        return ()

    def available(self) -> None:
        """All clients can take part."""

    def facts(self) -> dict[str, float]:
        """Nothing is to be told of a round beside its record."""
        return {}

    def meanwhile(self, task: Callable[[], None]) -> None:
        """Clients work in this very thread: what can wait is done at once."""
        task()

    def settle(self) -> None:
        """Nothing was left."""

    def closed(self, state: ServerState, record: RoundRecord) -> None:
        """Clients here read theta from the state: there is nobody to tell. The next round's first z is made ready."""
        if record.plan.directions:
            self.directions.prepare(Place("training", state.round, 0, 0))

    def run(self, state: ServerState, plan: RoundPlan) -> list[Reply]:
        """The replies to a plan, by ascending client id."""
        if self.together and plan.directions and set(plan.steps.values()) == {1}:
            return self._one_step(state, plan)
        replies = []
        for client in plan.steps:
            losses = self._losses_along(client, state.steps_made.get(client, 0))
            if plan.directions:
                h = state.corrections.get(client)
                reply, _ = local_steps(self.model, state.theta, plan, client, losses, self.directions, h, self.private)
            else:
                reply, _ = gradient_steps(self.model, state.theta, plan, client, losses)
            replies.append(reply)
        return replies

    def _losses_along(self, client: int, pointer: int) -> Callable[[int], Loss]:
        def loss_at(step: int) -> Loss:
            losses = self.losses_of([self.batch_of(client, pointer + step)])
            return losses if self.private else lambda: losses()[0]

        return loss_at

    def _one_step(self, state: ServerState, plan: RoundPlan) -> list[Reply]:
        batches = [self.batch_of(client, state.steps_made.get(client, 0)) for client in plan.steps]
        losses = self.losses_of(batches)
        if self.private:
            return self._one_private_step(state, plan, losses, [len(batch) for batch in batches], self.private)
        scalars = np.zeros((len(plan.steps), 1, plan.directions), dtype=np.float32)
        levels = np.zeros((len(plan.steps), plan.directions))
        for p in range(plan.directions):
            z = self.directions(plan.place(0, p))
            self.directions.prepare(plan.place_after(0, p))
            g, level = projected_gradient(self.model, state.theta, z, plan.eps, losses)
            added = [correction(plan.alpha, state.corrections.get(client), None, z) for client in plan.steps]
            scalars[:, 0, p], levels[:, p] = g.numpy() + np.array(added), level
        return [Reply(client, scalars[k], float(levels[k].mean())) for k, client in enumerate(plan.steps)]

    def _one_private_step(
        self, state: ServerState, plan: RoundPlan, losses: Loss, counts: Sequence[int], private: Mechanism
    ) -> list[Reply]:
        noisy = noisy_slopes(self.model, state.theta, plan, 0, losses, self.directions, private, counts)
        for p in range(plan.directions) if plan.alpha else ():
            z = self.directions(plan.place(0, p))
            noisy[:, p] += [correction(plan.alpha, state.corrections.get(client), None, z) for client in plan.steps]
        return [Reply(client, noisy[k : k + 1].astype(np.float32)) for k, client in enumerate(plan.steps)]
