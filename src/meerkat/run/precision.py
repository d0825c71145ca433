"""How precisely a run computes: the type of its weights, and the size of its perturbations.

Both are settled once, when a run begins; whoever takes part in it later, or resumes it, follows.
"""

import json
import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from meerkat.algorithm.perturbation import SIZES, PerturbationCurve, perturbation_curve
from meerkat.algorithm.precision import DTYPES, cast_, multiplies_bfloat16, weights_as
from meerkat.algorithm.quantised import quantise_
from meerkat.algorithm.zeroth_order import Loss, MaskedModel
from meerkat.errors import DAMAGE
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
        config = config.model_copy(update={"dtype": fitting_dtype(config, problem.model)})
    if config.eps != "auto":
        return config, without_curve(mask)
    scalars = config.recipe.sends_scalars  # without them, eps is read by nobody
    eps = config.recipe.eps if config.dtype == "float32" or not scalars else _IN_HALF_PRECISION
    public = problem.public() if scalars else None
    if public is None or not public.rows:
        return config.model_copy(update={"eps": eps}), without_curve(mask)
    curve, mask = _measured(config, problem, mask, public.rows)
    return config.model_copy(update={"eps": curve.chosen(eps)}), mask


def for_gradients(model: nn.Module) -> AbstractContextManager[None]:
    """While it lasts, weights are float32; those of a large model stay as they are stored, which takes less memory."""
    return nullcontext() if is_large(model) else weights_as(model, torch.float32)


def runnable_model(config: RunConfig, problem: Problem, mask: SparseMask) -> MaskedModel:
    """A problem's model as the run has it: quantised and cast in place. Raises MeerkatError: it cannot be quantised."""
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


def fitting_dtype(config: RunConfig, model: nn.Module) -> str:
    """What `dtype` auto stands for on this machine."""
    weights = [*model.parameters()]
    large = sum(parameter.numel() for parameter in weights) >= WORTH_CASTING
    gains = config.problem == CLASSIFICATION and large and multiplies_bfloat16(weights[0].device)
    return "bfloat16" if gains else "float32"


def without_curve(mask: SparseMask) -> SparseMask:
    """A mask that says nothing of eps."""
    return replace(mask, facts={name: fact for name, fact in mask.facts.items() if name != CURVE})


def _measured(
    config: RunConfig, problem: Problem, mask: SparseMask, rows: Sequence[Row]
) -> tuple[PerturbationCurve, SparseMask]:
    """The error of g by eps on public rows, and the mask with it; one that was measured alike is taken as it is."""
    rows = rows[: _BATCHES * config.batch_size]
    name = config.dtype if config.problem == CLASSIFICATION else "float32"
    alike = [problem.digest(problem.prepare(rows)), config.objective, config.batch_size, name, config.estimator]
    if (before := _measured_before(mask, alike)) is not None:
        return before, mask
    say("measuring the size of perturbations on public data")
    batches, keep = public_batches(config, problem, mask, rows), _never_cast(config, mask)
    curve = perturbation_curve(problem.model, mask, batches, DTYPES[name], estimator(config), keep)
    fact = {"of": alike, "eps": curve.eps, "error": curve.error}
    return curve, replace(mask, facts={**mask.facts, CURVE: json.dumps(fact)})


def _measured_before(mask: SparseMask, alike: Sequence[Any]) -> PerturbationCurve | None:
    """What a mask says of the error of g where it was measured alike; None where it says nothing that can be."""
    try:
        fact = json.loads(mask.facts[CURVE])
        curve = PerturbationCurve(tuple(map(float, fact["eps"])), tuple(map(float, fact["error"])))
        return curve if fact["of"] == alike and len(curve.eps) == len(curve.error) and _finite(curve) else None
    except DAMAGE:
        return None


def _finite(curve: PerturbationCurve) -> bool:
    return all(eps in SIZES for eps in curve.eps) and all(0 <= error < math.inf for error in curve.error)


def public_batches(
    config: RunConfig, problem: Problem, mask: SparseMask, rows: Sequence[Row]
) -> list[tuple[Tensor, Loss]]:
    """Batches of public rows: their exact gradients at the moving entries, and their losses.

    They have the run's size, or all rows where there are fewer.

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
        size = min(config.batch_size, len(examples))
        batches = np.arange(_BATCHES * size).reshape(_BATCHES, size) % len(examples)
        return [(gradient_of(batch), loss_of(batch)) for batch in batches]
