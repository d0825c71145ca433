"""Classification by label words: a causal language model reads a prompt, and the likeliest label string is its answer.

Method, section 9. Prompts are made in `tasks.py`, losses and scores in `causal_lm.py`.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from meerkat import seeds
from meerkat.errors import MeerkatError
from meerkat.problems import causal_lm
from meerkat.problems.causal_lm import Batch
from meerkat.problems.data import Row, load_rows, read_texts
from meerkat.problems.problem import Better, Evaluation, Public, Purpose, Split
from meerkat.problems.tasks import Example, Objective, Task, check_rows, encode

NO_TASK = Task("", "{label}", ())
"""Stands where no rows are needed: a mask can be made from public text alone."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s")
_LONGEST_SENTENCE = 400
"""Characters of a public row's field."""


def task_rows(task: Task, data: str, split: Split) -> list[Row]:
    """The rows of one split of some data, checked against a task.

    Raises:
        MeerkatError: there are none, or a row does not have what the task needs.
    """
    rows = load_rows(data, split)
    check_rows(task, rows, f"data '{data}', {split}")
    return rows


def public_rows(task: Task, text: str, count: int) -> list[Row]:
    """The first sentences of so many public texts as rows of a task, each with a label drawn at random."""
    if not task.labels:
        return []
    sentences = [
        _SENTENCE_END.split(each.strip(), 1)[0][:_LONGEST_SENTENCE] for each in islice(read_texts(text), count)
    ]
    labels = seeds.generator(0, "public labels").integers(len(task.labels), size=len(sentences)).tolist()
    in_turn = [sentences[i:] + sentences[:i] for i in range(len(task.needs))]
    return [
        {**dict(zip(task.needs, fields, strict=True)), "label": label}
        for *fields, label in zip(*in_turn, labels, strict=True)
    ]


@dataclass(frozen=True)
class Classification:
    """A task's rows, put to a causal language model. See `Problem`."""

    model: nn.Module
    tokenizer: Any = None
    task: Task = NO_TASK
    data: str = ""
    """Where rows are: see `data.load_rows`."""
    text: str = ""
    """Where pre-training text is: see `data.read_texts`; empty for none."""
    text_sequences: int = 256
    text_length: int = 256
    """Tokens of a pre-training sequence, at most."""
    max_length: int = 2048
    """Tokens of a prompt with its label, at most."""
    chat: bool = False
    """Whether a prompt goes into the tokenizer's chat template."""
    objective: Objective = "classification"
    together: bool = True
    """Whether clients' rows go through the model sorted by length, `tokens_per_pass` at a time."""
    packed: bool = False
    """Whether rows lie one behind another in a pass, in place of being padded: see `packing.packs`."""
    sequences_per_pass: int = 0
    tokens_per_pass: int = 0

    scores: ClassVar[Mapping[str, Better]] = {"accuracy": "higher", "loss": "lower"}

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def labels(self) -> tuple[str, ...]:
        """The task's label strings."""
        return self.task.labels

    def rows(self, split: Split) -> list[Row]:
        """The rows of one split, checked against the task."""
        return task_rows(self.task, self.data, split)

    def prepare(self, rows: Sequence[Row]) -> list[Example]:
        """Rows, tokenised. Raises MeerkatError: the model has no embedding for a token, or see `tasks.encode`."""
        length = causal_lm.longest_input(self.model, self.max_length)
        examples = encode(self.task, rows, self.tokenizer, length, self.chat)
        for example in examples:
            self._check_known("a row", *example.sequences, *(candidate.targets for candidate in example.candidates))
        return examples

    def _check_known(self, what: str, *tokens: Tensor | np.ndarray) -> None:
        """Raise MeerkatError unless the model has an embedding for each token."""
        known, last = causal_lm.vocabulary(self.model), max(int(each.max()) for each in tokens)
        if last >= known:
            raise MeerkatError(
                f"token {last} of {what}: the model has embeddings for 0 to {known - 1}; "
                "use the tokenizer that it was trained with"
            )

    def batch(self, examples: Sequence[Example], purpose: Purpose = "steps", /) -> Batch:
        """Examples in passes; one whose gradient is asked for is padded."""
        device = next(self.model.parameters()).device
        if purpose == "gradient":
            return causal_lm.collate(examples, device)
        together = self.together or purpose == "evaluation"
        return causal_lm.collate(
            examples,
            device,
            packed=self.packed,
            sort=together or self.packed,
            sequences_per_pass=self.sequences_per_pass,
            tokens_per_pass=self.tokens_per_pass if together else 0,
        )

    def row_losses(self, batch: Batch) -> Tensor:
        """Each row's loss by the objective, float32 [rows]."""
        return causal_lm.row_losses(self.model, batch, self.objective)

    def evaluate(self, batch: Batch) -> Evaluation:
        """Accuracy by highest score, overall and per label, and the mean classification loss."""
        return causal_lm.evaluate(self.model, batch, self.labels)

    def digest(self, examples: Sequence[Example]) -> str:
        """SHA-256 of tokens, of where labels are read, and of the right labels."""
        sha = hashlib.sha256()
        for example in examples:
            places = [[c.sequence, c.start, len(c.targets)] for c in example.candidates]
            sha.update(json.dumps([example.label, [len(s) for s in example.sequences], places]).encode())
            for tokens in (*example.sequences, *(c.targets for c in example.candidates)):
                sha.update(tokens.astype("<i8").tobytes())
        return sha.hexdigest()

    def public(self) -> Public | None:
        """Pre-training text, where there is any."""
        if not self.text:
            return None
        length = causal_lm.longest_input(self.model, self.text_length)
        sequences = causal_lm.load_text(self.text, self.tokenizer, self.text_sequences, length)
        self._check_known("the text", *sequences)
        return Public(
            sequences,
            causal_lm.language_modelling_loss(self.model),
            {"text": Path(self.text).name, "text_length": str(length)},
            public_rows(self.task, self.text, self.text_sequences),
        )
