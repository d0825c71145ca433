import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import federation_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.cli import main
from meerkat.errors import MeerkatError
from meerkat.export.model import apply_delta
from meerkat.record.verification import verify
from meerkat.run.evaluate import load_run

TOKENS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def run(simulate_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "run"
    assert main([*simulate_arguments, "--lr", "0.1", "--out", str(out)]) == 0
    return out


def logits_of_run(run: Path) -> torch.Tensor:
    _, problem = load_run(run)
    with torch.no_grad():
        logits: torch.Tensor = problem.model(TOKENS).logits
    return logits


@torch.no_grad()
def test_both_forms_give_the_run_s_logits(run: Path, federation: Path, tmp_path: Path) -> None:
    expected = logits_of_run(run)
    base = AutoModelForCausalLM.from_pretrained(federation / "model")
    assert not torch.allclose(base(TOKENS).logits, expected, atol=1e-3)

    assert main(["export", str(run), "--to", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged(TOKENS).logits, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("it was great")["input_ids"][0] == 0

    assert main(["export", str(run), "--to", str(tmp_path / "delta"), "--form", "delta"]) == 0
    file = tmp_path / "delta" / "delta.safetensors"
    assert torch.equal(apply_delta(base, file)(TOKENS).logits, expected)
    assert file.stat().st_size < 0.1 * (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert not list(tmp_path.glob("*.part"))


def test_a_delta_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--to", str(tmp_path / "delta"), "--form", "delta"]) == 0
    with pytest.raises(MeerkatError, match="other weights"):
        apply_delta(federation_model(seed=5), tmp_path / "delta" / "delta.safetensors")
    with pytest.raises(MeerkatError, match="not a delta"):
        apply_delta(federation_model(), run / "mask.safetensors")


@pytest.mark.parametrize("part", ["shapes", "parameters_total", "model_fingerprint", "format_version"])
@pytest.mark.parametrize("value", [None, "null", "{}", '{"x": [1]}', "[" * 100_000])
def test_a_delta_with_damaged_metadata_is_refused(run: Path, tmp_path: Path, part: str, value: str | None) -> None:
    def change(_: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        metadata.update({part: value}) if value else metadata.pop(part)

    refused(run, tmp_path, change)


@pytest.mark.parametrize("kind", ["values", "indices"])
@pytest.mark.parametrize("odd", [torch.zeros(()), torch.zeros(1, 1), torch.zeros(9, dtype=torch.float64), None])
def test_a_delta_with_damaged_tensors_is_refused(
    run: Path, tmp_path: Path, kind: str, odd: torch.Tensor | None
) -> None:
    def change(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        name = min(name for name in tensors if name.startswith(kind))
        tensors.pop(name)
        if odd is not None:
            tensors[name] = odd

    refused(run, tmp_path, change)


def refused(run: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    assert main(["export", str(run), "--to", str(tmp_path / "delta"), "--form", "delta"]) == 0
    file, model = tmp_path / "delta" / "delta.safetensors", federation_model()
    before = [parameter.clone() for parameter in model.parameters()]
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(MeerkatError) as told:
        apply_delta(model, file)
    assert len(str(told.value).splitlines()) == 1
    assert all(map(torch.equal, before, model.parameters()))


def test_what_a_killed_export_left_is_not_in_the_next(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".delta.0a1b2c3d.part").mkdir()
    (tmp_path / ".delta.0a1b2c3d.part" / "model.safetensors").write_text("old")
    assert main(["export", str(run), "--to", str(tmp_path / "delta"), "--form", "delta"]) == 0
    assert sorted(file.name for file in (tmp_path / "delta").iterdir()) == ["README.md", "delta.safetensors"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["export", str(run), "--to", ".", "--form", "delta"]) == 0
    assert (tmp_path / "here" / "delta.safetensors").is_file()


def test_an_export_never_overwrites(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("mine")
    assert main(["export", str(run), "--to", str(tmp_path / "taken")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "taken" / "x").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["export", str(run), "--to", str(tmp_path / "file" / "x")]) == 2
    assert f"'{tmp_path / 'file'}' cannot be written to; give another folder" in capsys.readouterr().err


def test_evaluate_gives_accuracy_overall_and_per_class(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert evaluation["accuracy"] == summary["accuracy"]
    assert evaluation["per_class"].keys() == {"terrible", "great"}
    assert sum(evaluation["per_class"].values()) / 2 == pytest.approx(evaluation["accuracy"])  # six rows of each class


@torch.no_grad()
def test_a_lora_run_goes_as_an_ordinary_model_or_as_adapters(
    simulate_arguments: list[str], federation: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert main([*simulate_arguments, "--method", "lora-fedzo", "--lr", "1", "--out", str(run)]) == 0
    expected = logits_of_run(run)
    base = AutoModelForCausalLM.from_pretrained(federation / "model")
    assert not torch.allclose(base(TOKENS).logits, expected, atol=1e-3)

    assert main(["export", str(run), "--to", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)

    assert main(["export", str(run), "--to", str(tmp_path / "adapters"), "--form", "delta"]) == 0
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["base_model_name_or_path"] == str((federation / "model").resolve())
    assert (tmp_path / "adapters" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("options", [[], ["--quantize", "int8"]], ids=str)
def test_no_weight_that_moved_is_rounded_to_the_checkpoint_s_type(
    simulate_arguments: list[str], federation: Path, tmp_path: Path, options: list[str]
) -> None:
    if "--quantize" in options:
        pytest.importorskip("bitsandbytes")
    shutil.copytree(federation / "model", tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tmp_path / "base").bfloat16().save_pretrained(tmp_path / "base")
    base = ["--model", str(tmp_path / "base"), "--dtype", "float32"]
    given = [*simulate_arguments, *base, "--eps", "3e-3", "--lr", "1e-4", *options]
    assert main([*given, "--out", str(tmp_path / "run")]) == 0
    for form in ("merged", "delta"):
        assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / form), "--form", form]) == 0
    verified = verify(tmp_path / "run")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert stored.dtype == torch.bfloat16
    weights = {name: weight.detach().float() for name, weight in stored.named_parameters()}
    applied = apply_delta(stored.float(), tmp_path / "delta" / "delta.safetensors")
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), applied):
        assert torch.equal(MaskedModel(model, verified.mask).read(), verified.theta)
        moved = sum(int((weight.float() != weights[name]).sum()) for name, weight in model.named_parameters())
        assert 0 < moved <= len(verified.mask)


def test_what_adapters_add_is_not_rounded_to_the_checkpoint_s_type(
    simulate_arguments: list[str], federation: Path, tmp_path: Path
) -> None:
    shutil.copytree(federation / "model", tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tmp_path / "base").bfloat16().save_pretrained(tmp_path / "base")
    given = ["--model", str(tmp_path / "base"), "--dtype", "bfloat16", "--method", "lora-fedzo", "--lr", "1e-3"]
    assert main([*simulate_arguments, *given, "--out", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "merged")]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    pairs = list(zip(base.parameters(), merged.parameters(), strict=True))
    lost = [((after != before) & (after.bfloat16() == before)).any() for before, after in pairs]
    assert any(lost)  # in bfloat16
