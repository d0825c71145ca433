"""Two forward passes instead of a gradient (method, section 3).

    l+ = f(theta + eps z)    l- = f(theta - eps z)    g = (l+ - l-) / (2 eps)

Weights are always written from theta, which stays float32: nothing is added to a weight and taken
away again, so restoring is exact and no drift builds up (numeric contracts 2 and 3).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from meerkat.errors import Diverged
from meerkat.masks.sparse_mask import SparseMask

Loss = Callable[[], Tensor]
"""The loss at the model's present weights, on a batch that was settled before: float [] or [K], one a client."""


class MaskedModel:
    """A model of which only the masked entries move: theta <-> the weights at the mask."""

    def __init__(self, model: nn.Module, mask: SparseMask) -> None:
        self.model = model
        self.mask = mask
        parameters = dict(model.named_parameters())
        self.device = next(iter(parameters.values())).device
        self._moving = [parameters[name] for name in mask.entries]
        self._parts: list[tuple[Tensor, Tensor | None]] = []
        for name, indices in mask.entries.items():
            weights = parameters[name].detach()
            if not weights.is_contiguous():
                raise ValueError(f"parameter '{name}' is not contiguous in memory")
            self._parts.append((weights.view(-1), None if indices is None else indices.to(weights.device)))
        self._sizes = [count for _, count in mask.counts()]

    def read(self) -> Tensor:
        """theta: the weights at the mask, float32 [n]."""
        return self.gather([weights for weights, _ in self._parts])

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """Those entries of tensors shaped like `parameters()` that move: float32 [n]."""
        entries = zip(tensors, self._parts, strict=True)
        return torch.cat([(t.reshape(-1) if at is None else t.reshape(-1)[at]).float() for t, (_, at) in entries])

    def parameters(self) -> list[nn.Parameter]:
        """The model's parameters that hold moving entries, in theta's order."""
        return self._moving

    def write_(self, theta: Tensor) -> None:
        """Set the weights at the mask to theta (float32 [n]), rounded to the weights' type."""
        for (weights, at), values in zip(self._parts, theta.split(self._sizes), strict=True):
            if at is None:
                weights.copy_(values)
            else:
                weights.index_copy_(0, at, values.to(weights.dtype))


class ProjectedGradient(NamedTuple):
    """What one direction tells: float64 on the CPU, [] or [K] as the loss is."""

    g: Tensor
    """(l+ - l-) / (2 eps)"""
    loss: Tensor
    """(l+ + l-) / 2, for the record of training only: it is never sent."""


@torch.no_grad()
def projected_gradient(model: MaskedModel, theta: Tensor, z: Tensor, eps: float, loss: Loss) -> ProjectedGradient:
    """The loss' slope along z at theta, from two forward passes on the same batch.

    Args:
        theta, z: float32 [n] on the model's device; neither is changed.
        eps: the perturbation size, above zero.

    The weights are theta's again when it returns, or raises.

    Raises:
        Diverged: a loss is not finite.
    """
    nudge = z * eps
    try:
        model.write_(theta + nudge)
        plus = loss()
        model.write_(theta - nudge)
        minus = loss()
    finally:
        model.write_(theta)
    both = torch.stack([plus, minus]).double().cpu()
    if not torch.isfinite(both).all():
        raise Diverged(
            f"the loss is {both.flatten()[~torch.isfinite(both.flatten())][0].item()} at theta +- {eps:g} z; "
            "start a new run with a lower --lr, or with float32 weights"
        )
    return ProjectedGradient((both[0] - both[1]) / (2 * eps), (both[0] + both[1]) / 2)
