"""A run's rows: which are trained on, which client has which, and which the model is evaluated on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meerkat import seeds
from meerkat.algorithm.attacks import flipped
from meerkat.errors import MeerkatError
from meerkat.problems.data import Row
from meerkat.problems.partition import Partition, partition
from meerkat.problems.problem import Problem
from meerkat.problems.problem import Split as Side
from meerkat.settings.config import RunConfig


def training_and_evaluation_rows(config: RunConfig, rows: Callable[[Side], list[Row]]) -> tuple[list[Row], list[Row]]:
    """The rows that clients have, and those that the model is evaluated on.

    Args:
        rows: gives the rows of a split, as `Problem.rows` does.

    Raises:
        MeerkatError: a side would have no rows.
    """
    training, held_back = _sides(config, rows)
    return training, evenly(rows("validation") if held_back is None else held_back, config.max_eval_samples)


def training_rows(config: RunConfig, rows: Callable[[Side], list[Row]]) -> list[Row]:
    """The rows that clients have; validation rows are not read. Otherwise as `training_and_evaluation_rows`."""
    return _sides(config, rows)[0]


def _sides(config: RunConfig, rows: Callable[[Side], list[Row]]) -> tuple[list[Row], list[Row] | None]:
    """The training rows, without and with those that are held back; None where none are."""
    training = rows("train")
    if not config.held_back:
        return training, None
    order = seeds.permutation(len(training), config.seed, "held back")
    count = round(config.held_back * len(training))
    if not 0 < count < len(training):
        raise MeerkatError(
            f"--held-back {config.held_back:g}: leaves no rows on one side of {len(training)}; choose another share"
        )
    return [training[i] for i in sorted(order[count:])], [training[i] for i in sorted(order[:count])]


def evenly(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many of some rows, evenly spaced; all of them where `most` is 0."""
    count = min(most, len(rows)) or len(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


@dataclass(frozen=True)
class Split:
    """The training rows, which client has which, and what the model is evaluated on."""

    examples: list[Any]
    """Of the training rows, in their order."""
    labels: np.ndarray | None
    """int64 [rows]; None where the problem has no labels"""
    partition: Partition
    evaluation: Any
    """A batch of the problem's."""
    digest: str
    """SHA-256 of the examples and of which client has which: a run is resumed with no others."""

    @property
    def sizes(self) -> list[int]:
        """Rows of each client."""
        return [len(rows) for rows in self.partition.rows]

    def label_counts(self, labels: int) -> np.ndarray:
        """Rows of each label at each client, int64 [K, labels]."""
        assert self.labels is not None
        return np.stack([np.bincount(self.labels[rows], minlength=labels) for rows in self.partition.rows])

    @classmethod
    def of(cls, config: RunConfig, problem: Problem) -> "Split":
        """Read, split and prepare the problem's rows.

        Raises:
            MeerkatError: they cannot be read or split so, or labels are to be flipped and there are none.
        """
        training, evaluated = training_and_evaluation_rows(config, problem.rows)
        parts = partition(config.partition, training, config.clients, config.seed)
        if config.attack in ("label-flip", "scaled"):
            training = _with_flipped_labels(config, training, parts, len(problem.labels))
        examples, evaluated_examples = problem.prepare(training), problem.prepare(evaluated)
        rows = [part.tolist() for part in parts.rows]
        digests = json.dumps([problem.digest(examples), problem.digest(evaluated_examples), rows])
        labels = np.array([row["label"] for row in training]) if problem.labels else None
        evaluation = problem.batch(evaluated_examples, "evaluation")
        return cls(examples, labels, parts, evaluation, hashlib.sha256(digests.encode()).hexdigest())


def _with_flipped_labels(config: RunConfig, rows: Sequence[Row], parts: Partition, labels: int) -> list[Row]:
    """The rows, with wrong labels at the attacking clients."""
    if not labels:
        raise MeerkatError(
            f"attack {config.attack}: flips labels, and problem '{config.problem}' has none; use another attack"
        )
    attacked = {row for client in config.attacking_clients for row in parts.rows[client].tolist()}
    return [{**row, "label": flipped(row["label"], labels)} if i in attacked else row for i, row in enumerate(rows)]
