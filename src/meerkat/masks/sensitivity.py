"""The paper's mask: the parameters most sensitive on pre-training text (method, section 2).

Every parameter is ranked by its mean squared gradient on pre-training text, the empirical Fisher diagonal; the
n = ceil(u d) largest move. Gradients are consumed tensor by tensor while backpropagation runs. The sums of a large
model's squares lie in files, and each of its layers is computed again before its gradients are: so backpropagation
needs the memory of inference and of one layer.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meerkat.errors import MeerkatError
from meerkat.masks.eligible import check_density, eligible_parameters, largest
from meerkat.masks.kinds import Exclusion, Kind, Scope
from meerkat.masks.sparse_mask import SparseMask
from meerkat.masks.top_entries import concentration

_IN_MEMORY = 2**30
"""Bytes of sums that are kept in the CPU's memory; a model with more is large. On a GPU, half of what is free."""
_CHUNK = 1 << 22
"""Entries squared together, so that no float32 copy of a whole gradient is made."""

_Item = TypeVar("_Item")
"""What a loss is taken of: token ids [length] of pre-training text, or a task's example."""


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
    with_gradient: bool = True,
    track: Callable[[Sequence[_Item], str], Iterable[_Item]] = _untracked,
) -> SparseMask:
    """The n = ceil(u d) parameters with the largest mean squared gradient (method, section 2).

    Args:
        model: in evaluation mode; its weights are only read.
        sequences: token ids, each [length], of pre-training text. Read twice: for the scores, then for the gradient
            at the chosen entries, which GradIP needs. For a task mask (kind "task") the clients' examples, read once:
            a task's gradient is no pre-training gradient.
        loss: the loss of one sequence, a differentiable scalar.
        density: u, the share of all d parameters that moves; 0 < u <= 1.
        scope: the n largest of all, or the u largest share of each tensor.
        exclude: kinds of parameters that never move.
        facts: what else the mask's file says of how it was made.
        with_gradient: whether to take the pre-training gradient, too; a task mask has none.
        track: wraps the sequences of each pass, for a progress bar.

    Memory: the weights, one sequence's activations, the largest tensor's gradient, and the sums of squares, four bytes
    an entry. Where these take more than a gibibyte on the CPU, or half of a GPU's free memory, they lie in files in
    TMPDIR, one tensor's at a time is in memory, and so are one layer's activations. The mask is the same to the bit.

    Raises:
        MeerkatError: a density out of range, no sequence, a loss or gradient that is not finite, or no room for the
            files.
    """
    check_density(density)
    parameters = eligible_parameters(model, exclude)
    with _sums_for(model, parameters) as squares:

        def add_square(name: str, gradient: Tensor) -> None:
            total = squares[name].view(-1)
            for part, of_gradient in zip(total.split(_CHUNK), gradient.reshape(-1).split(_CHUNK), strict=True):
                of_gradient = of_gradient.to(total.device, torch.float32)
                part.addcmul_(of_gradient, of_gradient)

        with stream_gradients(model, parameters, add_square):
            count = _backward(model, loss, track(sequences, "sensitivity"))
        # sums rank as means do: all are over the same count
        entries = largest(model, squares, density, scope)
        made = {
            **{"scope": scope, "sequences": str(count), "excluded": ",".join(exclude), **(facts or {})},
            "eligible": str(_entries(parameters.values())),
            "concentration": json.dumps(concentration(squares)),
        }
    mask = SparseMask.of(model, entries, kind, density, made)
    if kind == "task" or not with_gradient:
        return mask
    gradient = pretraining_gradient(model, mask, track(sequences, "pre-training gradient"), loss)
    return replace(mask, pretraining_gradient=gradient)


