"""A run from beginning to end: the only round loop there is.

A fresh run and a resumed one go the same way: settle the settings, replay what the log already holds,
and go on from there.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor

from meerkat.algorithm import calibration, path, server
from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.directions import Directions, run_key
from meerkat.algorithm.rounds import Reply, RoundPlan, RoundRecord, Scalars, check_reply
from meerkat.algorithm.server import ServerConfig, ServerState
from meerkat.algorithm.zeroth_order import Loss, MaskedModel
from meerkat.errors import Diverged, MeerkatError, RunFailed
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.partition import ClientRows
from meerkat.problems.problem import Problem, client_losses
from meerkat.progress import number_of, say, track
from meerkat.record.members import Member, Members
from meerkat.record.opening import Opening, check_format, file_digest, gradient_digest
from meerkat.record.replay import Replay
from meerkat.record.run_folder import Metric, RunFolder
from meerkat.record.run_log import LogReader, RunLog
from meerkat.run.attacked_engine import Attacked
from meerkat.run.local_engine import LocalEngine, LossesOf
from meerkat.run.mask import default_lr, make_mask, settled_mask, store_mask
from meerkat.run.metrics import EvaluationMetric, SplitMetric, kind_of, metric_of
from meerkat.run.sentences import (
    budgets_in_words,
    defence_in_words,
    evaluation_in_words,
    plan_in_words,
    stopped_in_words,
)
from meerkat.run.setup import open_problem, resolve
from meerkat.run.split import Split
from meerkat.run.summary import write_summary
from meerkat.run.trackers import tracking
from meerkat.settings import budget
from meerkat.settings.algorithm import directions, estimator, rules
from meerkat.settings.auto import number_or
from meerkat.settings.config import SITES, RunConfig


def simulate(config: RunConfig, out: Path) -> dict[str, Any]:
    """Run a federation from the start, in a new folder. Returns the summary.

    Raises:
        MeerkatError: the settings cannot be met; RunFailed: the run went wrong on the way.
    """
    RunFolder.check_free(out)
    config.check_none_idle()
    config = resolve(config)
    problem = open_problem(config)
    split = Split.of(config, problem)
    mask = make_mask(config, problem)
    if config.early_stop != "none" and config.vpcs_rule == "thresholds" and mask.pretraining_gradient is None:
        raise MeerkatError(
            "--vpcs-rule thresholds: reads GradIP, which needs a pre-training gradient; "
            "give --text or a mask that has one, or use automatic"
        )
    # what config.toml says is what runs: a given mask's own density, and the rate that fits its size
    rate = number_or(config.lr, default_lr(config.method, len(mask)))
    config = budget.with_noise(config, [len(rows) for rows in split.partition.rows])
    config = config.model_copy(update={"density": mask.density, "lr": rate})
    # nothing is written before everything that was asked for is known to be possible
    folder = RunFolder.create(out, config)
    store_mask(folder, mask, problem)
    return _carry_on(folder, config, problem, split)


def resume(root: Path) -> dict[str, Any]:
    """Go on with a run where its log ends. A finished one is left as it is.

    Raises:
        MeerkatError: there is no run, or what it rests on was changed; RunFailed: its record is damaged.
    """
    folder = RunFolder.open(root)
    check_format(next(iter(LogReader(folder.log_path)), {}), folder.log_path)
    try:
        summary = folder.summary()
    except ValueError:
        summary = None  # made again from log and metrics
    if summary is not None and _is_closed(folder) and folder.metrics():
        say(f"{root}: the run is finished, after {summary['rounds']} rounds")
        return summary
    if (config := folder.config()).partition == SITES:
        raise MeerkatError(f"{root}: a federation's run: start its coordinator again with the same run folder to go on")
    problem = open_problem(config)
    return _carry_on(folder, config, problem, Split.of(config, problem))


def _is_closed(folder: RunFolder) -> bool:
    """Whether the log's last sound record is the closing one."""
    last = deque(LogReader(folder.log_path), maxlen=1)
    return bool(last) and last[0].get("kind") == "close"


