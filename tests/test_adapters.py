import hashlib
import inspect
import logging
import math
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, tiny_model
from torch import Tensor, nn

from meerkat.algorithm.zeroth_order import MaskedModel, projected_gradient
from meerkat.errors import MeerkatError
from meerkat.masks.lora import add_lora, lora_mask, merge_lora_, save_adapter
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.causal_lm import language_modelling_loss

peft = pytest.importorskip("peft", reason="needs the 'lora' extra")

TOKENS = torch.arange(3, 20)
ADAPTED = {"gpt2": ("c_attn",)}
"""The layers that get adapters, by their names' ends; elsewhere queries and values."""


def adapted_model(architecture: str = "llama-tied", seed: int = 0) -> Any:
    model = tiny_model(architecture)
    add_lora(model, seed)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    output: Tensor = model(input_ids=TOKENS[None]).logits
    return output


def adapters(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by the name of the layer that they are on."""
    weights = dict(model.named_parameters())
    names = [name.removesuffix(".lora_A.default.weight") for name in weights if ".lora_A." in name]
    return {n: (weights[f"{n}.lora_A.default.weight"], weights[f"{n}.lora_B.default.weight"]) for n in names}


@torch.no_grad()
def stir_(model: nn.Module) -> None:
    """Give every B values, as a run would, so that the adapters do something."""
    generator = torch.Generator().manual_seed(3)
    for _, b in adapters(model).values():
        b.copy_(torch.randn(b.shape, generator=generator) * 0.2)


@contextmanager
def untouched_global_state() -> Iterator[None]:
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), repr(np.random.get_state())) == before[1:]


def one_line(refusal: pytest.ExceptionInfo[MeerkatError]) -> str:
    text = str(refusal.value)
    assert "\n" not in text
    return text


def through_peft(kind: Any, *arguments: Any) -> Any:
    """What PEFT loads, less its warnings: it calls what transformers has deprecated."""
    with warnings.catch_warnings(action="ignore"):
        return kind.from_pretrained(*arguments).eval()


# --- adding ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_leave_the_model_as_it_was_until_they_move(architecture: str) -> None:
    base = tiny_model(architecture)
    expected, signature = logits(base), inspect.signature(base.forward)
    before = {name: p.clone() for name, p in base.named_parameters()}
    kind = type(base)
    add_lora(base, 0)
    assert torch.equal(logits(base), expected)
    assert type(base) is kind
    assert inspect.signature(base.forward) == signature
    after = {name.replace(".base_layer.", "."): p for name, p in base.named_parameters() if "lora_" not in name}
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module.training for module in base.modules())
    assert not any(p.requires_grad for p in base.parameters())
    stir_(base)
    assert not torch.allclose(logits(base), expected, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_layer_in_question_gets_a_of_rank_8_and_a_zero_b(architecture: str) -> None:
    base = tiny_model(architecture)
    ends = ADAPTED.get(architecture, ("q_proj", "v_proj"))
    expected = {name: module for name, module in base.named_modules() if name.endswith(ends)}
    shapes = {  # [out, in]; GPT-2 stores its weights the other way round
        name: module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
        for name, module in expected.items()
    }
    add_lora(base, 0)
    pairs = adapters(base)
    assert list(pairs) == list(expected)
    for name, (a, b) in pairs.items():
        out_features, in_features = shapes[name]
        assert a.shape == (8, in_features)
        assert b.shape == (out_features, 8)
        assert a.dtype == b.dtype == torch.float32
        assert not b.any()


def test_a_starts_as_peft_would_start_it() -> None:
    for a, _ in adapters(adapted_model("llama")).values():
        bound = math.sqrt(6 / ((1 + 5) * a.shape[1]))  # Kaiming-uniform with a = sqrt(5)
        assert a.abs().max() <= bound
        assert a.min() < -0.9 * bound
        assert a.max() > 0.9 * bound
        assert a.unique().numel() > 0.99 * a.numel()
        assert abs(a.mean()) < 4 * bound / math.sqrt(3 * a.numel())
        assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_a_s_start_stays_the_same_for_good() -> None:
    """A run that is resumed makes its adapters again."""
    first, second, *_ = (a for a, _ in adapters(adapted_model("llama", 7)).values())
    key = int.from_bytes(hashlib.sha256(b"lora/7/0").digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(3)
    expected = [(2 * (int(word) >> 11) / 2**53 - 1) / math.sqrt(32) for word in words]
    assert first[0, :3].tolist() == pytest.approx(expected, rel=1e-7)
    assert not torch.equal(first, second[:, :32])


def test_the_start_is_a_function_of_the_seed_and_of_no_global_state() -> None:
    torch.manual_seed(1)
    with untouched_global_state():
        one = adapters(adapted_model(seed=0))
    torch.manual_seed(2)
    again, other = adapters(adapted_model(seed=0)), adapters(adapted_model(seed=1))
    assert all(torch.equal(one[name][0], again[name][0]) for name in one)
    assert not any(torch.equal(one[name][0], other[name][0]) for name in one)
    starts = [a for a, _ in one.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


# --- against the formula ---


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_a_layer_computes_w_x_plus_2_b_a_x(architecture: str) -> None:
    model = adapted_model(architecture)
    stir_(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        return lambda _, inputs, output: seen.update({name: (inputs[0], output)})

    pairs = adapters(model)
    for name in pairs:
        model.get_submodule(name).register_forward_hook(watch(name))
    logits(model)
    assert seen.keys() == pairs.keys()
    for name, (x, y) in seen.items():
        inside = model.get_submodule(name).base_layer
        w = inside.weight.double() if isinstance(inside, nn.Linear) else inside.weight.double().T
        bias = 0 if inside.bias is None else inside.bias.double()
        a, b = (part.double() for part in pairs[name])
        for i in range(x.shape[1]):
            column = x[0, i].double()
            expected = w @ column + bias + 16 / 8 * (b @ (a @ column))
            torch.testing.assert_close(y[0, i].double(), expected, rtol=1e-5, atol=1e-5)


# --- the mask ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_mask_is_every_adapter_whole_and_nothing_else(architecture: str) -> None:
    model = adapted_model(architecture)
    mask = lora_mask(model)
    names = [name for name, _ in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]
    assert list(mask.entries) == names
    assert set(mask.entries.values()) == {None}
    assert len(mask) == sum(a.numel() + b.numel() for a, b in adapters(model).values())
    base = sum(p.numel() for p in tiny_model(architecture).parameters())
    assert mask.total == base + len(mask)
    assert mask.density == len(mask) / mask.total
    assert (mask.kind, dict(mask.facts)) == ("lora", {"r": "8", "alpha": "16"})
    mask.check_fits(model)


def test_the_mask_fits_the_same_seed_s_adapters_alone(tmp_path: Path) -> None:
    mask = lora_mask(adapted_model(seed=0))
    mask.save(tmp_path / "mask.safetensors")
    loaded = SparseMask.load(tmp_path / "mask.safetensors")
    assert loaded == mask
    loaded.check_fits(adapted_model(seed=0))
    with pytest.raises(MeerkatError, match="other weights"):
        loaded.check_fits(adapted_model(seed=1))
    with pytest.raises(MeerkatError, match="differs at"):
        loaded.check_fits(tiny_model())


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_zeroth_order_steps_move_the_adapters_alone_and_lower_the_loss(architecture: str) -> None:
    model = adapted_model(architecture)
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss = language_modelling_loss(model)
    masked = MaskedModel(model, lora_mask(model))
    theta, generator = masked.read(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        first = loss(TOKENS)
        for _ in range(30):
            z = torch.randn(theta.shape, generator=generator)
            g = projected_gradient(masked, theta, z, 1e-3, lambda: loss(TOKENS)).g
            theta = theta - 1e-3 * float(g) * z
        masked.write_(theta)
        assert loss(TOKENS) < first
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(masked.mask.entries)


# --- taking the model away ---


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma2", "gpt2", "opt"])
def test_merged_the_model_is_an_ordinary_one_with_the_same_logits(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = adapted_model(architecture)
    stir_(model)
    expected, pairs = logits(model), {name: (a.clone(), b.clone()) for name, (a, b) in adapters(model).items()}
    with untouched_global_state():
        assert merge_lora_(model) is model

    literal = tiny_model(architecture)
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            weight = literal.get_submodule(name).weight
            weight += 2 * (b @ a).T if architecture == "gpt2" else 2 * (b @ a)
    assert [*dict(model.named_modules())] == [*dict(literal.named_modules())]
    assert not hasattr(model, "peft_config")
    for (name, one), (other_name, other) in zip(model.named_parameters(), literal.named_parameters(), strict=True):
        assert name == other_name
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter*"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("architecture", ["llama-tied", "qwen2", "gpt2"])
def test_a_saved_adapter_gives_the_same_logits_on_the_base_model(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_model(architecture).save_pretrained(tmp_path / "base")
    model = adapted_model(architecture)
    stir_(model)
    save_adapter(model, tmp_path / "deep" / "adapter", str(tmp_path / "base"))
    assert {f.name for f in (tmp_path / "deep" / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert model.peft_config["default"].base_model_name_or_path is None

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    loaded = through_peft(peft.PeftModel, base, tmp_path / "deep" / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    named = through_peft(peft.AutoPeftModelForCausalLM, tmp_path / "deep" / "adapter")  # the base, by its name
    assert torch.equal(logits(named), logits(model))


def test_adapters_stay_float32_on_half_precision_weights(tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    add_lora(model, 0)
    assert {p.dtype for pair in adapters(model).values() for p in pair} == {torch.float32}
    stir_(model)
    expected = logits(model)
    assert expected.dtype == torch.bfloat16
    save_adapter(model, tmp_path, "base")
    loaded = through_peft(peft.PeftModel, tiny_model().bfloat16(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    merge_lora_(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model).float(), expected.float(), rtol=0.1, atol=0.5)


# --- what is refused ---


def test_adapters_are_added_once() -> None:
    model = adapted_model()
    before = dict(model.named_parameters())
    with pytest.raises(MeerkatError, match="already has adapters"):
        add_lora(model, 0)
    assert dict(model.named_parameters()).keys() == before.keys()
    merge_lora_(model)
    add_lora(model, 0)


def test_an_architecture_that_peft_does_not_know_is_refused() -> None:
    from transformers import AutoModelForCausalLM, Olmo2Config

    small = Olmo2Config(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(small)
    for unknown, name in ((model, "'olmo2'"), (nn.Linear(2, 2), "'Linear'")):
        with pytest.raises(MeerkatError) as refusal:
            add_lora(unknown, 0)
        assert name in one_line(refusal)
        assert "another method" in one_line(refusal)
        assert not any("lora" in name for name, _ in unknown.named_modules())


def test_a_model_without_the_layers_of_its_architecture_is_refused() -> None:
    model = tiny_model()
    for layer in model.model.layers:
        del layer.self_attn.q_proj, layer.self_attn.v_proj
    with pytest.raises(MeerkatError) as refusal:
        add_lora(model, 0)
    assert "not found in the base model" in one_line(refusal)


def test_without_adapters_there_is_nothing_to_mask_merge_or_save(tmp_path: Path) -> None:
    for asked in (lora_mask, merge_lora_, lambda model: save_adapter(model, tmp_path / "to", "base")):
        with pytest.raises(MeerkatError, match="no LoRA adapters"):
            asked(tiny_model())
    assert not (tmp_path / "to").exists()


def test_without_peft_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MeerkatError) as refusal:
        add_lora(tiny_model(), 0)
    assert "pip install 'meerkat-fl[lora]'" in one_line(refusal)  # the distribution's name, as in pyproject.toml


def test_a_library_that_peft_imports_advises_nobody() -> None:
    """On some CPUs bitsandbytes, when it is imported, tells people to install kernels that are not used here."""
    logger = logging.getLogger("bitsandbytes")
    logger.setLevel(logging.NOTSET)
    add_lora(tiny_model("llama"), seed=0)
    assert not logger.isEnabledFor(logging.WARNING)
