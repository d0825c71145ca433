"""How large a perturbation should be: measured against exact slopes, on data that anyone may know.

A small eps drowns in the rounding of weights and losses, a large one in the loss' curvature; where the best one lies
depends on the model, on the type of its weights and on what moves.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meerkat import seeds
from meerkat.algorithm.directions import Directions, Place
from meerkat.algorithm.estimators import Estimator
from meerkat.algorithm.precision import weights_as
from meerkat.algorithm.zeroth_order import Loss, MaskedModel, slopes
from meerkat.errors import Diverged
from meerkat.masks.sparse_mask import SparseMask

SIZES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Values of eps that are tried."""

_NEGLIGIBLE = 0.02
"""An error of g that no run notices."""
_DIRECTIONS = 4
"""Along which each batch is measured."""


@dataclass(frozen=True)
class PerturbationCurve:
    """The error of g by eps: its root mean square over that of the exact slopes."""

    eps: tuple[float, ...]
    error: tuple[float, ...]

    def chosen(self, usual: float) -> float:
        """The eps of the smallest error; the usual one where its error is negligible beside the randomness of z."""
        by_eps = dict(zip(self.eps, self.error, strict=True))
        if not by_eps or by_eps.get(usual, math.inf) <= _NEGLIGIBLE:
            return usual
        return min(by_eps, key=by_eps.__getitem__)


def perturbation_curve(
    model: nn.Module,
    mask: SparseMask,
    batches: Sequence[tuple[Tensor, Loss]],
    dtype: torch.dtype,
    estimator: Estimator,
    keep: Collection[str] = (),
) -> PerturbationCurve:
    """How far g is from the exact slope <grad, z>, by eps.

    Args:
        model: its weights as the checkpoint has them; they are the same afterwards.
        batches: each batch's exact gradient at the moving entries, float32 [n], and its loss at the model's present
            weights, float [].
        dtype: what the weights are cast to for the forward passes, except the parameters of `keep`.

    Returns:
        The curve, without values of eps at which a loss is not finite; empty where exact slopes are zero throughout.
    """
    theta = MaskedModel(model, mask).read()
    directions = Directions(seeds.key(0, "perturbation"), len(mask), theta.device, estimator.law)
    squares, of_exact = [0.0] * len(SIZES), 0.0
    with weights_as(model, dtype, keep):
        cast = MaskedModel(model, mask)
        for number, (gradient, loss) in enumerate(batches):
            places = [Place("training", number, 0, p) for p in range(_DIRECTIONS)]
            gradient = gradient.to(theta.device)
            exact = torch.stack([(gradient * z).sum(dtype=torch.float64) for z in map(directions, places)]).cpu()
            of_exact += float(exact.square().sum())
            for i, eps in enumerate(SIZES):
                try:
                    g, _ = slopes(cast, theta, map(directions, places), eps, loss, estimator)
                    squares[i] += float((g - exact).square().sum())
                except Diverged:  # so far from theta, the loss is not finite
                    squares[i] = math.inf
    errors = {eps: math.sqrt(square / of_exact) for eps, square in zip(SIZES, squares, strict=True) if of_exact}
    finite = {eps: error for eps, error in errors.items() if math.isfinite(error)}
    return PerturbationCurve(tuple(finite), tuple(finite.values()))
