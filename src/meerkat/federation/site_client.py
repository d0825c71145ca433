"""The client that a site is: model, mask and rows, loaded once, and what it computes with them.

The functions are those of a simulation's clients, so that both have the same bits.
"""

import hashlib
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meerkat.algorithm import path
from meerkat.algorithm.client import local_steps
from meerkat.algorithm.live_entries import entries_that_move
from meerkat.algorithm.precision import DTYPES, types_in_passes
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.zeroth_order import Loss, MaskedModel
from meerkat.errors import MeerkatError
from meerkat.extensions import load
from meerkat.federation.offer import Offer
from meerkat.federation.private_rows import prepare_alone
from meerkat.federation.site_settings import SiteConfig, details_in_own_log
from meerkat.privacy.mechanism import Mechanism
from meerkat.problems import causal_lm
from meerkat.problems.classification import Classification
from meerkat.problems.partition import ClientRows
from meerkat.problems.problem import Problem, Split, client_losses, primary
from meerkat.run.precision import cast_model, quantise_model
from meerkat.run.setup import open_problem, resolve_machine
from meerkat.settings.algorithm import directions, estimator, rules
from meerkat.settings.auto import number
from meerkat.settings.config import CLASSIFICATION

_PUBLIC_EXAMPLES = 64
"""Public examples whose losses show whether an entry moves any."""


class SiteClient:
    """One client of one run, on its site."""

    def __init__(self, offer: Offer, settings: SiteConfig, goes_on: bool = False) -> None:
        """Load everything that the run needs.

        Args:
            goes_on: whether the offer's mask was tried before: that takes a few hundred forward passes.

        Raises:
            Refused: the site has not agreed to what is offered; no row was read.
            MeerkatError: model or data cannot be read, or are not the run's.
        """
        load(settings.accepts.extensions, installed=False)
        asked = offer.config({"model": settings.model, "data": settings.data, "device": settings.device})
        task = offer.load_task() if asked.problem == CLASSIFICATION else None
        settings.check_settings(asked, task.name if task else asked.problem)
        if task is not None:
            settings.check_task(task, built_in=not offer.task_text)
        self.number = settings.client
        resolved = resolve_machine(asked.model_copy(update={"task": ""}))  # a task's name is no path here
        threads = min(number(resolved.threads), os.cpu_count() or 1)  # far more of them than CPUs take far longer
        self.config = resolved.model_copy(update={"task": asked.task, "threads": threads})
        with details_in_own_log("the site's model cannot be loaded"):
            self._problem = open_problem(self.config, task)
        self.mask = offer.load_mask()
        self.mask.check_fits(self._problem.model)
        settings.check_mask(self.mask, self._problem.model)
        quantise_model(self.config, self._problem, self.mask)
        self.theta_0 = MaskedModel(self._problem.model, self.mask).read()
        if not goes_on and not settings.accepts.mask:  # one that the operator pinned is one they looked at
            model = self._problem.model
            dtype = DTYPES[self.config.dtype]  # quantised layers multiply in it, and their weights are no parameters
            types = dict.fromkeys(self.mask.entries, dtype) | types_in_passes(model, dtype)
            moving = entries_that_move(self.mask, self.theta_0, number(self.config.eps), types)
            settings.check_live_entries(self.mask, moving, model, _public_outputs(self._problem))
        if path.digest(self.theta_0) != offer.theta:
            raise MeerkatError(
                f"model '{settings.model}': its values at the mask are not the coordinator's; use the same model"
            )
        self._model = cast_model(self.config, self._problem, self.mask)
        self.rules = rules(self.config)
        self.directions = directions(self.config, len(self.mask), self.theta_0.device)
        private = self.config.dp == "example"
        examples = self._examples(settings.data, "train", private)
        self.rows = ClientRows(self.number, np.arange(len(examples)), self.config.batch_size, self.config.seed)
        self._is_fit = np.array([example is not None for example in examples])
        fit = [example for example in examples if example is not None]
        self.rows_digest = hashlib.sha256(self._is_fit.tobytes() + self._problem.digest(fit).encode()).digest()
        """SHA-256 of the rows as the model sees them; it stays on the site."""
        self.files_digest = _digest_of_files(Path(settings.data))
        """SHA-256 of the files that they are in, hexadecimal."""
        self._losses_of = client_losses(self._problem, examples, self.config.dp)
        self.evaluates = settings.evaluate and self.config.dp == "none"  # a score is exact: no noise covers it
        self._validation: Any = None
        if self.evaluates:
            self._validation = self._problem.batch(self._examples(settings.data, "validation"), "evaluation")

    def _examples(self, data: str, split: Split, private: bool = False) -> list[Any]:
        """The site's rows as the model sees them; with `private`, None for one that is unfit.

        Whatever is wrong with rows, the coordinator hears the same words.
        """
        with details_in_own_log("the site's rows are not fit for the run", Exception):
            if not (data and Path(data).is_dir()):
                raise MeerkatError(f"data '{data}': no such folder; a site's rows are its own, not the hub's")
            return prepare_alone(self._problem) if private else self._problem.prepare(self._problem.rows(split))

    def steps(self, replica: Replica, plan: RoundPlan, pointer: int, private: Mechanism | None) -> np.ndarray:
        """A plan's steps from a replica's theta: scalars, float32 [T_k, P].

        Args:
            pointer: steps that the client made before.
            private: makes the scalars noisy, under example-level privacy.

        Raises:
            Diverged: a loss is not finite.
        """
        reply, _ = local_steps(
            self._model,
            replica.theta,
            plan,
            self.number,
            self._batch_losses(pointer, private),
            self.directions,
            estimator=estimator(self.config),
            rule=self.rules.client,
            h=replica.h,
            private=private,
        )
        return reply.scalars

    def _batch_losses(self, pointer: int, private: Mechanism | None) -> Callable[[int], Loss]:
        def batch_loss(step: int) -> Loss:
            if private:
                sampled = private.sample(self.rows.rows)
                return self._losses_of([sampled[self._is_fit[sampled]]])
            losses = self._losses_of([self.rows.batch(pointer + step)])
            return lambda: losses()[0]

        return batch_loss

    def evaluate(self, replica: Replica) -> tuple[str, float, int]:
        """The primary score's name, its value at a replica's theta, and the number of validation rows."""
        with torch.no_grad():
            self._model.write_(replica.theta)
        evaluation, score = self._problem.evaluate(self._validation), primary(self._problem.scores)
        return score, evaluation.scores[score], evaluation.rows


def _digest_of_files(folder: Path) -> str:
    """SHA-256 of the files of training rows in a folder, hexadecimal, whatever a run's task makes of them."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*train*")):
        if file.is_file():
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _public_outputs(problem: Problem) -> Callable[[], Tensor] | None:
    """What a problem's model gives at its present weights on inputs that anyone may know; None where there are none."""
    if isinstance(problem, Classification):
        return causal_lm.public_logits(problem.model)
    if (public := problem.public()) is None:
        return None
    examples = list(islice(public.examples, _PUBLIC_EXAMPLES))
    return lambda: torch.stack([public.loss(example) for example in examples])
