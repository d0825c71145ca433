"""What a task's loss looks like at the mask's entries: how stiff, in which directions, and what rounds could reach.

    python benchmarks/curvature.py --model DIR --task sst2 --data DIR --text FILE [--rows 1000] [--json]

For a task of two labels. Reads the gradient of each row's difference of scores, of the task's rows and of public text,
and prints

- traces of the Gauss-Newton matrix, at the model's own shares of the labels and at equal ones, and its eigenvalues;
- how much of the task's curvature and of its gradient lies in the first k directions of the public text's;
- what the linearised model (scores at theta_0 and their gradients) reaches by exact gradients, by plain zeroth-order
  steps and by steps within k directions, each at several rates: the mean of its seeds on the validation rows.

The linearised model takes microseconds a round. It says what conditioning alone can do, not what the model does.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from meerkat.masks.sensitivity import entry_gradients
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.data import Row
from meerkat.problems.partition import partition
from meerkat.problems.problem import Problem
from meerkat.progress import track
from meerkat.run.mask import make_mask
from meerkat.run.precision import for_gradients
from meerkat.run.setup import open_problem, resolve
from meerkat.settings.config import make_config

RANKS = (1, 4, 16, 64)
DAMPING = 0.01
"""Of the trace: directions of less curvature are no reason for longer steps."""
RATES = (0.15, 0.3, 0.6, 1.2)
"""Times one over E[z'Hz]."""


@dataclass(frozen=True)
class Scores:
    """Rows as the linearised model sees them."""

    at_start: Tensor
    """score of label 1 - score of label 0, at theta_0: float32 [rows]"""
    gradients: Tensor
    """float32 [rows, n]"""
    labels: Tensor
    """float32 [rows]"""

    def weighted(self, equal: bool) -> Tensor:
        """Rows a with sum a a' = H, at equal shares of the labels or at the model's own: float32 [rows, n]."""
        p = torch.sigmoid(torch.zeros_like(self.at_start) if equal else self.at_start)
        return self.gradients * (p * (1 - p) / len(p)).sqrt()[:, None]

    def within(self, directions: Tensor) -> "Scores":
        """The same in the coordinates of some directions, float32 [k, n]."""
        return Scores(self.at_start, self.gradients @ directions.T, self.labels)


def scores_of(problem: Problem, mask: SparseMask, rows: Sequence[Row]) -> Scores:
    """Rows' scores and their gradients."""
    pairs = [problem.prepare([{**row, "label": label} for label in (0, 1)]) for row in rows]
    starts = []

    def difference(pair: Any) -> Tensor:
        zero, one = problem.row_losses(problem.batch(pair, "gradient"))
        starts.append((zero - one).item())
        return zero - one

    with for_gradients(problem.model):
        each = entry_gradients(problem.model, mask, (partial(difference, pair) for pair in track(pairs, "gradients")))
        gradients = torch.stack([*each])
    return Scores(torch.tensor(starts), gradients, torch.tensor([float(row["label"]) for row in rows]))


def directions_of(weighted: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues of H, descending, and their directions: float32 [k], [k, n]."""
    values, mixtures = torch.linalg.eigh((weighted @ weighted.T).double())
    values, mixtures = values.flip(0)[:most].float(), mixtures.flip(1)[:, :most].float()
    return values, (mixtures.T @ weighted) / values.sqrt()[:, None]


def batches(labels: Tensor, clients: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rounds of clients' batches under Dirichlet(0.5): rows, and each row's share of the federation's loss."""
    rows = [{"label": int(label)} for label in labels]
    of_clients = partition("dirichlet:0.5", rows, clients, seed).rows
    shuffled = [np.random.default_rng([seed, k]).permutation(of_client) for k, of_client in enumerate(of_clients)]
    shares = torch.cat([torch.full((size,), len(of_client) / len(labels) / size) for of_client in shuffled])
    at = 0
    while True:
        taken = [of_client[(at + np.arange(size)) % len(of_client)] for of_client in shuffled]
        yield torch.from_numpy(np.concatenate(taken)), shares
        at += size


@dataclass(frozen=True)
class Way:
    """A way to step in the linearised model."""

    train: Scores
    validation: Scores
    scale: Tensor | None
    """What z is multiplied by, entry by entry, float32 [n]; None for exact gradients."""
    stiffness: float
    """E[z'Hz]; for exact gradients the largest eigenvalue."""

    def trained(self, rounds: int, rate: float, federation: Iterator[tuple[Tensor, Tensor]], seed: int) -> list[float]:
        """Accuracy and loss on the validation rows after rounds at a rate that falls linearly to 0."""
        generator, step = torch.Generator().manual_seed(seed), torch.zeros(self.train.gradients.shape[1])
        for r, (rows, shares) in zip(range(rounds), federation, strict=False):
            gradients, eta = self.train.gradients[rows], rate * (1 - r / rounds)
            scores = self.train.at_start[rows] + gradients @ step
            residual = shares * (torch.sigmoid(scores) - self.train.labels[rows])
            if self.scale is None:
                step = step - eta * (residual @ gradients)
            else:
                z = self.scale * torch.randn(len(step), generator=generator)
                step = step - eta * float(residual @ (gradients @ z)) * z
        ends, labels = self.validation.at_start + self.validation.gradients @ step, self.validation.labels
        accuracy = ((ends > 0).float() == labels).float().mean()
        return [accuracy.item(), binary_cross_entropy_with_logits(ends, labels).item()]


def report(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    given = {name: value for name in ("model", "task", "data", "text") if (value := getattr(options, name))}
    config = resolve(make_config(given))
    problem = open_problem(config)
    mask, public, rows = make_mask(config, problem), problem.public(), problem.rows("train")
    assert public is not None
    drawn = np.random.default_rng(0).permutation(len(rows))[: options.rows]
    train = scores_of(problem, mask, [rows[i] for i in drawn])
    validation = scores_of(problem, mask, problem.rows("validation")[: options.rows])
    text = scores_of(problem, mask, public.rows)
    values, vectors = directions_of(text.weighted(equal=True), max(RANKS))
    task, trace = train.weighted(equal=True), square(text.weighted(equal=True))
    gradient = (torch.sigmoid(train.at_start) - train.labels) @ train.gradients / len(train.labels)
    rest = gradient - vectors[0] * (vectors[0] @ gradient)
    ways = {
        "exact": Way(train, validation, None, float(values[0])),
        "plain": Way(train, validation, torch.ones(len(mask)), trace),
    }
    for k in RANKS[1:]:
        scale, inside = (DAMPING * trace / (values[:k] + DAMPING * trace)).sqrt(), vectors[:k]
        stiffness = float(values[:k] @ scale.square())
        ways[f"within {k}"] = Way(train.within(inside), validation.within(inside), scale, stiffness)
    linearised = {}
    for name, way in ways.items():
        for c in RATES:
            federations = [batches(train.labels, options.clients, options.batch, seed) for seed in range(options.seeds)]
            ends = [way.trained(options.rounds, c / way.stiffness, f, seed) for seed, f in enumerate(federations)]
            accuracy, loss = np.mean(ends, axis=0).tolist()
            linearised[f"{name}, {c:g}"] = {"accuracy": accuracy, "loss": loss}
    best = {name: min(linearised[f"{name}, {c:g}"]["loss"] for c in RATES) for name in ways}
    return {
        "name": "curvature",
        "ratio": min(best[f"within {k}"] for k in RANKS[1:]) / best["plain"],
        "measured_on": f"{config.task}, {len(train.labels)} rows, {options.seeds} seeds of {options.rounds} rounds",
        "entries": len(mask),
        "trace_of_text": {"own shares": square(text.weighted(equal=False)), "equal shares": trace},
        "trace_of_task": {"own shares": square(train.weighted(equal=False)), "equal shares": square(task)},
        "eigenvalues_of_text": values[:8].tolist(),
        "curvature_of_task_within": {k: square(task @ vectors[:k].T) / square(task) for k in RANKS},
        "gradient_of_task_within": {k: square(vectors[:k] @ gradient) / square(gradient) for k in RANKS},
        "gradient_but_the_first_within": {k: square(vectors[1:k] @ rest) / square(rest) for k in RANKS[1:]},
        "linearised": linearised,
    }


def square(values: Tensor) -> float:
    """The sum of squares."""
    return float(values.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("model", "embedded"), ("task", "reviews"), ("data", ""), ("text", "")):
        parser.add_argument(f"--{name}", default=default)
    for name, count in (("rows", 1000), ("rounds", 100), ("seeds", 4), ("clients", 10), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=count, help="[default: %(default)s]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = report(options)
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name}: {'' if isinstance(value, dict) else value}")
        for key, each in value.items() if isinstance(value, dict) else ():
            print(f"    {key}: {each}")


if __name__ == "__main__":
    main()
