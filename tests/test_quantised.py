"""A base frozen in few bits: what is packed and what is not, that theta stays exact beside it, and runs on it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, Setting
from tiny import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from meerkat.algorithm import path
from meerkat.algorithm.first_order import masked_gradient
from meerkat.algorithm.quantised import BLOCK, Bits, QuantisedLinear, quantise_
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.cli import main
from meerkat.errors import MeerkatError
from meerkat.export.model import apply_delta
from meerkat.masks.baselines import full_mask, random_mask
from meerkat.masks.lora import add_lora, lora_mask
from meerkat.masks.sparse_mask import SparseMask, fingerprint
from meerkat.problems.causal_lm import language_modelling_loss
from meerkat.run.evaluate import load_run
from meerkat.settings.config import make_config

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the 'quantize' extra")

TOKENS = torch.arange(3, 20)
both = pytest.mark.parametrize("bits", ["int8", "nf4"])


def rounded(weight: Tensor, bits: Bits) -> Tensor:
    """Every block over its largest magnitude, rounded to a level nearby, and scaled back."""
    blocks = weight.reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    at = torch.searchsorted((LEVELS[bits][1:] + LEVELS[bits][:-1]) / 2, blocks / scale)
    return (LEVELS[bits][at] * scale).view(weight.shape)


# QLoRA (arXiv 2305.14314), appendix E
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
LEVELS = {"int8": torch.arange(-127, 128) / 127, "nf4": NF4}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    output: Tensor = model(input_ids=TOKENS[None]).logits
    return output


def quantised(bits: Bits, architecture: str = "llama-tied") -> tuple[Any, MaskedModel]:
    model = tiny_model(architecture)
    mask = random_mask(model, 0.02, seed=1)
    quantise_(model, mask, bits)
    return model, MaskedModel(model, mask)


@both
@torch.no_grad()
def test_it_is_the_model_of_rounded_weights_with_theta_in_them(bits: Bits) -> None:
    model, target = quantised(bits)
    theta = target.read() + 0.05 * torch.randn(len(target.mask), generator=torch.Generator().manual_seed(2))
    target.write_(theta)

    plain, whole = tiny_model(), tiny_model()
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight.copy_(rounded(layer.weight, bits))
    for each in (plain, whole):
        MaskedModel(each, target.mask).write_(theta)
    rounding = torch.dist(logits(plain), logits(whole))
    assert torch.dist(logits(model), logits(plain)) < 0.3 * rounding  # of near ties some are rounded the other way


@both
@torch.no_grad()
def test_theta_is_exact_and_restoring_it_restores_every_bit(bits: Bits) -> None:
    exact = MaskedModel(tiny_model(), random_mask(tiny_model(), 0.02, seed=1)).read()
    model, target = quantised(bits)
    theta, before = target.read(), logits(model)
    assert torch.equal(theta, exact)
    target.write_(theta + 0.01)
    assert not torch.equal(logits(model), before)
    target.write_(theta)
    assert torch.equal(logits(model), before)
    assert torch.equal(target.read(), theta)


@torch.no_grad()
def test_a_cast_model_computes_in_its_type_and_keeps_theta_exact() -> None:
    model, target = quantised("nf4")
    before, theta = logits(model), target.read()
    after = logits(model.to(torch.bfloat16))
    assert after.dtype == torch.bfloat16
    assert torch.allclose(after.float(), before, rtol=0.1, atol=0.1)
    beside = torch.cat([torch.full((count,), name.endswith("_proj.weight")) for name, count in target.mask.counts()])
    assert torch.equal(target.read()[beside], theta[beside])
    assert 0 < beside.sum() < len(theta)


@both
def test_masked_entries_have_the_gradient_of_the_rounded_model(bits: Bits) -> None:
    _, target = quantised(bits)
    theta, plain = target.read(), tiny_model().requires_grad_(False)
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head":
                layer.weight.copy_(rounded(layer.weight, bits))
    reference = MaskedModel(plain, target.mask)
    ours, theirs = (
        masked_gradient(each, theta, lambda model=each.model: language_modelling_loss(model)(TOKENS))
        for each in (target, reference)
    )
    assert torch.dist(ours[0], theirs[0]) < 0.02 * torch.linalg.vector_norm(theirs[0])


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "gemma2", "opt"])
def test_layers_are_packed_and_embeddings_head_norms_and_biases_are_not(architecture: str) -> None:
    model, whole = quantised("nf4", architecture)[0], tiny_model(architecture)
    packed = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, QuantisedLinear)}
    kept = dict(model.named_parameters())
    assert packed == {n for n, p in whole.named_parameters() if p.ndim == 2 and "embed" not in n and "head" not in n}
    assert kept.keys() == dict(whole.named_parameters()).keys() - packed
    assert all(torch.equal(kept[name], p) for name, p in whole.named_parameters() if name in kept)


@pytest.mark.parametrize(("bits", "most"), [("int8", 8.51), ("nf4", 4.51)])
def test_a_weight_takes_its_bits_and_half_a_bit_of_scale(bits: Bits, most: float) -> None:
    linear = nn.Linear(1024, 2048, bias=False).requires_grad_(False)
    layer = QuantisedLinear(linear, None, bits)
    rounding = torch.dist(rounded(linear.weight, bits), linear.weight)
    assert torch.dist(layer.weight(torch.float32), rounded(linear.weight, bits)) < 0.3 * rounding
    tensors = [value for value in (*vars(layer).values(), layer._scales.absmax) if isinstance(value, Tensor)]
    assert most - 0.02 < 8 * sum(value.nbytes for value in tensors) / 2**21 <= most


def test_lora_s_adapters_move_on_a_quantised_base() -> None:
    pytest.importorskip("peft", reason="needs the 'lora' extra")
    model = tiny_model()
    add_lora(model, 0)
    mask = lora_mask(model)
    theta = MaskedModel(model, mask).read()
    quantise_(model, mask, "nf4")
    target, before = MaskedModel(model, mask), logits(model)
    packed = [name for name, layer in model.named_modules() if isinstance(layer, QuantisedLinear)]
    assert any("q_proj.base_layer" in name for name in packed)
    assert not any("lora" in name for name in packed)
    assert torch.equal(target.read(), theta)
    with torch.no_grad():
        target.write_(theta + 0.05)
    assert not torch.allclose(logits(model), before)


def test_what_cannot_be_quantised_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeerkatError, match="quantize nf4: freezes weights, and method full-fedzo moves them all"):
        make_config({"quantize": "nf4", "method": "full-fedzo"})
    with pytest.raises(MeerkatError, match="quantize int4: must be 'none', 'int8' or 'nf4'"):
        make_config({"quantize": "int4"})
    for architecture, mask_of in (("gpt2", lambda model: random_mask(model, 0.01, seed=1)), ("llama", full_mask)):
        model = tiny_model(architecture)
        with pytest.raises(MeerkatError, match=r"no nn\.Linear layer to quantise"):
            quantise_(model, mask_of(model), "int8")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MeerkatError, match="needs the 'bitsandbytes' package; pip install 'meerkat-fl\\[quantize\\]'"):
        quantise_(tiny_model(), random_mask(tiny_model(), 0.01, seed=1), "int8")


@both
def test_a_federation_is_the_simulation_to_the_bit(
    federation: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bits: Bits
) -> None:
    setting = Setting.make(federation, tmp_path / "sites", local_steps=2, rounds=2)
    ours = setting.but(quantize=bits)
    lived = Federation.of(ours, monkeypatch)
    state = lived.lived(tmp_path / "run")
    digests = [record["theta"] for record in lived.records if record["kind"] == "round"]
    assert digests == ours.simulated() != setting.simulated()
    assert path.digest(state.theta) == digests[-1] != path.digest(setting.theta_0)


def test_a_run_on_a_quantised_base_is_evaluated_on_it_and_exported_without(
    simulate_arguments: list[str], federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*simulate_arguments, "--quantize", "nf4", "--lr", "0.1"]
    for out in ("run", "again"):
        assert main([*arguments, "--out", str(tmp_path / out)]) == 0
    run, again = tmp_path / "run", tmp_path / "again"
    assert (run / "rounds.log").read_text() == (again / "rounds.log").read_text()
    assert main(["verify", str(run), "--evaluate"]) == 0

    verified, problem = load_run(run)
    assert any(isinstance(layer, QuantisedLinear) for layer in problem.model.modules())
    base = AutoModelForCausalLM.from_pretrained(federation / "model")
    expected = base_with(base, verified.mask, verified.theta)
    assert main(["export", str(run), "--to", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), expected)
    assert "quantised in the run (nf4), not here" in (tmp_path / "merged" / "README.md").read_text()

    assert main(["export", str(run), "--to", str(tmp_path / "delta"), "--form", "delta"]) == 0
    fresh = AutoModelForCausalLM.from_pretrained(federation / "model")
    assert torch.equal(logits(apply_delta(fresh, tmp_path / "delta" / "delta.safetensors")), expected)
    capsys.readouterr()


@torch.no_grad()
def base_with(base: Any, mask: SparseMask, theta: Tensor) -> Tensor:
    """The base model's logits with a run's theta in it."""
    assert fingerprint(base) == mask.fingerprint
    MaskedModel(base, mask).write_(theta)
    return logits(base)
