"""A simulation some of whose clients attack: they do what honest clients do, and send something else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from meerkat import seeds
from meerkat.algorithm.attacks import IN_CALIBRATIONS, IN_ROUNDS, Attack, Craft, Seen
from meerkat.algorithm.directions import PHASES
from meerkat.algorithm.rounds import LARGEST_LOSS, Reply, RoundPlan, Scalars
from meerkat.algorithm.server import ServerState
from meerkat.run.local_engine import LocalEngine

_WITHIN = 0.999
"""Of the largest scalar that a reply may have: float32 rounds."""


@dataclass(frozen=True)
class AttackedEngine:
    """The clients of a simulation, some of which attack. See `loop.Engine`."""

    engine: LocalEngine
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
