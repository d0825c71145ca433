"""The model that a run made: verified, loaded and evaluated."""

from pathlib import Path
from typing import Any

from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.errors import MeerkatError, RunFailed
from meerkat.problems.problem import Evaluation, Problem, Split
from meerkat.progress import say
from meerkat.record.replay import agree
from meerkat.record.run_folder import RunFolder
from meerkat.record.summary import alike
from meerkat.record.verification import VerifiedRun, verify
from meerkat.run.loop import evaluation_of
from meerkat.run.mask import check_model
from meerkat.run.precision import runnable_model
from meerkat.run.setup import has_device, open_problem
from meerkat.run.split import Split as Rows
from meerkat.run.split import evenly
from meerkat.run.summary import evaluated

ROUNDING = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-2}
"""How far scores of the same weights may lie apart on two machines, by the weights' type."""


def load_run(root: Path, as_stored: bool = False) -> tuple[VerifiedRun, Problem]:
    """A verified run, and its problem with the run's theta in the model.

    Args:
        as_stored: leave the other weights as the checkpoint has them, neither quantised nor in half precision.
    """
    run = verify(root)
    problem, model = _opened(root, run, as_stored)
    model.write_(run.theta.to(model.device))
    return run, problem


def _opened(root: Path, run: VerifiedRun, as_stored: bool = False) -> tuple[Problem, MaskedModel]:
    """A verified run's problem, and its model, which is the one that the run began with."""
    config = run.config
    if not has_device(config.device):
        say(f"note: the run was made on {config.device}, which this machine lacks; its model is loaded on the CPU")
        config = config.model_copy(update={"device": "cpu"})
    problem = open_problem(config)
    check_model(RunFolder(root), run.mask, config, problem)
    if as_stored and (config.quantize, config.dtype) != ("none", "float32"):
        return problem, MaskedModel(problem.model, run.mask)
    return problem, runnable_model(config, problem, run.mask)


def evaluate(root: Path, split: Split = "validation") -> Evaluation:
    """How a run's model does on one split of its problem's rows."""
    _, problem = load_run(root)
    return problem.evaluate(problem.batch(problem.prepare(problem.rows(split)), "evaluation"))


def check_scores(root: Path, run: VerifiedRun) -> None:
    """Evaluate a finished run's model anew, before and after training, and compare with its summary.

    A simulation's rows are compared with the log, too; which rows a federation's coordinator evaluated on, no log says.

    Raises:
        MeerkatError: the run states no scores, or sites made them, or its model or rows are not here.
        RunFailed: rows, or a score by more than `ROUNDING`, are not those of the run.
    """
    folder, summary, config = RunFolder(root), run.summary, run.config
    if summary is None:
        raise MeerkatError(f"{root}: not finished, so there is no summary whose scores could be checked; resume it")
    if summary.evaluated_on == "sites":
        raise MeerkatError(
            f"{root}: its summary says, and no log confirms, that its sites evaluated it, on rows only they have; "
            "leave --evaluate out, and use 'meerkat evaluate' for its scores on your rows"
        )
    problem, model = _opened(root, run)
    batch, extreme = _evaluation_rows(folder, run, problem)
    agree(folder.summary_path, "extreme_clients", summary.extreme_clients, extreme)
    evaluation, theta_0 = evaluation_of(problem, model, batch), run.mask.theta_0
    assert theta_0 is not None
    stages = ((theta_0, 0), (run.theta, run.rounds))
    again = evaluated(config, [evaluation(theta.to(model.device), rounds) for theta, rounds in stages])
    for name, value in again.items():
        if not alike(getattr(summary, name), value, ROUNDING[config.dtype]):
            raise RunFailed(
                f"{folder.summary_path}: {name}: recorded {getattr(summary, name)}, found {value}; the run was "
                "evaluated on other rows or with other software, or its summary is forged"
            )


def _evaluation_rows(folder: RunFolder, run: VerifiedRun, problem: Problem) -> tuple[Any, list[int]]:
    """A batch of what the run was evaluated on, and the clients whose data is extreme, where that is known."""
    if run.opening.federation:
        rows = evenly(problem.rows("validation"), run.config.max_eval_samples)
        return problem.batch(problem.prepare(rows), "evaluation"), []
    split = Rows.of(run.config, problem)
    agree(folder.log_path, "the rows, and which client has which", run.opening.data, split.digest)
    return split.evaluation, list(split.partition.extreme)
