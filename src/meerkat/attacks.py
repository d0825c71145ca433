"""Attacks on a simulated federation: what clients of bad will send in place of their scalars.

The attackers, f of K clients drawn by the seed, do what honest clients do, and then change it:

    label-flip        their rows' labels, l -> C - 1 - l (Fang et al. 2020); their scalars are honest ones of those rows
    sign-flip         -s g, s = 1 (Li et al. 2019, Karimireddy et al. 2021)
    gaussian          N(0, s^2) in each entry, s = 200 (Blanchard et al. 2017)
    scaled            s g on flipped labels, s = K / f: model replacement, which puts the attackers' mean in the place
                      of everyone's (Bagdasaryan et al. 2020)
    little-is-enough  mu - s sigma, of the honest replies entry by entry; s = z_max = Phi^-1((K - f - h) / (K - f)),
                      h = floor(K / 2 + 1) - f (Baruch et al. 2019). With few attackers z_max is zero
    collusion         -s mu, all the same: inner-product manipulation (Xie et al. 2020). s = 2 (K - f) / f turns the
                      equally weighted mean round, to -(K - f) / K mu; from (K - f) / f on its sign is wrong
    gradip-forgery    in a calibration, noise that at every step is as loud as the honest clients are on average,
                      times s = 1; in rounds, sign-flip. A small s forges a client that is quiet, to be stopped early

K and f are those of the round. In calibrations all but the last two words above are honest: only gradip-forgery lies
there, and flipped labels are what they are.

**What attackers know.** Everyone knows z, theta, the plan and, if not its text, then the model whose pre-training
gradient GradIP is of. little-is-enough, collusion and gradip-forgery are omniscient, as in the literature: they know
the honest replies of the round before they send their own; where nobody honest was asked, their own. All know what
`rounds.check_reply` lets through and stay within it: who does not is shown out of a federation, and gains nothing.

**GradIP is a signal of heterogeneity, not a defence.** GradIP_k = g_k c, and g_k is whatever client k sends, so that
its trace can be made to look like any client's at the cost of some random numbers: a forger passes Meerkat-vp's
calibration as lively, and poisons all T steps of every round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from meerkat import seeds
from meerkat.config import Attack, RunConfig
from meerkat.directions import PHASES
from meerkat.engines.local import LocalEngine
from meerkat.rounds import LARGEST_LOSS, Reply, RoundPlan, RoundRecord
from meerkat.server import ServerState

_WITHIN = 0.999
"""Of the largest scalar that a reply may have: float32 rounds."""


def attackers(config: RunConfig) -> tuple[int, ...]:
    """The clients that attack, ascending; none where there is no attack."""
    if config.attack == "none":
        return ()
    order = seeds.permutation(config.clients, config.seed, "attackers")
    return tuple(sorted(order[: config.attackers].tolist()))


def flipped(label: int, classes: int) -> int:
    """A row's label as an attacker has it."""
    return classes - 1 - label


@dataclass(frozen=True)
class Seen:
    """What an attacker goes by in a round."""

    mean: np.ndarray
    """mu of the honest replies, over those that made the step: float64 [T, P]; zero where none did."""
    deviation: np.ndarray
    """sigma of them: float64 [T, P], of the population."""
    clients: int
    """K: replies in the round."""
    attackers: int
    """f: those of attackers."""
    scale: float
    """s; 0 for the attack's own."""
    noise: np.random.Generator
    """The attacker's own, at this place of the run."""


Craft = Callable[[np.ndarray, Seen], np.ndarray]
"""(its honest scalars, float64 [T_k, P]; what it knows) -> what it sends."""


def sign_flip(own: np.ndarray, seen: Seen) -> np.ndarray:
    """-s g"""
    return -(seen.scale or 1.0) * own


def gaussian(own: np.ndarray, seen: Seen) -> np.ndarray:
    """N(0, s^2)"""
    sent: np.ndarray = (seen.scale or 200.0) * seen.noise.standard_normal(own.shape)
    return sent


