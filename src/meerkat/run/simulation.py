"""Simulating a federation on this machine, from the start or from where a run's log ends."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from meerkat.algorithm.zeroth_order import Loss
from meerkat.errors import MeerkatError
from meerkat.problems.partition import ClientRows
from meerkat.problems.problem import Problem, client_losses
from meerkat.progress import say
from meerkat.record.opening import check_format
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import LogReader
from meerkat.run.local_engine import AttackedEngine, LocalEngine, LossesOf
from meerkat.run.loop import Attendance, Engine, evaluation_of, run_rounds
from meerkat.run.metrics import SplitMetric
from meerkat.run.run import Run, begin, carry_on
from meerkat.run.sentences import budgets_in_words, defence_in_words, plan_in_words
from meerkat.run.setup import open_problem, resolve
from meerkat.run.split import Split
from meerkat.run.summary import write_summary
from meerkat.settings import budget
from meerkat.settings.algorithm import estimator, rules
from meerkat.settings.auto import number_or
from meerkat.settings.config import SITES, RunConfig


def simulate(config: RunConfig, out: Path) -> dict[str, Any]:
    """Run a federation from the start, in a new folder. Returns the summary.

    Raises:
        MeerkatError: the settings cannot be met.
        RunFailed: the run failed on the way.
    """
    RunFolder.check_free(out)
    config.check_none_idle()
    config = resolve(config)
    problem = open_problem(config)
    split = Split.of(config, problem)
    return _go_on(begin(config, out, problem, split.sizes), problem, split)


def resume(root: Path) -> dict[str, Any]:
    """Resume a run where its log ends; a finished one is left as it is. Returns the summary.

    Raises:
        MeerkatError: there is no run, or what it rests on was changed.
        RunFailed: its record is damaged.
    """
    folder = RunFolder.open(root)
    record: Mapping[str, Any] = {}
    for record in LogReader(folder.log_path):
        check_format(record, folder.log_path)
    try:
        summary = folder.summary()
    except ValueError:
        summary = None  # it is made again from log and metrics
    if summary is not None and record.get("kind") == "close" and folder.metrics():
        say(f"{root}: the run is finished, after {summary['rounds']} rounds")
        return summary
    if (config := folder.config()).partition == SITES:
        raise MeerkatError(f"{root}: a federation's run: start its coordinator again with the same run folder to go on")
    problem = open_problem(config)
    return _go_on(folder, problem, Split.of(config, problem))


def _go_on(folder: RunFolder, problem: Problem, split: Split) -> dict[str, Any]:
    config = folder.config()
    lasting = budget.allowance(config, split.sizes) if config.dp == "example" else []
    with carry_on(folder, problem, data=split.digest, examples=split.sizes, allowance=lasting) as run:
        _announce(run, split, lasting)
        if problem.labels and not any(metric["kind"] == SplitMetric.kind for metric in folder.metrics()):
            run.lost.append(SplitMetric.of(problem.labels, split.label_counts(len(problem.labels))).to_json())
        everyone, evaluate = _Everyone(), evaluation_of(problem, run.model, split.evaluation)
        run_rounds(run, _engine(run, problem, split, everyone), evaluate, everyone)
        return write_summary(run, split.partition.extreme)


def _engine(run: Run, problem: Problem, split: Split, everyone: "_Everyone") -> Engine:
    """The clients of a simulation, some of which may attack."""
    config = run.config
    clients = [ClientRows(k, rows, config.batch_size, config.seed) for k, rows in enumerate(split.partition.rows)]
    private = budget.mechanism(config) if config.dp == "example" else None
    losses_of = client_losses(problem, split.examples, config.dp)
    honest = LocalEngine(
        model=run.model,
        directions=run.directions,
        batch_of=lambda k, step: private.sample(clients[k].rows) if private else clients[k].batch(step),
        losses_of=everyone.timed(losses_of),
        together=config.batching == "auto",
        private=private,
        estimator=estimator(config),
        rule=rules(config).client,
    )
    if config.attack == "none":
        return honest
    scale = number_or(config.attack_scale, None)
    return AttackedEngine(honest, config.attack, config.attacking_clients, scale, config.seed)


def _announce(run: Run, split: Split, lasting: Sequence[int]) -> None:
    """Say what is about to run."""
    config, sizes = run.config, split.sizes
    if not run.state.round:
        say(plan_in_words(config, run.mask, sizes))
    if defence := defence_in_words(config):
        say(defence)
    if early := budget.ending_early(config, lasting):
        never = [client for client in early if lasting[client] < config.local_steps]
        say(f"note: {budgets_in_words(early, len(sizes))}; {len(never)} never take part: those with the fewest rows")


class _Everyone(Attendance):
    """All clients, all the time, and how long their forward passes take."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def facts(self) -> Mapping[str, Any]:
        """Seconds spent in the round's forward passes."""
        seconds, self._seconds = self._seconds, 0.0
        return {"forward_s": seconds}

    def timed(self, losses_of: LossesOf) -> LossesOf:
        """Losses as before, whose passes are timed."""

        def timed_losses_of(rows: Sequence[np.ndarray]) -> Loss:
            losses = losses_of(rows)

            def timed() -> Tensor:
                began = time.perf_counter()
                try:
                    return losses()
                finally:
                    self._seconds += time.perf_counter() - began

            return timed

        return timed_losses_of
