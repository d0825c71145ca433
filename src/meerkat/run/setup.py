"""What a run stands on: its settings resolved, the model and task, the rows and who holds them, the mask."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from meerkat import demo, seeds
from meerkat.algorithm.attacks import flipped
from meerkat.errors import MeerkatError
from meerkat.masks.baselines import full_mask, magnitude_mask, random_mask
from meerkat.masks.lora import add_lora, lora_mask
from meerkat.masks.sensitivity import pretraining_gradient, sensitivity_mask
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems import causal_lm
from meerkat.problems.data import load_rows
from meerkat.problems.partition import Partition, partition
from meerkat.problems.tasks import TASKS, Example, Row, Task, check_rows, encode, load_task
from meerkat.progress import say, track
from meerkat.record.run_folder import RunFolder
from meerkat.settings.algorithm import estimator, rules
from meerkat.settings.auto import number, number_or
from meerkat.settings.config import EMBEDDED, RunConfig
from meerkat.settings.methods import METHODS, Method


@dataclass(frozen=True)
class Workplace:
    """The model on its device, and the task's rows as it sees them."""

    config: RunConfig
    model: nn.Module
    tokenizer: Any
    task: Task
    device: torch.device

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """Rows, tokenised."""
        return encode(self.task, rows, self.tokenizer, causal_lm.longest_input(self.model, self.config.max_length))

    def training_batch(self, examples: Sequence[Example]) -> causal_lm.Batch:
        """Examples laid out for the clients' forward passes, as `batching` says."""
        together = self.config.batching == "auto"
        return causal_lm.collate(
            examples,
            self.device,
            sort=together,
            sequences_per_pass=self.config.micro_batch,
            tokens_per_pass=number(self.config.tokens_per_pass) if together else 0,
        )

    def evaluation_batch(self, examples: Sequence[Example]) -> causal_lm.Batch:
        """Examples laid out for evaluation."""
        return causal_lm.collate(
            examples,
            self.device,
            sequences_per_pass=self.config.micro_batch,
            tokens_per_pass=number(self.config.tokens_per_pass),
        )


def resolve(config: RunConfig, rows: bool = True) -> RunConfig:
    """Fill in what the settings leave to us, and make local paths absolute, so that a run can be resumed anywhere.

    Args:
        rows: whether rows of the task are needed here.

    Raises:
        MeerkatError: something is needed that was not given.
    """
    task = config.task or (demo.DEFAULT_TASK if config.model == EMBEDDED else "")
    if not task:
        raise MeerkatError("--task: needed with a model of your own; sst2, for instance, or a .toml file")
    if rows and not config.data and task not in demo.TASKS:
        raise MeerkatError(
            f"--data: needed with task '{task}'; a folder with train.jsonl and validation.jsonl, or a hub name"
        )
    filled = {
        "task": task,
        "clients_per_round": config.clients_per_round or config.clients,
        "eps": number_or(config.eps, config.recipe.eps),
        "early_stop": config.stopping,
        "server_lr": number_or(config.server_lr, {"adam": 1e-2}.get(config.update_rule, 1.0)),
    }
    if filled["early_stop"] != "none" and config.local_steps == 1:
        say("note: at --local-steps 1 every client makes one step a round: nobody is calibrated or stopped early")
    config = config.model_copy(update=filled)
    rules(config)  # a name that is not known here is refused before anything is loaded
    estimator(config)
    return resolve_model(config)


def resolve_model(config: RunConfig) -> RunConfig:
    """The part of `resolve` that a mask alone needs."""
    if config.recipe.moves == "sensitivity" and config.model != EMBEDDED and not (config.text or config.mask):
        raise MeerkatError("--text: needed to make a sensitivity mask: pre-training text, .jsonl or plain")
    return resolve_place(config)


def resolve_place(config: RunConfig) -> RunConfig:
    """The part of `resolve` that is about this machine: device, threads, sizes of passes, absolute paths."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    kind = device.partition(":")[0]
    filled: dict[str, Any] = {
        "device": device,
        "threads": number_or(config.threads, torch.get_num_threads()),
        "tokens_per_pass": number_or(
            config.tokens_per_pass, causal_lm.TOKENS_PER_PASS.get(kind, causal_lm.TOKENS_PER_PASS["cuda"])
        ),
    }
    named = {"model": {EMBEDDED}, "task": TASKS.keys() | demo.TASKS.keys()}
    for name in ("model", "task", "data", "text", "mask"):
        value = getattr(config, name)
        if value and value not in named.get(name, ()) and Path(value).exists():
            filled[name] = str(Path(value).resolve())
    return config.model_copy(update=filled)


def open_model(config: RunConfig) -> tuple[nn.Module, Any]:
    """Load the model and its tokenizer. Global state of torch is touched here alone: the number of threads."""
    torch.set_num_threads(number(config.threads))
    if config.dtype != "float32":
        say(f"note: with {config.dtype} weights small perturbations are rounded away; float32 is what was measured")
    name = str(demo.MODEL) if config.model == EMBEDDED else config.model
    model, tokenizer = causal_lm.load_model(name, config.device, config.dtype)
    if config.recipe.moves == "lora":
        add_lora(model, config.seed)
    return model, tokenizer


def open_workplace(config: RunConfig) -> Workplace:
    """Load the task, the model and its tokenizer."""
    task = open_task(config)
    model, tokenizer = open_model(config)
    return Workplace(config, model, tokenizer, task, next(model.parameters()).device)


def open_task(config: RunConfig) -> Task:
    """The run's task."""
    return demo.load_task(config.task) if config.task in demo.TASKS else load_task(config.task)


