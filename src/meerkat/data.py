"""Labelled data: a folder of JSON-lines files, or a data set of the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

from meerkat.errors import MeerkatError
from meerkat.tasks import Row

HUB_SPLITS = {"validation": ("validation", "test")}
"""Where a hub data set has no validation split, its test split stands in."""


def load_rows(source: str, split: str) -> list[Row]:
    """The rows of one split.

    Args:
        source: a folder with SPLIT.jsonl files; any other folder or name goes to `datasets.load_dataset`,
            with a configuration after a colon where it has one, as in `aps/super_glue:boolq`.
        split: "train", "validation" or "test".

    Raises:
        MeerkatError: no such data, or rows that are not JSON objects.
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
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MeerkatError(f"data '{file}', line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise MeerkatError(f"data '{file}', line {number}: must be a JSON object, not {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise MeerkatError(f"data '{file}': the file has no rows; give one JSON object a line")
    return rows


def _from_hub(source: str, split: str) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise MeerkatError(
            f"data '{source}': hub data needs the 'datasets' package; pip install 'meerkat-fl[hub]'"
        ) from None
    name, configuration = source, None
    if not Path(source).exists() and ":" in source:
        name, configuration = source.rsplit(":", 1)
    try:
        # a data set's own type is Any here: its rows are plain dictionaries
        held: Any = datasets.load_dataset(name, configuration)
        present = next((s for s in HUB_SPLITS.get(split, (split,)) if s in held), None)
    except Exception as error:  # the library raises many kinds, its own and its transport's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MeerkatError(
            f"data '{source}': cannot be loaded ({reason}); give a folder with train.jsonl, or a hub name"
        ) from None
    if present is None:
        raise MeerkatError(f"data '{source}': has no split '{split}', only {', '.join(held)}")
    return [dict(row) for row in held[present]]
