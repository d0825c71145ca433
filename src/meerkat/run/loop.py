"""The round loop, the only one there is: open, ask, close, note. A calibration is a second kind of round."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from meerkat.algorithm import calibration, server
from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.replies import Reply, Scalars, check_reply
from meerkat.algorithm.rounds import RoundPlan, RoundRecord
from meerkat.algorithm.server import ServerConfig, ServerState
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.errors import Diverged, RunFailed
from meerkat.problems.problem import Problem
from meerkat.progress import number_of, say, track
from meerkat.record.members import Member
from meerkat.record.run_folder import Metric
from meerkat.run.metrics import EvaluationMetric, metric_of
from meerkat.run.run import Run
from meerkat.run.sentences import evaluation_in_words, stopped_in_words
from meerkat.run.trackers import tracking

Available = Collection[int] | None
"""The clients that can take part in the next round; None for all."""

Evaluate = Callable[[Tensor, int], EvaluationMetric]
"""(theta, rounds) -> how the model does with theta, after so many rounds."""


class Engine(Protocol):
    """Makes clients take their steps: in this process, or at the other end of a network."""

    def run(self, state: ServerState, plan: RoundPlan) -> list[Reply] | None:
        """The replies to a plan, of all clients that were asked or of some; None where the round must open again."""


class Attendance:
    """Which clients are there: as it stands, everyone, all the time. A federation's come and go."""

    @property
    def evaluates(self) -> bool:
        """Whether it is the clients that evaluate."""
        return False

    def arrivals(self, _: int) -> Sequence[Member]:
        """Wait until a round can open; the clients that joined, to be logged before it."""
        return ()

    def available(self) -> Available:
        """The clients that can take part in the next round."""
        return None

    def facts(self) -> Mapping[str, Any]:
        """What to note of the last round."""
        return {}

    def defer(self, task: Callable[[], None]) -> None:
        """Do what nobody waits for within seconds, in order, while clients are at work."""
        task()

    def run_deferred(self) -> None:
        """Do it now."""

    def logged(self, record: RoundRecord | CalibrationRecord) -> None:
        """A round or a calibration is on the disk."""

    def closed(self, state: ServerState, record: RoundRecord) -> None:
        """A round is on the disk, and this is the state after it."""


class RoundKind(NamedTuple):
    """How a kind of round opens and closes."""

    open: Callable[[ServerState, ServerConfig, Available], RoundPlan]
    close: Callable[
        [ServerState, RoundPlan, Sequence[Reply], ServerConfig, Directions, Tensor | None],
        tuple[ServerState, RoundRecord | CalibrationRecord],
    ]


def _open_calibration(state: ServerState, settings: ServerConfig, available: Available) -> RoundPlan:
    plan = calibration.open_calibration(state, settings, available)
    say(f"calibrating {number_of(len(plan.steps), 'client')}, {settings.vpcs.calibration_steps} steps each")
    return plan


def _open_training(state: ServerState, settings: ServerConfig, available: Available) -> RoundPlan:
    plan = server.open_round(state, settings, settings.aggregation.invited(settings.clients, available))
    if not plan.steps and settings.allowance:
        raise RunFailed(f"round {plan.round}: every client's privacy budget is spent; the model is as it is")
    return plan


CALIBRATION = RoundKind(_open_calibration, calibration.close_calibration)
TRAINING = RoundKind(_open_training, server.close_round)


def run_rounds(run: Run, engine: Engine, evaluate: Evaluate, attendance: Attendance) -> None:
    """The rounds that are left, each on the disk before the next begins."""
    loop = _Loop(run, engine, evaluate, attendance)
    with tracking(run.config.tracker, run.folder.root, run.state.round) as tracker:
        run.folder.track = tracker
        try:
            loop.start()
            for _ in track(range(run.state.round, run.config.rounds), "rounds"):
                if calibration.due(run.state, run.settings):
                    loop.one_round(CALIBRATION)
                loop.one_round(TRAINING)
                if loop.evaluation_is_due():
                    loop.evaluate_now(run.state.theta, run.state.round)
        except Diverged as error:
            attendance.run_deferred()  # the lines of the rounds before
            with suppress(RunFailed):  # a full disk hides nothing
                run.folder.append_metric({"kind": "diverged", "round": run.state.round, "why": str(error)})
            raise
        finally:
            attendance.run_deferred()
    run.close()


