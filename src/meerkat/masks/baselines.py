"""The baselines' masks: every parameter, the largest weights, a random choice (method, section 8)."""

import math
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor, nn

from meerkat import seeds
from meerkat.masks.eligible import check_density, eligible_parameters, largest
from meerkat.masks.kinds import Exclusion, Scope
from meerkat.masks.sparse_mask import SparseMask


def full_mask(model: nn.Module, *, exclude: Collection[Exclusion] = ()) -> SparseMask:
    """Every parameter moves (baseline "full-FedZO"): no index is stored."""
    entries = dict.fromkeys(eligible_parameters(model, exclude))
    return SparseMask.of(model, entries, "full", facts={"excluded": ",".join(exclude)})


def magnitude_mask(
    model: nn.Module, density: float = 1e-3, *, scope: Scope = "global", exclude: Collection[Exclusion] = ()
) -> SparseMask:
    """The n = ceil(u d) parameters with the largest absolute value (baseline "weight magnitude")."""
    check_density(density)
    entries = largest(model, eligible_parameters(model, exclude), density, scope)
    return SparseMask.of(model, entries, "magnitude", density, {"scope": scope, "excluded": ",".join(exclude)})


def random_mask(
    model: nn.Module,
    density: float = 1e-3,
    seed: int = 0,
    *,
    scope: Scope = "global",
    exclude: Collection[Exclusion] = (),
) -> SparseMask:
    """n = ceil(u d) parameters drawn at random without replacement (baseline "random mask")."""
    check_density(density)
    sizes = {name: p.numel() for name, p in eligible_parameters(model, exclude).items()}

    def draw(index: int, count: int, size: int) -> np.ndarray:
        rng = seeds.generator(seed, "random mask", index)
        return np.sort(rng.choice(size, min(count, size), replace=False, shuffle=False))

    entries: dict[str, Tensor] = {}
    if scope == "global":
        total = sum(p.numel() for p in model.parameters())
        drawn = draw(0, math.ceil(density * total), sum(sizes.values()))
        ends = np.cumsum([0, *sizes.values()])
        for name, first, last in zip(sizes, ends[:-1], ends[1:], strict=True):
            inside = drawn[np.searchsorted(drawn, first) : np.searchsorted(drawn, last)] - first
            if len(inside):
                entries[name] = torch.from_numpy(inside)
    else:
        for index, (name, size) in enumerate(sizes.items(), 1):
            entries[name] = torch.from_numpy(draw(index, math.ceil(density * size), size))
    facts = {"scope": scope, "excluded": ",".join(exclude), "seed": str(seed)}
    return SparseMask.of(model, entries, "random", density, facts)
