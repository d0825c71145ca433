"""Labelled rows and texts: JSON-lines files, or data sets of the Hugging Face hub."""

import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meerkat.errors import DAMAGE, MeerkatError, in_short, is_utf8

Row = Mapping[str, Any]
"""One row; where a problem has labels, its `label` is an index into them, counted from 0."""

_SPLITS = ("train", "validation", "test")
_FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".arrow": "arrow",
    ".txt": "text",
}
"""A file's ending -> what the `datasets` library calls its format."""

HUB_SPLITS = {"validation": ("validation", "test")}
"""Split -> hub splits to use, the first that exists: a test split replaces a missing validation split."""


def load_rows(source: str, split: str) -> list[Row]:
    """The rows of one split.

    Args:
        source: a folder with SPLIT.jsonl files. The files of any other folder, and any other name, go to
            `datasets.load_dataset`; a name may have a configuration after a colon, as in `aps/super_glue:boolq`.
        split: "train", "validation" or "test".

    Raises:
        MeerkatError: there is no such data, or a row is not a JSON object.
    """
    folder = Path(source)
    file = folder / f"{split}.jsonl"
    if file.is_file():
        return _read_jsonl(file)
    if folder.is_file():
        raise MeerkatError(f"data '{source}': is a file; give the folder that it is in")
    if folder.is_dir() and any(folder.glob("*.jsonl")):
        raise MeerkatError(f"data '{source}': the folder has no {split}.jsonl; add it, or use another split")
    if not folder.exists() and (folder.is_absolute() or source.startswith(".")):
        raise MeerkatError(
            f"data '{source}': no such folder; give one with train.jsonl and validation.jsonl, or a hub name"
        )
    return _from_hub(source, split)


def _read_jsonl(file: Path) -> list[Row]:
    rows: list[Row] = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise MeerkatError(f"data '{file}': not UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(parse_row(line, f"data '{file}', line {number}"))
    if not rows:
        raise MeerkatError(f"data '{file}': the file has no rows; give one JSON object a line")
    return rows


def parse_row(line: str, where: str) -> Row:
    """The row on one line of JSON lines; `where` stands in the message. Raises MeerkatError: it is no JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or a number too long for Python
        reason = error.msg if isinstance(error, json.JSONDecodeError) else in_short(error)
        raise MeerkatError(f"{where}: not JSON ({reason})") from None
    if not isinstance(row, dict):
        raise MeerkatError(f"{where}: must be a JSON object, not {type(row).__name__}")
    return row


def read_texts(source: str) -> Iterator[str]:
    """Texts one by one, from a file or from a hub data set's training split, which is streamed.

    Args:
        source: a `.jsonl` file with a `text` field on each line; any other file, with a text on each line; or a
            data set's folder or name, with an optional configuration after a colon, as in `allenai/c4:en`.

    Raises:
        MeerkatError: there is no such text, or a row without one.
    """
    path = Path(source)
    may_be_hub_name = path.suffix not in (".jsonl", ".txt") and not path.is_absolute() and source[:1] != "."
    if path.is_dir() or (may_be_hub_name and not path.exists()):
        yield from _hub_texts(source)
        return
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text_of(line, f"{source}, line {number}") if path.suffix == ".jsonl" else line.strip()
    except OSError as error:
        raise MeerkatError(
            f"text '{source}': {error.strerror}; give a .jsonl file with 'text' fields, plain text, or a hub name"
        ) from None
    except UnicodeDecodeError:
        raise MeerkatError(f"text '{source}': not UTF-8 text") from None


def _text_of(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except DAMAGE:
        text = None
    if not isinstance(text, str) or not is_utf8(text):
        raise MeerkatError(f"{where}: must be a JSON object with a 'text' string")
    return text


def _hub_texts(source: str) -> Iterator[str]:
    rows = iter(_load_dataset(source, "text", split="train", streaming=True))
    while True:
        try:  # rows are read as they are asked for
            row = next(rows, None)
        except Exception as error:
            raise _cannot_be_loaded(source, "text", error) from None
        if row is None:
            return
        if not isinstance(text := row.get("text"), str):
            raise MeerkatError(f"text '{source}': its rows have no 'text', only {', '.join(row)}; give another")
        if not is_utf8(text):
            raise MeerkatError(f"text '{source}': a row has half a character, such as \\ud800 alone; correct it")
        yield text


def _from_hub(source: str, split: str) -> list[Row]:
    splits = _load_dataset(source, "data")
    name = next((name for name in HUB_SPLITS.get(split, (split,)) if name in splits), None)
    if name is None:
        raise MeerkatError(f"data '{source}': has no split '{split}', only {', '.join(splits)}; give another data set")
    return [dict(row) for row in splits[name]]


def _files_by_split(folder: Path, what: str) -> tuple[str, Mapping[str, list[str]]]:
    """The format of a folder's files, and which belong to which split by the start of their names.

    Where no name starts with a split's, all are for training. Left to itself, the library would read the folder's card,
    which may name files elsewhere.
    """
    # '::' in a name would be the start of an address
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in _FORMATS and "::" not in str(file)]
    splits = {split: [file for file in files if file.name.startswith(split)] for split in _SPLITS}
    splits = {split: held for split, held in splits.items() if held} or {"train": files}
    if len(formats := {_FORMATS[file.suffix] for held in splits.values() for file in held}) != 1:
        found = "files of several formats" if formats else "no file that can be read"
        raise MeerkatError(
            f"{what} '{folder}': cannot be loaded ({found}); give a .jsonl file, or a folder with files of one format: "
            f"{', '.join(_FORMATS)}"
        )
    return formats.pop(), {split: [glob.escape(str(file)) for file in held] for split, held in splits.items()}


def _load_dataset(source: str, what: str, **options: Any) -> Any:
    """A data set from the hub or a folder; rows are plain dictionaries."""
    try:
        import datasets
    except ImportError:
        raise MeerkatError(
            f"{what} '{source}': hub data needs the 'datasets' package; pip install 'meerkat-fl[hub]'"
        ) from None
    name, configuration = source, None
    if Path(source).is_dir():
        name, options["data_files"] = _files_by_split(Path(source), what)
    elif not Path(source).exists() and ":" in source:
        name, configuration = source.rsplit(":", 1)
    try:
        return datasets.load_dataset(name, configuration, **options)
    except Exception as error:  # the library and its transport raise many kinds
        raise _cannot_be_loaded(source, what, error) from None


def _cannot_be_loaded(source: str, what: str, error: Exception) -> MeerkatError:
    """What to raise for the library's error, or for the one behind it, which says more."""
    told = str(error.__cause__ or error).strip() or type(error).__name__
    reason = told.splitlines()[0]
    cure = "a folder with train.jsonl" if what == "data" else "a .jsonl file with 'text' fields"
    return MeerkatError(f"{what} '{source}': cannot be loaded ({reason}); give {cure}, or a hub name")
