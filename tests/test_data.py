import gc
import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meerkat.errors import MeerkatError
from meerkat.problems.data import load_rows, read_texts

TRAIN: list[dict[str, Any]] = [{"text": "one", "label": 0}, {"text": "two", "label": 1, "site": "Ulm"}]
TEST: list[dict[str, Any]] = [{"text": "three", "label": 1}]


def one_line(refusal: pytest.ExceptionInfo[MeerkatError]) -> str:
    message = str(refusal.value)
    assert message.strip()
    assert "\n" not in message
    return message


def write(folder: Path, split: str, text: str) -> None:
    (folder / f"{split}.jsonl").write_bytes(text.encode())


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- JSON lines ---


def test_the_rows_of_a_split_in_their_order(tmp_path: Path) -> None:
    write(tmp_path, "train", jsonl(TRAIN))
    write(tmp_path, "validation", jsonl(TEST))
    assert load_rows(str(tmp_path), "train") == TRAIN
    assert load_rows(str(tmp_path), "validation") == TEST


def test_a_relative_folder_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine", "train", jsonl(TRAIN))
    monkeypatch.chdir(tmp_path)
    assert load_rows("mine", "train") == load_rows("./mine", "train") == TRAIN


@pytest.mark.parametrize(
    "text",
    [
        "\n\n" + jsonl(TRAIN[:1]) + "  \t\n\n" + jsonl(TRAIN[1:]) + "\n",
        jsonl(TRAIN).rstrip("\n"),
        jsonl(TRAIN).replace("\n", "\r\n"),
    ],
    ids=["blank lines", "no newline at the end", "carriage returns"],
)
def test_how_lines_are_parted_does_not_matter(tmp_path: Path, text: str) -> None:
    write(tmp_path, "train", text)
    assert load_rows(str(tmp_path), "train") == TRAIN


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_unicode_line_separator_inside_a_string_does_not_split_the_row(tmp_path: Path, separator: str) -> None:
    rows = [{"text": f"one{separator}two", "label": 0}, {"text": "three", "label": 1}]
    write(tmp_path, "train", jsonl(rows))
    assert separator.encode() in (tmp_path / "train.jsonl").read_bytes()
    assert load_rows(str(tmp_path), "train") == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"label": 0}\n\n{"label": 1\n', "line 3: not JSON"),
        ("label,text\n", "line 1: not JSON"),
        ('{"label": 0}\n[1, 2]\n', "line 2: must be a JSON object, not list"),
        ('{"label": 0}\n"text"\n', "line 2: must be a JSON object, not str"),
        ("null\n", "line 1: must be a JSON object, not NoneType"),
        ('{"label": 0}\n{"label": ' + "9" * 5000 + "}\n", "line 2: not JSON .*4300 digits"),
        ('{"label": ' + "[" * 100_000 + "}\n", "line 1: not JSON .*RecursionError"),
        ("", "no rows"),
        ("\n \n", "no rows"),
    ],
)
def test_a_bad_file_is_refused_with_the_line(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, "train", text)
    with pytest.raises(MeerkatError, match=said) as refusal:
        load_rows(str(tmp_path), "train")
    assert str(tmp_path / "train.jsonl") in one_line(refusal)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes('{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(MeerkatError, match="not UTF-8") as refusal:
        load_rows(str(tmp_path), "train")
    assert str(tmp_path / "train.jsonl") in one_line(refusal)


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path, "train", jsonl(TRAIN))
    write(tmp_path, "test", jsonl(TEST))  # stands in for nothing: a folder of one's own says what it means
    with pytest.raises(MeerkatError, match=r"no validation\.jsonl") as refusal:
        load_rows(str(tmp_path), "validation")
    assert str(tmp_path) in one_line(refusal)


@pytest.mark.parametrize("relative", [False, True])
def test_a_missing_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
    monkeypatch.chdir(tmp_path)
    name = "./none" if relative else str(tmp_path / "none")
    with pytest.raises(MeerkatError, match="no such folder") as refusal:
        load_rows(name, "train")
    assert f"'{name}'" in one_line(refusal)


# --- through the datasets library ---


@pytest.fixture(scope="module")
def real_datasets() -> Any:
    return pytest.importorskip("datasets", reason="needs the 'hub' extra")


