"""What is learned, apart from how: rows, the model that they are put to, a loss a row, and scores.

`classification.py` and `module.py` are the two kinds that come with the package. Everything after them (masks, engines,
runs, comparisons, reports) knows a problem by this page alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from meerkat.problems.data import Row

Split = Literal["train", "validation", "test"]

Better = Literal["higher", "lower"]

Hides = Literal["none", "example", "client"]
"""Whose presence a run hides, as its setting `dp` has it: nobody's, each row's, or each whole client's."""

Purpose = Literal["steps", "evaluation", "gradient"]
"""What a batch is for: clients' forward passes, an evaluation, or one example's gradient by backpropagation."""

RANGES: Mapping[str, tuple[float, float]] = {"accuracy": (0.0, 1.0)}
"""Lowest and highest value of the scores that have such bounds."""


@dataclass(frozen=True)
class Evaluation:
    """How well a model does on some rows."""

    rows: int
    scores: Mapping[str, float]
    """Each of the problem's scores, a mean over the rows."""
    per_class: Mapping[str, float] = field(default_factory=dict)
    """The first score on the rows of each label, by label; labels without rows are left out."""


@dataclass(frozen=True)
class Public:
    """Data that anyone may know: what a sensitivity mask and GradIP's gradient are made from."""

    examples: Sequence[Any]
    loss: Callable[[Any], Tensor]
    """One of the examples -> its loss at the model's present weights, float32 []."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What the mask's file says of it."""


class Problem(Protocol):
    """What is learned. Its examples and batches are its own: nobody else looks into them."""

    @property
    def name(self) -> str:
        """What is learned, in a word or two."""

    @property
    def model(self) -> nn.Module:
        """The model, on its device; no parameter requires a gradient, and layers are as for evaluation."""

    @property
    def scores(self) -> Mapping[str, Better]:
        """The scores that `evaluate` gives, and which values are better.

        The first is the score that runs are compared by. `loss` is among them: learning rates are chosen by it.
        """

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels' names; empty where rows have none."""

    def rows(self, split: Split) -> list[Row]:
        """The rows of one split, at least one.

        Raises:
            MeerkatError: there is no such split, or its rows are not the problem's.
        """

    def prepare(self, rows: Sequence[Row]) -> list[Any]:
        """Rows as the model sees them, an example each."""

    def batch(self, examples: Sequence[Any], purpose: Purpose = "steps", /) -> Any:
        """At least one example, laid out once for any number of passes at different weights."""

    def row_losses(self, batch: Any) -> Tensor:
        """Each row's loss at the model's present weights, float32 [rows], in the order of its examples.

        A function of weights and batch alone, bit for bit, whatever was computed before: privacy rests on it.
        """

    def evaluate(self, batch: Any) -> Evaluation:
        """The scores of the model's present weights. Raises Diverged: a score is not finite."""

    def digest(self, examples: Sequence[Any]) -> str:
        """SHA-256 of examples, hexadecimal: a run is resumed with no others."""

    def public(self) -> Public | None:
        """What masks are made from; None where there is nothing public: no sensitivity mask then, and no GradIP."""


def primary(scores: Mapping[str, Any]) -> str:
    """The name of the score that runs are compared by: the first one."""
    return next(iter(scores))


def client_losses(
    problem: Problem, examples: Sequence[Any], hides: Hides = "none"
) -> Callable[[Sequence[np.ndarray]], Callable[[], Tensor]]:
    """How an engine gets losses: row numbers of each of K clients -> their mean losses at the present weights.

    Batches are laid out once; each call of what is returned goes through the model: float64 [K]. Where examples are
    hidden it gives every row's loss, client by client: float64 [rows], where a loss that is not finite is zero, so that
    no row can end a private run.

    Args:
        hides: whose presence is hidden. A slope divides a loss' rounding by 2 eps, and rounding depends on what
            shares a pass, so what is hidden shares none: each client's rows, or each row, are a batch of their own.
    """

    def losses_of(rows: Sequence[np.ndarray]) -> Callable[[], Tensor]:
        of_clients = [[examples[row] for row in of_client] for of_client in rows]
        wanted = [example for of_client in of_clients for example in of_client]
        if not wanted:
            return lambda: torch.zeros(0, dtype=torch.float64)
        alone = {"none": [wanted], "client": of_clients, "example": [[example] for example in wanted]}[hides]
        batches, counts = [problem.batch(part) for part in alone if part], [len(of_client) for of_client in of_clients]

        def losses() -> Tensor:
            each = torch.cat([problem.row_losses(batch).double() for batch in batches])
            if hides == "example":
                return each.nan_to_num(0.0, 0.0, 0.0)
            return torch.stack([part.mean() for part in each.split(counts)])

        return losses

    return losses_of
