"""Forward passes instead of a gradient (method, section 3).

    l+ = f(theta + eps z)    l- = f(theta - eps z)    g = (l+ - l-) / (2 eps)

Weights are always written from theta, which stays float32. Nothing is added to a weight and taken away again, so
restoring is exact and no drift builds up (numeric contracts 2 and 3).
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from meerkat.algorithm.estimators import PLAIN, Estimator, Slopes
from meerkat.algorithm.quantised import moving_beside
from meerkat.masks.sparse_mask import SparseMask

Loss = Callable[[], Tensor]
"""The loss at the model's present weights, on a batch chosen before: float [], or [K] for K clients or rows."""


class MaskedModel:
    """A model of which only the masked entries move: theta <-> the weights at the mask."""

    def __init__(self, model: nn.Module, mask: SparseMask) -> None:
        self.model = model
        self.mask = mask
        beside = moving_beside(model)
        parameters: dict[str, Tensor] = {**dict(model.named_parameters()), **beside}
        self.device = next(model.parameters()).device
        self._moving = [parameters[name] for name in mask.entries]
        self._parts: list[tuple[Tensor, Tensor | None]] = []
        for name, indices in mask.entries.items():
            weights = parameters[name].detach()
            if not weights.is_contiguous():
                raise ValueError(f"parameter '{name}' is not contiguous in memory")
            at = None if indices is None or name in beside else indices.to(weights.device)
            self._parts.append((weights.view(-1), at))
        self._sizes = [count for _, count in mask.counts()]

    def read(self) -> Tensor:
        """theta: the weights at the mask, float32 [n]."""
        return self.gather([weights for weights, _ in self._parts])

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """The moving entries of tensors shaped like `parameters()`: float32 [n]."""
        entries = zip(tensors, self._parts, strict=True)
        return torch.cat([(t.reshape(-1) if at is None else t.reshape(-1)[at]).float() for t, (_, at) in entries])

    def parameters(self) -> list[Tensor]:
        """The model's parameters that have moving entries, in theta's order; of quantised ones only these entries."""
        return self._moving

    def write_(self, theta: Tensor) -> None:
        """Set the weights at the mask to theta (float32 [n]), rounded to the weights' type."""
        for (weights, at), values in zip(self._parts, theta.split(self._sizes), strict=True):
            if at is None:
                weights.copy_(values)
            else:
                weights.index_copy_(0, at, values.to(weights.dtype))


def slopes(
    model: MaskedModel, theta: Tensor, along: Iterable[Tensor], eps: float, loss: Loss, estimator: Estimator = PLAIN
) -> Slopes:
    """The loss' slopes at theta along P directions, float32 [n] each, on one batch.

    Args:
        theta: float32 [n] on the model's device; not changed. The weights are theta's again afterwards.

    Raises:
        Diverged: a loss is not finite.
    """

    def loss_at(point: Tensor) -> Tensor:
        model.write_(point)
        return loss()

    with torch.no_grad():
        try:
            return estimator.slopes(loss_at, theta, along, eps)
        finally:
            model.write_(theta)


def projected_gradient(model: MaskedModel, theta: Tensor, z: Tensor, eps: float, loss: Loss) -> Slopes:
    """The loss' slope at theta along one z, float32 [n], by two forward passes: float64 [], or [K].

    theta and the weights afterwards are as in `slopes`.

    Raises:
        Diverged: a loss is not finite.
    """
    (g,), (level,) = slopes(model, theta, [z], eps, loss)
    return Slopes(g, level)