@pytest.fixture
def parquet(real_datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of parquet files with a train and a test split; the library's cache is kept away from the user's."""
    monkeypatch.setattr(real_datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "parquet"
    folder.mkdir()
    real_datasets.Dataset.from_list([{"text": "one", "label": 0}, {"text": "two", "label": 1}]).to_parquet(
        folder / "train.parquet"
    )
    real_datasets.Dataset.from_list(TEST).to_parquet(folder / "test.parquet")
    return folder


def test_a_folder_of_parquet_files_is_loaded(parquet: Path) -> None:
    rows = load_rows(str(parquet), "train")
    assert rows == [{"text": "one", "label": 0}, {"text": "two", "label": 1}]
    assert all(type(row["label"]) is int for row in rows)


def test_the_test_split_stands_in_for_a_missing_validation_split(parquet: Path) -> None:
    assert load_rows(str(parquet), "validation") == TEST
    assert load_rows(str(parquet), "test") == TEST


def test_a_validation_split_goes_before_the_test_split(real_datasets: Any, parquet: Path) -> None:
    held_out = [{"text": "four", "label": 0}]
    real_datasets.Dataset.from_list(held_out).to_parquet(parquet / "validation.parquet")
    assert load_rows(str(parquet), "validation") == held_out


def test_nothing_stands_in_for_a_missing_training_split(parquet: Path) -> None:
    (parquet / "train.parquet").unlink()
    with pytest.raises(MeerkatError, match="no split 'train', only test") as refusal:
        load_rows(str(parquet), "train")
    one_line(refusal)


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "named", ["{elsewhere}/secret.jsonl", "../elsewhere/secret.jsonl", "http://127.0.0.1:9/x.jsonl"]
)
def test_a_card_in_a_folder_does_not_say_which_files_are_read(
    parquet: Path, tmp_path: Path, card: str, named: str
) -> None:
    """A data set's card may name files anywhere, on the network too, and the library would read them."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret.jsonl").write_text('{"text": "a row of ours", "label": 0}\n')
    files = f'{{split: train, path: "{named.format(elsewhere=elsewhere)}"}}'
    settings = f"configs:\n- {{config_name: default, data_files: [{files}]}}\n"
    (parquet / "dataset_infos.json").write_text("{}")  # as data sets have it
    (parquet / card).write_text(f"---\n{settings}---\n" if card == "README.md" else settings)
    assert load_rows(str(parquet), "train") == [{"text": "one", "label": 0}, {"text": "two", "label": 1}]


@pytest.mark.usefixtures("real_datasets")
def test_files_of_other_names_are_the_training_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder [1]" / "data").mkdir(parents=True)
    (tmp_path / "folder [1]" / "data" / "part-0.csv").write_text("text,label\none,0\n")
    assert load_rows(str(tmp_path / "folder [1]"), "train") == [{"text": "one", "label": 0}]


@pytest.mark.usefixtures("real_datasets")
def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MeerkatError, match="cannot be loaded") as refusal:
        load_rows(str(tmp_path), "train")
    assert str(tmp_path) in one_line(refusal)


@pytest.mark.usefixtures("real_datasets")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.csv", b'text\none\n"two, three\n', "cannot be loaded"),
        ("train.txt", b"caf\xe9\n" * 3, "cannot be loaded ('utf-8' codec can't decode byte 0xe9"),
        ("train.json", b'{"text": "one"}\nnot json\n', "cannot be loaded"),
        ("train.csv", b"word\none\n", "its rows have no 'text', only word"),
    ],
)
def test_a_text_folder_that_breaks_while_it_is_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, said: str
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)
    with pytest.raises(MeerkatError, match=re.escape(said)) as refusal:
        list(read_texts(str(tmp_path / "text")))
    one_line(refusal)
    del refusal
    gc.collect()  # the library leaves its file open


@pytest.mark.usefixtures("real_datasets")
@pytest.mark.parametrize("name", ["meerkat-tests/none", "meerkat-tests/none:boolq", "none"])
def test_a_hub_name_offline_is_refused_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    with pytest.raises(MeerkatError, match="cannot be loaded") as refusal:
        load_rows(name, "train")
    assert time.monotonic() - began < 30  # and not after many tries; a busy machine is slow
    assert f"'{name}'" in one_line(refusal)


# --- what the library is asked, and what becomes of its answers ---


def hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


@pytest.mark.parametrize(
    ("source", "asked"),
    [("aps/super_glue:boolq", ("aps/super_glue", "boolq")), ("ag_news", ("ag_news", None)), ("a/b", ("a/b", None))],
)
def test_a_configuration_follows_a_colon(
    monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[str, str | None]
) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        return {"train": TRAIN}

    hub(monkeypatch, load_dataset)
    assert load_rows(source, "train") == TRAIN
    assert calls == [asked]


@pytest.mark.parametrize(
    ("raised", "said"),
    [(RuntimeError("\n  first\nsecond"), "(first)"), (TimeoutError(), "(TimeoutError)"), (ValueError("x"), "(x)")],
)
def test_whatever_the_library_raises_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str
) -> None:
    def load_dataset(*_: Any) -> Any:
        raise raised

    hub(monkeypatch, load_dataset)
    with pytest.raises(MeerkatError) as refusal:
        load_rows("org/name", "train")
    assert said in one_line(refusal)
    assert "'org/name'" in one_line(refusal)


def test_without_the_library_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MeerkatError) as refusal:
        load_rows("org/name", "train")
    assert "pip install 'meerkat-fl[hub]'" in one_line(refusal)  # the distribution's name, as in pyproject.toml


def test_texts_come_from_a_data_set_too(real_datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "texts").mkdir()
    real_datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}]).to_parquet(tmp_path / "texts" / "train.parquet")
    monkeypatch.chdir(tmp_path)
    assert list(read_texts("texts")) == ["one", "two"]
    real_datasets.Dataset.from_list([{"label": 1}]).to_parquet(tmp_path / "texts" / "train.parquet")
    with pytest.raises(MeerkatError, match="its rows have no 'text', only label"):
        list(read_texts("texts"))


def test_a_hub_text_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return iter({"text": str(i)} for i in itertools.count())

    hub(monkeypatch, load_dataset)
    assert list(itertools.islice(read_texts("org/corpus:en"), 3)) == ["0", "1", "2"]
    assert asked == [(("org/corpus", "en"), {"split": "train", "streaming": True})]


@pytest.mark.parametrize(
    "line", ['{"text": "half a \\ud800"}', '{"text": ' + "[" * 100_000 + "}", '{"text": 9' + "9" * 5000 + "}"]
)
def test_a_text_that_no_tokenizer_takes_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(MeerkatError, match="line 2: must be a JSON object with a 'text' string"):
        list(read_texts(str(tmp_path / "text.jsonl")))
