"""What is learned, apart from how: rows, the model that they are put to, a loss a row, and scores.

`classification.py` and `module.py` are the two kinds that come with the package. Everything after them (masks, engines,
runs, comparisons, reports) knows a problem by this page alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from meerkat.errors import in_short
from meerkat.problems.data import Row
from meerkat.progress import say

_T = TypeVar("_T")

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
    rows: Sequence[Row] = ()
    """The same as rows of the problem, for `--eps auto` to be measured on; empty where there are none."""


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
        """Rows of one split, at least one. Raises MeerkatError: no such split, or its rows are not the problem's."""

    def prepare(self, rows: Sequence[Row]) -> list[Any]:
        """Rows as the model sees them, an example each."""

    def batch(self, examples: Sequence[Any], purpose: Purpose = "steps", /) -> Any:
        """At least one example, laid out once for any number of passes at different weights."""

    def row_losses(self, batch: Any) -> Tensor:
        """Each row's loss at the model's present weights, float32 [rows], in the order of its examples.

        A function of weights and batch alone, bit for bit, whatever was computed before: privacy rests on it. In a
        client's steps, what it draws from torch's default generators is the same for every batch.
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
    hidden it gives every row's loss, client by client: float64 [rows]. There a loss that is not finite is zero, and so
    is that of a row whose layout or pass fails: no row can end a private run.

    In every pass, torch draws the same random numbers: what a model draws for a row follows from no row before it.

    Args:
        hides: whose presence is hidden. A slope divides a loss' rounding by 2 eps, and rounding depends on what
            shares a pass, so what is hidden shares none: each client's rows, or each row, are a batch of their own.
    """
    row_losses = _drawing_alike(problem)
    if hides == "example":
        return _RowsAlone(problem, row_losses, examples)

    def losses_of(rows: Sequence[np.ndarray]) -> Callable[[], Tensor]:
        of_clients = [[examples[row] for row in of_client] for of_client in rows]
        alone = of_clients if hides == "client" else [[example for of_client in of_clients for example in of_client]]
        batches, counts = [problem.batch(part) for part in alone if part], [len(of_client) for of_client in of_clients]
        if not batches:
            return lambda: torch.zeros(0, dtype=torch.float64)

        def losses() -> Tensor:
            each = torch.cat([row_losses(batch).double() for batch in batches])
            return torch.stack([part.mean() for part in each.split(counts)])

        return losses

    return losses_of


class _RowsAlone:
    """Losses of rows that go through the model one by one, as `client_losses` gives them."""

    def __init__(self, problem: Problem, row_losses: Callable[[Any], Tensor], examples: Sequence[Any]) -> None:
        self._problem = problem
        self._row_losses = row_losses
        self._examples = examples
        self._nothing = torch.zeros((), dtype=torch.float64, device=next(problem.model.parameters()).device)
        self._told = False

    def __call__(self, rows: Sequence[np.ndarray]) -> Callable[[], Tensor]:
        wanted = [int(row) for of_client in rows for row in of_client]
        if not wanted:
            return lambda: torch.zeros(0, dtype=torch.float64)
        batches = [self._attempt(row, partial(self._problem.batch, [self._examples[row]])) for row in wanted]
        return lambda: torch.stack([self._loss(*each) for each in zip(wanted, batches, strict=True)])

    def _loss(self, row: int, batch: Any | None) -> Tensor:
        """One row's loss, float64 []."""
        loss = (
            None if batch is None else self._attempt(row, lambda: self._row_losses(batch).to(self._nothing).reshape(()))
        )
        return self._nothing if loss is None else loss.nan_to_num(0.0, 0.0, 0.0)

    def _attempt(self, row: int, compute: Callable[[], _T]) -> _T | None:
        """What is computed of a row; None where that fails. The first failure is said here, in the site's own log."""
        try:
            return compute()
        except Exception as error:  # a machine out of memory raises several kinds, an extension any
            if not self._told:
                say(f"note: row {row + 1} fails in the model, and counts as nothing ({in_short(error)})")
                say("  rows that fail after it are not listed")
                self._told = True
            return None


def _drawing_alike(problem: Problem) -> Callable[[Any], Tensor]:
    """A problem's `row_losses`, for which torch's generators begin at the same place; they are left as they were."""
    devices = {parameter.device for parameter in problem.model.parameters() if parameter.device.type == "cuda"}
    generators = [torch.default_generator, *(torch.cuda.default_generators[device.index] for device in devices)]

    def row_losses(batch: Any) -> Tensor:
        states = [generator.get_state() for generator in generators]
        try:
            for generator in generators:
                generator.manual_seed(0)
            return problem.row_losses(batch)
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

    return row_losses
