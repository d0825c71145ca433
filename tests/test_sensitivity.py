import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ARCHITECTURES, tiny_model
from torch import Tensor, nn

from meerkat.errors import MeerkatError
from meerkat.masks import sensitivity as choosing
from meerkat.masks import top_entries as ranking
from meerkat.masks.baselines import full_mask, magnitude_mask, random_mask
from meerkat.masks.sensitivity import sensitivity_mask
from meerkat.masks.sparse_mask import SparseMask, fingerprint
from meerkat.masks.top_entries import top_entries
from meerkat.problems.causal_lm import language_modelling_loss


def dense(mask: SparseMask, model: nn.Module) -> Tensor:
    """The mask as a bool vector over all parameters."""
    parts = []
    for name, parameter in model.named_parameters():
        part = torch.zeros(parameter.numel(), dtype=torch.bool)
        if name in mask.entries:
            at = mask.entries[name]
            part[slice(None) if at is None else at] = True
        parts.append(part)
    return torch.cat(parts)


def sensitivity(model: nn.Module, sequences: list[Tensor], density: float = 0.01, **options: Any) -> SparseMask:
    return sensitivity_mask(model, sequences, language_modelling_loss(model), density, **options)


# --- choosing the largest ---

scores = st.lists(
    st.one_of(st.floats(0, 2.0**100, width=32), st.sampled_from([0.0, -0.0, 1.0, 1.0000001, 2.0])),
    min_size=1,
    max_size=60,
)


@given(scores, st.data())
def test_top_entries_are_those_of_a_full_stable_sort(values: list[float], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    tensor = torch.tensor(values)
    tensors = {"a": tensor[:cut], "b": tensor[cut:]}
    entries = top_entries(tensors, n)
    expected = reference.top_n_mask(tensor + 0.0, n).nonzero().flatten()
    both = torch.cat([entries.get("a", torch.zeros(0).long()), entries.get("b", torch.zeros(0).long()) + cut])
    assert both.tolist() == expected.tolist()


def test_top_entries_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)).mul(50).round()  # many ties
    monkeypatch.setattr(ranking, "_CHUNK", 7)
    expected = reference.top_n_mask(values, 123).nonzero().flatten()
    assert top_entries({"x": values}, 123)["x"].tolist() == expected.tolist()


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(MeerkatError, match="not all finite"):
        top_entries({"w": torch.tensor([1.0, bad])}, 1)


# --- sensitivity ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sensitivity_mask_is_the_literal_one(architecture: str, random_sequences: list[Tensor]) -> None:
    model = tiny_model(architecture)
    expected = reference.sensitivity(model, random_sequences)
    mask = sensitivity(model, random_sequences)
    moving = dense(mask, model)
    assert len(mask) == moving.sum() == math.ceil(0.01 * sum(p.numel() for p in model.parameters()))
    # float32 sums may swap entries whose scores agree to 1e-4: every chosen one must beat every other but for that
    assert expected[moving].min() >= expected[~moving].max() * (1 - 1e-4)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_pretraining_gradient_is_the_literal_one(architecture: str, random_sequences: list[Tensor]) -> None:
    model = tiny_model(architecture)
    mask = sensitivity(model, random_sequences)
    expected = reference.pretraining_gradient(model, random_sequences)[dense(mask, model)]
    assert mask.pretraining_gradient is not None
    assert mask.pretraining_gradient.dtype == torch.float32
    torch.testing.assert_close(mask.pretraining_gradient.double(), expected, rtol=1e-4, atol=1e-6)


