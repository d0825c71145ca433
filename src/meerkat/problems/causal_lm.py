"""Hugging Face causal language models: losses and evaluation. Knows prompts' tokens, not the method.

Scores are the length-normalised log-probabilities of the label strings; the training loss is the
cross-entropy over them (method, section 9). Sequences are packed, or padded on the right, where a causal
model never looks, and logits are computed only at the positions that a label is read from.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from meerkat import seeds
from meerkat.errors import Diverged, MeerkatError
from meerkat.problems.data import read_texts
from meerkat.problems.packing import Groups, Shape, attending_by_tree, positions
from meerkat.problems.problem import Evaluation
from meerkat.problems.tasks import Example, Objective

TOKENS_PER_PASS = {"cpu": 1024, "cuda": 16384}
"""Tokens that go through the model together where sequences are sorted by length, padded ones counted.

Measured on the CPU: below it a pass's own cost shows, above it nothing is gained. See benchmarks/client_batching.py.
"""

_PUBLIC_TOKENS = (2, 8)
"""Sequences of random tokens, and tokens of each, on which it shows whether a weight matters."""


def longest_input(model: nn.Module, limit: int) -> int:
    """The longest sequence, in tokens, that both the limit and the model's position table allow."""
    return min(limit, getattr(model.config, "max_position_embeddings", None) or limit)


def vocabulary(model: Any) -> int:
    """How many tokens a model has embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])


def public_logits(model: nn.Module) -> Callable[[], Tensor]:
    """A function of the model's present weights alone: its logits on random tokens, float32 [outputs]."""
    ids = torch.from_numpy(seeds.generator(0, "public tokens").integers(vocabulary(model), size=_PUBLIC_TOKENS))
    ids = ids.to(next(model.parameters()).device)
    return lambda: model(input_ids=ids, use_cache=False).logits.float().flatten()


# --- pre-training text ----------------------------------------------------------------------------


def load_text(source: str, tokenizer: Any, sequences: int, max_length: int) -> list[Tensor]:
    """The first sequences of a text as token ids, int64 [length], each cut to max_length.

    `source` is what `data.read_texts` reads. Texts of fewer than two tokens are skipped.

    Raises:
        MeerkatError: no such text, or nothing usable in it.
    """
    tokens: list[Tensor] = []
    for text in read_texts(source):
        ids = tokenizer(text, truncation=True, max_length=max_length, verbose=False)["input_ids"]
        if len(ids) > 1:
            tokens.append(torch.tensor(ids))
        if len(tokens) == sequences:
            break
    if not tokens:
        raise MeerkatError(f"text '{source}': no text in it; give a .jsonl file with 'text' fields, or plain text")
    return tokens


