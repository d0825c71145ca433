"""The subspace that a mask's entries may be perturbed in: a few directions, the same bits on every machine.

    z = B e,    B int16 [k, n] with one power of two for a unit,    e_j on a grid of 2^-12

Products of the two and sums over k <= 64 are whole numbers below 2^53, so float64 gives them exactly, in any order and
on any device. z is rounded once, to float32.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LARGEST_RANK = 64
"""k, at most: sums stay exact."""
GRID = 2.0**-12
"""Distance of neighbouring values of e_j. The normal quantiles that it rounds end at 4.3."""
_LARGEST = 2**15 - 1
_EXPONENTS = (-64, 64)


@dataclass(frozen=True, eq=False)
class Subspace:
    """k directions at the moving entries."""

    coefficients: Tensor
    """int16 [k, n], on the CPU; at least one of them is not zero."""
    exponent: int
    """A coefficient's unit is 2^exponent."""

    @classmethod
    def of(cls, directions: Tensor) -> "Subspace":
        """Directions of these lengths relative to each other, scaled so that E|z|^2 = n for e ~ N(0, I).

        So a z has the length that it has without a subspace, and eps, clipping and bounds keep their meaning.

        Args:
            directions: floats [k, n], k <= 64, on any device, finite, not all zero.
        """
        wide = directions.double().cpu()
        wide = wide * math.sqrt(wide.shape[1] / float(wide.square().sum()))
        exponent = math.ceil(math.log2(float(wide.abs().max()) / _LARGEST))
        return cls((wide * 2.0**-exponent).round().to(torch.int16), exponent)

    def __len__(self) -> int:
        """k"""
        return len(self.coefficients)

    def combine(self, e: np.ndarray, start: int, count: int) -> np.ndarray:
        """Entries start .. start + count of z = B e: float32 [count].

        Args:
            e: float32 [k]; rounded to the grid.
        """
        steps = torch.from_numpy(np.rint(e.astype(np.float64) / GRID))
        exact = steps @ self.coefficients[:, start : start + count].double()
        return (exact * (GRID * 2.0**self.exponent)).float().numpy()

    def spread(self) -> Tensor:
        """The standard deviation of each entry of z: float32 [n]."""
        return (self.coefficients.double().square().sum(0).sqrt() * 2.0**self.exponent).float()

    def rank(self) -> int:
        """How many directions are independent, each counted by its direction and not by its length."""
        rows = self.coefficients.double()
        lengths = rows.norm(dim=1, keepdim=True)
        unit = rows / torch.where(lengths > 0, lengths, 1.0)
        return int((torch.linalg.eigvalsh(unit @ unit.T) > _INDEPENDENT).sum())

    def check_form(self, entries: int) -> None:
        """Raise ValueError unless this can be a subspace of so many moving entries."""
        form = tuple(self.coefficients.shape)
        if len(form) != 2 or not 1 <= form[0] <= LARGEST_RANK or form[1] != entries:
            raise ValueError(f"a subspace is [k, {entries}] with k from 1 to {LARGEST_RANK}, not {list(form)}")
        if self.coefficients.dtype != torch.int16 or not self.coefficients.any():
            raise ValueError("a subspace is int16, and not zero throughout")
        if not _EXPONENTS[0] <= self.exponent <= _EXPONENTS[1]:
            raise ValueError(f"a subspace's exponent is from {_EXPONENTS[0]} to {_EXPONENTS[1]}, not {self.exponent}")


_INDEPENDENT = 1e-3
"""Least eigenvalue of the cosines' matrix that counts as a direction of its own."""
