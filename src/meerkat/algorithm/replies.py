"""What a client replies with, and the check that every reply passes before it counts."""

import math
from dataclasses import dataclass

import numpy as np

from meerkat.algorithm.rounds import RoundPlan

LARGEST_LOSS = 50.0
"""Nats. Two losses differ by less, so no honest |g| is above this over eps: twice what a two-sided slope can be."""


@dataclass(frozen=True)
class Scalars:
    """A client's reply of zeroth-order steps: its projected gradients, four bytes each."""

    client: int
    scalars: np.ndarray
    """g_k^{r,t,p}: float32 [T_k, P]"""
    loss: float = float("nan")
    """Mean training loss. Only a simulation knows it: it is never sent."""
    pointer: int | None = None
    """Local steps that the client had made before, by its own count; None for as many as the server counted."""
    signature: bytes = b""
    """The client's signature of its scalars, 64 bytes; empty where it does not sign. See `record.signatures`."""

    @property
    def steps(self) -> int:
        """Local steps made."""
        return len(self.scalars)


@dataclass(frozen=True)
class Delta:
    """A client's reply of first-order steps: how far they took it, 4n bytes."""

    client: int
    delta: np.ndarray
    """theta_k - theta_r: float32 [n]"""
    steps: int
    """Local steps made."""
    loss: float = float("nan")
    """Mean training loss, as in `Scalars`."""
    pointer: None = None
    """Nobody counts but the server."""


Reply = Scalars | Delta


def check_reply(plan: RoundPlan, client: int, scalars: np.ndarray) -> None:
    """Check a reply's scalars (float32), wherever they are read: at the wire, in a simulation, in a log.

    Raises:
        ValueError: the client was not asked, the reply is not the [T_k, P] that was asked for, or a scalar is not
            finite or larger than any loss can make it.
    """
    if client not in plan.steps:
        raise ValueError(f"a reply of client {client}, which was not asked")
    if scalars.shape != (plan.steps[client], plan.directions):
        raise ValueError(
            f"a reply of {scalars.shape[0]} steps in {scalars.shape[1]} directions, where {plan.steps[client]} "
            f"in {plan.directions} were asked for"
        )
    values = scalars.ravel().tolist()
    if not all(map(math.isfinite, values)):
        raise ValueError("a reply with a scalar that is not finite")
    if (largest := max(map(abs, values), default=0.0)) > (most := LARGEST_LOSS / plan.eps):
        raise ValueError(f"a reply with a scalar of {largest:.3g}: no loss makes one above {most:.3g}")
