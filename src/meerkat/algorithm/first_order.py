"""FedAvg by backpropagation on the masked entries: the upper bound that others are compared with (method, section 8).

    theta <- theta - eta d f_k(theta; B) / d theta

The only method that needs gradients on the clients. It sends 4n bytes a round, not scalars.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from meerkat.algorithm.replies import Delta
from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.zeroth_order import Loss, MaskedModel
from meerkat.errors import Diverged


def masked_gradient(model: MaskedModel, theta: Tensor, loss: Loss) -> tuple[Tensor, float]:
    """The loss' gradient with respect to theta at theta, float32 [n], and the loss.

    The weights are theta's afterwards.

    Raises:
        Diverged: the loss is not finite, or an entry of its gradient.
    """
    with torch.no_grad():
        model.write_(theta)
    parameters = model.parameters()
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            value = loss()
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    if not torch.isfinite(value):
        raise Diverged(f"the loss is {value.item()}; start a new run with a lower --lr")
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    gathered = model.gather(filled)
    if not torch.isfinite(gathered).all():
        raise Diverged("the loss' gradient is not finite; start a new run with a lower --lr")
    return gathered, value.item()


def gradient_steps(
    model: MaskedModel, theta: Tensor, plan: RoundPlan, client: int, batch_loss: Callable[[int], Loss]
) -> tuple[Delta, Tensor]:
    """Client k's steps of one round by backpropagation; the arguments are those of `client.local_steps`.

    Returns:
        The reply, with delta = theta_k - theta, float32 [n], and theta_k.
    """
    moved, losses = theta, []
    for t in range(plan.steps[client]):
        gradient, level = masked_gradient(model, moved, batch_loss(t))
        moved = moved - gradient * plan.lr
        losses.append(level)
    return Delta(client, (moved - theta).cpu().numpy(), len(losses), float(np.mean(losses))), moved
