"""The largest entries of a model, without sorting all d of them.

Non-negative floats order as their bit patterns do, so the n-th largest is found exactly by counting the patterns'
upper, then their lower 16 bits.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from meerkat.errors import MeerkatError

_CHUNK = 1 << 22
"""Entries taken together, so that counting needs little memory beside the tensors."""
_BINS = 1 << 16
_INFINITY = 0x7F800000


def top_entries(tensors: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    """The n entries of largest absolute value: flat indices (int64, ascending) for each tensor that has any.

    Ties go to the earlier entry.

    Raises:
        MeerkatError: a value is not finite.
    """

    def counts(select: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros(_BINS, dtype=torch.int64)
        for name, tensor in tensors.items():
            for bits in _patterns(name, tensor):
                total += torch.bincount(select(bits), minlength=_BINS).cpu()
        return total

    upper, remaining = _bin_of_nth(counts(lambda bits: bits >> 16), n)
    lower, ties = _bin_of_nth(counts(lambda bits: bits[bits >> 16 == upper] & 0xFFFF), remaining)
    threshold = upper << 16 | lower

    chosen: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts, offset = [], 0
        for bits in _patterns(name, tensor):
            keep = bits > threshold
            equal = (bits == threshold).nonzero().reshape(-1)[:ties]
            keep[equal] = True
            ties -= len(equal)
            parts.append(keep.nonzero().reshape(-1).cpu() + offset)
            offset += len(bits)
        if len(indices := torch.cat(parts)):
            chosen[name] = indices
    return chosen


def concentration(scores: Mapping[str, Tensor]) -> list[tuple[float, float]]:
    """The share of the sum of all scores that the largest ones make up: pairs (share of entries, share of the sum).

    31 shares of entries, from 1e-5 to 1. Scores are binned by their upper 16 bits, which is exact to one part in 128.
    Empty where all scores are zero.
    """
    counts, sums = torch.zeros(_BINS, dtype=torch.float64), torch.zeros(_BINS, dtype=torch.float64)
    for name, tensor in scores.items():
        for bits in _patterns(name, tensor):
            values, bins = bits.view(torch.float32).cpu().double(), bits.cpu() >> 16
            counts += torch.bincount(bins, minlength=_BINS)
            sums += torch.bincount(bins, weights=values, minlength=_BINS)
    entries, sum_of_largest = counts.flip(0).cumsum(0).numpy(), sums.flip(0).cumsum(0).numpy()
    if not sum_of_largest[-1]:
        return []
    shares = np.logspace(-5, 0, 31)
    parts = np.interp(shares, entries / entries[-1], sum_of_largest / sum_of_largest[-1])
    return [(float(f"{share:.3g}"), round(float(part), 5)) for share, part in zip(shares, parts, strict=True)]


def _patterns(name: str, tensor: Tensor) -> Iterator[Tensor]:
    """The bit patterns of a tensor's absolute values, int32, a few million at a time."""
    for chunk in tensor.detach().reshape(-1).split(_CHUNK):
        bits = chunk.abs().float().view(torch.int32)
        if len(bits) and bits.max() >= _INFINITY:
            raise MeerkatError(f"the scores of '{name}' are not all finite; check the model's weights")
        yield bits


def _bin_of_nth(counts: Tensor, n: int) -> tuple[int, int]:
    """The bin that holds the n-th largest, and how many of the n largest lie in it."""
    at_least = counts.flip(0).cumsum(0).flip(0)
    chosen = int((at_least >= n).nonzero().max())
    return chosen, n - int(at_least[chosen] - counts[chosen])
