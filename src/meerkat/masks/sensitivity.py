"""Choosing the mask: the most sensitive parameters, and the baselines' choices (method, section 2).

`sensitivity_mask` ranks every parameter by its mean squared gradient on pre-training text, the
empirical Fisher diagonal, and keeps the n = ceil(u d) largest.

Nothing here holds a second copy of the model or sorts all d scores: gradients are consumed tensor by
tensor while backpropagation runs, and the n-th largest score is found by counting bit patterns.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from meerkat import seeds
from meerkat.errors import MeerkatError
from meerkat.masks.kinds import Exclusion, Kind, Scope
from meerkat.masks.sparse_mask import SparseMask, fingerprint

_CHUNK = 1 << 22
"""Entries looked at together, so that counting needs little memory beside the tensors."""


# --- which scores are the n largest --------------------------------------------------------------


def check_density(density: float) -> None:
    """Raise MeerkatError unless 0 < density <= 1."""
    if not 0 < density <= 1:
        raise MeerkatError(f"density {density:g}: must be above 0 and at most 1; the paper's is 1e-3")


def top_entries(
    tensors: Mapping[str, Tensor], n: int, score: Callable[[Tensor], Tensor] = torch.abs
) -> dict[str, Tensor]:
    """The n entries with the largest scores: flat indices (int64, ascending) for each tensor that has any.

    `score` turns entries into non-negative scores, a few million at a time. Ties go to the earlier
    entry. Non-negative floats order as their bit patterns do, so the n-th largest is found exactly by
    counting the patterns' upper, then their lower 16 bits.

    Raises:
        MeerkatError: a score is negative or not finite.
    """

    def patterns(name: str) -> Iterator[Tensor]:
        for chunk in tensors[name].detach().reshape(-1).split(_CHUNK):
            # + 0.0 turns a negative zero, whose pattern is negative, into zero
            bits = (score(chunk).float() + 0.0).view(torch.int32)
            if bits.numel() and (bits.min() < 0 or bits.max() >= 0x7F800000):
                raise MeerkatError(f"the scores of '{name}' are not all finite and non-negative: is the model sound?")
            yield bits

    def counted(select: Callable[[Tensor], Tensor]) -> Tensor:
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for name in tensors:
            for bits in patterns(name):
                counts += torch.bincount(select(bits), minlength=1 << 16).cpu()
        return counts

    def cut(counts: Tensor, wanted: int) -> tuple[int, int]:
        """The bin that the wanted-th largest falls in, and how many are wanted from it."""
        above = counts.flip(0).cumsum(0).flip(0)
        chosen = int((above >= wanted).nonzero().max())
        return chosen, wanted - int(above[chosen] - counts[chosen])

    upper, wanted = cut(counted(lambda bits: bits >> 16), n)
    lower, ties = cut(counted(lambda bits: bits[bits >> 16 == upper] & 0xFFFF), wanted)
    threshold = upper << 16 | lower

    chosen: dict[str, Tensor] = {}
    for name in tensors:
        found, offset = [], 0
        for bits in patterns(name):
            keep = bits > threshold
            equal = (bits == threshold).nonzero().reshape(-1)[:ties]
            keep[equal] = True
            ties -= len(equal)
            found.append(keep.nonzero().reshape(-1).cpu() + offset)
            offset += len(bits)
        if len(indices := torch.cat(found)):
            chosen[name] = indices
    return chosen


def eligible_parameters(model: nn.Module, exclude: Collection[Exclusion] = ()) -> dict[str, nn.Parameter]:
    """The parameters that may move, by name, tied ones once.

    "embeddings" are the weights of every nn.Embedding and of the output head; "norms" those of every
    module whose class name has "Norm" in it.
    """
    barred: set[int] = set()
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    for module in model.modules():
        is_embedding = isinstance(module, nn.Embedding) or module is head
        is_norm = "norm" in type(module).__name__.lower()
        if (is_embedding and "embeddings" in exclude) or (is_norm and "norms" in exclude):
            barred.update(id(p) for p in module.parameters(recurse=False))
    left = {name: p for name, p in model.named_parameters() if id(p) not in barred}
    if not left:
        raise MeerkatError(f"excluding {' and '.join(exclude)} leaves no parameter; exclude less")
    return left


def _chosen(
    model: nn.Module,
    scored: Mapping[str, Tensor],
    density: float,
    scope: Scope,
    kind: Kind,
    facts: Mapping[str, str],
) -> SparseMask:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    total = sum(math.prod(shape) for shape in shapes.values())
    if scope == "global":
        most = sum(math.prod(shapes[name]) for name in scored)
        entries = top_entries(scored, min(math.ceil(density * total), most))
    else:
        entries = {}
        for name, tensor in scored.items():
            entries |= top_entries({name: tensor}, math.ceil(density * math.prod(shapes[name])))
    return SparseMask(
        entries=entries,
        shapes={name: shapes[name] for name in entries},
        fingerprint=fingerprint(model),
        total=total,
        kind=kind,
        density=density,
        facts={"scope": scope, **facts},
    )


# --- the masks ------------------------------------------------------------------------------------

_Item = TypeVar("_Item")
"""What a loss is taken of: token ids [length] of pre-training text, or a task's example."""


