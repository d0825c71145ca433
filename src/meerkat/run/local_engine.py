"""Every client in this process, on one copy of the model; some of them may attack.

A client keeps nothing between rounds but what follows from the log: its rows, a data pointer, and h_k where its rule
carries one. So a thousand clients need the memory of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from meerkat import seeds
from meerkat.algorithm.attacks import IN_CALIBRATIONS, IN_ROUNDS, Attack, Craft, Seen
from meerkat.algorithm.client import correction, local_steps, slopes
from meerkat.algorithm.client_rules import ZEROTH_ORDER, ClientRule
from meerkat.algorithm.directions import PHASES, Directions
from meerkat.algorithm.estimators import PLAIN, Estimator
from meerkat.algorithm.first_order import gradient_steps
from meerkat.algorithm.replies import LARGEST_LOSS, Reply, Scalars
from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.server import ServerState
from meerkat.algorithm.zeroth_order import Loss, MaskedModel
from meerkat.privacy.mechanism import Mechanism

if TYPE_CHECKING:
    from meerkat.run.shared_engine import SharedEngine

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


_WITHIN = 0.999
"""Of the largest scalar that a reply may have: float32 rounds."""


@dataclass(frozen=True)
class AttackedEngine:
    """Clients some of which do what honest ones do, and send something else. See `loop.Engine`."""

    engine: "LocalEngine | SharedEngine"
    attack: Attack
    clients: Sequence[int]
    """The attackers."""
    scale: float | None = None
    """The attack's strength; None for its own."""
    seed: int = 0

    def run(self, state: ServerState, plan: RoundPlan) -> list[Reply]:
        """The replies to a plan, by ascending client id, those of attackers as they send them."""
        replies = self.engine.run(state, plan)
        craft = (IN_CALIBRATIONS if plan.phase == "calibration" else IN_ROUNDS).get(self.attack)
        scalars = [reply for reply in replies if isinstance(reply, Scalars)]
        return replies if craft is None else self._changed(scalars, plan, craft)

    def _changed(self, replies: Sequence[Scalars], plan: RoundPlan, craft: Craft) -> list[Reply]:
        theirs = [reply for reply in replies if reply.client in self.clients]
        honest = [reply for reply in replies if reply.client not in self.clients] or theirs
        mean, deviation = _moments(honest, max(plan.steps.values()))
        most = _WITHIN * LARGEST_LOSS / plan.eps
        sent = {}
        for reply in theirs:
            noise = seeds.generator(self.seed, "attack", plan.round, PHASES[plan.phase], reply.client)
            seen = Seen(mean, deviation, len(replies), len(theirs), self.scale, noise)
            wide = craft(reply.scalars.astype(np.float64), seen)
            sent[reply.client] = replace(reply, scalars=np.clip(wide, -most, most).astype(np.float32))
        return [sent.get(reply.client, reply) for reply in replies]


def _moments(replies: Sequence[Scalars], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of replies, entry by entry, over those that made the step: float64 [T, P] each."""
    mean = np.zeros((steps, replies[0].scalars.shape[1]))
    deviation = np.zeros_like(mean)
    for step in range(max(len(reply.scalars) for reply in replies)):
        made = np.stack([reply.scalars[step] for reply in replies if step < len(reply.scalars)]).astype(np.float64)
        mean[step], deviation[step] = made.mean(0), made.std(0)
    return mean, deviation
