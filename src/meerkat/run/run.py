"""A run under way: its folder and log, its state so far, and what its rounds are opened from.

`begin` makes a new run's folder; `carry_on` opens its log and replays what is in it. Simulations and coordinators, new
runs and resumed ones all go this way.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from meerkat.algorithm import path
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.server import ServerConfig, ServerState
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.errors import MeerkatError
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.problem import Problem
from meerkat.progress import say
from meerkat.record.members import Member, Members
from meerkat.record.opening import Opening, file_digest, gradient_digest
from meerkat.record.replay import Replay, closing_record
from meerkat.record.run_folder import Metric, RunFolder
from meerkat.record.run_log import LogReader, RunLog
from meerkat.run.curvature import with_rates
from meerkat.run.mask import chosen_by, load_mask, make_mask, store_mask
from meerkat.run.metrics import metric_of
from meerkat.run.precision import runnable_model, with_precision
from meerkat.run.trackers import check_tracker
from meerkat.settings import budget
from meerkat.settings.algorithm import directions
from meerkat.settings.config import RunConfig


@dataclass
class Run:
    """A run that goes on. Only `state`, `settings` and `closed` change on the way."""

    folder: RunFolder
    log: RunLog
    config: RunConfig
    model: MaskedModel
    opening: Opening
    members: Members
    """The members of a federation, their nodes and their keys."""
    directions: Directions
    gradient: Tensor | None
    """The pre-training gradient, float32 [n]."""
    settings: ServerConfig
    """What rounds are opened from, with the clients that joined so far."""
    state: ServerState
    closed: bool
    """Whether the log has its closing record."""
    lost: list[Metric]
    """Metrics of logged rounds that metrics.jsonl does not have, made again."""

    @property
    def mask(self) -> SparseMask:
        """What moves."""
        return self.model.mask

    def admit(self, members: Iterable[Member]) -> None:
        """Log the clients that joined, before the round that they may take part in."""
        for member in members:
            self.log.append(member.to_json())
            self.settings = member.added_to(self.settings)

    def close(self) -> None:
        """End the log, unless it has its end."""
        if not self.closed:
            self.log.append(closing_record(self.state))
            self.closed = True


def begin(config: RunConfig, out: Path, problem: Problem, sizes: Sequence[int] = ()) -> RunFolder:
    """A new run's folder, with mask and settings, written once everything that was asked for is known to work.

    Args:
        config: resolved settings.
        sizes: rows of each client; empty in a federation, which does not know them.

    Raises:
        MeerkatError: the settings cannot be met, or the folder is not free.
    """
    budget.check_countable(config)
    check_tracker(config.tracker)
    if config.stopping != config.recipe.early_stop:
        usual = f"method {config.method} by itself has {config.recipe.early_stop}"
        say(f"note: early_stop is {config.stopping} as asked; {usual}")
    if config.stopping != "none" and config.local_steps == 1:
        say("note: at --local-steps 1 every client makes one step a round: nobody is calibrated or stopped early")
    mask = make_mask(config, problem)
    if config.stopping != "none" and config.vpcs_rule == "thresholds" and mask.pretraining_gradient is None:
        raise MeerkatError(
            "--vpcs-rule thresholds: reads GradIP, which needs a pre-training gradient; "
            "give --text or a mask that has one, or use automatic"
        )
    # config.toml says what runs: how a given mask was chosen, the rates that fit it, the noise that a budget needs
    chosen = chosen_by(mask) if config.mask else {}
    config, mask = with_rates(config, problem, mask)
    config, mask = with_precision(config, problem, mask)
    config = budget.with_noise(config, sizes).model_copy(update={"density": mask.density, **chosen})
    folder = RunFolder.create(out, config)
    store_mask(folder, mask, problem)
    return folder


def prepared(
    folder: RunFolder, config: RunConfig, problem: Problem
) -> tuple[MaskedModel, Tensor, Directions, Tensor | None]:
    """What a run's rounds are made with: model, theta_0, directions, and the pre-training gradient if there is one.

    The model is cast and quantised in place; theta_0 is as it was before that. It and the gradient are float32 [n], on
    the model's device.

    Raises:
        MeerkatError: the model is not the run's, or cannot be quantised.
        RunFailed: the mask's base values are not the model's.
    """
    mask = load_mask(folder, config, problem)
    theta_0 = MaskedModel(problem.model, mask).read()
    model = runnable_model(config, problem, mask)
    z = directions(config, len(mask), model.device)
    gradient = None if mask.pretraining_gradient is None else mask.pretraining_gradient.to(model.device)
    return model, theta_0, z, gradient


@contextmanager
def carry_on(
    folder: RunFolder,
    problem: Problem,
    *,
    data: str = "",
    examples: Sequence[int] = (),
    allowance: Sequence[int] = (),
    federation: str = "",
    signed: bool = False,
    cure: str = "",
) -> Iterator[Run]:
    """A run as far as its folder has come, with its log open for the rounds that are left.

    Args:
        data, examples, allowance: a simulation's, as in `Opening`.
        federation, signed: those of a new federation; a resumed one keeps its own.
        cure: what to do once a full disk has room; empty for resuming the run.

    Raises:
        MeerkatError: what the run rests on was changed since it began, or another process has its log open.
        RunFailed: its record is damaged.
    """
    config, log = folder.config(), RunLog(folder.log_path, cure)
    with closing(log), closing(folder):
        folder.remove_leftovers()
        if log.dropped:
            say(f"note: {folder.log_path}: {log.dropped}; that record is dropped and its round is run again")
        model, theta_0, z, gradient = prepared(folder, config, problem)
        mask = model.mask
        opening = Opening(
            run_key=f"{z.key:032x}",
            config=file_digest(folder.config_path),
            model=mask.fingerprint,
            mask=mask.digest(),
            about_mask=mask.description_digest(),
            gradient=gradient_digest(mask),
            theta=path.digest(theta_0),
            data=data,
            examples=list(examples),
            torch=torch.__version__,
            transformers=transformers.__version__,
            allowance=list(allowance),
            federation=federation,
            rule=config.aggregation,
            estimator=config.estimator,
            update_rule=config.update_rule,
            signed=signed,
        )
        records: Iterator[dict[str, Any]] = iter(LogReader(folder.log_path))
        if (first := next(records, None)) is None:
            log.append(opening.to_json())
        else:
            now, opening = opening, Opening.from_json(first, folder.log_path)
            _check_unchanged(opening, now, folder)
        members, settings = Members(opening.identity(config)), opening.settings(config, theta_0)
        replay = Replay(records, theta_0, settings, z, gradient, folder.log_path, members)
        noted = {(metric["kind"], metric["round"]) for metric in folder.metrics()}
        lost = [
            metric_of(record, {"wall_s": 0.0, "forward_s": 0.0})
            for _, record in replay
            if (record.kind, record.plan.round) not in noted
        ]
        yield Run(
            folder=folder,
            log=log,
            config=config,
            model=model,
            opening=opening,
            members=members,
            directions=z,
            gradient=gradient,
            settings=replay.settings,
            state=replay.state,
            closed=replay.closed,
            lost=lost,
        )


_DEPENDENCIES = {
    "config": "config.toml was changed",
    "mask": "mask.safetensors was changed",
    "about_mask": "mask.safetensors was changed",
    "gradient": "mask.safetensors was changed",
    "data": "the rows, their split or how they are prepared (task, tokenizer) was changed",
    "allowance": "privacy budgets do not last as long any more: the log's opening or dp-accounting was changed",
    **dict.fromkeys(
        ("run_key", "model", "theta", "examples", "rule", "estimator", "update_rule"), "the log's opening was changed"
    ),
}
"""What of an opening must be as it was when the run began, and what is wrong where it is not."""


def _check_unchanged(logged: Opening, now: Opening, folder: RunFolder) -> None:
    for name, trouble in _DEPENDENCIES.items():
        if getattr(logged, name) != getattr(now, name):
            raise MeerkatError(
                f"run folder '{folder.root}': {trouble} since the run began; restore it, or start a new run"
            )
    for name in ("torch", "transformers"):
        if (then := getattr(logged, name)) != (here := getattr(now, name)):
            say(f"note: the run began with {name} {then}, this is {here}: losses may differ in their last bits")
