"""Differential privacy for scalars: clip, add noise, sample by chance (DP-ZO, Tang et al. 2024; DPZero, Zhang et al.).

    example:  g_i = (l_i+ - l_i-) / (2 eps) in R^P,   g = (sum_i clip(g_i, C) + N(0, sigma^2 C^2 I)) / B
    client:   G = (sum_k clip(g_k, S) + N(0, sigma^2 S^2 I)) / (q K),   g_k in R^(T P)

clip(v, C) scales v down to an L2 norm of C: for one direction it is a bound on |g_i|. Rows are Poisson-sampled at
q_k = B / N_k (all rows of a client with fewer than B), clients at q = clients_per_round / K; the denominators are
fixed, and an empty sample is answered with noise. With one example (or client) added or removed the sum moves by C
(or S) at most; with one replaced, by twice that.

Samples and noise come from the operating system's randomness, not from anything that a seed gives: who knows every
seed of a run can predict neither.
"""

import math
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Level = Literal["none", "example", "client"]
"""Whose presence a run hides: nobody's, that of one row of a client's, or that of a whole client."""
Relation = Literal["add-or-remove", "replace"]
"""Which data sets are neighbours: one has an example (or client) more, or one of them another in its place."""

WEAK = 20.0
"""An epsilon above which a guarantee says next to nothing: one example may make a model e^20 times as likely."""

_SYSTEM = random.SystemRandom()


@dataclass(frozen=True)
class Guarantee:
    """(epsilon, delta)-differential privacy of a run, as far as it has come."""

    level: Literal["example", "client"]
    relation: Relation
    epsilon: float
    """Of the client that has spent the most."""
    otherwise: float
    """The same run's epsilon under the other relation."""
    delta: float
    clip: float
    noise_multiplier: float
    among: int = 0
    """Rows of all clients that took steps, or clients: one of these is hidden. 0 where not known."""

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, in words as well; an epsilon without bound is null."""
        held = {name: value if value != math.inf else None for name, value in asdict(self).items()}
        return {**held, "in_words": self.in_words()}

    def in_words(self) -> str:
        """What is promised, in one line."""
        ways = ["added or removed", "replaced"]
        this, other = ways if self.relation == "add-or-remove" else reversed(ways)
        whom = "one example of a client" if self.level == "example" else "one client"
        otherwise = f"{self.otherwise:.3g} where one is {other}"
        promised = f"epsilon {self.epsilon:.3g} at delta {self.delta:g}, {whom} {this}; {otherwise}"
        return "; too weak to protect anybody: ".join(filter(None, [promised, self._weakness()]))

    def _weakness(self) -> str:
        """Why the numbers are no protection to count on; empty where they are."""
        if self.epsilon == math.inf:
            return "the noise bounds nothing that could be computed"
        if self.epsilon > WEAK:
            return f"epsilon is above {WEAK:g}"
        if self.among and self.delta * self.among >= 1:
            hidden = "rows" if self.level == "example" else "clients"
            return f"delta is not below 1 / {self.among:,}, one over the {hidden}, so one of them may be given away"
        return ""


@dataclass(frozen=True)
class Mechanism:
    """One noisy sum: the Gaussian mechanism on Poisson-sampled vectors."""

    clip: float
    """C or S: the largest L2 norm that one vector has in the sum."""
    noise_multiplier: float
    """sigma: the noise's standard deviation over the clip."""
    expected: float
    """The fixed denominator: B, or q K."""

    def rate(self, count: int) -> float:
        """q: with what probability each of so many is sampled."""
        return sampling_rate(self.expected, count)

    def sample(self, members: Sequence[int] | np.ndarray) -> np.ndarray:
        """Each of the members with probability q, by itself: int64, in their order; perhaps none."""
        members = np.asarray(members, dtype=np.int64)
        drawn = np.frombuffer(os.urandom(8 * len(members)), dtype="<u8") >> 11  # as many bits as a double holds
        return members[drawn < self.rate(max(len(members), 1)) * 2.0**53]

    def release(self, vectors: np.ndarray) -> np.ndarray:
        """The noisy mean, float64 [D], of vectors float64 [sampled, D]: all that may leave.

        A vector that is not finite counts as zero: what one example does to the sum stays bounded.
        """
        total = clipped(vectors, self.clip).sum(0)
        noisy: np.ndarray = (total + self.noise_multiplier * self.clip * gaussian(len(total))) / self.expected
        return noisy


def sampling_rate(expected: float, count: int) -> float:
    """q: with what probability each of `count` is sampled, so that `expected` are."""
    return min(1.0, expected / count)


def clipped(vectors: np.ndarray, clip: float) -> np.ndarray:
    """Vectors, float64 [count, D], each scaled down to an L2 norm of at most `clip`; zero where one is not finite."""
    vectors = np.where(np.isfinite(vectors).all(1, keepdims=True), vectors, 0.0)
    largest = np.abs(vectors).max(1, keepdims=True, initial=0.0)
    unit = vectors / np.where(largest > 0, largest, 1.0)  # so that squares do not overflow
    shrunk = clip / np.sqrt((unit**2).sum(1, keepdims=True)).clip(min=1.0)
    scaled: np.ndarray = np.where(largest > shrunk, unit * shrunk, vectors)
    return scaled


def gaussian(count: int) -> np.ndarray:
    """Standard normal values from the operating system's randomness: float64 [count].

    Each is the sum of four over two, so that no single double's rounding tells what it was added to (Holohan and
    Braghin 2021).
    """
    # not `gauss`, which keeps a value for the next call: two threads, or a forked process, could have the same
    return np.array([sum(_SYSTEM.normalvariate(0.0, 1.0) for _ in range(4)) / 2 for _ in range(count)])
