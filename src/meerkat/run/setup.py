"""A run's settings, resolved, and the problem that they name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from meerkat import demo
from meerkat.algorithm.quantised import packing
from meerkat.errors import MeerkatError
from meerkat.masks.lora import add_lora
from meerkat.problems import causal_lm
from meerkat.problems.classification import NO_TASK, Classification, task_rows
from meerkat.problems.data import Row
from meerkat.problems.models import load_model
from meerkat.problems.packing import packs
from meerkat.problems.problem import Problem, Split
from meerkat.problems.tasks import TASKS, Task, load_task
from meerkat.settings.algorithm import estimator, look_up, rules
from meerkat.settings.auto import AUTO, Auto, number, number_or
from meerkat.settings.config import CLASSIFICATION, EMBEDDED, RunConfig

BUILT_IN_TASKS = TASKS.keys() | demo.TASKS.keys()


def resolve(config: RunConfig, rows: bool = True) -> RunConfig:
    """Fill in the settings that were left open, and make local paths absolute, so that a run can be resumed anywhere.

    Args:
        rows: whether rows of the task are needed here.

    Raises:
        MeerkatError: something is needed that was not given, or a name is not known here.
    """
    task = config.task
    if config.problem == CLASSIFICATION:
        task = task or (demo.DEFAULT_TASK if config.model == EMBEDDED else "")
        if not task:
            raise MeerkatError("--task: needed with a model of your own; sst2, for instance, or a .toml file")
        if rows and not config.data and task not in demo.TASKS:
            load_task(task)  # rather say that there is no such task
            raise MeerkatError(
                f"--data: needed with task '{task}'; a folder with train.jsonl and validation.jsonl, or a hub name"
            )
    filled = {
        "task": task,
        "clients_per_round": config.clients_per_round or config.clients,
        "server_lr": _server_lr(config),
    }
    config = config.model_copy(update=filled)
    # unknown names are refused before anything is loaded, even while Adam's rate is open
    rules(config.model_copy(update={"server_lr": number_or(config.server_lr, 1.0)}))
    estimator(config)
    return resolve_model(config)


def _server_lr(config: RunConfig) -> float | Auto:
    """eta_s; Adam's stays open until the mask is there to measure it by."""
    if config.server_lr != AUTO or config.update_rule == "adam":
        return config.server_lr
    return float(f"{1 - config.server_beta1:.6g}") if config.update_rule == "momentum" else 1.0


def resolve_model(config: RunConfig) -> RunConfig:
    """The part of `resolve` that is enough for a mask."""
    own_model = config.problem == CLASSIFICATION and config.model != EMBEDDED
    if own_model and config.recipe.moves == "sensitivity" and not (config.text or config.mask):
        raise MeerkatError("--text: needed to make a sensitivity mask: pre-training text, .jsonl or plain")
    return resolve_machine(config)


def resolve_machine(config: RunConfig) -> RunConfig:
    """The part of `resolve` that is about this machine: device, threads, sizes of passes, absolute paths."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    tokens = causal_lm.TOKENS_PER_PASS["cpu" if device.startswith("cpu") else "cuda"]
    filled: dict[str, Any] = {
        "device": device,
        "threads": number_or(config.threads, torch.get_num_threads()),
        "tokens_per_pass": number_or(config.tokens_per_pass, tokens),
    }
    named = {"model": {EMBEDDED}, "task": BUILT_IN_TASKS}
    for name in ("model", "task", "data", "text", "mask"):
        value = getattr(config, name)
        if value and value not in named.get(name, ()) and Path(value).exists():
            filled[name] = str(Path(value).resolve())
    return config.model_copy(update=filled)


def has_device(name: str) -> bool:
    """Whether this machine has the device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # CUDA that is not there, or not compiled in
        return False
    return True


def open_task(name: str) -> Task:
    """A built-in task by its name, or a user's from a TOML file. Raises MeerkatError: see `tasks.load_task`."""
    return demo.load_task(name) if name in demo.TASKS else load_task(name)


def load_split(config: RunConfig, split: Split) -> list[Row]:
    """The rows of one split of a run that classifies, without its model."""
    return task_rows(open_task(config.task), _data(config), split)


def _data(config: RunConfig) -> str:
    return config.data or str(demo.TASKS.get(config.task, ""))


def classification(config: RunConfig, task: Task | None = None) -> Classification:
    """Classification as the settings have it, with its model loaded and none of its rows read.

    Args:
        task: in place of the one that the settings name.

    Raises:
        MeerkatError: task or model cannot be loaded.
    """
    embedded = config.model == EMBEDDED
    task = task or (open_task(config.task) if config.task else NO_TASK)
    model, tokenizer = load_model(str(demo.MODEL) if embedded else config.model, config.device)
    chat = config.chat_template == "on"
    if chat and not tokenizer.chat_template:
        raise MeerkatError(
            f"chat_template on: model '{config.model}' has no chat template; use off, or a model tuned for chats"
        )
    return Classification(
        model=model,
        tokenizer=tokenizer,
        task=task,
        data=_data(config),
        text=config.text or (str(demo.TEXT) if embedded else ""),
        text_sequences=config.text_sequences,
        text_length=config.text_length,
        max_length=config.max_length,
        chat=chat,
        objective=config.objective,
        together=config.batching == "auto",
        packed=packs(model),
        sequences_per_pass=config.micro_batch,
        tokens_per_pass=number(config.tokens_per_pass),
    )


PROBLEMS: dict[str, Callable[[RunConfig], Problem]] = {CLASSIFICATION: classification}
"""By the name that `--problem` takes; an extension adds its own."""


def open_problem(config: RunConfig, task: Task | None = None) -> Problem:
    """The problem that the settings name, with its model loaded; torch's number of threads is set only here.

    Args:
        task: as in `classification`.

    Raises:
        MeerkatError: there is no such problem, or its model or data cannot be loaded.
    """
    make = look_up(PROBLEMS, "problem", config.problem)
    if config.quantize != "none":
        packing()  # what is missing is missed before a mask is made
    torch.set_num_threads(number(config.threads))
    problem = classification(config, task) if make is classification else make(config)
    if config.recipe.moves == "lora":
        add_lora(problem.model, config.seed)
    return problem