class _Timer:
    """Seconds spent in forward passes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def lap(self) -> float:
        """The seconds since this was last asked."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def around(self, losses_of: LossesOf) -> LossesOf:
        def timed_losses_of(rows: Sequence[np.ndarray]) -> Loss:
            losses = losses_of(rows)

            def timed() -> Tensor:
                began = time.perf_counter()
                try:
                    return losses()
                finally:
                    self.seconds += time.perf_counter() - began

            return timed

        return timed_losses_of


def opening_of(
    folder: RunFolder,
    config: RunConfig,
    mask: SparseMask,
    theta_0: Tensor,
    data: str = "",
    examples: Sequence[int] = (),
    allowance: Sequence[int] = (),
    federation: str = "",
    signed: bool = False,
) -> Opening:
    """The first record of a run that begins. A federation knows no data and no rows: its clients join one by one."""
    return Opening(
        run_key=f"{run_key(config.seed):032x}",
        config=file_digest(folder.config_path),
        model=mask.fingerprint,
        mask=mask.digest(),
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


def _check_opening(logged: Opening, now: Opening, folder: RunFolder) -> None:
    what = {
        "config": "config.toml was changed",
        "mask": "mask.safetensors was changed",
        "gradient": "mask.safetensors was changed",
        "data": "the rows, their split or how they are prepared (task, tokenizer) was changed",
        "allowance": "privacy budgets do not last as long any more: the log's opening or dp-accounting was changed",
        **dict.fromkeys(
            ("run_key", "model", "theta", "examples", "rule", "estimator", "update_rule"),
            "the log's opening was changed",
        ),
    }
    for name, trouble in what.items():
        if getattr(logged, name) != getattr(now, name):
            raise MeerkatError(
                f"run folder '{folder.root}': {trouble} since the run began; restore it, or start a new run"
            )
    for name in ("torch", "transformers"):
        if (then := getattr(logged, name)) != (here := getattr(now, name)):
            say(f"note: the run began with {name} {then}, this is {here}: losses may differ in their last bits")


def _carry_on(folder: RunFolder, config: RunConfig, problem: Problem, split: Split) -> dict[str, Any]:
    log = RunLog(folder.log_path)
    try:
        if log.dropped:
            say(f"note: {folder.log_path}: {log.dropped}; that record is dropped and its round is run again")
        return _run(folder, config, problem, split, log)
    finally:
        log.close()


def _run(folder: RunFolder, config: RunConfig, problem: Problem, split: Split, log: RunLog) -> dict[str, Any]:
    mask = settled_mask(folder, config, problem)
    model = MaskedModel(problem.model, mask)
    theta_0 = model.read()
    sizes = [len(rows) for rows in split.partition.rows]
    lasting = budget.allowance(config, sizes) if config.dp == "example" else []
    opening = opening_of(folder, config, mask, theta_0, split.digest, sizes, lasting)
    replayed, z, _, lost = replay_log(folder, log, opening, config, mask, theta_0)
    timer = _Timer()
    clients = [ClientRows(k, rows, config.batch_size, config.seed) for k, rows in enumerate(split.partition.rows)]
    private = budget.mechanism(config) if config.dp == "example" else None
    losses_of = client_losses(problem, split.examples, each_row=private is not None)
    honest = LocalEngine(
        model=model,
        directions=z,
        batch_of=lambda k, step: private.sample(clients[k].rows) if private else clients[k].batch(step),
        losses_of=timer.around(losses_of),
        together=config.batching == "auto",
        private=private,
        estimator=estimator(config),
        rule=rules(config).client,
    )
    engine: Engine = honest
    if config.attack != "none":
        engine = Attacked(
            honest, config.attack, config.attacking_clients, number_or(config.attack_scale, None), config.seed
        )
    if not replayed.state.round:
        say(plan_in_words(config, mask, sizes))
    if defence := defence_in_words(config):
        say(defence)
    if early := budget.ending_early(config, lasting):
        never = [client for client in early if lasting[client] < config.local_steps]
        say(f"note: {budgets_in_words(early, len(sizes))}; {len(never)} never take part: those with the fewest rows")
    if problem.labels and not any(metric["kind"] == SplitMetric.kind for metric in folder.metrics()):
        lost.append(SplitMetric.of(problem.labels, split.label_counts(len(problem.labels))).to_json())
    evaluate = evaluation_of(problem, model, split.evaluation)
    with tracking(config.tracker, folder.root, replayed.state.round) as follower:
        folder.on_metric(follower)
        state = run_rounds(folder, log, replayed, z, config, mask, engine, evaluate, timer.lap, lost)
    return write_summary(folder, config, mask, state, split.partition.extreme)


Evaluate = Callable[[Tensor, int], EvaluationMetric]
"""(theta, rounds) -> how the model does with theta, after so many rounds."""


def evaluation_of(problem: Problem, model: MaskedModel, batch: Any) -> Evaluate:
    """How theta is evaluated on a batch at hand."""

    def evaluate(theta: Tensor, rounds: int) -> EvaluationMetric:
        with torch.no_grad():
            model.write_(theta)
        return EvaluationMetric.of(problem.evaluate(batch), problem.scores, rounds)

    return evaluate


class Engine(Protocol):
    """Whoever makes clients take their steps: in this process, or at the end of a network."""

    def arrivals(self, round: int) -> Sequence[Member]:
        """The clients that came since the last round, to be logged before the next."""

    def available(self) -> Sequence[int] | None:
        """The clients that can take part in the next round; None for all."""

    def run(self, state: ServerState, plan: RoundPlan) -> list[Reply]:
        """The replies to a plan, of all that were asked or of some; none where it must be opened again."""

    def facts(self) -> Mapping[str, Any]:
        """What to note of the round that was run last."""

    def meanwhile(self, task: Callable[[], None]) -> None:
        """Do what nobody waits for: at once, or within seconds while clients are at work, in order."""

    def settle(self) -> None:
        """Do now what `meanwhile` was given and was not done yet."""

    def closed(self, state: ServerState, record: RoundRecord) -> None:
        """A round is on the disk, and the state after it."""


def replay_log(
    folder: RunFolder, log: RunLog, opening: Opening, config: RunConfig, mask: SparseMask, theta_0: Tensor
) -> tuple[Replay, Directions, Opening, list[Metric]]:
    """Open the log, or replay what it holds: the run as far as it has come, its directions, its opening, lost metrics.

    Lost are those of records that the log holds and the metrics do not tell of, made again.

    Raises:
        MeerkatError: what the run rests on was changed since it began; RunFailed: its record is damaged.
    """
    records: Iterator[dict[str, Any]] = iter(LogReader(folder.log_path))
    first = next(records, None)
    if first is None:
        log.append(opening.to_json())
    else:
        logged = Opening.from_json(first, folder.log_path)
        _check_opening(logged, opening, folder)
        opening = logged
    z = directions(config, len(mask), theta_0.device)
    gradient = None if mask.pretraining_gradient is None else mask.pretraining_gradient.to(theta_0.device)
    register = Members(opening.charter(config))
    replayed = Replay(records, theta_0, opening.settings(config, theta_0), z, gradient, folder.log_path, register)
    noted = {(metric["kind"], metric["round"]) for metric in folder.metrics()}
    lost = [
        metric_of(record, {"wall_s": 0.0, "forward_s": 0.0})
        for _, record in replayed
        if (kind_of(record), record.plan.round) not in noted
    ]
    return replayed, z, opening, lost


def run_rounds(
    folder: RunFolder,
    log: RunLog,
    replayed: Replay,
    z: Directions,
    config: RunConfig,
    mask: SparseMask,
    engine: Engine,
    evaluate: Evaluate,
    forward_s: Callable[[], float] = lambda: 0.0,
    lost: Sequence[Metric] = (),
) -> ServerState:
    """The rounds that are left, each on the disk before the next begins.

    Args:
        replayed: the run as far as it has come.
        forward_s: seconds spent in forward passes since it was last asked.
        lost: what the metrics are to hold beside what they do.
    """
    state, settings = replayed.state, replayed.settings
    gradient = None if mask.pretraining_gradient is None else mask.pretraining_gradient.to(state.theta.device)

    def note_evaluation(theta: Tensor, rounds: int) -> None:
        engine.settle()
        began = time.perf_counter()
        metric = evaluate(theta, rounds)
        folder.append_metric(replace(metric, facts={"wall_s": time.perf_counter() - began}).to_json())
        say(evaluation_in_words(metric, config.rounds))

    def gather(settings: ServerConfig) -> ServerConfig:
        for join in engine.arrivals(state.round):
            log.append(join.to_json())
            settings = join.added_to(settings)
        return settings

    def due(rounds: int) -> bool:
        return rounds == config.rounds or bool(config.eval_every and rounds % config.eval_every == 0)

    def open_round(settings: ServerConfig) -> RoundPlan:
        invited = settings.aggregation.invited(settings.clients, engine.available())
        plan = server.open_round(state, settings, invited)
        if not plan.steps and settings.allowance:
            raise RunFailed(f"round {plan.round}: every client's privacy budget is spent; the model is as it is")
        return plan

    def replies_to(plan: RoundPlan) -> list[Reply]:
        if not plan.steps:
            return []
        try:
            replies = engine.run(state, plan)
        except Diverged as error:
            raise Diverged(f"round {plan.round}: {error}") from None
        for reply in replies:
            try:
                if isinstance(reply, Scalars):
                    check_reply(plan, reply.client, reply.scalars)
            except ValueError as error:
                raise Diverged(
                    f"round {plan.round}: client {reply.client}: {error}; start a new run with a lower --lr"
                ) from None
        return replies

    def note(record: RoundRecord | CalibrationRecord, replies: Sequence[Reply] = ()) -> None:
        facts = {**engine.facts(), "wall_s": time.perf_counter() - began, "forward_s": forward_s()}
        # not through to the disk: lines that are lost with the machine are made again from the log
        engine.meanwhile(lambda: folder.append_metric(metric_of(record, facts, replies), sync=False))
        log.append({"kind": kind_of(record), **record.to_json()})

    metrics = folder.rewrite_metrics(lambda metric: _is_past(metric, state), _place, lost)
    evaluated = {m["round"] for m in metrics if m["kind"] == EvaluationMetric.kind}
    if state.round:
        say(f"{folder.root}: going on after round {state.round} of {config.rounds}")
    if state.round < config.rounds:
        settings = gather(settings)  # before the first evaluation, which sites may make
    if 0 not in evaluated:
        note_evaluation(mask.theta_0.to(state.theta.device) if mask.theta_0 is not None else state.theta, 0)
    if state.round and due(state.round) and state.round not in evaluated:
        note_evaluation(state.theta, state.round)
    for _ in track(range(state.round, config.rounds), "rounds"):
        settings = gather(settings)
        if calibration.due(state, settings):
            began, _ = time.perf_counter(), forward_s()
            plan = calibration.open_calibration(state, settings, engine.available())
            say(f"calibrating {number_of(len(plan.steps), 'client')}, {settings.vpcs.calibration_steps} steps each")
            while not (replies := replies_to(plan)):
                settings = gather(settings)
                plan = calibration.open_calibration(state, settings, engine.available())
            state, decided = calibration.close_calibration(state, plan, replies, settings, z, gradient)
            note(decided)
            say(stopped_in_words(decided.early_stopped, len(plan.steps)))
            settings = gather(settings)  # a calibration takes long: some may have come, and some gone
        began, _ = time.perf_counter(), forward_s()
        plan = open_round(settings)
        while not (replies := replies_to(plan)) and settings.aggregation.keeps_replies:
            settings = gather(settings)  # too few were left: it opens again, with who is here
            plan = open_round(settings)
        server.check_rate(plan, replies, settings)
        state, closed = server.close_round(state, plan, replies, settings, z, gradient)
        note(closed, replies)
        engine.closed(state, closed)
        if due(state.round):
            note_evaluation(state.theta, state.round)
    engine.settle()
    if not replayed.closed:
        log.append({"kind": "close", "rounds": state.round, "theta": state.replica.digest})
    return state


def _is_past(metric: Metric, state: ServerState) -> bool:
    """Whether a metric tells of something that the log holds, up to a state."""
    if metric["kind"] == "round":
        return bool(metric["round"] < state.round)
    if metric["kind"] == "calibration":
        return state.calibrated is not None and metric["round"] <= state.calibrated
    return bool(metric["round"] <= state.round)


def _place(metric: Metric) -> tuple[int, int]:
    """Where a metric stands among others: rounds closed when it was noted, and an evaluation before a calibration."""
    after = {"split": 0, "round": 1, "evaluation": 2, "calibration": 3}
    return metric["round"] + (metric["kind"] == "round"), after.get(metric["kind"], len(after))
