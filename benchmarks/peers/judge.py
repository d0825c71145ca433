"""The rows and the evaluation that all peers' programs are given, and the line that is kept of each run."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meerkat.problems.data import Row
from meerkat.run.setup import open_problem, resolve
from meerkat.run.split import training_and_evaluation_rows
from meerkat.settings.config import make_config


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """The arguments that all programs take."""
    made = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("checkout", type=Path)
    made.add_argument("--model", required=True)
    made.add_argument("--data", required=True)
    made.add_argument("--lr", type=float, required=True)
    made.add_argument("--mu", type=float, default=1e-3, help="size of a perturbation [default: %(default)s]")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--held-back", type=float, default=0.0, help="share of the training rows to judge on")
    made.add_argument("--max-eval-samples", type=int, default=300)
    return made


class Judge:
    """A model folder and rows of SST-2 as Meerkat's runs have them."""

    def __init__(self, given: argparse.Namespace) -> None:
        settings = {"model": given.model, "data": given.data, "task": "sst2", "method": "full-fedzo", "threads": 1}
        settings |= {name: getattr(given, name) for name in ("held_back", "max_eval_samples", "seed")}
        config = resolve(make_config(settings))
        self.given, self.problem = given, open_problem(config)
        self.training: Sequence[Row]
        self.training, evaluated = training_and_evaluation_rows(config, self.problem.rows)
        self._batch = self.problem.batch(self.problem.prepare(evaluated), "evaluation")
        self._before = self.problem.evaluate(self._batch).scores

    def line(self, program: str, **facts: Any) -> str:
        """A run that is over, as JSON: its settings, what it says of itself, and the scores of `problem`'s weights."""
        settings = {name: getattr(self.given, name) for name in ("lr", "mu", "seed", "held_back")}
        scores = {"before": self._before, "scores": self.problem.evaluate(self._batch).scores}
        return json.dumps({"program": program, "model": Path(self.given.model).name, **settings, **facts, **scores})
