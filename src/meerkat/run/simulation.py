"""Simulating a federation on this machine, from the start or from where a run's log ends."""

import time
from collections import deque
from collections.abc import Sequence
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
from meerkat.run.attacked_engine import AttackedEngine
from meerkat.run.local_engine import LocalEngine, LossesOf
from meerkat.run.loop import Engine, evaluation_of, run_rounds
from meerkat.run.metrics import SplitMetric
from meerkat.run.run import Run, begin, carry_on
from meerkat.run.sentences import budgets_in_words, defence_in_words, plan_in_words
from meerkat.run.setup import open_problem, resolve
from meerkat.run.split import Split
from meerkat.run.summary import write_summary
from meerkat.run.trackers import tracking
from meerkat.settings import budget
from meerkat.settings.algorithm import estimator, rules
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
    return _go_on(begin(config, out, problem, split.sizes), problem, split)


def resume(root: Path) -> dict[str, Any]:
    """Go on with a run where its log ends. A finished one is left as it is. Returns the summary.

    Raises:
        MeerkatError: there is no run, or what it rests on was changed; RunFailed: its record is damaged.
    """
    folder = RunFolder.open(root)
    check_format(next(iter(LogReader(folder.log_path)), {}), folder.log_path)
    try:
        summary = folder.summary()
    except ValueError:
        summary = None  # it is made again from log and metrics
    if summary is not None and _is_closed(folder) and folder.metrics():
        say(f"{root}: the run is finished, after {summary['rounds']} rounds")
        return summary
    if (config := folder.config()).partition == SITES:
        raise MeerkatError(f"{root}: a federation's run: start its coordinator again with the same run folder to go on")
    problem = open_problem(config)
    return _go_on(folder, problem, Split.of(config, problem))


def _is_closed(folder: RunFolder) -> bool:
    """Whether the log's last sound record is the closing one."""
    last = deque(LogReader(folder.log_path), maxlen=1)
    return bool(last) and last[0].get("kind") == "close"


def _go_on(folder: RunFolder, problem: Problem, split: Split) -> dict[str, Any]:
    config = folder.config()
    lasting = budget.allowance(config, split.sizes) if config.dp == "example" else []
    with carry_on(folder, problem, data=split.digest, examples=split.sizes, allowance=lasting) as run:
        _announce(run, split, lasting)
        if problem.labels and not any(metric["kind"] == SplitMetric.kind for metric in folder.metrics()):
            run.lost.append(SplitMetric.of(problem.labels, split.label_counts(len(problem.labels))).to_json())
        timer = _Timer()
        engine = _engine(run, problem, split, timer)
        with tracking(config.tracker, folder.root, run.state.round) as tracker:
            folder.on_metric(tracker)
            evaluate = evaluation_of(problem, run.model, split.evaluation)
            run_rounds(run, engine, evaluate, forward_s=timer.lap)
        return write_summary(folder, config, run.mask, run.state, split.partition.extreme)


def _engine(run: Run, problem: Problem, split: Split, timer: "_Timer") -> Engine:
    """The clients of a simulation, some of which may attack."""
    config = run.config
    clients = [ClientRows(k, rows, config.batch_size, config.seed) for k, rows in enumerate(split.partition.rows)]
    private = budget.mechanism(config) if config.dp == "example" else None
    losses_of = client_losses(problem, split.examples, each_row=private is not None)
    honest = LocalEngine(
        model=run.model,
        directions=run.directions,
        batch_of=lambda k, step: private.sample(clients[k].rows) if private else clients[k].batch(step),
        losses_of=timer.around(losses_of),
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
