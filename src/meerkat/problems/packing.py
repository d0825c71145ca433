"""Rows packed one behind another in a pass, so that nothing is padded and each sees itself alone.

A packed row is a tree: the tokens that all its sequences begin with, then the rest of each sequence, a branch. So the
prompt in front of several label strings is computed once. Only attention looks from token to token: here it is
transformers' own (`sdpa`), called once for neighbours of one shape.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
"""How many tokens a tree's branches share, then how many each has of its own; (length,) for a plain sequence."""
Groups = Sequence[tuple[int, Shape]]
"""A pack from its first token on: how many trees of one shape, then how many of the next."""

_NAME = "meerkat_packed"
"""The attention's name in transformers."""
_LAYERS = {"full_attention", "sliding_attention"}


def positions(shape: Shape) -> np.ndarray:
    """Where each token of a tree stands in its own sequence: int64 [tokens]."""
    shared, *branches = shape
    return np.concatenate([np.arange(shared), *(shared + np.arange(length) for length in branches)])


@lru_cache(maxsize=32)
def _sees(shape: Shape, window: int, device: torch.device) -> Tensor:
    """Which token of a tree (the first index) sees which: bool [tokens, tokens]."""
    branch = torch.from_numpy(np.repeat(np.arange(len(shape)), shape))
    place = torch.from_numpy(positions(shape)).int()
    behind = place[:, None] - place
    own = (branch == 0) | (branch == branch[:, None])
    return (own & (behind >= 0) & (behind < window)).to(device)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: Tensor | None,
    *,
    groups: Groups = (),
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention within each tree of a pack: [1, heads, tokens, width] -> [1, tokens, heads, width]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    outputs, start = [], 0
    for count, shape in groups or [(1, (query.shape[2],))]:
        length = sum(shape)
        end = start + count * length
        parts = [each[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1) for each in (query, key, value)]
        window = sliding_window or length
        mask = _sees(shape, window, query.device)[None, None] if len(shape) > 1 or length > window else None
        outputs.append(sdpa_attention_forward(module, *parts, mask, **settings)[0].flatten(0, 1))
        start = end
    return torch.cat(outputs)[None], None


@contextmanager
def attending_by_tree(model: nn.Module) -> Iterator[None]:
    """Within it, a model's passes are packs: given `input_ids` and `position_ids` [1, tokens], and `groups`."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attention)
    config: Any = model.config
    usual = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = usual


@torch.no_grad()
def packs(model: nn.Module) -> bool:
    """Whether a model's passes can be packs: a row must have the same logits wherever it lies in one.

    They cannot where attention is not transformers' `sdpa`, or is not told which tokens are a row's, or where another
    layer looks from token to token.
    """
    config = getattr(model, "config", None)
    layers = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "_attn_implementation", "") != "sdpa" or not layers <= _LAYERS:
        return False
    first = next(model.parameters())
    places = torch.tensor([[0, 1, 2, 0, 1, 2]], device=first.device)

    def logits(*tokens: int) -> Tensor:
        ids = torch.tensor([tokens], device=first.device)
        with attending_by_tree(model):
            found: Tensor = model(input_ids=ids, position_ids=places, groups=[(2, (3,))], use_cache=False).logits[0]
        return found.float()

    try:
        before, behind = logits(1, 2, 3, 3, 1, 2)[:3], logits(3, 1, 2, 1, 2, 3)[3:]
    except TypeError:  # the model, or its attention, takes other arguments
        return False
    rounding = 1e-4 if first.dtype == torch.float32 else 3e-2
    return bool((before - behind).abs().max() <= rounding * before.abs().max())