def _entries(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def is_large(model: nn.Module) -> bool:
    """Whether a sum for each of its parameters is more than is kept in memory."""
    device = next(model.parameters()).device
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _IN_MEMORY
    return 4 * _entries(model.parameters()) > room


@contextmanager
def _sums_for(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """A sum for each entry of some parameters, float32, 0 at first: beside them, or in files where the model is large.

    Raises:
        MeerkatError: the disk has no room for the files.
    """
    if not is_large(model):
        yield {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in parameters.items()}
        return
    with TemporaryDirectory(prefix="meerkat-mask-") as folder:
        wanted, free = 4 * _entries(parameters.values()), disk_usage(folder).free
        if wanted > free:
            raise MeerkatError(
                f"{Path(folder).parent}: {free / 2**30:.1f} GiB are free, and making a mask of this model takes "
                f"{wanted / 2**30:.1f} for a while; set TMPDIR to a folder on a disk that has them"
            )
        yield _InFiles(Path(folder), {name: p.shape for name, p in parameters.items()})


@dataclass(frozen=True)
class _InFiles(Mapping[str, Tensor]):
    """Float32 tensors on the CPU by name, each a file of zeros at first; one is in memory while it is held."""

    folder: Path
    shapes: Mapping[str, Sequence[int]]

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        file = str(self.folder / name)
        return torch.from_file(file, shared=True, size=math.prod(shape), dtype=torch.float32).view(*shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def pretraining_gradient(
    model: nn.Module, mask: SparseMask, sequences: Iterable[_Item], loss: Callable[[_Item], Tensor]
) -> Tensor:
    """grad_p: the mean gradient of the loss over the sequences, at the moving entries: float32 [n], on the CPU."""
    devices = {name: p.device for name, p in model.named_parameters()}
    sums = {name: torch.zeros(count, device=devices[name]) for name, count in mask.counts()}
    indices = {name: None if at is None else at.to(devices[name]) for name, at in mask.entries.items()}

    def add(name: str, gradient: Tensor) -> None:
        flat, at = gradient.reshape(-1), indices[name]
        sums[name] += flat if at is None else flat[at]

    with stream_gradients(model, sums, add):
        count = _backward(model, loss, sequences)
    return torch.cat([sums[name].cpu() for name in mask.entries]) / count


def entry_gradients(model: nn.Module, mask: SparseMask, values: Iterable[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """The gradient of each value, a differentiable scalar, at the moving entries: float32 [n], on the CPU."""
    parts: dict[str, Tensor] = {}

    def keep(name: str, gradient: Tensor) -> None:
        flat, at = gradient.reshape(-1), mask.entries[name]
        parts[name] = (flat if at is None else flat[at.to(flat.device)]).float().cpu()

    with stream_gradients(model, mask.entries.keys(), keep):
        for value in values:
            parts.clear()
            _backward(model, lambda value: value(), [value])
            yield torch.cat([parts.get(name, torch.zeros(count)) for name, count in mask.counts()])


def _backward(model: nn.Module, loss: Callable[[_Item], Tensor], sequences: Iterable[_Item]) -> int:
    """Backpropagate each sequence's loss; how many there were."""
    count = 0
    with _layers_recomputed(model) if is_large(model) else nullcontext():
        for sequence in sequences:
            with torch.enable_grad():
                value = loss(sequence)
            if not torch.isfinite(value):
                raise MeerkatError(
                    f"the loss of pre-training sequence {count} is {value.item()}; check the model's weights"
                )
            value.backward()
            count += 1
    if count == 0:
        raise MeerkatError("no pre-training sequence was given; a sensitivity mask needs at least one")
    return count


@contextmanager
def _layers_recomputed(model: nn.Module) -> Iterator[None]:
    """While open, a model's layers keep only their inputs for backpropagation, which computes the rest again."""
    layers = next((module for module in model.modules() if isinstance(module, nn.ModuleList)), nn.ModuleList())
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@contextmanager
def stream_gradients(
    model: nn.Module, names: Collection[str], consume: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While open, a backward pass hands the named parameters' gradients to `consume`, and frees each at once.

    No other parameter gets a gradient. On leaving, the model's gradients and `requires_grad` are what they were.
    """

    def hook_for(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient, parameter.grad = parameter.grad, None
            consume(name, gradient.to_dense() if gradient.is_sparse else gradient)

        return hook

    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    # an embedding's gradient is a few rows: kept sparse, a tied embedding needs one dense gradient, not two
    embeddings = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and not module.sparse and not module.scale_grad_by_freq
    ]
    handles = []
    try:
        for module in embeddings:
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
        for module in embeddings:
            module.sparse = False
        for parameter, (required, gradient) in before.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient
