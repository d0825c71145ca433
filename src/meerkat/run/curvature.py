"""What a run learns of its task's curvature from public data: the subspace of its directions, and its learning rate.

Both are settled once, when a run begins. No client's row is used.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from meerkat.algorithm.curvature import RANK, Curvature, curvature
from meerkat.errors import MeerkatError
from meerkat.masks.sensitivity import entry_gradients
from meerkat.masks.sparse_mask import CURVATURE, SparseMask
from meerkat.problems.data import Row
from meerkat.problems.problem import Problem
from meerkat.progress import track
from meerkat.run.precision import for_gradients
from meerkat.settings.algorithm import estimator
from meerkat.settings.auto import AUTO
from meerkat.settings.config import RunConfig


def with_curvature(config: RunConfig, problem: Problem, mask: SparseMask) -> tuple[RunConfig, SparseMask]:
    """The settings with a learning rate; and the mask, with a subspace where the estimator needs one.

    Args:
        config: resolved settings.
        problem: its model's weights are as the checkpoint has them.

    Raises:
        MeerkatError: something is to be measured on public data, and there is none.
    """
    within = estimator(config).subspace
    if not within:
        mask = replace(mask, subspace=None)
        if config.lr != AUTO:
            return config, mask
    public = problem.public()
    if public is None or not public.rows:
        asked, cure = ("estimator subspace", "use plain") if within else ("lr auto", "give a number")
        raise MeerkatError(f"{asked}: is measured on public text, put through the task, and there is none; {cure}")
    if within and (most := len(public.rows) * max(len(problem.labels) - 1, 1)) < RANK:
        raise MeerkatError(
            f"estimator subspace: takes {RANK} directions, and public text gives {most}; give more --text, or use plain"
        )
    known, mask = _measured(problem, mask, public.rows, within)
    if config.lr == AUTO:
        rate = config.recipe.lr_times_curvature / known.along(mask.subspace)
        config = config.model_copy(update={"lr": float(f"{rate:.1e}")})
    return config, mask


def _measured(problem: Problem, mask: SparseMask, rows: Sequence[Row], within: bool) -> tuple[Curvature, SparseMask]:
    """The curvature on public rows, and the mask with it; a mask that has both from the same rows is taken as it is."""
    candidates = [[{**row, "label": label} for label in range(len(problem.labels))] or [dict(row)] for row in rows]
    examples = [problem.prepare(alike) for alike in candidates]
    of = problem.digest([example for alike in examples for example in alike])
    fact: dict[str, Any] = json.loads(mask.facts.get(CURVATURE, "{}"))
    if fact.get("of") == of and (mask.subspace is not None or not within):
        return Curvature(fact["trace"], torch.tensor(fact["eigenvalues"], dtype=torch.float64), torch.zeros(0, 0)), mask
    with for_gradients(problem.model):
        known = curvature(_gradients(problem, mask, examples), len(rows), keep=within)
    if not known.trace > 0:
        raise MeerkatError("lr auto: the task's loss does not depend on the mask's entries; give --lr a number")
    subspace = known.subspace() if within else None
    fact = {"of": of, "trace": known.trace, "eigenvalues": known.eigenvalues[:RANK].tolist()}
    return known, replace(mask, subspace=subspace, facts={**mask.facts, CURVATURE: json.dumps(fact)})


def _gradients(problem: Problem, mask: SparseMask, examples: Sequence[Sequence[Any]]) -> Iterator[Tensor]:
    """Gradients g with sum g g' = H of each row: float32 [n], C - 1 for C candidates.

    With scores s = -l, a row's H is grad s' A grad s, where A = I / C - 1 1' / C^2, and each root of A gives one g.
    """
    roots = _roots(len(examples[0]))

    def values() -> Iterator[Callable[[], Tensor]]:
        for alike in track(examples, "curvature"):
            batch = problem.batch(alike, "gradient")
            for root in roots:
                yield partial(mixed, root, batch)

    def mixed(root: Tensor, batch: Any) -> Tensor:
        losses = problem.row_losses(batch)
        return root.to(losses.device) @ losses

    yield from entry_gradients(problem.model, mask, values())


def _roots(candidates: int) -> Tensor:
    """Rows r with sum r r' = I / C - 1 1' / C^2: float32 [C - 1, C], Helmert's contrasts; of a single candidate 1."""
    if candidates == 1:
        return torch.ones(1, 1)
    rows = torch.ones(candidates - 1, candidates).tril()
    last = torch.arange(1, candidates, dtype=torch.float32)
    rows[torch.arange(candidates - 1), torch.arange(1, candidates)] = -last
    return rows / (last * (last + 1) * candidates).sqrt()[:, None]
