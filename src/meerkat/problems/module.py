"""Any torch module and loss as a problem: rows are tensors, and every score is a mean over rows."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from meerkat.errors import Diverged, MeerkatError
from meerkat.problems.data import Row
from meerkat.problems.problem import Better, Evaluation, Public, Purpose, Split, primary

RowFunction = Callable[[Tensor, Tensor], Tensor]
"""(outputs [rows, ...], targets [rows, ...]) -> a value a row, [rows]."""

_TOGETHER = 1024
"""Rows in one forward pass, at most."""


class Tensors(NamedTuple):
    """Rows and what is to be learned of them."""

    inputs: Tensor
    """[rows, ...]"""
    targets: Tensor
    """[rows, ...]; label numbers, int64 [rows], where the problem has labels"""


class Score(NamedTuple):
    """A score: a function of each row, and which of its values are better."""

    of_rows: RowFunction
    better: Better = "higher"


def right(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the highest output is the target's, else 0: float64 [rows], whose mean is the accuracy."""
    return (outputs.argmax(-1) == targets).double()


@dataclass(frozen=True)
class ModuleProblem:
    """A module that takes a batch of inputs, with a loss of its outputs and the targets. See `Problem`.

    The module is set to evaluation and its parameters to require no gradient.
    """

    model: nn.Module
    loss: RowFunction
    train: Tensors
    validation: Tensors
    labels: tuple[str, ...] = ()
    row_scores: Mapping[str, Score] = field(default_factory=dict)
    """By name; the first is the one that runs are compared by. None at all leaves the loss."""
    public_data: Tensors | None = None
    """Data that anyone may know, from which masks are made."""
    test: Tensors | None = None
    name: str = "module"

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)

    @property
    def scores(self) -> Mapping[str, Better]:
        """As given, and the loss."""
        return {**{name: score.better for name, score in self.row_scores.items()}, "loss": "lower"}

    def rows(self, split: Split) -> list[Row]:
        """The rows of one split: `input`, and `label` where there are labels, else `target`."""
        tensors: Tensors | None = getattr(self, split)
        if tensors is None:
            raise MeerkatError(f"split '{split}': the problem has no such rows; use another split")
        return self._as_rows(tensors)

    def _as_rows(self, tensors: Tensors) -> list[Row]:
        if self.labels:
            return [{"input": i, "label": t} for i, t in zip(tensors.inputs, tensors.targets.tolist(), strict=True)]
        return [{"input": i, "target": t} for i, t in zip(*tensors, strict=True)]

    def prepare(self, rows: Sequence[Row]) -> list[Tensors]:
        """Each row's input and target."""
        return [Tensors(r["input"], torch.tensor(r["label"]) if self.labels else r["target"]) for r in rows]

    def batch(self, examples: Sequence[Tensors], _: Purpose = "steps", /) -> Tensors:
        """Examples stacked, on the model's device."""
        device = next(self.model.parameters()).device
        return Tensors(*(torch.stack(tensors).to(device) for tensors in zip(*examples, strict=True)))

    def row_losses(self, batch: Tensors) -> Tensor:
        """Each row's loss, float32 [rows]."""
        return self.loss(self._outputs(batch), batch.targets).float()

    @torch.no_grad()
    def evaluate(self, batch: Tensors) -> Evaluation:
        """The mean of every score, and of the first on the rows of each label."""
        outputs = self._outputs(batch)
        functions = {**{name: score.of_rows for name, score in self.row_scores.items()}, "loss": self.loss}
        values = {name: of_rows(outputs, batch.targets).double() for name, of_rows in functions.items()}
        scores = {name: of_rows.mean().item() for name, of_rows in values.items()}
        if unsound := [name for name, value in scores.items() if not abs(value) < float("inf")]:
            raise Diverged(f"the score {unsound[0]} is not finite on these rows; start a new run with a lower --lr")
        first, of_label = values[primary(values)], [batch.targets == k for k in range(len(self.labels))]
        per_class = {
            name: first[rows].mean().item() for name, rows in zip(self.labels, of_label, strict=True) if rows.any()
        }
        return Evaluation(len(outputs), scores, per_class)

    def digest(self, examples: Sequence[Tensors]) -> str:
        """SHA-256 of all inputs and targets, shapes and types included."""
        sha = hashlib.sha256()
        for tensor in (tensor for example in examples for tensor in example):
            sha.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def public(self) -> Public | None:
        """The public data row by row, where there is any."""
        if self.public_data is None:
            return None
        examples = [Tensors(*row) for row in zip(*self.public_data, strict=True)]
        return Public(
            examples,
            lambda example: self.row_losses(self.batch([example], "gradient"))[0],
            rows=self._as_rows(self.public_data),
        )

    def _outputs(self, batch: Tensors) -> Tensor:
        return torch.cat([self.model(inputs) for inputs in batch.inputs.split(_TOGETHER)])
