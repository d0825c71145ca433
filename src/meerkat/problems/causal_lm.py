"""Hugging Face causal language models: loading, losses, evaluation. Knows prompts' tokens, not the method.

Scores are the length-normalised log-probabilities of the label strings; the training loss is the
cross-entropy over them (method, section 9). Sequences are padded on the right, where a causal model
never looks, and logits are computed only at the positions that a label is read from.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from meerkat import seeds
from meerkat.errors import Diverged, MeerkatError
from meerkat.problems.data import read_texts
from meerkat.problems.problem import Evaluation
from meerkat.problems.tasks import Example, Objective

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TOKENS_PER_PASS = {"cpu": 512, "cuda": 16384}
"""Padded tokens that go through the model together where sequences are sorted by length.

Measured on the CPU: small passes stay in its caches. See benchmarks/client_batching.py.
"""

_PUBLIC_TOKENS = (2, 8)
"""Sequences of random tokens, and tokens of each, on which it shows whether a weight matters."""


def load_model(name: str, device: str = "cpu", dtype: str = "float32") -> tuple[nn.Module, Any]:
    """Load a causal LM and its tokenizer from a local folder or the hub, ready for evaluation.

    Nothing that comes with the model is run: no code of its own, and no pickled weights, which are code too.

    Raises:
        MeerkatError: there is no such model, or it has no tokenizer or no causal-LM head, or it is one to be run.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(name)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise MeerkatError(
            f"model '{name}': no such folder; give a folder with config.json, or a hub name like org/model"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise MeerkatError(f"model '{name}': the folder has no config.json; give the folder of a Hugging Face model")
    if folder.is_dir() and not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise MeerkatError(
            f"model '{name}': the folder has no tokenizer; save it there with tokenizer.save_pretrained()"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, loading = AutoModelForCausalLM.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, dtype=DTYPES[dtype], output_loading_info=True
        )
    except Exception as error:  # the library raises many kinds: its own, safetensors', the tokenizers'
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason:
            reason = "it needs code of its own, which is not run; give a kind of model that transformers knows"
        elif "safetensors" in reason and not isinstance(error, SafetensorError):
            reason = (
                "its weights must be in model.safetensors: pickled ones can hold code; save it with save_pretrained()"
            )
        where = "" if folder.is_dir() else "no such folder, and from the hub it "
        raise MeerkatError(f"model '{name}': {where}cannot be loaded as a causal language model ({reason})") from None
    if missing := min(loading["missing_keys"], default=""):
        raise MeerkatError(f"model '{name}': cannot be loaded as a causal language model (no weights for {missing})")
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise MeerkatError(f"device '{device}': {str(error).splitlines()[0]}; use --device cpu") from None
    model.requires_grad_(False)
    if not _is_causal(model.eval()):
        raise MeerkatError(f"model '{name}': its tokens see later ones; give a causal language model")
    return model, tokenizer


@torch.no_grad()
def _is_causal(model: nn.Module) -> bool:
    """Whether a later token leaves an earlier one's logits alone; encoders such as BERT load as causal models too."""
    ids = torch.tensor([[1, 2], [1, 3]], device=next(model.parameters()).device)
    one, other = model(input_ids=ids).logits[:, 0].float()
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


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
class _Pass:
    """One forward pass: padded sequences, and where the label tokens are read."""

    input_ids: Tensor
    """int64 [sequences, length]"""
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
    sort: bool = True,
    sequences_per_pass: int = 0,
    tokens_per_pass: int = 0,
) -> Batch:
    """Lay examples out in padded passes.

    Args:
        sort: put sequences of like length together, so that little is padded.
        sequences_per_pass: at most so many in a forward pass; 0 for any number.
        tokens_per_pass: at most so many padded tokens in a forward pass; 0 for any number.
    """
    places = [(row, s) for row, example in enumerate(examples) for s in range(len(example.sequences))]
    lengths = {(row, s): len(examples[row].sequences[s]) for row, s in places}
    if sort:
        places.sort(key=lengths.__getitem__)
    groups: list[list[tuple[int, int]]] = [[]]
    longest = 0
    for place in places:
        longest = max(longest, lengths[place])
        full = sequences_per_pass and len(groups[-1]) == sequences_per_pass
        long = tokens_per_pass and longest * (len(groups[-1]) + 1) > tokens_per_pass
        if groups[-1] and (full or long):
            groups.append([])
            longest = lengths[place]
        groups[-1].append(place)
    labels = torch.tensor([example.label for example in examples], device=device)
    tokens = _single_tokens(examples)
    return Batch(
        passes=tuple(_lay_out(examples, group, device) for group in groups),
        labels=labels,
        candidates=len(examples[0].candidates),
        tokens=None if tokens is None else torch.from_numpy(tokens).to(device),
    )