def language_modelling_loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Token ids [length] -> mean cross-entropy of each token given those before it, float32 []."""
    device = next(model.parameters()).device

    def loss(tokens: Tensor) -> Tensor:
        ids = tokens.to(device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        return nn.functional.cross_entropy(logits.float(), ids[1:])

    return loss


# --- candidate scores -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """Tokens of a row that lie one behind another: one of its sequences, or all of them as a tree."""

    row: int
    tokens: np.ndarray
    """int64 [length]"""
    shape: Shape
    read: tuple[tuple[int, np.ndarray], ...]
    """Candidates whose tokens are read here, each with the places where they are predicted, int64."""


@dataclass(frozen=True)
class _Pass:
    """One forward pass: sequences padded to one length, or one pack of them, and where the label tokens are read."""

    input_ids: Tensor
    """int64 [sequences, length]; a pack is one sequence"""
    position_ids: Tensor | None
    """int64 [1, length] in a pack"""
    groups: Groups
    """What is in a pack."""
    keep: Tensor
    """Positions whose logits are needed, int64 [sequences, W]."""
    read: Tensor
    """For each label token, its index among the sequences * W kept positions: int64 [labels, longest]."""
    targets: Tensor
    """Token ids, int64 [labels, longest]."""
    share: Tensor
    """1 / (number of the label's tokens), 0 where there is none: float32 [labels, longest]."""
    slots: Tensor
    """row * C + candidate of each label, int64 [labels]."""


@dataclass(frozen=True)
class Batch:
    """Examples laid out for the model, once for all passes at different weights."""

    passes: tuple[_Pass, ...]
    labels: Tensor
    """int64 [rows]"""
    candidates: int
    """C"""
    tokens: Tensor | None
    """Where candidates are single tokens that a row reads at one position: those tokens, ascending, int64."""


def collate(
    examples: Sequence[Example],
    device: torch.device | str = "cpu",
    *,
    packed: bool = False,
    sort: bool = True,
    sequences_per_pass: int = 0,
    tokens_per_pass: int = 0,
) -> Batch:
    """Lay examples out in passes.

    Args:
        packed: one behind another, all sequences of an example as one tree; otherwise padded on the right.
        sort: put sequences of like length together, so that little is padded and attention goes through many at once.
        sequences_per_pass: at most so many (or trees) in a forward pass; 0 for any number.
        tokens_per_pass: at most so many tokens in a forward pass, padded ones counted; 0 for any number.
    """
    units = [unit for row, example in enumerate(examples) for unit in _units(row, example, packed)]
    if sort:
        units.sort(key=lambda unit: (len(unit.tokens), unit.shape))
    passes: list[list[_Unit]] = [[]]
    total = longest = 0
    for unit in units:
        length, count = len(unit.tokens), len(passes[-1])
        tokens = total + length if packed else max(longest, length) * (count + 1)
        if count and (count == sequences_per_pass or (tokens_per_pass and tokens > tokens_per_pass)):
            passes.append([])
            total = longest = 0
        passes[-1].append(unit)
        total, longest = total + length, max(longest, length)
    labels = torch.tensor([example.label for example in examples], device=device)
    single = _single_tokens(examples)
    return Batch(
        passes=tuple(_lay_out(examples, each, packed, device) for each in passes),
        labels=labels,
        candidates=len(examples[0].candidates),
        tokens=None if single is None else torch.from_numpy(single).to(device),
    )


def _units(row: int, example: Example, packed: bool) -> list[_Unit]:
    """An example's sequences each by itself, or packed as one tree."""
    numbers = range(len(example.sequences))
    return [_unit(row, example, part) for part in ([numbers] if packed else [[s] for s in numbers])]


def _unit(row: int, example: Example, part: Sequence[int]) -> _Unit:
    sequences = [example.sequences[s] for s in part]
    shortest = min(map(len, sequences))
    alike = np.all([sequence[:shortest] == sequences[0][:shortest] for sequence in sequences], axis=0)
    shared = shortest if alike.all() else int(alike.argmin())
    branches = [len(sequence) - shared for sequence in sequences]
    starts = dict(zip(part, np.cumsum([shared, *branches]), strict=False))
    read = []
    for c, each in enumerate(example.candidates):
        if each.sequence in part:
            at = each.start + np.arange(len(each.targets))
            read.append((c, np.where(at < shared, at, at - shared + starts[each.sequence])))
    return _Unit(
        row,
        tokens=np.concatenate([sequences[0][:shared], *(sequence[shared:] for sequence in sequences)]),
        shape=(shared, *(length for length in branches if length)),
        read=tuple(read),
    )


def _single_tokens(examples: Sequence[Example]) -> np.ndarray | None:
    """All candidates' tokens, ascending, where each is one and a row's are read at one position; None elsewhere."""
    candidates = [candidate for example in examples for candidate in example.candidates]
    places = [{(c.sequence, c.start) for c in example.candidates} for example in examples]
    if any(len(place) > 1 for place in places) or any(len(c.targets) > 1 for c in candidates):
        return None
    return np.unique(np.concatenate([c.targets for c in candidates]))


def _lay_out(examples: Sequence[Example], units: Sequence[_Unit], packed: bool, device: torch.device | str) -> _Pass:
    """One pass over some units."""
    lengths = [len(unit.tokens) for unit in units]
    keeps = [np.unique(np.concatenate([at for _, at in unit.read])) for unit in units]
    if packed:
        input_ids = np.concatenate([unit.tokens for unit in units])[None]
        before = np.cumsum([0, *lengths])
        kept = np.concatenate([keep + start for keep, start in zip(keeps, before, strict=False)])[None]
        first = np.cumsum([0, *map(len, keeps)])
    else:
        input_ids = np.stack([np.pad(unit.tokens, (0, max(lengths) - len(unit.tokens))) for unit in units])
        width = max(map(len, keeps))
        kept = np.stack([np.pad(keep, (0, width - len(keep)), mode="edge") for keep in keeps])
        first = width * np.arange(len(units))
    read = [
        begin + np.searchsorted(keep, at)
        for unit, keep, begin in zip(units, keeps, first, strict=False)
        for _, at in unit.read
    ]
    targets = [examples[unit.row].candidates[c].targets for unit in units for c, _ in unit.read]
    slots = [unit.row * len(examples[unit.row].candidates) + c for unit in units for c, _ in unit.read]
    counts = np.array([len(target) for target in targets])
    inside = np.arange(counts.max()) < counts[:, None]
    read_at, target_ids = np.zeros((2, *inside.shape), dtype=np.int64)
    read_at[inside], target_ids[inside] = np.concatenate(read), np.concatenate(targets)
    share = (inside / counts[:, None]).astype(np.float32)
    arrays = (kept, read_at, target_ids, share, np.array(slots))
    shapes = [unit.shape for unit in units]
    return _Pass(
        torch.from_numpy(input_ids).to(device),
        torch.from_numpy(np.concatenate([positions(shape) for shape in shapes])[None]).to(device) if packed else None,
        [(len(list(alike)), shape) for shape, alike in groupby(shapes)] if packed else (),
        *(torch.from_numpy(array).to(device) for array in arrays),
    )


def _kept_logits(model: nn.Module, batch: _Pass, head: Mapping[str, Tensor] | None = None) -> Tensor:
    """Logits at the kept positions, float32 [sequences * W, V], or of the tokens that `head` is for."""

    def forward(**arguments: Any) -> Any:
        arguments |= {"input_ids": batch.input_ids, "use_cache": False}
        if batch.position_ids is None:
            return torch.func.functional_call(model, dict(head or {}), kwargs=arguments, tie_weights=False)
        arguments |= {"position_ids": batch.position_ids, "groups": batch.groups}
        with attending_by_tree(model):
            return torch.func.functional_call(model, dict(head or {}), kwargs=arguments, tie_weights=False)

    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        logits: Tensor = forward().logits.take_along_dim(batch.keep[..., None], dim=1)
    elif _keeps_by_sequence():
        logits = forward(logits_to_keep=batch.keep).logits
    else:
        kept, at = batch.keep.unique(return_inverse=True)
        logits = forward(logits_to_keep=kept).logits.take_along_dim(at[..., None], dim=1)
    # half-precision logits would quantise the loss to steps that 1 / (2 eps) magnifies
    return logits.float().flatten(0, 1)


def _keeps_by_sequence() -> bool:
    """Whether `logits_to_keep` may differ between sequences: from transformers 5.21 on."""
    from transformers import modeling_utils

    return hasattr(modeling_utils, "slice_logits_to_keep")


def _head_for(model: Any, tokens: Tensor) -> dict[str, Tensor] | None:
    """The output layer's parameters for some tokens, by name; None where that layer is of a kind of its own."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        return None
    name = next(name for name, module in model.named_modules() if module is head)
    return {f"{name}.{part}": parameter[tokens] for part, parameter in head.named_parameters()}


def candidate_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Mean log-probability of each label string's tokens: float32 [rows, C]."""
    scores = torch.zeros(len(batch.labels) * batch.candidates, device=batch.labels.device)
    for one in batch.passes:
        logits = _kept_logits(model, one)
        picked = logits[one.read, one.targets] - logits.logsumexp(-1)[one.read]
        scores[one.slots] = (picked * one.share).sum(-1)
    return scores.view(-1, batch.candidates)


def _compared_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Scores that within a row differ as `candidate_scores` do, all that a softmax over them sees: float32 [rows, C].

    What all candidates of a row share is left out where it can be. Single tokens read at one position share the
    logarithm of a sum over the vocabulary, so that the output layer computes their logits and no others.
    """
    head = None if batch.tokens is None else _head_for(model, batch.tokens)
    if batch.tokens is None or head is None:
        return candidate_scores(model, batch)
    scores = torch.zeros(len(batch.labels) * batch.candidates, device=batch.labels.device)
    for one in batch.passes:
        logits = _kept_logits(model, one, head)
        scores[one.slots] = logits[one.read[:, 0], torch.searchsorted(batch.tokens, one.targets[:, 0])]
    return scores.view(-1, batch.candidates)


def row_losses(model: nn.Module, batch: Batch, objective: Objective = "classification") -> Tensor:
    """Each row's loss, float32 [rows].

    "classification" is the cross-entropy over the candidates' scores; "language-modelling" that of the
    right label's tokens over the whole vocabulary.
    """
    if objective == "classification":
        return nn.functional.cross_entropy(_compared_scores(model, batch), batch.labels, reduction="none")
    return -candidate_scores(model, batch).gather(1, batch.labels[:, None])[:, 0]


@torch.no_grad()
def evaluate(model: nn.Module, batch: Batch, labels: Sequence[str]) -> Evaluation:
    """Accuracy by highest candidate score, overall and per label, and the mean classification loss.

    Raises:
        Diverged: a score is not finite.
    """
    scores = _compared_scores(model, batch)
    if not torch.isfinite(scores).all():
        raise Diverged(
            "the model's scores are not finite on the evaluation rows; "
            "start a new run with a lower --lr, or with float32 weights"
        )
    right = (scores.argmax(1) == batch.labels).double()
    return Evaluation(
        rows=len(scores),
        scores={"accuracy": right.mean().item(), "loss": nn.functional.cross_entropy(scores, batch.labels).item()},
        per_class={
            label: right[batch.labels == index].mean().item()
            for index, label in enumerate(labels)
            if (batch.labels == index).any()
        },
    )
