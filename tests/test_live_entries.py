"""A mask of which hardly any entry moves the loss: a site counts those that do, and needs no row for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Setting
from tiny import ARCHITECTURES, tiny_model
from torch import Tensor, nn

from meerkat.algorithm.live_entries import count_live, entries_that_move
from meerkat.algorithm.precision import types_in_passes
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.errors import MeerkatError
from meerkat.federation.site_settings import Refused
from meerkat.masks.baselines import magnitude_mask, random_mask
from meerkat.masks.sparse_mask import SparseMask, fingerprint
from meerkat.problems.causal_lm import public_logits
from meerkat.run.setup import open_problem


def mask_of(model: nn.Module, entries: dict[str, Tensor]) -> SparseMask:
    """A mask of some entries."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ordered = {name: entries[name] for name in shapes if name in entries}
    total = sum(parameter.numel() for parameter in model.parameters())
    made = SparseMask(ordered, {name: shapes[name] for name in ordered}, fingerprint(model), total, "random", 0.01)
    made.check_form()
    return made


def key_biases(model: nn.Module, live: int) -> SparseMask:
    """The 64 biases of an OPT model's keys, which move no loss, and some weights of its values, which do."""
    parameters = dict(model.named_parameters())
    entries = {name: torch.arange(32) for name in parameters if name.endswith("k_proj.bias")}
    if live:
        entries[next(name for name in parameters if name.endswith("v_proj.weight"))] = torch.arange(live)
    return mask_of(model, entries)


def live_in(model: nn.Module, mask: SparseMask, enough: int = 1000) -> int:
    return count_live(model, mask, public_logits(model), enough)


@pytest.mark.parametrize("live", [1, 36])
def test_a_mask_of_entries_that_move_no_loss_is_refused(
    federation: Path, tokenizer: Any, tmp_path: Path, live: int
) -> None:
    """100 entries, or nearly so, of which a few say everything."""
    model = tiny_model("opt")
    for name in ("data", "text.jsonl"):
        (tmp_path / name).symlink_to(federation / name)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    setting = replace(Setting.make(tmp_path, tmp_path / "sites"), mask=key_biases(model, live))
    with pytest.raises(Refused) as told:
        setting.site(0, data="no such folder", accepts={"mask_minimum": 60})
    message = f"mask_minimum: the run asks for {64 + live} parameters to move, of which {live} were seen to change"
    assert str(told.value).startswith(message)
    assert "the site accepts at least 60 that do" in str(told.value)
    with pytest.raises(
        MeerkatError, match="not fit for the run"
    ):  # it goes on to the rows: its operator knows the mask
        setting.site(0, data="no such folder", accepts={"mask_minimum": 60, "mask": setting.mask.digest()})


@pytest.mark.parametrize(
    ("dtype", "eps", "taken"), [("bfloat16", 1e-4, False), ("bfloat16", 3e-2, True), ("float32", 1e-4, True)]
)
def test_entries_that_a_perturbation_leaves_as_they_are_do_not_count(
    dtype: str, eps: float, taken: bool, federation: Path, tmp_path: Path
) -> None:
    """Large weights in half precision, whose spacing is far above eps: they move no loss, as nothing moves them."""
    setting = Setting.make(federation, tmp_path / "sites", dtype=dtype, eps=eps, exclude="embeddings,norms")
    model = open_problem(setting.config).model
    setting = replace(setting, mask=magnitude_mask(model, 100 / 40_000, exclude=("embeddings", "norms")))
    with pytest.raises((Refused, MeerkatError)) as told:
        setting.site(0, data="no such folder", accepts={"mask_minimum": 50})
    assert ("not fit for the run" if taken else "were seen to change") in str(told.value)


def test_entries_of_norms_move_in_half_precision_as_they_do_in_float32() -> None:
    model = tiny_model("llama")
    norms = {name: torch.arange(len(p)) for name, p in model.named_parameters() if p.dim() == 1}
    mask = mask_of(model, norms)
    theta = MaskedModel(model, mask).read()
    moving = entries_that_move(mask, theta, 1e-3, types_in_passes(model, torch.bfloat16))
    assert len(moving) == len(mask)
    assert len(entries_that_move(mask, theta, 1e-3, dict.fromkeys(mask.entries, torch.bfloat16))) < len(mask)


@pytest.mark.parametrize("scale", [0.0, 0.2, 5.0])
@pytest.mark.parametrize("live", [0, 1, 9])
def test_rounding_is_not_taken_for_a_change(scale: float, live: int) -> None:
    model = tiny_model("opt")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=scale, generator=torch.Generator().manual_seed(1))
    assert live_in(model, key_biases(model, live)) == live


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ordinary_masks_are_live(architecture: str) -> None:
    """Nearly every entry is, taken alone; and enough groups of them are."""
    model = tiny_model(architecture)
    few, many = (random_mask(model, density, 0, exclude=["embeddings"]) for density in (0.003, 0.05))
    assert live_in(model, few) >= 0.9 * len(few)
    assert live_in(model, many, enough=20) == 20


def test_key_biases_before_rotary_positions_matter() -> None:
    model = tiny_model("qwen2")
    names = [name for name, _ in model.named_parameters() if name.endswith("k_proj.bias")]
    mask = mask_of(model, {name: torch.arange(16) for name in names})
    assert live_in(model, mask) == len(mask) == 32


def test_weights_are_the_same_afterwards() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    live_in(model, random_mask(model, 0.01, 0))
    assert fingerprint(model) == before


def test_a_parameter_of_zeros_can_be_live() -> None:
    model = tiny_model("opt")
    name = next(name for name, _ in model.named_parameters() if name.endswith("v_proj.bias"))
    dict(model.named_parameters())[name].data.zero_()
    assert live_in(model, mask_of(model, {name: torch.arange(8)})) == 8


def test_half_precision_weights_are_tried_in_float32() -> None:
    """Their own rounding would hide what a single entry does."""
    model = tiny_model("opt").bfloat16()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert live_in(model, key_biases(model, 9)) == 9
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, before[name]) for name, p in model.named_parameters())
