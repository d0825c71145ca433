"""The curvature of a task's loss, measured on public data: which directions are stiff, and how fast steps may be.

    H = E_x sum_c (1 / C) (grad s_c - m) (grad s_c - m)',    m = (1 / C) sum_c grad s_c

is the Gauss-Newton matrix of the cross-entropy over C candidates' scores s_c where all of them are equally likely. No
label is needed, so text that anyone has will do. A pre-trained model prefers some label, and its loss looks flat: a run
unlearns that first, and is then where H is measured. docs/steps.md tells how the constants below were chosen, and
what else was tried.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from meerkat.masks.subspace import Subspace

RANK = 16
"""k: directions of the subspace."""
DAMPING = 0.01
"""Eigenvalues well below this share of the trace are no reason for longer steps."""
_WITHIN = 64
"""Directions that are kept while gradients are read, and gradients that are taken in at a time."""
_ROUNDING = 1e-9
"""Of the largest eigenvalue: what is smaller is rounding."""


@dataclass(frozen=True)
class Curvature:
    """H at the moving entries, as far as it is known."""

    trace: float
    eigenvalues: Tensor
    """The largest, descending: float64 [k]."""
    vectors: Tensor
    """Theirs, orthonormal: float32 [k, n]."""

    def subspace(self, rank: int = RANK, damping: float = DAMPING) -> Subspace:
        """The first directions v_j, each times sqrt(d / (lambda_j + d)) with d = damping * trace.

        A step g z then moves along H's inverse, damped, and the stiffest directions do not limit it.
        """
        d = damping * self.trace
        scale = (d / (self.eigenvalues[:rank] + d)).sqrt()
        return Subspace.of(self.vectors[:rank] * scale[:, None].float())

    def along(self, subspace: Subspace | None = None) -> float:
        """E[z'Hz] for z ~ N(0, I), or for the z of a subspace of its own first directions."""
        if subspace is None:
            return self.trace
        lengths = subspace.coefficients.double().square().sum(1) * 4.0**subspace.exponent
        return float(lengths @ self.eigenvalues[: len(subspace)])


def curvature(gradients: Iterable[Tensor], rows: int, keep: bool = True) -> Curvature:
    """H = (1 / rows) sum of gradient gradient', its trace exactly and its first directions from one reading.

    Directions beyond the first 64 are forgotten after every 64 gradients.

    Args:
        gradients: any whose outer products sum up to that of all rows, at the moving entries: float32 [n] each.
        rows: how many rows they are of.
        keep: whether directions are wanted; without, no gradient is kept.
    """
    trace, known, waiting = 0.0, list[Tensor](), list[Tensor]()
    for gradient in gradients:
        trace += float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
        if keep:
            waiting.append(gradient)
        if len(waiting) == _WITHIN:
            known, waiting = _first([*known, *waiting]), []
    if waiting:
        known = _first([*known, *waiting])
    if not known:
        return Curvature(trace / rows, torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0))
    longest_first = torch.stack(known)
    squares = longest_first.double().square().sum(1)
    return Curvature(trace / rows, squares / rows, longest_first / squares.sqrt()[:, None].float())


def _first(gradients: list[Tensor]) -> list[Tensor]:
    """At most 64 orthogonal gradients, longest first, the sum of whose outer products is nearly that of those given."""
    rows = torch.stack(gradients)
    values, mixtures = torch.linalg.eigh((rows @ rows.T).double())
    values, mixtures = values.flip(0)[:_WITHIN], mixtures.flip(1)[:, :_WITHIN]
    return [*(mixtures[:, values > _ROUNDING * values[0]].T.float() @ rows)]
