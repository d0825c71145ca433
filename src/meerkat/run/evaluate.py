"""The model that a run made: verified, loaded and evaluated."""

from pathlib import Path

import torch

from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.problems.problem import Evaluation, Problem, Split
from meerkat.progress import say
from meerkat.record.run_folder import RunFolder
from meerkat.record.verification import VerifiedRun, verify
from meerkat.run.mask import check_model
from meerkat.run.setup import open_problem


def load_run(root: Path) -> tuple[VerifiedRun, Problem]:
    """A verified run, and its problem with the run's theta in the model."""
    run = verify(root)
    config = run.config
    if config.device != "cpu" and not torch.cuda.is_available():
        say(f"note: the run was made on {config.device}, which is not here; its model is loaded on the CPU")
        config = config.model_copy(update={"device": "cpu"})
    problem = open_problem(config)
    check_model(RunFolder(root), run.mask, config, problem)
    model = MaskedModel(problem.model, run.mask)
    model.write_(run.theta.to(model.device))
    return run, problem


def evaluate(root: Path, split: Split = "validation") -> Evaluation:
    """How a run's model does on one split of its problem's rows."""
    _, problem = load_run(root)
    return problem.evaluate(problem.batch(problem.prepare(problem.rows(split)), "evaluation"))
