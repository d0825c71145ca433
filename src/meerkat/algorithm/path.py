"""Paths: scalars and shared directions -> theta (method, section 5).

One arithmetic serves client, server, auditor and late joiner, and gives each the same bits (numeric contract 2):
c = float32(eta / P) * G; step = c * z; theta -= step. Every operation is rounded by itself, steps then directions
ascending.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from meerkat.algorithm.directions import Directions
from meerkat.algorithm.rounds import RoundPlan, Update


def descend(theta: Tensor, rate: np.float32, g: np.float32, z: Tensor, out: Tensor | None = None) -> Tensor:
    """theta - (rate g) z, in `out` where one is given, which may be theta; all are float32 [n]."""
    # no `alpha=` and no addcmul: they may fuse the product into the difference and round once
    return torch.sub(theta, z * float(rate * g), out=out)


def walk(theta: Tensor, plan: RoundPlan, scalars: np.ndarray, directions: Directions) -> Iterator[Tensor]:
    """theta after each local step that the scalars (float32 [T, P]) describe.

    By a client's own scalars of a round that began at theta, equal to what the client had, to the bit. Each tensor
    yielded is the same one, updated: clone what you keep.
    """
    moved = None
    for step, row in enumerate(scalars):
        for p, g in enumerate(row):
            z = directions(plan.place(step, p))
            if (step + 1, p + 1) != scalars.shape:
                directions.prepare(plan.place_after(step, p))
            theta = moved = descend(theta, plan.rate, g, z, moved)
        yield theta


def moved(theta: Tensor, update: Update, directions: Directions) -> Tensor:
    """theta moved by what a round says: theta - (eta / P) sum_{t,p} G z, or theta plus the mean delta."""
    if not update.aggregate.size:
        return theta
    if update.plan.sends == "delta":
        return theta + torch.from_numpy(update.aggregate).to(theta.device)
    *_, end = walk(theta, update.plan, update.aggregate, directions)
    return end


def digest(theta: Tensor) -> str:
    """SHA-256 of theta's float32 values, little-endian."""
    values = theta.detach().cpu().contiguous()
    if values.dtype != torch.float32:
        raise TypeError(f"theta is {values.dtype}, not float32")
    return hashlib.sha256(values.numpy().astype("<f4", copy=False).data).hexdigest()