@contextmanager
def _gradients_to(model: nn.Module, names: Collection[str], consume: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, a backward pass hands the named parameters' gradients to `consume` and frees each at once.

    No other parameter gets a gradient.
    """

    def hook_for(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient, parameter.grad = parameter.grad, None
            consume(name, gradient.to_dense() if gradient.is_sparse else gradient)

        return hook

    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    # a lookup's own gradient is a few rows: kept sparse, a tied embedding needs one dense gradient, not two
    lookups = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and not module.sparse and not module.scale_grad_by_freq
    ]
    handles = []
    try:
        for module in lookups:
            module.sparse = True
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
            parameter.grad = None
            if name in names:
                handles.append(parameter.register_post_accumulate_grad_hook(hook_for(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in lookups:
            module.sparse = False
        for parameter, (required, gradient) in before.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _backward(loss: Callable[[_Item], Tensor], sequences: Iterable[_Item]) -> int:
    count = 0
    for sequence in sequences:
        with torch.enable_grad():
            value = loss(sequence)
        if not torch.isfinite(value):
            raise MeerkatError(f"the loss of pre-training sequence {count} is {value.item()}; is the model sound?")
        value.backward()
        count += 1
    if count == 0:
        raise MeerkatError("no pre-training sequence was given; a sensitivity mask needs at least one")
    return count


def _untracked(sequences: Sequence[_Item], _: str) -> Iterable[_Item]:
    return sequences


def sensitivity_mask(
    model: nn.Module,
    sequences: Sequence[_Item],
    loss: Callable[[_Item], Tensor],
    density: float = 1e-3,
    *,
    scope: Scope = "global",
    exclude: Collection[Exclusion] = (),
    kind: Kind = "sensitivity",
    facts: Mapping[str, str] | None = None,
    track: Callable[[Sequence[_Item], str], Iterable[_Item]] = _untracked,
) -> SparseMask:
    """The n = ceil(u d) parameters with the largest mean squared gradient (method, section 2).

    Args:
        model: in evaluation mode; its weights are only read.
        sequences: token ids, each [length], of pre-training text; gone through twice: once for the scores,
            once for the gradient at the chosen entries, which GradIP needs. For a task mask (kind "task"),
            the clients' examples, gone through once: a task's gradient is no pre-training gradient.
        loss: the loss of one sequence, a scalar that can be differentiated.
        density: u, the share of all d parameters that moves; 0 < u <= 1.
        scope: the n largest of all, or the u largest share of each tensor.
        exclude: kinds of parameters that never move.
        track: wraps the sequences of each pass, for a progress bar.

    Memory: the weights, one float32 accumulator of their size and the largest tensor's gradient, beside
    one sequence's activations.

    Raises:
        MeerkatError: a density out of range, no sequence, or a loss that is not finite.
    """
    check_density(density)
    parameters = eligible_parameters(model, exclude)
    squares = {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in parameters.items()}

    def add_square(name: str, gradient: Tensor) -> None:
        gradient = gradient.float()
        squares[name].addcmul_(gradient, gradient)

    with _gradients_to(model, squares, add_square):
        count = _backward(loss, track(sequences, "sensitivity"))
    noted = {"sequences": str(count), "excluded": ",".join(exclude), **(facts or {})}
    # summed, not averaged: dividing all by the same count ranks them the same
    mask = _chosen(model, squares, density, scope, kind, noted)
    eligible = sum(tensor.numel() for tensor in squares.values())
    spread = {"eligible": str(eligible), "concentration": json.dumps(concentration(squares))}
    mask = replace(mask, facts={**mask.facts, **spread})
    squares.clear()
    if kind == "task":
        return mask
    gradient = pretraining_gradient(model, mask, sequences, loss, track=track)
    return replace(mask, pretraining_gradient=gradient)


def concentration(scores: Mapping[str, Tensor]) -> list[tuple[float, float]]:
    """How much of all sensitivity the most sensitive entries hold: (share of entries, share of the sum).

    From the largest entries to all of them, at some 30 shares between 1e-5 and 1; entries are counted by the
    upper 16 bits of their score, which is exact to one part in 128.
    """
    counts, sums = torch.zeros(1 << 16, dtype=torch.float64), torch.zeros(1 << 16, dtype=torch.float64)
    for tensor in scores.values():
        for chunk in tensor.detach().reshape(-1).split(_CHUNK):
            bins = (chunk.float() + 0.0).view(torch.int32).cpu() >> 16
            counts += torch.bincount(bins, minlength=1 << 16)
            sums += torch.bincount(bins, weights=chunk.cpu().double(), minlength=1 << 16)
    entries, held = counts.flip(0).cumsum(0).numpy(), sums.flip(0).cumsum(0).numpy()
    if not held[-1]:
        return []
    shares = np.logspace(-5, 0, 31)
    found = np.interp(shares, entries / entries[-1], held / held[-1])
    return [(float(f"{share:.3g}"), round(float(part), 5)) for share, part in zip(shares, found, strict=True)]


def pretraining_gradient(
    model: nn.Module,
    mask: SparseMask,
    sequences: Sequence[_Item],
    loss: Callable[[_Item], Tensor],
    *,
    track: Callable[[Sequence[_Item], str], Iterable[_Item]] = _untracked,
) -> Tensor:
    """grad_p: the mean over sequences of the loss' gradient at the moving entries, float32 [n], on the CPU."""
    parameters = {name: p for name, p in model.named_parameters() if name in mask.entries}
    sums = {name: torch.zeros(count, device=parameters[name].device) for name, count in mask.counts()}
    places = {
        name: None if indices is None else indices.to(parameters[name].device) for name, indices in mask.entries.items()
    }

    def add(name: str, gradient: Tensor) -> None:
        flat, at = gradient.reshape(-1), places[name]
        sums[name] += flat if at is None else flat[at]

    with _gradients_to(model, sums, add):
        count = _backward(loss, track(sequences, "pre-training gradient"))
    return torch.cat([sums[name].cpu() for name in mask.entries]) / count


def magnitude_mask(
    model: nn.Module, density: float = 1e-3, *, scope: Scope = "global", exclude: Collection[Exclusion] = ()
) -> SparseMask:
    """The n = ceil(u d) parameters with the largest absolute value (baseline "weight magnitude")."""
    check_density(density)
    scored = eligible_parameters(model, exclude)
    return _chosen(model, scored, density, scope, "magnitude", {"excluded": ",".join(exclude)})


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
    names = list(eligible_parameters(model, exclude))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    total = sum(math.prod(shape) for shape in shapes.values())
    sizes = {name: math.prod(shapes[name]) for name in names}

    def draw(purpose_index: int, wanted: int, among: int) -> np.ndarray:
        rng = seeds.generator(seed, "random mask", purpose_index)
        return np.sort(rng.choice(among, min(wanted, among), replace=False, shuffle=False))

    entries: dict[str, Tensor] = {}
    if scope == "global":
        drawn = draw(0, math.ceil(density * total), sum(sizes.values()))
        ends = np.cumsum([0, *sizes.values()])
        for name, first, last in zip(names, ends[:-1], ends[1:], strict=True):
            inside = drawn[np.searchsorted(drawn, first) : np.searchsorted(drawn, last)] - first
            if len(inside):
                entries[name] = torch.from_numpy(inside)
    else:
        for index, name in enumerate(names):
            entries[name] = torch.from_numpy(draw(1 + index, math.ceil(density * sizes[name]), sizes[name]))
    return SparseMask(
        entries=entries,
        shapes={name: shapes[name] for name in entries},
        fingerprint=fingerprint(model),
        total=total,
        kind="random",
        density=density,
        facts={"scope": scope, "excluded": ",".join(exclude), "seed": str(seed)},
    )


def full_mask(model: nn.Module, *, exclude: Collection[Exclusion] = ()) -> SparseMask:
    """Every parameter moves (baseline "full-FedZO"): no index is stored."""
    parameters = eligible_parameters(model, exclude)
    return SparseMask(
        entries=dict.fromkeys(parameters),
        shapes={name: tuple(p.shape) for name, p in parameters.items()},
        fingerprint=fingerprint(model),
        total=sum(p.numel() for p in model.parameters()),
        kind="full",
        facts={"excluded": ",".join(exclude)},
    )