@dataclass(frozen=True)
class _Loop:
    """What the rounds of a run go through."""

    run: Run
    engine: Engine
    evaluate: Evaluate
    attendance: Attendance

    def one_round(self, kind: RoundKind) -> None:
        """Open, ask, close, note."""
        run, present = self.run, self.attendance
        run.admit(present.arrivals(run.state.round))
        began = time.perf_counter()
        while (replies := self.ask(plan := kind.open(run.state, run.settings, present.available()))) is None:
            run.admit(present.arrivals(run.state.round))  # too few were left: it opens again, with those that are here
        run.state, record = kind.close(run.state, plan, replies, run.settings, run.directions, run.gradient)
        facts = {"forward_s": 0.0, **present.facts(), "wall_s": time.perf_counter() - began}
        # not synced: lines that are lost with the machine are made again from the log
        present.defer(lambda: run.folder.append_metric(metric_of(record, facts, replies), sync=False))
        run.log.append(record.to_json())
        present.logged(record)
        if isinstance(record, CalibrationRecord):
            say(stopped_in_words(record.early_stopped, run.config.clients))
        else:
            present.closed(run.state, record)

    def ask(self, plan: RoundPlan) -> list[Reply] | None:
        """The replies to a plan, each checked."""
        settings = self.run.settings
        if not plan.steps:
            return None if settings.aggregation.keeps_replies else []
        try:
            replies = self.engine.run(self.run.state, plan)
        except Diverged as error:
            raise Diverged(f"round {plan.round}: {error}") from None
        for reply in replies or ():
            try:
                if isinstance(reply, Scalars):
                    check_reply(plan, reply.client, reply.scalars)
            except ValueError as error:
                raise Diverged(
                    f"round {plan.round}: client {reply.client}: {error}; start a new run with a lower --lr"
                ) from None
        if replies and plan.phase == "training":
            server.check_rate(plan, replies, settings)
        return replies

    def start(self) -> None:
        """Bring the metrics in line with the log, and evaluate where the run stands, unless that was done."""
        run, state = self.run, self.run.state
        metrics = run.folder.rewrite_metrics(lambda metric: _is_past(metric, state), _place, run.lost)
        evaluated = {metric["round"] for metric in metrics if metric["kind"] == EvaluationMetric.kind}
        if state.round:
            say(f"{run.folder.root}: going on after round {state.round} of {run.config.rounds}")
        due = self.evaluation_is_due() and state.round not in evaluated
        if state.round < run.config.rounds or (due and not run.closed and self.attendance.evaluates):
            run.admit(self.attendance.arrivals(state.round))  # before an evaluation, which sites may make
        if 0 not in evaluated:
            theta_0 = run.mask.theta_0
            self.evaluate_now(state.theta if theta_0 is None else theta_0.to(state.theta.device), 0)
        if state.round and due:
            self.evaluate_now(state.theta, state.round)

    def evaluation_is_due(self) -> bool:
        """Whether the model is evaluated after the rounds closed so far."""
        rounds, every = self.run.state.round, self.run.config.eval_every
        return rounds == self.run.config.rounds or bool(every and rounds % every == 0)

    def evaluate_now(self, theta: Tensor, rounds: int) -> None:
        """Evaluate, and note it."""
        self.attendance.run_deferred()
        began = time.perf_counter()
        metric = self.evaluate(theta, rounds)
        self.run.folder.append_metric(replace(metric, facts={"wall_s": time.perf_counter() - began}).to_json())
        say(evaluation_in_words(metric, self.run.config.rounds))


def evaluation_of(problem: Problem, model: MaskedModel, batch: Any) -> Evaluate:
    """How theta is evaluated on a batch at hand."""

    def evaluate(theta: Tensor, rounds: int) -> EvaluationMetric:
        with torch.no_grad():
            model.write_(theta)
        return EvaluationMetric.of(problem.evaluate(batch), problem.scores, rounds)

    return evaluate


def _is_past(metric: Metric, state: ServerState) -> bool:
    """Whether a metric is of something that the log has, up to a state."""
    if metric["kind"] == "diverged":
        return False
    if metric["kind"] == "calibration":
        return state.calibrated is not None and metric["round"] <= state.calibrated
    return _place(metric)[0] <= state.round


def _place(metric: Metric) -> tuple[int, int]:
    """Where a metric stands among others: rounds closed when it was noted, and an evaluation before a calibration."""
    after = {"split": 0, "round": 1, "evaluation": 2, "calibration": 3}
    return metric["round"] + (metric["kind"] == "round"), after.get(metric["kind"], len(after))
