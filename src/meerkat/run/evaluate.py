"""The model that a run made: verified, loaded and judged."""

from pathlib import Path

import torch

from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.problems import causal_lm
from meerkat.progress import say
from meerkat.record.run_folder import RunFolder
from meerkat.record.verification import VerifiedRun, verify
from meerkat.run.setup import Workplace, check_model, load_split, open_workplace


def load_run(root: Path) -> tuple[VerifiedRun, Workplace]:
    """A verified run, and its model with the run's theta in it."""
    replayed = verify(root)
    config = replayed.config
    if config.device != "cpu" and not torch.cuda.is_available():
        say(f"note: the run was made on {config.device}, which is not here; its model is judged on the CPU")
        config = config.model_copy(update={"device": "cpu"})
    workplace = open_workplace(config)
    check_model(RunFolder(root), replayed.mask, workplace)
    MaskedModel(workplace.model, replayed.mask).write_(replayed.theta.to(workplace.device))
    return replayed, workplace


def evaluate(root: Path, split: str = "validation") -> causal_lm.Evaluation:
    """Judge a run's model on one split of its data."""
    replayed, workplace = load_run(root)
    examples = workplace.examples(load_split(replayed.config, workplace.task, split))
    return causal_lm.evaluate(workplace.model, workplace.evaluation_batch(examples), workplace.task.labels)
