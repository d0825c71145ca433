"""A model folder from somebody else runs no code: neither its own modules, whoever answers a prompt, nor a pickle."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from meerkat.errors import MeerkatError
from meerkat.problems.models import load_model


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Boom:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("kind", ["evil", "llama"], ids=["unknown kind", "known kind"])
@pytest.mark.parametrize("said", ["", "y\n"])
def test_code_in_a_model_folder_is_not_run_whatever_standard_input_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, kind: str
) -> None:
    mark = folder.parent / "it-ran"
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": names}))
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    (folder / "evil.py").write_text(code)
    monkeypatch.setattr("sys.stdin", stdin := io.StringIO(said))
    if kind == "llama":  # transformers' own class is taken
        load_model(str(folder))
    else:
        with pytest.raises(MeerkatError, match="code of its own, which is not run") as told:
            load_model(str(folder))
        assert len(str(told.value).splitlines()) == 1
    assert not mark.exists()
    assert stdin.tell() == 0, "nobody was asked"


def test_code_of_a_tokenizer_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = folder.parent / "it-ran"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    monkeypatch.setattr("sys.stdin", stdin := io.StringIO("y\n"))
    try:
        load_model(str(folder))
    except MeerkatError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 (either is well)
    assert not mark.exists()
    assert stdin.tell() == 0


def test_pickled_weights_are_refused(folder: Path) -> None:
    mark = folder.parent / "it-ran"
    (folder / "model.safetensors").unlink()
    torch.save({"x": Boom(mark)}, folder / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(MeerkatError, match="safetensors") as told:
        load_model(str(folder))
    assert len(str(told.value).splitlines()) == 1
    assert not mark.exists()


def test_pickled_weights_are_refused_even_if_they_are_harmless(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(MeerkatError, match="safetensors"):
        load_model(str(folder))


def test_safetensors_are_taken_where_both_are_there(folder: Path) -> None:
    mark = folder.parent / "it-ran"
    torch.save({"x": Boom(mark)}, folder / "pytorch_model.bin", pickle_module=pickle)
    load_model(str(folder))
    assert not mark.exists()
