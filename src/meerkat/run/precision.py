"""How precisely a run computes: the type of its weights, and the size of its perturbations.

Both are settled once, when a run begins; whoever takes part in it later, or resumes it, follows.
"""

import json
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from meerkat.algorithm.perturbation import PerturbationCurve, perturbation_curve
from meerkat.algorithm.precision import DTYPES, cast_, multiplies_bfloat16, weights_as
from meerkat.algorithm.quantised import quantise_
from meerkat.algorithm.zeroth_order import Loss, MaskedModel
from meerkat.masks.sensitivity import is_large, pretraining_gradient
from meerkat.masks.sparse_mask import CURVE, SparseMask
from meerkat.problems.data import Row
from meerkat.problems.problem import Problem, client_losses
from meerkat.progress import say
from meerkat.settings.algorithm import estimator
from meerkat.settings.config import CLASSIFICATION, RunConfig

WORTH_CASTING = 5_000_000
"""Parameters from which on bfloat16 is worth it: passes take .57 of the time at 5.8 million, .77 at half a million."""

_BATCHES = 2
"""Batches that eps is measured on."""
_IN_HALF_PRECISION = 3e-3
"""The usual eps where weights are rounded to half precision."""


def with_precision(config: RunConfig, problem: Problem, mask: SparseMask) -> tuple[RunConfig, SparseMask]:
    """The settings with the weights' type and eps; and the mask, which says how eps was measured, if it was.

    Args:
        config: resolved settings.
        problem: its model's weights are as the checkpoint has them.
    """
    if config.dtype == "auto":
        config = config.model_copy(update={"dtype": _fitting_dtype(config, problem.model)})
    facts = {name: fact for name, fact in mask.facts.items() if name != CURVE}
    eps = config.eps
    if eps == "auto":
        eps = config.recipe.eps if config.dtype == "float32" else _IN_HALF_PRECISION
        curve = _measured(config, problem, mask) if config.recipe.sends_scalars else None
        if curve is not None and curve.eps:
            eps, facts[CURVE] = curve.chosen(eps), json.dumps([curve.eps, curve.error])
    return config.model_copy(update={"eps": eps}), replace(mask, facts=facts)


def for_gradients(model: nn.Module) -> AbstractContextManager[None]:
    """While it lasts, weights are float32; those of a large model stay as they are stored, which takes less memory."""
    return nullcontext() if is_large(model) else weights_as(model, torch.float32)


def runnable_model(config: RunConfig, problem: Problem, mask: SparseMask) -> MaskedModel:
    """A problem's model as the run computes with it: quantised and cast, in place.

    Raises:
        MeerkatError: it cannot be quantised.
    """
    quantise_model(config, problem, mask)
    return cast_model(config, problem, mask)


def quantise_model(config: RunConfig, problem: Problem, mask: SparseMask) -> None:
    """Freeze a problem's model in few bits, in place, where the settings say so. Raises MeerkatError: it cannot be."""
    if config.quantize != "none":
        quantise_(problem.model, mask, config.quantize)


def cast_model(config: RunConfig, problem: Problem, mask: SparseMask) -> MaskedModel:
    """A problem's model, cast in place to what the run computes with.

    Adapters are stored in float32, as PEFT has it, and a problem that is not built in makes its own model.
    """
    if config.problem == CLASSIFICATION:
        cast_(problem.model, DTYPES[config.dtype], _never_cast(config, mask))
    return MaskedModel(problem.model, mask)


def _never_cast(config: RunConfig, mask: SparseMask) -> Collection[str]:
    return mask.entries.keys() if config.recipe.moves == "lora" else ()


def _fitting_dtype(config: RunConfig, model: nn.Module) -> str:
    weights = [*model.parameters()]
    large = sum(parameter.numel() for parameter in weights) >= WORTH_CASTING
    gains = config.problem == CLASSIFICATION and large and multiplies_bfloat16(weights[0].device)
    return "bfloat16" if gains else "float32"


def _measured(config: RunConfig, problem: Problem, mask: SparseMask) -> PerturbationCurve | None:
    """The error of g by eps on public data; None where there is none."""
    public = problem.public()
    if public is None or not public.rows:
        return None
    say("measuring the size of perturbations on public data")
    batches = public_batches(config, problem, mask, public.rows)
    dtype = DTYPES[config.dtype if config.problem == CLASSIFICATION else "float32"]
    return perturbation_curve(problem.model, mask, batches, dtype, estimator(config), _never_cast(config, mask))


def public_batches(
    config: RunConfig, problem: Problem, mask: SparseMask, rows: Sequence[Row]
) -> list[tuple[Tensor, Loss]]:
    """Batches of the run's size of public rows: their exact gradients at the moving entries, and their losses.

    Gradients, float32 [n], are of the weights as they are (see `for_gradients`); losses, float64 [], of what they
    become later.
    """
    examples = problem.prepare(rows)
    losses_of = client_losses(problem, examples, config.dp)

    def loss_of(batch: np.ndarray) -> Loss:
        losses = losses_of([batch])
        return lambda: losses().mean()

    def loss_of_example(example: Any) -> Tensor:
        return problem.row_losses(problem.batch([example], "gradient"))[0]

    def gradient_of(batch: np.ndarray) -> Tensor:
        return pretraining_gradient(problem.model, mask, [examples[row] for row in batch], loss_of_example)

    with for_gradients(problem.model):
        batches = np.arange(_BATCHES * config.batch_size).reshape(_BATCHES, -1) % len(examples)
        return [(gradient_of(batch), loss_of(batch)) for batch in batches]
