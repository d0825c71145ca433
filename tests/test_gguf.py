"""A GGUF file is a model like any other: loaded, trained, resumed, exported, or refused in one line."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHAT_TEMPLATE, VOCABULARY, federation_model
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("gguf")

import gguf
from federation import Federation, Setting
from gguf.quants import dequantize, quantize
from gguf_file import write_gguf

from meerkat.cli import main
from meerkat.errors import MeerkatError
from meerkat.export.model import apply_delta
from meerkat.federation.doctor import model as checked_model
from meerkat.masks.sparse_mask import fingerprint
from meerkat.problems.models import load_model
from meerkat.record.run_folder import RunFolder

TEXT = "it was great, yes or  no:\nthe film Zoë"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", federation_model(), tokenizer)


def refusal(name: Path | str) -> str:
    with pytest.raises(MeerkatError) as told:
        load_model(str(name))
    message = str(told.value)
    assert f"model '{name}'" in message
    assert len(message.splitlines()) == 1
    return message


# --- loading ---


def test_the_model_and_the_tokenizer_are_those_that_were_written(file: Path, tokenizer: Any) -> None:
    model, loaded = load_model(str(file))
    assert fingerprint(model) == fingerprint(federation_model())
    ids = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, federation_model()(ids).logits)
    assert not model.training
    assert loaded.is_fast
    assert loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert loaded(TEXT)["input_ids"][0] == tokenizer.bos_token_id
    assert loaded.chat_template == CHAT_TEMPLATE


def test_quantised_weights_are_dequantised_to_float32(tmp_path: Path, tokenizer: Any) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    model, _ = load_model(str(write_gguf(tmp_path / "tiny.gguf", federation_model(), tokenizer, kind=kind)))
    embeddings = federation_model().get_input_embeddings().weight.detach().numpy()
    expected = torch.from_numpy(dequantize(quantize(embeddings, kind), kind))
    assert torch.equal(model.get_input_embeddings().weight, expected)
    assert not torch.equal(expected, torch.from_numpy(embeddings))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_folder_with_one_gguf_file_is_that_model(file: Path) -> None:
    assert fingerprint(load_model(str(file.parent))[0]) == fingerprint(federation_model())


def test_a_folder_with_several_gguf_files_is_refused_with_their_names(file: Path, tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(file.read_bytes())
    assert "2 models (a.gguf, b.gguf); name one" in refusal(tmp_path)


def test_safetensors_are_taken_where_a_folder_has_both(file: Path, tmp_path: Path, tokenizer: Any) -> None:
    federation_model(seed=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tiny.gguf").write_bytes(file.read_bytes())
    assert fingerprint(load_model(str(tmp_path))[0]) == fingerprint(federation_model(seed=1))


# --- refusals ---


def test_a_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'meerkat-fl[gguf]'" in refusal(file)


def test_what_is_no_gguf_file_by_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "is no .gguf file" in refusal(tmp_path / "model.bin")
    assert "no such folder" in refusal("nowhere.gguf")


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(share * len(data))]


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "of four bytes": lambda _: b"GGUF",
    "wrong magic": lambda data: b"GGML" + data[4:],
    "of version 1": lambda data: data[:4] + b"\1\0\0\0" + data[8:],
    "cut in its metadata": cut(0.02),
    "cut in its tensors": cut(0.5),
    "cut by a byte": lambda data: data[:-1],
    "with more metadata than it holds": lambda data: data[:16] + b"\xff" * 7 + b"\0" + data[24:],
    "with more tensors than it holds": lambda data: data[:8] + b"\xff" * 7 + b"\0" + data[16:],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(file: Path, tmp_path: Path, damage: str) -> None:
    (tmp_path / "x.gguf").write_bytes(DAMAGED[damage](file.read_bytes()))
    assert "if the file may not be whole, fetch it again" in refusal(tmp_path / "x.gguf")


def test_an_unknown_architecture_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    made = write_gguf(tmp_path / "x.gguf", federation_model(), tokenizer, architecture="burrow")
    assert "burrow" in refusal(made)


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    made = write_gguf(tmp_path / "x.gguf", federation_model(), tokenizer, without=["tokenizer"])
    assert "tokenizer" in refusal(made)


def test_a_file_without_a_tensor_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    made = write_gguf(tmp_path / "x.gguf", federation_model(), tokenizer, without=["blk.0.ffn_up.weight"])
    assert "no weights for model.layers.0.mlp.up_proj.weight" in refusal(made)


def test_code_beside_a_gguf_file_is_not_run(file: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    (tmp_path / "tiny.gguf").write_bytes(file.read_bytes())
    names = {"AutoConfig": "evil.T", "AutoModelForCausalLM": "evil.T", "AutoTokenizer": ["evil.T", "evil.T"]}
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"auto_map": names, "tokenizer_class": "T"}))
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    try:
        load_model(str(tmp_path / "tiny.gguf"))
    except MeerkatError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 (either is well)
    assert not mark.exists()


# --- runs ---


def test_a_run_on_a_gguf_file_is_the_run_on_its_folder_and_goes_home_like_one(
    file: Path, simulate_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_folder, at = tmp_path / "folder", simulate_arguments.index("--model") + 1
    assert main([*simulate_arguments, "--out", str(on_folder)]) == 0
    monkeypatch.chdir(file.parent)
    on_gguf = tmp_path / "gguf"
    with_gguf = [*simulate_arguments[:at], file.name, *simulate_arguments[at + 1 :]]
    assert main([*with_gguf, "--out", str(on_gguf)]) == 0
    digests = [RunFolder(root).summary()["theta_digest"] for root in (on_folder, on_gguf)]
    assert digests[0] == digests[1]

    monkeypatch.chdir(tmp_path)  # the model's path is absolute
    assert main(["resume", str(on_gguf)]) == 0
    assert main(["verify", str(on_gguf), "--evaluate"]) == 0
    assert main(["export", str(on_gguf), "--to", "merged"]) == 0
    assert main(["export", str(on_gguf), "--to", "delta", "--form", "delta"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tuned = apply_delta(base, tmp_path / "delta" / "delta.safetensors")
    assert fingerprint(merged) == fingerprint(tuned) != fingerprint(federation_model())
    ours, theirs = load_model(str(file))[1], AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    card = (tmp_path / "delta" / "README.md").read_text()
    assert f'from_pretrained(base, gguf_file="{file.name}", dtype="float32")' in card
    assert f"`{file.name}`, fingerprint `{fingerprint(federation_model())}`" in card


def test_sites_with_a_gguf_file_are_the_simulation_on_its_folder(
    file: Path, federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    shutil.copytree(federation, root)
    expected = Setting.make(root, tmp_path / "expected").simulated()
    shutil.rmtree(root / "model")
    (root / "model").mkdir()
    shutil.copy(file, root / "model")
    run = Federation.of(Setting.make(root, tmp_path / "sites"), monkeypatch)
    run.lived(tmp_path / "run")
    assert [record["theta"] for record in run.records if record["kind"] == "round"] == expected


def test_a_doctor_weighs_a_gguf_file_as_float32(file: Path) -> None:
    memory, model = checked_model(str(file), "cpu")
    assert f"{8 * file.stat().st_size / 1e6:.1f} MB of weights" in memory.found
    assert fingerprint(federation_model()) in model.found
