"""Simulating a federation on this machine, from the start or from where a run's log ends, by one process or several."""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.rounds import RoundRecord
from meerkat.algorithm.zeroth_order import Loss, MaskedModel
from meerkat.errors import Diverged, MeerkatError, RunFailed
from meerkat.problems.partition import ClientRows
from meerkat.problems.problem import Problem, client_losses
from meerkat.progress import number_of, say
from meerkat.record.members import Members
from meerkat.record.opening import Opening, check_format
from meerkat.record.replay import Replay, agree
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import LogReader
from meerkat.record.summary import Summary
from meerkat.run.local_engine import AttackedEngine, LocalEngine, LossesOf
from meerkat.run.loop import Attendance, Engine, evaluation_of, run_rounds
from meerkat.run.metrics import EvaluationMetric, split_metric
from meerkat.run.ranks import RankLost, Ranks
from meerkat.run.run import Run, begin, carry_on, prepared
from meerkat.run.sentences import budgets_in_words, defence_in_words, plan_in_words
from meerkat.run.setup import has_device, open_problem, resolve
from meerkat.run.shared_engine import SharedEngine, answer
from meerkat.run.split import Split
from meerkat.run.summary import write_summary
from meerkat.settings import budget
from meerkat.settings.algorithm import estimator, rules
from meerkat.settings.auto import number_or
from meerkat.settings.config import SITES, RunConfig


def simulate(config: RunConfig, out: Path, ranks: Ranks | None = None) -> dict[str, Any]:
    """Run a federation from the start, in a new folder. Returns the summary.

    Args:
        ranks: those that share the run, of which this is rank 0; None where this process is alone.

    Raises:
        MeerkatError: the settings cannot be met.
        RunFailed: the run failed on the way.
    """
    RunFolder.check_free(out)
    config.check_none_idle()
    config = resolve(config)
    problem = open_problem(config)
    split = Split.of(config, problem)
    return _go_on(begin(config, out, problem, split.sizes), problem, split, ranks)


def resume(root: Path, ranks: Ranks | None = None) -> dict[str, Any]:
    """Resume a run where its log ends; a finished one is left as it is. Returns the summary.

    `ranks` are as in `simulate`, and may be more or fewer than before.

    Raises:
        MeerkatError: there is no run, or what it rests on was changed.
        RunFailed: its record is damaged.
    """
    folder = RunFolder.open(root)
    record: Mapping[str, Any] = {}
    for record in LogReader(folder.log_path):
        check_format(record, folder.log_path)
    evaluations = EvaluationMetric.of_run(folder)
    try:
        summary = folder.summary()
        rounds = 0 if summary is None else Summary.from_json(summary).rounds
    except (LookupError, ValueError):
        summary = None  # it is made again from log and metrics
    if summary is not None and record.get("kind") == "close" and evaluations:
        say(f"{root}: the run is finished, after {number_of(rounds, 'round')}")
        return summary
    if (config := folder.config()).partition == SITES:
        raise MeerkatError(f"{root}: a federation's run: start its coordinator again, by the same 'flwr run'")
    if not has_device(config.device):
        cure = "resume it on one that has it"
        raise MeerkatError(f"{root}: was begun on {config.device}, which this machine does not have; {cure}")
    problem = open_problem(config)
    return _go_on(folder, problem, Split.of(config, problem), ranks)


def follow(ranks: Ranks) -> None:
    """Share the run that rank 0 makes, until it ends: a replica that follows the log as rank 0 writes it.

    The folder must be here, too.

    Raises:
        MeerkatError: model or rows are not those of the run.
        RunFailed: this rank's state is not rank 0's after a record, or a loss is not finite.
    """
    start = ranks.hear()
    if start is None:
        return
    folder = RunFolder.open(Path(start["folder"]))
    config = folder.config()
    problem = open_problem(config)
    split = Split.of(config, problem)
    model, theta_0, z, gradient = prepared(folder, config, problem)
    logged = islice(LogReader(folder.log_path), start["records"])
    opening = Opening.from_json(next(logged), folder.log_path)
    agree(folder.log_path, "the rows, and which client has which", opening.data, split.digest)
    engine = honest_clients(config, model, z, split, client_losses(problem, split.examples, config.dp))

    def records() -> Iterator[dict[str, Any]]:
        yield from logged
        for message in ranks.heard():
            if "plan" in message:
                ranks.answer(answer(message["plan"], engine, replay.state, ranks))
            else:
                yield message["record"]

    settings, members = opening.settings(config, theta_0), Members(opening.identity(config))
    replay = Replay(records(), theta_0, settings, z, gradient, folder.log_path, members)
    try:
        replay.run()
    except (Diverged, RankLost):
        raise
    except RunFailed as error:
        raise RunFailed(f"does not follow rank 0, so the run stops; resume it with fewer workers ({error})") from None


