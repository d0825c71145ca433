"""How stiff a task's loss is at the moving entries, and the learning rates that follow (docs/steps.md).

    H = E_x (1 / C) sum_c (grad s_c - m)(grad s_c - m)',    m = (1 / C) sum_c grad s_c

is the Gauss-Newton matrix of the cross-entropy over C candidates' scores s_c where all of them are equally likely. No
label is needed, so text that anyone has will do. A pre-trained model prefers some label, and its loss looks flat: a run
unlearns that first, and is then where H is measured.

A step -eta g z / P along P normal directions, with g_p = <grad, z_p>, changes a loss of curvature H by

    -eta |grad|^2 + eta^2 / 2 grad' ((tr H + (P + 1) H) / P) grad

on average, since E[z z' H z z'] = tr(H) I + 2 H. It falls fastest, along the stiffest direction, at
eta = P / (tr H + (P + 1) lambda_max); without directions, by exact gradients, at 1 / lambda_max.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_TOGETHER = 16
"""Directions that are kept while gradients are read, and gradients that are taken in at a time."""
_MOST_ENTRIES = 1 << 20
"""Of longer gradients, so many evenly spaced entries tell which share of the trace is the largest eigenvalue."""
_ROUNDING = 1e-9
"""Of the largest eigenvalue: what is smaller is rounding."""


@dataclass(frozen=True)
class Curvature:
    """What of H the learning rate depends on."""

    trace: float
    largest: float
    """lambda_max"""

    def rate(self, directions: int) -> float:
        """The eta of the fastest expected descent along the stiffest of directions, of P at a time."""
        return directions / (self.trace + (directions + 1) * self.largest)

    def longest_rate(self, theta: Tensor) -> float:
        """The eta at which a step along one direction is as long as theta (float32 [n]), if its slope is `slope`."""
        return float(torch.linalg.vector_norm(theta)) / (math.sqrt(len(theta)) * self.slope)

    @property
    def slope(self) -> float:
        """sqrt(tr H): root mean square of a row's slope along normal directions, where its label is drawn at random."""
        return math.sqrt(self.trace)

    @property
    def rate_of_gradients(self) -> float:
        """The eta of the fastest descent by exact gradients."""
        return 1 / self.largest

    def adam_rate(self, local_steps: int, directions: int) -> float:
        """The eta_s at which Adam's rounds move an entry as far as plain steps do, by scalars as large as `slope`.

        Adam divides a round's D by its size, eta times slope times sqrt(T / P): T steps go T ways, each is a mean of P.
        """
        return self.slope * math.sqrt(local_steps / directions)

    def adam_rate_of_gradients(self, local_steps: int, entries: int) -> float:
        """The same for exact gradients over so many entries: `slope` is their length, and those of T steps add up."""
        return self.slope * local_steps / math.sqrt(entries)


def curvature(gradients: Iterable[Tensor], rows: int) -> Curvature:
    """H = (1 / rows) sum of gradient gradient': its trace exactly, its largest eigenvalue nearly.

    Directions beyond the first 16 are forgotten after every 16 gradients.

    Args:
        gradients: any whose outer products sum up to that of all rows, at the moving entries: float32 [n] each.
        rows: how many rows they are of.
    """
    trace, of_part, known, waiting = 0.0, 0.0, list[Tensor](), list[Tensor]()
    for gradient in gradients:
        trace += _square(gradient)
        part = gradient[:: -(-len(gradient) // _MOST_ENTRIES)].clone()
        of_part += _square(part)
        waiting.append(part)
        if len(waiting) == _TOGETHER:
            known, waiting = _first([*known, *waiting]), []
    known = _first([*known, *waiting]) if waiting else known
    share = max(map(_square, known), default=0.0) / of_part if of_part else 0.0
    return Curvature(trace / rows, share * trace / rows)


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _first(gradients: list[Tensor]) -> list[Tensor]:
    """At most 16 orthogonal gradients, longest first, the sum of whose outer products is nearly that of those given."""
    rows = torch.stack(gradients)
    values, mixtures = torch.linalg.eigh((rows @ rows.T).double())
    values, mixtures = values.flip(0)[:_TOGETHER], mixtures.flip(1)[:, :_TOGETHER]
    return [*(mixtures[:, values > _ROUNDING * values[0]].T.float() @ rows)]