def scaled(own: np.ndarray, seen: Seen) -> np.ndarray:
    """s g"""
    return (seen.scale or seen.clients / seen.attackers) * own


def little_is_enough(own: np.ndarray, seen: Seen) -> np.ndarray:
    """mu - s sigma"""
    s = seen.scale or z_max(seen.clients, seen.attackers)
    return (seen.mean - s * seen.deviation)[: len(own)]


def z_max(clients: int, attackers: int) -> float:
    """By how many sigma attackers can be off, and still have a majority on their side of the mean (Baruch et al. 2019).

    Attackers that are the majority need nobody: they are given the z of one supporter.
    """
    honest = clients - attackers
    supporters = max(clients // 2 + 1 - attackers, 1)
    share = (honest - supporters) / honest if honest else 0.0
    return max(NormalDist().inv_cdf(share), 0.0) if share > 0 else 0.0


def collusion(own: np.ndarray, seen: Seen) -> np.ndarray:
    """-s mu"""
    honest = max(seen.clients - seen.attackers, 1)
    return -(seen.scale or 2 * honest / seen.attackers) * seen.mean[: len(own)]


def forged_trace(own: np.ndarray, seen: Seen) -> np.ndarray:
    """Noise of the level that honest clients have on average, step by step."""
    level: np.ndarray = np.sqrt((seen.mean**2 + seen.deviation**2).mean(1, keepdims=True))[: len(own)]
    sent: np.ndarray = (seen.scale or 1.0) * level * seen.noise.standard_normal(own.shape)
    return sent


IN_ROUNDS: Mapping[Attack, Craft] = {
    "sign-flip": sign_flip,
    "gaussian": gaussian,
    "scaled": scaled,
    "little-is-enough": little_is_enough,
    "collusion": collusion,
    "gradip-forgery": lambda own, _: -own,
}
IN_CALIBRATIONS: Mapping[Attack, Craft] = {"gradip-forgery": forged_trace}


@dataclass(frozen=True)
class Attacked:
    """The clients of a simulation, some of which attack. See `experiment.Engine`."""

    engine: LocalEngine
    attack: Attack
    clients: Sequence[int]
    """The attackers."""
    scale: float = 0.0
    """The attack's strength; 0 for its own."""
    seed: int = 0

    def arrivals(self, round: int) -> tuple[()]:
        """Nobody comes."""
        return self.engine.arrivals(round)

    def available(self) -> None:
        """All clients can take part."""
        self.engine.available()

    def facts(self) -> Mapping[str, Any]:
        """What the engine has to tell."""
        return self.engine.facts()

    def meanwhile(self, task: Callable[[], None]) -> None:
        """At once."""
        self.engine.meanwhile(task)

    def settle(self) -> None:
        """Nothing was left."""
        self.engine.settle()

    def closed(self, state: ServerState, record: RoundRecord) -> None:
        """A round is on the disk."""
        self.engine.closed(state, record)

    def run(self, state: ServerState, plan: RoundPlan) -> list[Reply]:
        """The replies to a plan, by ascending client id, those of attackers as they send them."""
        replies = self.engine.run(state, plan)
        craft = (IN_CALIBRATIONS if plan.phase == "calibration" else IN_ROUNDS).get(self.attack)
        return replies if craft is None else self._changed(replies, plan, craft)

    def _changed(self, replies: Sequence[Reply], plan: RoundPlan, craft: Craft) -> list[Reply]:
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


def _moments(replies: Sequence[Reply], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of replies, entry by entry, over those that made the step: float64 [T, P] each."""
    mean = np.zeros((steps, replies[0].scalars.shape[1]))
    deviation = np.zeros_like(mean)
    for step in range(max(len(reply.scalars) for reply in replies)):
        made = np.stack([reply.scalars[step] for reply in replies if step < len(reply.scalars)]).astype(np.float64)
        mean[step], deviation[step] = made.mean(0), made.std(0)
    return mean, deviation
