"""How many entries of a mask move a model's outputs at all, by forward passes alone.

Some move none: a key's bias, in an attention layer without rotary positions, adds the same to all scores of a query,
which softmax takes away again. A mask of many such entries and a few others is a mask of a few.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from meerkat import seeds
from meerkat.algorithm.precision import weights_as
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.masks.sparse_mask import SparseMask

_PERTURBATION = 0.3
"""Of an entry, in root mean squares of its parameter: outputs change visibly, and nearly in proportion."""
_OF_ZEROS = 0.02
"""The same of a parameter that is zero throughout, as a value."""
_DEALT = 1_000_000
"""Entries that are dealt at all, evenly spread: of more, this many are plenty."""
_OPPOSITE = -0.5
"""The cosine below which two changes are opposite. By rounding alone it is near +.5: both share one term."""


def entries_that_move(mask: SparseMask, theta: Tensor, eps: float, types: Mapping[str, torch.dtype]) -> SparseMask:
    """The part of a mask that theta +- eps changes at all, once rounded to the types that a pass computes with.

    Args:
        theta: the mask's values, float32 [n].
        types: of each parameter, as `precision.types_in_passes` gives them.
    """
    entries: dict[str, Tensor | None] = {}
    parts = theta.split([count for _, count in mask.counts()])
    for (name, at), values in zip(mask.entries.items(), parts, strict=True):
        moves = ((values + eps).to(types[name]) != (values - eps).to(types[name])).cpu()
        if moves.any():
            entries[name] = moves.nonzero()[:, 0] if at is None else at[moves]
    shapes = {name: mask.shapes[name] for name in entries}
    return replace(mask, entries=entries, shapes=shapes, pretraining_gradient=None, theta_0=None)


@torch.no_grad()
def count_live(model: nn.Module, mask: SparseMask, outputs: Callable[[], Tensor], enough: int) -> int:
    """A lower bound on the entries that move the outputs, counted up to `enough`.

    Entries are dealt at random into at most 2 `enough` groups. A group is moved up and then down by the same amount: it
    has a live entry if the outputs change in opposite directions. Where they only round differently they do not, since
    both changes include the rounding of the outputs in between. Takes at most 4 `enough` + 1 evaluations, in float32.

    Args:
        model: its weights are the same afterwards; narrower ones are kept beside a float32 copy meanwhile.
        outputs: what depends on the model's present weights, [outputs]: a few dozen numbers at least.
    """
    if not mask.entries:
        return 0
    with weights_as(model, torch.float32):
        masked, count = MaskedModel(model, mask), len(mask)
        theta, dealt = masked.read(), min(count, _DEALT)
        amounts = _perturbations(masked).to(theta.device)
        order = torch.from_numpy(seeds.permutation(dealt, 0, "live entries") * (count // dealt)).to(theta.device)
        before, live = outputs().double(), 0
        try:
            for group in order.tensor_split(min(count, 2 * enough)):
                step = torch.zeros_like(theta)
                step[group] = amounts[group] / len(group) ** 0.5
                masked.write_(theta + step)
                up = outputs().double() - before
                masked.write_(theta - step)
                down = outputs().double() - before
                live += bool(torch.cosine_similarity(up, down, dim=0) < _OPPOSITE)
                if live == enough:
                    break
        finally:
            masked.write_(theta)
    return live


def _perturbations(model: MaskedModel) -> Tensor:
    """How far each entry is moved, every other one the other way: float32 [n], on the CPU."""
    sizes = []
    for parameter, (_, count) in zip(model.parameters(), model.mask.counts(), strict=True):
        scale = float(torch.linalg.vector_norm(parameter, dtype=torch.float32)) / parameter.numel() ** 0.5
        sizes.append(torch.full((count,), _PERTURBATION * scale or _OF_ZEROS))
    amounts = torch.cat(sizes)
    amounts[1::2] *= -1
    return amounts
