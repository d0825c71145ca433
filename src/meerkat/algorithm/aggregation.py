"""Aggregators: whom a round asks, how replies of scalars become one G, and whether the replies are kept.

`robust.Aggregation` is a function of the replies, the weighted mean among its rules: everyone can recompute it.
`Hidden` is client-level differential privacy: clients are sampled by chance, and their replies clipped, summed, noised
and forgotten.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from meerkat.algorithm.client_sampling import poisson_sample
from meerkat.algorithm.robust import Aggregation
from meerkat.privacy.mechanism import Mechanism


@dataclass(frozen=True)
class Hidden:
    """G = (sum_k clip(g_k, S) + N(0, sigma^2 S^2 I)) / (q K), of replies with all T steps."""

    mechanism: Mechanism
    steps: int
    """T"""
    directions: int
    """P"""
    keeps_replies: ClassVar[bool] = False
    weighs: ClassVar[bool] = False
    byzantine: ClassVar[int] = 0

    def invited(self, clients: int, available: Collection[int] | None) -> Collection[int]:
        """A Poisson sample of all clients, as far as it is available. Nobody can foretell it."""
        return poisson_sample(self.mechanism, clients, available)

    def combine(self, replies: Mapping[int, np.ndarray], *_: object) -> np.ndarray:
        """See `Aggregation.combine`: the noisy mean, whoever was sampled; all count equally."""
        form = self.steps, self.directions
        vectors = [g.astype(np.float64).reshape(-1) for g in replies.values() if g.shape == form]
        return self.mechanism.release(np.stack(vectors) if vectors else np.zeros((0, math.prod(form)))).reshape(form)


Aggregator = Aggregation | Hidden
"""What the server makes of a round's replies."""