def _single_tokens(examples: Sequence[Example]) -> np.ndarray | None:
    """All candidates' tokens, ascending, where each is one and a row's are read at one position; None elsewhere."""
    for example in examples:
        if len({(c.sequence, c.start) for c in example.candidates}) > 1 or any(
            len(c.targets) > 1 for c in example.candidates
        ):
            return None
    return np.unique(np.concatenate([c.targets for example in examples for c in example.candidates]))


def _lay_out(examples: Sequence[Example], places: Sequence[tuple[int, int]], device: torch.device | str) -> _Pass:
    """One pass over (row, sequence) places."""
    inputs = [examples[row].sequences[s] for row, s in places]
    input_ids = np.zeros((len(inputs), max(map(len, inputs))), dtype=np.int64)
    keeps: list[np.ndarray] = []
    read, targets, slots = [], [], []
    for i, (row, s) in enumerate(places):
        input_ids[i, : len(inputs[i])] = inputs[i]
        candidates = [(c, each) for c, each in enumerate(examples[row].candidates) if each.sequence == s]
        positions = [each.start + np.arange(len(each.targets)) for _, each in candidates]
        keep = np.unique(np.concatenate(positions))
        keeps.append(keep)
        for (c, each), at in zip(candidates, positions, strict=True):
            read.append((i, np.searchsorted(keep, at)))
            targets.append(each.targets)
            slots.append(row * len(examples[row].candidates) + c)
    width, longest = max(map(len, keeps)), max(map(len, targets))
    kept = np.stack([np.pad(keep, (0, width - len(keep)), mode="edge") for keep in keeps])
    counts = np.array([len(target) for target in targets])
    inside = np.arange(longest) < counts[:, None]
    read_at = np.zeros((len(read), longest), dtype=np.int64)
    read_at[inside] = np.concatenate([i * width + at for i, at in read])
    target_ids = np.zeros_like(read_at)
    target_ids[inside] = np.concatenate(targets)
    share = (inside / counts[:, None]).astype(np.float32)
    arrays = (input_ids, kept, read_at, target_ids, share, np.array(slots))
    return _Pass(*(torch.from_numpy(array).to(device) for array in arrays))


def _kept_logits(model: nn.Module, batch: _Pass, head: Mapping[str, Tensor] | None = None) -> Tensor:
    """Logits at the kept positions, float32 [sequences * W, V], or of the tokens that `head` is for."""

    def forward(**arguments: Any) -> Any:
        arguments |= {"input_ids": batch.input_ids, "use_cache": False}
        return torch.func.functional_call(model, dict(head or {}), kwargs=arguments, tie_weights=False)

    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        logits: Tensor = forward().logits.take_along_dim(batch.keep[..., None], dim=1)
    elif _keeps_by_sequence():
        logits = forward(logits_to_keep=batch.keep).logits
    else:
        positions, at = batch.keep.unique(return_inverse=True)
        logits = forward(logits_to_keep=positions).logits.take_along_dim(at[..., None], dim=1)
    # half-precision logits would quantise the loss to steps that 1 / (2 eps) magnifies
    return logits.float().flatten(0, 1)


def _keeps_by_sequence() -> bool:
    """Whether `logits_to_keep` may differ between sequences: from transformers 5.21 on."""
    from transformers import modeling_utils

    return hasattr(modeling_utils, "slice_logits_to_keep")


def _head_for(model: Any, tokens: Tensor) -> dict[str, Tensor] | None:
    """The output layer's parameters, by name, cut down to some tokens; None where that layer is of a kind of its own."""
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
