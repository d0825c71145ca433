"""A client's whole life: local steps along shared directions (method, sections 3 and 4).

It knows no transport, no prompt and no other client. It is given theta, the round's plan and the losses of its own
batches, and replies with one float32 a direction a step.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from meerkat.algorithm import zeroth_order
from meerkat.algorithm.client_rules import ZEROTH_ORDER, ClientRule
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.estimators import PLAIN, Estimator
from meerkat.algorithm.path import descend
from meerkat.algorithm.replies import Scalars
from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.zeroth_order import Loss, MaskedModel
from meerkat.privacy.mechanism import Mechanism


def local_steps(
    model: MaskedModel,
    theta: Tensor,
    plan: RoundPlan,
    client: int,
    batch_loss: Callable[[int], Loss],
    directions: Directions,
    *,
    estimator: Estimator = PLAIN,
    rule: ClientRule = ZEROTH_ORDER,
    h: Tensor | None = None,
    private: Mechanism | None = None,
) -> tuple[Scalars, Tensor]:
    """Client k's steps of one round.

    Args:
        theta: the global theta that the round starts from, float32 [n]; not changed.
        batch_loss: local step t = 0, 1, ... -> the loss on that step's batch: its mean, or with `private` each row's.
        rule, h: what is added to slopes (nothing in a calibration), and what the rule carries, float32 [n]; None for 0.
        private: example-level differential privacy: turns rows' slopes into one noisy scalar a direction.

    Returns:
        The reply, with g_k float32 [T_k, P], and the client's own theta afterwards, float32 [n].

    Raises:
        Diverged: a loss is not finite.
    """
    steps = plan.steps[client]
    scalars = np.zeros((steps, plan.directions), dtype=np.float32)
    losses = np.zeros((steps, plan.directions))
    start = theta
    for t in range(steps):
        (g,), (losses[t],) = slopes(model, theta, plan, t, batch_loss(t), directions, estimator, private)
        drift = theta - start if t else None
        moved: Tensor | None = None
        for p, z in enumerate(plan.along(t, directions)):
            scalars[t, p] = g[p] + correction(plan, rule, h, drift, z)
            moved = descend(theta if moved is None else moved, plan.rate, scalars[t, p], z, moved)
        theta = theta if moved is None else moved
    return Scalars(client, scalars, float(losses.mean())), theta


def slopes(
    model: MaskedModel,
    theta: Tensor,
    plan: RoundPlan,
    step: int,
    loss: Loss,
    directions: Directions,
    estimator: Estimator = PLAIN,
    private: Mechanism | None = None,
    rows: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Slopes of K clients along the P directions of a local step, and losses near theta: float64 [K, P] each.

    Args:
        loss: one client's, float []; those of K clients, float [K]; with `private` each row's, client by client,
            float64 [rows].
        private: clips each row's slopes over all directions together, and adds noise. Losses are nan then: the noisy
            slopes are all that may be known of the rows.
        rows: how many rows are the first client's, the second's and so on; empty where all are one client's.

    Raises:
        Diverged: a loss is not finite.
    """
    measured = zeroth_order.slopes(model, theta, plan.along(step, directions), plan.eps, loss, estimator)
    g, level = (values.reshape(plan.directions, *values.shape[1:] or (1,)).T.numpy() for values in measured)
    if private is None:
        return g, level
    of_clients = np.split(g, np.cumsum(rows, dtype=np.int64)[:-1])
    noisy = np.stack([private.release(of_client) for of_client in of_clients])
    return noisy, np.full_like(noisy, np.nan)


def correction(plan: RoundPlan, rule: ClientRule, h: Tensor | None, drift: Tensor | None, z: Tensor) -> float:
    """What the rule adds to a slope along z; nothing in a calibration."""
    return rule.correction(h, drift, z) if plan.phase == "training" else 0.0