def _go_on(folder: RunFolder, problem: Problem, split: Split, ranks: Ranks | None) -> dict[str, Any]:
    config = folder.config()
    lasting = budget.allowance(config, split.sizes) if config.dp == "example" else []
    with carry_on(folder, problem, data=split.digest, examples=split.sizes, allowance=lasting) as run:
        if ranks is not None:
            records = sum(1 for _ in LogReader(folder.log_path))
            ranks.tell({"folder": str(folder.root.resolve()), "records": records})
        _announce(run, split, lasting)
        if problem.labels and not any(metric["kind"] == "split" for metric in folder.metrics()):
            run.lost.append(split_metric(problem.labels, split.label_counts(len(problem.labels))))
        everyone, evaluate = _Everyone(ranks), evaluation_of(problem, run.model, split.evaluation)
        losses_of = everyone.timed(client_losses(problem, split.examples, config.dp))
        honest = honest_clients(config, run.model, run.directions, split, losses_of)
        run_rounds(run, _clients(config, honest, ranks), evaluate, everyone)
        return write_summary(run, split.partition.extreme)


def honest_clients(
    config: RunConfig, model: MaskedModel, z: Directions, split: Split, losses_of: LossesOf
) -> LocalEngine:
    """The clients of a simulation, each as its rows have it."""
    clients = [ClientRows(k, rows, config.batch_size, config.seed) for k, rows in enumerate(split.partition.rows)]
    private = budget.mechanism(config) if config.dp == "example" else None
    return LocalEngine(
        model=model,
        directions=z,
        batch_of=lambda k, step: private.sample(clients[k].rows) if private else clients[k].batch(step),
        losses_of=losses_of,
        together=config.batching == "auto",
        private=private,
        estimator=estimator(config),
        rule=rules(config).client,
    )


def _clients(config: RunConfig, honest: LocalEngine, ranks: Ranks | None) -> Engine:
    """All clients, shared among ranks; some of them may attack."""
    engine = honest if ranks is None else SharedEngine(honest, ranks)
    if config.attack == "none":
        return engine
    scale = number_or(config.attack_scale, None)
    return AttackedEngine(engine, config.attack, config.attacking_clients, scale, config.seed)


def _announce(run: Run, split: Split, lasting: Sequence[int]) -> None:
    """Say what is about to run."""
    config, sizes = run.config, split.sizes
    if not run.state.round:
        say(plan_in_words(config, run.mask, sizes))
    if defence := defence_in_words(config):
        say(defence)
    if early := budget.ending_early(config, lasting):
        never = [client for client in early if lasting[client] < config.local_steps]
        who = budgets_in_words(early, len(sizes), "may")
        say(f"note: {who}; {len(never)} never take part: those with the fewest rows")


class _Everyone(Attendance):
    """All clients, all the time, and how long the forward passes take of those that this process runs."""

    def __init__(self, ranks: Ranks | None) -> None:
        self._ranks = ranks
        self._seconds = 0.0

    def facts(self) -> Mapping[str, Any]:
        """Seconds spent in the round's forward passes."""
        seconds, self._seconds = self._seconds, 0.0
        return {"forward_s": seconds}

    def logged(self, record: RoundRecord | CalibrationRecord) -> None:
        """Have the other ranks follow."""
        if self._ranks is not None:
            self._ranks.tell({"record": record.to_json()})

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
