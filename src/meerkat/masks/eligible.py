"""Which parameters a mask may choose from, and how many it takes."""

import math
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from meerkat.errors import MeerkatError
from meerkat.masks.kinds import Exclusion, Scope
from meerkat.masks.top_entries import top_entries


def check_density(density: float) -> None:
    """Raise MeerkatError unless 0 < density <= 1."""
    if not 0 < density <= 1:
        raise MeerkatError(f"density {density:g}: must be above 0 and at most 1; the paper's is 1e-3")


def eligible_parameters(model: nn.Module, exclude: Collection[Exclusion] = ()) -> dict[str, nn.Parameter]:
    """The parameters that may move, by name, tied ones once.

    "embeddings" excludes the weights of every nn.Embedding and of the output head; "norms" those of every
    module with "norm" in its class name.

    Raises:
        MeerkatError: nothing is left.
    """
    excluded: set[int] = set()
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    for module in model.modules():
        is_embedding = isinstance(module, nn.Embedding) or module is head
        is_norm = "norm" in type(module).__name__.lower()
        if (is_embedding and "embeddings" in exclude) or (is_norm and "norms" in exclude):
            excluded.update(id(p) for p in module.parameters(recurse=False))
    eligible = {name: p for name, p in model.named_parameters() if id(p) not in excluded}
    if not eligible:
        raise MeerkatError(f"excluding {' and '.join(exclude)} leaves no parameter; exclude less")
    return eligible


def largest(model: nn.Module, scores: Mapping[str, Tensor], density: float, scope: Scope) -> dict[str, Tensor]:
    """The entries with the largest absolute scores, by parameter: flat indices, int64, ascending.

    Args:
        scores: of the eligible parameters, each of its parameter's shape.
        scope: "global" takes ceil(u d) of them all, where d counts the whole model and u d is rounded as float64 is;
            "per-tensor" takes the share u of each.
    """
    if scope == "global":
        total = sum(p.numel() for p in model.parameters())
        return top_entries(scores, min(math.ceil(density * total), sum(p.numel() for p in scores.values())))
    entries: dict[str, Tensor] = {}
    for name, tensor in scores.items():
        entries |= top_entries({name: tensor}, math.ceil(density * tensor.numel()))
    return entries
