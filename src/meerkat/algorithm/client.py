"""The client's whole life: local steps along shared directions (method, sections 3 and 4).

It knows no transport, no prompt and no other client: it is given theta, the round's plan and the
losses of its own batches, and answers with one float32 a direction a step.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from meerkat.algorithm.directions import Directions
from meerkat.algorithm.path import descend
from meerkat.algorithm.rounds import Reply, RoundPlan
from meerkat.algorithm.zeroth_order import Loss, MaskedModel, projected_gradient
from meerkat.privacy.mechanism import Mechanism


def local_steps(
    model: MaskedModel,
    theta: Tensor,
    plan: RoundPlan,
    client: int,
    batch_loss: Callable[[int], Loss],
    directions: Directions,
    h: Tensor | None = None,
    private: Mechanism | None = None,
) -> tuple[Reply, Tensor]:
    """Client k's steps of one round.

    Args:
        theta: the global theta that the round starts from, float32 [n]; not changed.
        batch_loss: local step t = 0, 1, ... -> the loss on that step's batch: its mean, or with `private` each row's.
        h: FedDyn's h_k, float32 [n]; None is zero. Looked at where the plan's alpha is not zero.
        private: example-level differential privacy: what makes one noisy scalar a direction of the rows'.

    Returns:
        The reply, with g_k float32 [T_k, P], and the client's own theta afterwards, float32 [n].
    """
    steps = plan.steps[client]
    scalars = np.zeros((steps, plan.directions), dtype=np.float32)
    losses = np.zeros((steps, plan.directions))
    start = theta
    for t in range(steps):
        loss = batch_loss(t)
        drift = theta - start if plan.alpha else None
        noisy = noisy_slopes(model, theta, plan, t, loss, directions, private)[0] if private else None
        moved: Tensor | None = None
        for p in range(plan.directions):
            z = directions(plan.place(t, p))
            directions.prepare(plan.place_after(t, p))
            if noisy is None:
                g, level = projected_gradient(model, theta, z, plan.eps, loss)
                slope, losses[t, p] = g.item(), level
            else:
                slope, losses[t, p] = float(noisy[p]), np.nan  # the noisy slopes are all that is known of the rows
            scalars[t, p] = slope + correction(plan.alpha, h, drift, z)
            moved = descend(theta if moved is None else moved, plan.rate, scalars[t, p], z, moved)
        theta = theta if moved is None else moved
    return Reply(client, scalars, float(losses.mean())), theta


def noisy_slopes(
    model: MaskedModel,
    theta: Tensor,
    plan: RoundPlan,
    step: int,
    losses: Loss,
    directions: Directions,
    private: Mechanism,
    counts: Sequence[int] = (),
) -> np.ndarray:
    """One step's slopes of K clients along all P directions under example-level differential privacy: float64 [K, P].

    Rows' slopes are clipped over all directions together. `losses` gives each row's loss: float64 [rows], perhaps none.

    Args:
        counts: how many rows are the first client's, the second's and so on; empty where all are one client's.
    """
    slopes = [row_slopes(model, theta, plan, step, p, losses, directions) for p in range(plan.directions)]
    of_clients = np.split(np.stack(slopes, axis=1), np.cumsum(counts, dtype=np.int64)[:-1])
    return np.stack([private.release(rows) for rows in of_clients])


def row_slopes(
    model: MaskedModel, theta: Tensor, plan: RoundPlan, step: int, p: int, losses: Loss, directions: Directions
) -> np.ndarray:
    """Each row's slope along one direction, float64 [rows]."""
    z = directions(plan.place(step, p))
    directions.prepare(plan.place_after(step, p))
    return projected_gradient(model, theta, z, plan.eps, losses).g.numpy()


def correction(alpha: float, h: Tensor | None, moved: Tensor | None, z: Tensor) -> float:
    """What FedDyn adds to a projected gradient: <alpha (theta - theta_r) - h_k, z>, in float64 (method, section 8).

    Args:
        moved: theta - theta_r, float32 [n]; None is zero, as is `h`.
    """
    if not alpha:
        return 0.0
    wide, found = z.double(), 0.0
    if moved is not None:
        found += alpha * (moved.double() @ wide).item()
    if h is not None:
        found -= (h.double() @ wide).item()
    return found
