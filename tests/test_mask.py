import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor, nn

from meerkat.errors import MeerkatError
from meerkat.masks.baselines import full_mask, magnitude_mask
from meerkat.masks.sensitivity import sensitivity_mask
from meerkat.masks.sparse_mask import SparseMask, fingerprint
from meerkat.problems.causal_lm import language_modelling_loss


@pytest.mark.parametrize("odd", [[3] * 100, [5, 3], [-1, 3], [3, 10**9], [[3, 5]]])
def test_entries_that_are_no_indices_or_come_twice_do_not_fit(odd: list[int]) -> None:
    model = tiny_model()
    mask = magnitude_mask(model)
    mask.check_fits(model)
    name = next(iter(mask.entries))
    with pytest.raises(MeerkatError, match="ascending indices, each once"):
        dataclasses.replace(mask, entries={**mask.entries, name: torch.tensor(odd)}).check_fits(model)


def test_saved_and_loaded_masks_are_equal(tmp_path: Path, random_sequences: list[Tensor]) -> None:
    model = tiny_model()
    loss = language_modelling_loss(model)
    for made in (sensitivity_mask(model, random_sequences, loss, facts={"text": "a.jsonl"}), full_mask(model)):
        made = dataclasses.replace(made, theta_0=torch.arange(len(made)).float())
        made.save(tmp_path / "m.safetensors")
        mask = SparseMask.load(tmp_path / "m.safetensors")
        mask.check_fits(model)
        assert mask.digest() == made.digest()
        assert list(mask.entries) == list(made.entries)
        assert (mask.kind, mask.density, mask.facts, mask.total) == (made.kind, made.density, made.facts, made.total)
        assert mask.theta_0 is not None
        assert torch.equal(mask.theta_0, made.theta_0)
        if made.pretraining_gradient is not None:
            assert torch.equal(mask.pretraining_gradient, made.pretraining_gradient)


def test_a_mask_of_another_model_is_refused() -> None:
    mask = magnitude_mask(tiny_model(seed=0))
    with pytest.raises(MeerkatError, match="other weights"):
        mask.check_fits(tiny_model(seed=1))
    with pytest.raises(MeerkatError, match=r"27,808 parameters, this one has 40,096"):
        mask.check_fits(tiny_model("llama"))


def test_files_that_are_no_masks(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(MeerkatError, match="no such file"):
        SparseMask.load(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(MeerkatError, match="damaged"):
        SparseMask.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(MeerkatError, match="not a mask"):
        SparseMask.load(path)
    save_file({}, path, metadata={"format": "meerkat-mask", "format_version": "99"})
    with pytest.raises(MeerkatError, match="format version 99"):
        SparseMask.load(path)


def damaged(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    return lambda _, metadata: metadata.update({name: json.dumps(value) for name, value in changes.items()})


def without(name: str) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    return lambda tensors, metadata: (tensors if name in tensors else metadata).pop(name)


def other(name: str, values: Tensor) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    return lambda tensors, _: tensors.update({name: values})


@pytest.mark.parametrize(
    "change",
    [
        *(without(name) for name in ("format_version", "kind", "density", "model_fingerprint", "indices/a", "facts")),
        *(
            damaged(entries=value)
            for value in (None, 5, [["a", [2, 5]]], [["a", [2, -5], False]], [["a", None, False]])
        ),
        *(damaged(entries=[["a", [10**30], True]]), damaged(entries=[["a", [10**12], True]]), damaged(entries=[])),
        *(damaged(parameters_total=value) for value in (None, 2, 10**30)),
        *(damaged(density=value) for value in (None, 0, 2, float("nan"))),
        *(damaged(facts=value) for value in (None, [])),
        *(other("indices/a", torch.tensor(odd)) for odd in ([7, 3, 0], [3, 3, 7], [0, 3, 99], [0.0, 3.0, 7.0], 3)),
        *(
            other("theta_0", odd)
            for odd in (torch.zeros(2), torch.zeros(1, 3), torch.zeros(3).double(), torch.zeros(()))
        ),
        lambda _, metadata: metadata.update(entries="[" * 100_000),
    ],
)
def test_a_damaged_mask_is_one_clear_line(
    tmp_path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]
) -> None:
    path = tmp_path / "m.safetensors"
    entries = {"a": torch.tensor([0, 3, 7])}
    SparseMask(entries=entries, shapes={"a": (2, 5)}, fingerprint="", total=20, theta_0=torch.zeros(3)).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    assert SparseMask.load(path).entries["a"].tolist() == [0, 3, 7]
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(MeerkatError, match="damaged") as told:
        SparseMask.load(path)
    assert len(str(told.value).splitlines()) == 1


def test_the_fingerprint_sees_names_shapes_and_values() -> None:
    plain = nn.Sequential(nn.Linear(2, 3))
    same = nn.Sequential(nn.Linear(2, 3))
    same.load_state_dict(plain.state_dict())
    assert fingerprint(plain) == fingerprint(same)
    with torch.no_grad():
        same[0].bias[0] += 1e-6
    assert fingerprint(plain) != fingerprint(same)
    assert fingerprint(plain) != fingerprint(plain[0])


def test_overlap_is_the_share_of_entries_in_common() -> None:
    def moving(**entries: list[int] | None) -> SparseMask:
        indices = {name: None if at is None else torch.tensor(at) for name, at in entries.items()}
        return SparseMask(entries=indices, shapes=dict.fromkeys(indices, (2, 5)), fingerprint="", total=20)

    some, others = moving(a=[0, 3, 7], b=[1]), moving(a=[3, 7, 8, 9])
    assert some.overlap(others) == others.overlap(some) == 2 / 4
    whole = moving(a=None)
    assert (some.overlap(whole), whole.overlap(some), whole.overlap(whole)) == (3 / 4, 3 / 10, 1)