def check_model(folder: RunFolder, mask: SparseMask, workplace: Workplace) -> None:
    """Raise MeerkatError unless the model at hand is the one that a run began with."""
    try:
        mask.check_fits(workplace.model)
    except MeerkatError:
        raise MeerkatError(
            f"run folder '{folder.root}': the model '{workplace.config.model}' is not the one the run began with; "
            "restore it, or start a new run"
        ) from None


def load_split(config: RunConfig, task: Task, split: str) -> list[Row]:
    """One split of the run's data, checked against the task."""
    source = config.data or str(demo.TASKS[config.task])
    rows = load_rows(source, split)
    check_rows(task, rows, f"data '{source}', {split}")
    return rows


def training_and_evaluation_rows(config: RunConfig, task: Task) -> tuple[list[Row], list[Row]]:
    """The rows that clients hold, and those that the model is judged on."""
    training = load_split(config, task, "train")
    if not config.held_back:
        return training, load_split(config, task, "validation")
    order = seeds.permutation(len(training), config.seed, "held back")
    count = round(config.held_back * len(training))
    if not 0 < count < len(training):
        raise MeerkatError(
            f"--held-back {config.held_back:g}: leaves no rows on one side of {len(training)}; choose another share"
        )
    return [training[i] for i in sorted(order[count:])], [training[i] for i in sorted(order[:count])]


def make_mask(config: RunConfig, model: nn.Module, tokenizer: Any) -> SparseMask:
    """The mask that the method calls for, on the model at hand."""
    scope, exclude, kind = config.mask_scope, config.exclude, config.recipe.moves
    given = SparseMask.load(Path(config.mask)) if config.mask else None
    if given is not None:
        given.check_fits(model)
        if given.pretraining_gradient is not None:
            return given
    text = config.text or (str(demo.TEXT) if config.model == EMBEDDED else "")
    length = causal_lm.longest_input(model, config.text_length)
    sequences = causal_lm.load_text(text, tokenizer, config.text_sequences, length) if text else []
    loss = causal_lm.language_modelling_loss(model)
    facts = {"text": Path(text).name, "text_length": str(length)}
    if given is not None:
        mask = given
    elif kind == "sensitivity":
        return sensitivity_mask(
            model, sequences, loss, config.density, scope=scope, exclude=exclude, facts=facts, track=track
        )
    elif kind == "full":
        mask = full_mask(model)
    elif kind == "lora":
        mask = lora_mask(model)
    elif kind == "magnitude":
        mask = magnitude_mask(model, config.density, scope=scope, exclude=exclude)
    elif kind == "random":
        mask = random_mask(model, config.density, config.seed, scope=scope, exclude=exclude)
    else:
        mask = _task_mask(config, model, tokenizer)
    if not sequences:
        return mask
    # no part of the method's choice, but GradIP needs it
    return replace(mask, pretraining_gradient=pretraining_gradient(model, mask, sequences, loss, track=track))


def _task_mask(config: RunConfig, model: nn.Module, tokenizer: Any) -> SparseMask:
    """The entries most sensitive on the clients' own task: their examples, as many as sequences of text, at random."""
    task = open_task(config)
    workplace = Workplace(config, model, tokenizer, task, next(model.parameters()).device)
    training, _ = training_and_evaluation_rows(config, task)
    drawn = sorted(seeds.permutation(len(training), config.seed, "task mask")[: config.text_sequences])
    examples = workplace.examples([training[i] for i in drawn])
    return sensitivity_mask(
        model,
        examples,
        lambda example: causal_lm.row_losses(model, causal_lm.collate([example], workplace.device), config.objective)[
            0
        ],
        config.density,
        scope=config.mask_scope,
        exclude=config.exclude,
        kind="task",
        facts={"task": task.name},
        track=track,
    )


def default_lr(method: Method, moving: int) -> float:
    """A learning rate that fits so many moving parameters, to two digits."""
    return float(f"{METHODS[method].lr_times_moving / moving:.1e}")


@dataclass(frozen=True)
class Split:
    """The training rows, who holds which, and what to judge on."""

    examples: list[Example]
    partition: Partition
    evaluation: causal_lm.Batch
    digest: str
    """SHA-256 of the examples, as the model sees them, and of who holds which: a run goes on with nothing else."""

    def label_counts(self, labels: int) -> np.ndarray:
        """Rows of each label at each client, int64 [K, labels]."""
        of_row = np.array([example.label for example in self.examples])
        return np.stack([np.bincount(of_row[rows], minlength=labels) for rows in self.partition.rows])

    @classmethod
    def of(cls, workplace: Workplace) -> "Split":
        """Read, split and tokenise the run's data."""
        config = workplace.config
        training, judged = training_and_evaluation_rows(config, workplace.task)
        held = partition(config.partition, training, config.clients, config.seed)
        if config.attack in ("label-flip", "scaled"):
            turned = {row for client in config.attacking_clients for row in held.rows[client].tolist()}
            classes = len(workplace.task.labels)
            training = [
                {**row, "label": flipped(row["label"], classes)} if i in turned else row
                for i, row in enumerate(training)
            ]
        examples, judged_examples = workplace.examples(training), workplace.examples(judged)
        sha = hashlib.sha256()
        for example in (*examples, *judged_examples):
            places = [[c.sequence, c.start, len(c.targets)] for c in example.candidates]
            sha.update(json.dumps([example.label, [len(s) for s in example.sequences], places]).encode())
            for tokens in (*example.sequences, *(c.targets for c in example.candidates)):
                sha.update(tokens.astype("<i8").tobytes())
        for rows in held.rows:
            sha.update(json.dumps(rows.tolist()).encode())
        return cls(examples, held, workplace.evaluation_batch(judged_examples), sha.hexdigest())
