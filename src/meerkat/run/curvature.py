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
from meerkat.algorithm.estimators import PLAIN, SUBSPACE, estimator
from meerkat.errors import MeerkatError
from meerkat.masks.sensitivity import entry_gradients
from meerkat.masks.sparse_mask import CURVATURE, SparseMask
from meerkat.problems.data import Row
from meerkat.problems.problem import Problem
from meerkat.progress import track
from meerkat.run.precision import for_gradients
from meerkat.settings.auto import AUTO
from meerkat.settings.compatibility import plain_because
from meerkat.settings.config import RunConfig


def with_curvature(config: RunConfig, problem: Problem, mask: SparseMask) -> tuple[RunConfig, SparseMask]:
    """The settings with an estimator and a learning rate; and the mask, with a subspace where the estimator has one.

    Args:
        config: resolved settings.
        problem: its model's weights are as the checkpoint has them.

    Raises:
        MeerkatError: something is to be measured on public data, and there is none.
    """
    public = problem.public()
    rows = public.rows if public is not None else ()
    name = config.estimator
    if name == AUTO:
        name = SUBSPACE.name if rows and len(mask) >= RANK and not plain_because(config) else PLAIN.name
    within = estimator(name).subspace
    if (within or config.lr == AUTO) and not rows:
        asked, cure = ("estimator subspace", "use plain") if within else ("lr auto", "give a number")
        raise MeerkatError(f"{asked}: is measured on public text, put through the task, and there is none; {cure}")
    if not within:
        mask = replace(mask, subspace=None)
    if within or config.lr == AUTO:
        known, mask = _measured(problem, mask, rows, within)
        if config.lr == AUTO:
            rate = config.recipe.lr_times_curvature / known.along(mask.subspace)
            config = config.model_copy(update={"lr": float(f"{rate:.1e}")})
    return config.model_copy(update={"estimator": name}), mask


def _measured(problem: Problem, mask: SparseMask, rows: Sequence[Row], within: bool) -> tuple[Curvature, SparseMask]:
    """The curvature on public rows, and the mask with it; a mask that has both from the same rows is taken as it is."""
    candidates = [[{**row, "label": label} for label in range(len(problem.labels))] or [dict(row)] for row in rows]
    examples = [problem.prepare(alike) for alike in candidates]
    of = problem.digest([example for alike in examples for example in alike])
    fact: dict[str, Any] = json.loads(mask.facts.get(CURVATURE, "{}"))
    if fact.get("of") == of and (mask.subspace is not None or not within):
        return Curvature(fact["trace"], torch.tensor(fact["eigenvalues"]), torch.zeros(0, 0)), mask
    with for_gradients(problem.model):
        known = curvature(_gradients(problem, mask, examples), len(rows), keep=within)
    if not known.trace > 0:
        raise MeerkatError("lr auto: the task's loss does not depend on the mask's entries; give --lr a number")
    subspace = known.subspace() if within else None
    fact = {"of": of, "trace": known.trace, "eigenvalues": known.eigenvalues[:RANK].tolist()}
    return known, replace(mask, subspace=subspace, facts={**mask.facts, CURVATURE: json.dumps(fact)})


def _gradients(problem: Problem, mask: SparseMask, examples: Sequence[Sequence[Any]]) -> Iterator[Tensor]:
    """Gradients g with sum g g' = sum_c p_c grad l_c grad l_c' over all rows: float32 [n], C - 1 a row.

    p is the softmax of a row's scores s = -l, and grad l_c = sum_j p_j grad s_j - grad s_c: so a row's sum is
    grad s' (diag(p) - p p') grad s, and a root of that small matrix gives one g.
    """

    def mixed(root: Tensor, batch: Any) -> Tensor:
        return root @ problem.row_losses(batch)

    def values() -> Iterator[Callable[[], Tensor]]:
        for alike in track(examples, "curvature"):
            batch = problem.batch(alike, "gradient")
            with torch.no_grad():
                shares = problem.row_losses(batch).double().neg().softmax(0)
            for root in _roots(shares):
                yield partial(mixed, root, batch)

    yield from entry_gradients(problem.model, mask, values())


def _roots(p: Tensor) -> Tensor:
    """Rows r with r'r summed = diag(p) - p p': float32 [C - 1, C]; of a single candidate, which is given, [[1]]."""
    if len(p) == 1:
        return torch.ones(1, 1, device=p.device)
    squares, vectors = torch.linalg.eigh(p.diag() - torch.outer(p, p))
    roots: Tensor = squares.clamp(min=0).sqrt()[:, None] * vectors.T
    return roots[1:].float()
