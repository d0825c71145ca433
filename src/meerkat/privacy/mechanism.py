"""Differential privacy for scalars: clip, add noise, sample at random (DP-ZO, Tang et al. 2024; DPZero, Zhang et al.).

    example:  g_i = (l_i+ - l_i-) / (2 eps) in R^P,   g = (sum_i clip(g_i, C) + N(0, sigma^2 C^2 I)) / B
    client:   G = (sum_k clip(g_k, S) + N(0, sigma^2 S^2 I)) / (q K),   g_k in R^(T P)

clip(v, C) scales v down to an L2 norm of C: for one direction it is a bound on |g_i|. Rows are Poisson-sampled at
q_k = B / N_k (all rows of a client that has fewer than B), clients at q = clients_per_round / K. The denominators are
fixed, and the reply to an empty sample is noise alone. Adding or removing one example (or client) moves the sum by at
most C (or S); replacing one, by at most twice that.

Samples and noise come from the operating system's randomness, never from a seed: knowing all of a run's seeds helps
to predict neither.
"""

import math
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Level = Literal["none", "example", "client"]
"""What a run hides the presence of: nothing, one row of a client, or a whole client."""
Relation = Literal["add-or-remove", "replace"]
"""Which data sets are neighbours: those that differ by one more example (or client), or by one that is replaced."""

WEAK = 20.0
"""The epsilon above which a guarantee means next to nothing: one example may make a model e^20 times as likely."""

_SYSTEM = random.SystemRandom()


@dataclass(frozen=True)
class Guarantee:
    """(epsilon, delta)-differential privacy of a run so far."""

    level: Literal["example", "client"]
    relation: Relation
    epsilon: float
    """Of the client that spent the most."""
    otherwise: float
    """The same run's epsilon under the other relation."""
    delta: float
    clip: float
    noise_multiplier: float
    among: int = 0
    """How many there are to hide one among: rows of all clients that took steps, or clients. 0 if unknown."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, and the promise in words; an infinite epsilon is null."""
        fields = {name: value if value != math.inf else None for name, value in asdict(self).items()}
        return {**fields, "in_words": self.in_words()}

    def in_words(self) -> str:
        """The promise in one line."""
        changes = ["added or removed", "replaced"]
        this, other = changes if self.relation == "add-or-remove" else reversed(changes)
        unit = "one example of a client" if self.level == "example" else "one client"
        promise = f"epsilon {self.epsilon:.3g} at delta {self.delta:g}, {unit} {this}"
        promise += f"; {self.otherwise:.3g} where one is {other}"
        return "; too weak to protect anybody: ".join(filter(None, [promise, self._weakness()]))

    def _weakness(self) -> str:
        """Why the numbers do not protect; empty if they do."""
        if self.epsilon == math.inf:
            return "no bound could be computed"
        if self.epsilon > WEAK:
            return f"epsilon is above {WEAK:g}"
        if self.among and self.delta * self.among >= 1:
            unit = "rows" if self.level == "example" else "clients"
            return f"delta is not below 1 / {self.among:,}, one over the {unit}, so one of them may be exposed"
        return ""


@dataclass(frozen=True)
class Mechanism:
    """One noisy sum: the Gaussian mechanism on Poisson-sampled vectors."""

    clip: float
    """C or S: the largest L2 norm of a vector in the sum."""
    noise_multiplier: float
    """sigma: the noise's standard deviation divided by the clip."""
    expected: float
    """The fixed denominator: B, or q K."""

    def rate(self, count: int) -> float:
        """q: the probability with which each of `count` is sampled."""
        return sampling_rate(self.expected, count)

    def sample(self, members: Sequence[int] | np.ndarray) -> np.ndarray:
        """Each member independently with probability q: int64 [sampled], in their order; may be empty."""
        members = np.asarray(members, dtype=np.int64)
        drawn = np.frombuffer(os.urandom(8 * len(members)), dtype="<u8") >> 11  # as many bits as a double holds
        return members[drawn < self.rate(max(len(members), 1)) * 2.0**53]

    def release(self, vectors: np.ndarray) -> np.ndarray:
        """The noisy mean, float64 [D], of vectors, float64 [sampled, D]: the only thing that may leave.

        A vector that is not finite counts as zero, so one example's effect on the sum stays bounded. The sum is exact:
        it is rounded once, with the noise in it, so that no vector's part of it depends on the others. Then it is
        rounded to multiples of about 2^-24 sigma C: noise that is a double has gaps between its values, and finer bits
        of the sum would show in them.
        """
        deviation = self.noise_multiplier * self.clip
        noise = deviation * gaussian(vectors.shape[1])
        entries = zip(clipped(vectors, self.clip).T, noise, strict=True)
        sums = np.array([math.fsum([*summands, drawn]) for summands, drawn in entries])
        return _on_grid(sums, deviation) / self.expected


def _on_grid(sums: np.ndarray, deviation: float) -> np.ndarray:
    """Sums rounded to multiples of a power of two, about 2^-24 of the noise's deviation; as they are if it is 0."""
    _, exponent = math.frexp(deviation)
    grid = math.ldexp(1.0, exponent - 25) if deviation else 0.0
    return np.round(sums / grid) * grid if grid else sums


def sampling_rate(expected: float, count: int) -> float:
    """q: the probability with which each of `count` is sampled, so that `expected` are on average."""
    return min(1.0, expected / count)


def clipped(vectors: np.ndarray, clip: float) -> np.ndarray:
    """Vectors, float64 [count, D], each scaled down to an L2 norm of at most `clip`; zeros if it is not finite.

    Each is a function of its vector alone, bit for bit, and at most a few units in the last place longer than `clip`.
    """
    lengths = np.array([math.hypot(*vector) for vector in vectors]).reshape(-1, 1)
    vectors = np.where(np.isfinite(lengths), vectors, 0.0)
    longer = np.isfinite(lengths) & (lengths > clip)
    return np.where(longer, vectors / np.where(longer, lengths, 1.0) * clip, vectors)


def gaussian(count: int) -> np.ndarray:
    """Standard normal values from the operating system's randomness: float64 [count].

    Each is half the sum of four, so that the rounding of a single double does not reveal what it was added to (Holohan
    and Braghin 2021).
    """
    # not `gauss`, which keeps a value for the next call: two threads, or a forked process, could use the same one
    return np.array([sum(_SYSTEM.normalvariate(0.0, 1.0) for _ in range(4)) / 2 for _ in range(count)])
