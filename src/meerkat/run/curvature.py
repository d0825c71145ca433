"""The learning rates of a run that names none: measured once, when the run begins, on public data alone."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from meerkat.algorithm.curvature import Curvature, curvature
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.errors import DAMAGE, MeerkatError
from meerkat.masks.sensitivity import entry_gradients
from meerkat.masks.sparse_mask import CURVATURE, SparseMask
from meerkat.problems.data import Row
from meerkat.problems.problem import Problem
from meerkat.progress import track
from meerkat.run.precision import for_gradients
from meerkat.settings.auto import AUTO
from meerkat.settings.config import RunConfig

_ROWS = 64
"""Public rows that are read, at most: by them the rate is within some five percent of that by all."""

_LONGEST = 10
"""Steps are at most so many times as long as theta: beyond, curvature at the start says nothing."""

_SHARE_OF_SLOPE = 0.25
"""Adam's rate counts on scalars of this share of a row's slope: a batch's rows agree in part only."""


def with_rates(config: RunConfig, problem: Problem, mask: SparseMask) -> tuple[RunConfig, SparseMask]:
    """The settings with learning rates, eta and Adam's eta_s; and the mask, which says what they were chosen by.

    Args:
        config: resolved settings.
        problem: its model's weights are as the checkpoint has them.

    Raises:
        MeerkatError: a rate is to be measured on public data, and there is none, or the mask moves nothing there.
    """
    open_rates = [name for name in ("lr", "server_lr") if getattr(config, name) == AUTO]
    if not open_rates:
        return config, _without_foreign_curvature(config, problem, mask)
    public, numbers = problem.public(), _numbers_for(open_rates)
    if public is None or not public.rows:
        raise MeerkatError(
            f"{open_rates[0]} auto: is measured on public text, and there is none; give --text, or {numbers}"
        )
    known, mask = _measured(config, problem, mask, public.rows[:_ROWS])
    if not known.trace > 0:
        raise MeerkatError(
            f"{open_rates[0]} auto: the mask's entries do not move the task's loss on public text; give {numbers}"
        )
    measured = {"lr": _rate, "server_lr": _adam_rate}
    rates = {name: float(f"{measured[name](config, problem, mask, known):.1e}") for name in open_rates}
    return config.model_copy(update=rates), mask


def _numbers_for(names: Sequence[str]) -> str:
    flags = " and ".join("--" + name.replace("_", "-") for name in names)
    return f"{flags} a number" if len(names) == 1 else f"numbers for {flags}"


def _rate(config: RunConfig, problem: Problem, mask: SparseMask, known: Curvature) -> float:
    fastest = known.rate(config.directions) if config.recipe.sends_scalars else known.rate_of_gradients
    rate = config.recipe.share_of_fastest * fastest
    if config.recipe.sends_scalars and (theta := MaskedModel(problem.model, mask).read()).any():
        rate = min(rate, _LONGEST * known.longest_rate(theta))
    return rate


def _adam_rate(config: RunConfig, _: Problem, mask: SparseMask, known: Curvature) -> float:
    if not config.recipe.sends_scalars:
        return _SHARE_OF_SLOPE * known.adam_rate_of_gradients(config.local_steps, len(mask))
    share = min(_SHARE_OF_SLOPE, _longest_scalar(config) / known.slope)
    return share * known.adam_rate(config.local_steps, config.directions)


def _longest_scalar(config: RunConfig) -> float:
    """What scalars are clipped to: Adam's steps must not undo that."""
    of_a_step = math.sqrt(config.directions)
    of_a_reply = of_a_step * math.sqrt(config.local_steps)
    limits = {"example": config.dp_clip / of_a_step, "client": config.dp_clip / of_a_reply, "none": math.inf}
    fixed = config.clip_norm / of_a_reply if config.clipping == "fixed" else math.inf
    return min(limits[config.dp], fixed)


def _measured(
    config: RunConfig, problem: Problem, mask: SparseMask, rows: Sequence[Row]
) -> tuple[Curvature, SparseMask]:
    """The curvature on public rows, and the mask with it; one that was measured alike is taken as it is."""
    examples, of = _candidates(config, problem, rows)
    if (before := _measured_before(mask, of)) is not None:
        return before, mask
    with for_gradients(problem.model):
        known = curvature(_gradients(problem, mask, examples), len(rows))
    fact = {"of": of, "trace": known.trace, "largest": known.largest}
    return known, replace(mask, facts={**mask.facts, CURVATURE: json.dumps(fact)})


def _candidates(config: RunConfig, problem: Problem, rows: Sequence[Row]) -> tuple[list[list[Any]], list[str]]:
    """Each public row with each label, prepared, and what tells that from others."""
    candidates = [[{**row, "label": label} for label in range(len(problem.labels))] or [dict(row)] for row in rows]
    examples = [problem.prepare(alike) for alike in candidates]
    return examples, [problem.digest([example for alike in examples for example in alike]), config.objective]


def _without_foreign_curvature(config: RunConfig, problem: Problem, mask: SparseMask) -> SparseMask:
    """A mask that says nothing of the curvature on other rows than this problem's."""
    if CURVATURE not in mask.facts:
        return mask
    public = problem.public()
    if public is not None and _measured_before(mask, _candidates(config, problem, public.rows[:_ROWS])[1]) is not None:
        return mask
    return replace(mask, facts={name: fact for name, fact in mask.facts.items() if name != CURVATURE})


def _measured_before(mask: SparseMask, of: Sequence[str]) -> Curvature | None:
    """What a mask says of its curvature where it was measured alike; None where it says nothing that can be."""
    try:
        fact = json.loads(mask.facts[CURVATURE])
        known = Curvature(float(fact["trace"]), float(fact["largest"]))
        return known if fact["of"] == of and math.inf > known.trace and known.trace >= known.largest > 0 else None
    except DAMAGE:
        return None


def _gradients(problem: Problem, mask: SparseMask, examples: Sequence[Sequence[Any]]) -> Iterator[Tensor]:
    """Gradients g with sum g g' = H of each row: float32 [n], C - 1 for C candidates.

    With scores s = -l, a row's H is grad s' A grad s, where A = I / C - 1 1' / C^2, and each root of A gives one g.
    """
    roots = _roots(len(examples[0]))

    def mixed(root: Tensor, batch: Any) -> Tensor:
        losses = problem.row_losses(batch)
        return root.to(losses.device) @ losses

    def values() -> Iterator[Callable[[], Tensor]]:
        for alike in track(examples, "curvature"):
            batch = problem.batch(alike, "gradient")
            for root in roots:
                yield partial(mixed, root, batch)

    yield from entry_gradients(problem.model, mask, values())


def _roots(candidates: int) -> Tensor:
    """Rows r with sum r r' = I / C - 1 1' / C^2: float32 [C - 1, C], Helmert's contrasts; of a single candidate 1."""
    if candidates == 1:
        return torch.ones(1, 1)
    rows = torch.ones(candidates - 1, candidates).tril()
    last = torch.arange(1, candidates, dtype=torch.float32)
    rows[torch.arange(candidates - 1), torch.arange(1, candidates)] = -last
    return rows / (last * (last + 1) * candidates).sqrt()[:, None]