def test_tied_weights_are_counted_once() -> None:
    model = tiny_model("llama-tied")
    mask = full_mask(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert mask.total == len(mask) == sum(p.numel() for p in model.parameters())
    assert [name for name in mask.entries if "embed" in name or "head" in name] == ["model.embed_tokens.weight"]


def test_gradients_are_freed_while_backpropagation_runs(random_sequences: list[Tensor]) -> None:
    model = tiny_model("llama")
    alive: list[int] = []
    stream = choosing.stream_gradients

    def watching(model: nn.Module, names: Any, use: Any) -> Any:
        def watch(name: str, gradient: Tensor) -> None:
            alive.append(sum(p.grad is not None for p in model.parameters()))  # beside the one handed over
            use(name, gradient)

        return stream(model, names, watch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "stream_gradients", watching)
        sensitivity(model, random_sequences)
    assert set(alive) == {0}


# --- sums in files ---


def mapped_files() -> set[str]:
    """The files of sums that this process has in memory."""
    maps = Path("/proc/self/maps").read_text()
    return {line.split()[-1] for line in maps.splitlines() if "/meerkat-mask-" in line}


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """However small the model, its sums lie in files in this folder."""
    monkeypatch.setattr(choosing, "_IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("scope", ["global", "per-tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama-tied", "opt"])
def test_a_mask_is_the_same_whether_its_sums_lie_in_files_or_in_memory(
    architecture: str, dtype: torch.dtype, scope: str, random_sequences: list[Tensor], request: pytest.FixtureRequest
) -> None:
    model = tiny_model(architecture).to(dtype)
    expected = sensitivity(model, random_sequences, scope=scope)
    folder = request.getfixturevalue("in_files")
    mask = sensitivity(model, random_sequences, scope=scope)
    assert mask.digest() == expected.digest()
    assert mask.facts == expected.facts
    assert expected.pretraining_gradient is not None
    assert mask.pretraining_gradient is not None
    assert torch.equal(mask.pretraining_gradient, expected.pretraining_gradient)
    assert not any(folder.iterdir())


@pytest.mark.usefixtures("in_files")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells which files are in memory")
def test_sums_in_files_are_in_memory_one_tensor_at_a_time(
    random_sequences: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, from_file = tiny_model("llama"), torch.from_file
    seen: list[int] = []

    def watched(*arguments: Any, **options: Any) -> Tensor:
        tensor = from_file(*arguments, **options)
        seen.append(len(mapped_files()))
        return tensor

    monkeypatch.setattr(torch, "from_file", watched)
    sensitivity(model, random_sequences)
    # each tensor for each sequence, in backpropagation, and again where entries are counted and chosen
    assert len(seen) > len(random_sequences) * len(list(model.parameters()))
    # a loop over tensors holds one until it has the next
    assert max(seen) <= 2
    assert not mapped_files()


def kept_for_backpropagation(model: nn.Module, sequences: list[Tensor]) -> int:
    """Bytes that the graphs of all passes keep, beside the weights and what a layer that is computed again makes."""
    weights, kept = {p.data_ptr() for p in model.parameters()}, 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes * (tensor.data_ptr() not in weights)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        sensitivity(model, sequences)
    return kept


def test_a_large_model_keeps_no_activations_of_its_layers(
    random_sequences: list[Tensor], request: pytest.FixtureRequest
) -> None:
    shallow, deep = tiny_model("llama"), tiny_model("llama")
    del shallow.model.layers[1:]
    before = {vars(layer).get("forward") for layer in deep.model.layers}
    of_layers = kept_for_backpropagation(deep, random_sequences) - kept_for_backpropagation(shallow, random_sequences)
    request.getfixturevalue("in_files")
    left = kept_for_backpropagation(deep, random_sequences) - kept_for_backpropagation(shallow, random_sequences)
    assert left < 0.1 * of_layers
    assert {vars(layer).get("forward") for layer in deep.model.layers} == before


def test_sums_that_no_disk_has_room_for_are_an_error(
    in_files: Path, random_sequences: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "disk_usage", lambda _: SimpleNamespace(free=2**10))
    with pytest.raises(MeerkatError, match=r"0\.0 GiB are free.*set TMPDIR"):
        sensitivity(tiny_model(), random_sequences)
    assert not any(in_files.iterdir())


def test_the_model_is_left_as_it_was(random_sequences: list[Tensor]) -> None:
    model = tiny_model("llama")
    model.model.requires_grad_(False)
    before, required = fingerprint(model), [p.requires_grad for p in model.parameters()]
    sensitivity(model, random_sequences)
    assert fingerprint(model) == before
    assert [p.requires_grad for p in model.parameters()] == required
    assert not any(p.grad is not None or p._post_accumulate_grad_hooks for p in model.parameters())


def test_gradients_left_on_the_model_are_neither_used_nor_lost(random_sequences: list[Tensor]) -> None:
    model = tiny_model()
    expected = sensitivity(model, random_sequences).digest()
    left = torch.full_like(model.model.norm.weight, 1e6)
    model.model.norm.weight.grad = left
    assert sensitivity(model, random_sequences).digest() == expected
    assert model.model.norm.weight.grad is left


def test_a_loss_that_is_not_finite_is_an_error(random_sequences: list[Tensor]) -> None:
    model = tiny_model()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(MeerkatError, match="sequence 0 is nan"):
        sensitivity(model, random_sequences)
    with pytest.raises(MeerkatError, match="at least one"):
        sensitivity(tiny_model(), [])


# --- options and baselines ---


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, math.nan])
def test_density_out_of_range(density: float) -> None:
    for make in (magnitude_mask, random_mask):
        with pytest.raises(MeerkatError, match="above 0 and at most 1"):
            make(tiny_model(), density)


def test_per_tensor_scope_takes_the_same_share_of_each(random_sequences: list[Tensor]) -> None:
    model = tiny_model()
    for mask in (
        sensitivity(model, random_sequences, 0.1, scope="per-tensor"),
        magnitude_mask(model, 0.1, scope="per-tensor"),
        random_mask(model, 0.1, scope="per-tensor"),
    ):
        shares = {name: math.ceil(0.1 * p.numel()) for name, p in model.named_parameters()}
        assert dict(mask.counts()) == shares


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_excluded_kinds_never_move(architecture: str) -> None:
    model = tiny_model(architecture)
    left = set(full_mask(model, exclude=("embeddings", "norms")).entries)
    assert left
    assert not [n for n in left if any(w in n.lower() for w in ("embed", "norm", "ln_", "wte", "wpe", "lm_head"))]
    assert not full_mask(model, exclude=("embeddings",)).entries.keys() & {"lm_head.weight"}


def test_excluding_everything_is_an_error() -> None:
    with pytest.raises(MeerkatError, match="leaves no parameter"):
        full_mask(nn.Sequential(nn.Embedding(4, 4)), exclude=("embeddings",))


def test_magnitude_mask_takes_the_largest_weights() -> None:
    model = tiny_model()
    moving = dense(magnitude_mask(model, 0.02), model)
    expected = reference.top_n_mask(reference.flat_parameters(model).abs(), int(moving.sum()))
    assert torch.equal(moving, expected)


def test_random_mask_is_uniform_and_a_function_of_the_seed() -> None:
    model = tiny_model()
    total = sum(p.numel() for p in model.parameters())
    hits = sum(dense(random_mask(model, 0.1, seed), model).long() for seed in range(50))
    assert dense(random_mask(model, 0.1, 3), model).sum() == math.ceil(0.1 * total)
    assert random_mask(model, 0.1, 3).digest() == random_mask(model, 0.1, 3).digest()
    assert random_mask(model, 0.1, 3).digest() != random_mask(model, 0.1, 4).digest()
    # 50 draws at 0.1: mean 5, variance 4.5; a chi-square over all entries, within six standard errors
    chi = ((hits - 5.0) ** 2 / 4.5).mean().item()
    assert abs(chi - 1) < 6 * math.sqrt(2 / total)
