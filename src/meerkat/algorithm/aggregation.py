"""Aggregators: whom a round asks, how replies of scalars become one G, and whether the replies are kept.

`robust.Aggregation` is a function of the replies, the weighted mean among its rules: everyone can recompute it.
`Hidden` is client-level differential privacy: clients are sampled by chance, and their replies clipped, summed, noised
and forgotten.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from meerkat.algorithm.client_sampling import poisson_sample
from meerkat.privacy.mechanism import Mechanism


class Aggregator(Protocol):
    """What the server makes of a round's replies."""

    @property
    def keeps_replies(self) -> bool:
        """Whether each reply stays in the record, so that G and GradIP can be recomputed from it."""

    @property
    def weighs(self) -> bool:
        """Whether clients may count by their rows."""

    @property
    def byzantine(self) -> int:
        """f: replies of a round that may be anything."""

    def invited(self, clients: int, available: Collection[int] | None) -> Collection[int] | None:
        """Of those available, the clients that a round may ask; None for everyone, among all or those available."""

    def combine(
        self, replies: Mapping[int, np.ndarray], weights: Mapping[int, float], shape: tuple[int, int]
    ) -> np.ndarray:
        """G before the cap, and before it is rounded: float64 [T, P].

        Args:
            replies: g_k by client id, float32 [T_k, P] with T_k <= T.
            weights: p_k
            shape: T, the most steps that a client was asked for, and P.
        """


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
        """The noisy mean: float64 [T, P], whoever was sampled; all count equally."""
        form = self.steps, self.directions
        vectors = [g.astype(np.float64).reshape(-1) for g in replies.values() if g.shape == form]
        return self.mechanism.release(np.stack(vectors) if vectors else np.zeros((0, math.prod(form)))).reshape(form)
