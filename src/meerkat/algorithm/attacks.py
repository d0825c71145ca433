"""Attacks on a simulated federation: what malicious clients send in place of their scalars.

The attackers, f of the round's K clients, make the steps that honest clients make and then change the result; flipped
labels change it before. docs/robustness.md has each attack with its source and its usual s. Everyone knows z, theta and
the plan; little-is-enough, collusion and gradip-forgery see the round's honest replies as well, or their own where no
honest client was asked. All stay within what `replies.check_reply` lets through. In a calibration attackers are honest,
except that gradip-forgery lies.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from meerkat import seeds

Attack = Literal[
    "none", "label-flip", "sign-flip", "gaussian", "scaled", "little-is-enough", "collusion", "gradip-forgery"
]


def attackers(count: int, clients: int, seed: int) -> tuple[int, ...]:
    """The clients that attack, ascending: `count` of all, drawn by the seed."""
    order = seeds.permutation(clients, seed, "attackers")
    return tuple(sorted(order[:count].tolist()))


def flipped(label: int, classes: int) -> int:
    """A row's label as an attacker has it (Fang et al. 2020)."""
    return classes - 1 - label


@dataclass(frozen=True)
class Seen:
    """What an attacker knows in a round."""

    mean: np.ndarray
    """mu of the honest replies, over those that made the step: float64 [T, P]; zero where none did."""
    deviation: np.ndarray
    """sigma of them: float64 [T, P], of the population."""
    clients: int
    """K: replies in the round."""
    attackers: int
    """f: those of attackers."""
    scale: float | None
    """s; None for the attack's usual one."""
    noise: np.random.Generator
    """The attacker's randomness at this place of the run."""


Craft = Callable[[np.ndarray, Seen], np.ndarray]
"""(its honest scalars, float64 [T_k, P]; what it knows) -> what it sends."""


def sign_flip(honest: np.ndarray, seen: Seen) -> np.ndarray:
    """-s g (Li et al. 2019, Karimireddy et al. 2021)"""
    return -(seen.scale or 1.0) * honest


def gaussian(honest: np.ndarray, seen: Seen) -> np.ndarray:
    """N(0, s^2) in each entry (Blanchard et al. 2017)"""
    return (seen.scale or 200.0) * seen.noise.standard_normal(honest.shape)


def scaled(honest: np.ndarray, seen: Seen) -> np.ndarray:
    """s g, of flipped labels: model replacement (Bagdasaryan et al. 2020)"""
    return (seen.scale or seen.clients / seen.attackers) * honest


def little_is_enough(honest: np.ndarray, seen: Seen) -> np.ndarray:
    """mu - s sigma, entry by entry (Baruch et al. 2019)"""
    s = seen.scale or z_max(seen.clients, seen.attackers)
    return (seen.mean - s * seen.deviation)[: len(honest)]


def z_max(clients: int, attackers: int) -> float:
    """By how many sigma attackers can be off and still have a majority on their side of the mean (Baruch et al. 2019).

    Attackers that are the majority need no supporters: they get the z of one.
    """
    honest = clients - attackers
    supporters = max(clients // 2 + 1 - attackers, 1)
    share = (honest - supporters) / honest if honest else 0.0
    return max(NormalDist().inv_cdf(share), 0.0) if share > 0 else 0.0


def collusion(honest: np.ndarray, seen: Seen) -> np.ndarray:
    """-s mu: inner-product manipulation (Xie et al. 2020); the usual s turns the equally weighted mean around"""
    others = max(seen.clients - seen.attackers, 1)
    return -(seen.scale or 2 * others / seen.attackers) * seen.mean[: len(honest)]


def forged_trace(honest: np.ndarray, seen: Seen) -> np.ndarray:
    """Noise of the level that honest clients have on average, step by step."""
    level: np.ndarray = np.sqrt((seen.mean**2 + seen.deviation**2).mean(1, keepdims=True))[: len(honest)]
    return (seen.scale or 1.0) * level * seen.noise.standard_normal(honest.shape)


IN_ROUNDS: Mapping[Attack, Craft] = {
    "sign-flip": sign_flip,
    "gaussian": gaussian,
    "scaled": scaled,
    "little-is-enough": little_is_enough,
    "collusion": collusion,
    "gradip-forgery": lambda honest, _: -honest,
}
IN_CALIBRATIONS: Mapping[Attack, Craft] = {"gradip-forgery": forged_trace}
