"""A site's rows under example-level privacy: each is read alone, and one that is unfit counts as nothing.

What a single row is like then shows nowhere but in its own slopes, which are clipped and covered by noise. A row that
cannot be used has none: it adds zero to every sum, and is counted among the N rows like any other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meerkat.errors import MeerkatError, in_short
from meerkat.problems.classification import Classification
from meerkat.problems.data import Row, parse_row
from meerkat.problems.problem import Problem
from meerkat.problems.tasks import Task, check_rows
from meerkat.progress import number_of, say

_SHOWN = 10
"""Unfit rows that are listed, at most."""


def read_alone(folder: Path, task: Task | None) -> list[Row | MeerkatError]:
    """The rows of a folder's train.jsonl, one a line; in place of a row that is unfit, what is wrong with it.

    Other formats are not read: what one row of a table holds can change how all the others are read.

    Args:
        task: what rows must fit; None where they must only be rows.

    Raises:
        MeerkatError: there is no such file, or no row in it.
    """
    file = folder / "train.jsonl"
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise MeerkatError(f"data '{file}': {error.strerror}; dp example reads rows only from train.jsonl") from None
    rows = [_read_line(line, task, f"line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise MeerkatError(f"data '{file}': the file has no rows; give one JSON object a line")
    return rows


def _read_line(line: bytes, task: Task | None, where: str) -> Row | MeerkatError:
    try:
        row = parse_row(line.decode(), where)
        if task is not None:
            check_rows(task, [row], where)
    except UnicodeDecodeError:
        return MeerkatError(f"{where}: not UTF-8 text")
    except MeerkatError as error:
        return error
    return row


def prepare_alone(problem: Problem) -> list[Any | None]:
    """The training rows as the model sees them, each prepared on its own; None for one that is unfit.

    Which rows are unfit, and why, is said here, in the site's own log. An extension's problem reads its rows itself.

    Raises:
        MeerkatError: there are no rows.
    """
    rows: Sequence[Row | MeerkatError]
    if isinstance(problem, Classification):
        rows = read_alone(Path(problem.data), problem.task)
    else:
        rows = problem.rows("train")
    prepared = [_prepare(problem, row, f"row {number}") for number, row in enumerate(rows, 1)]
    if unfit := [each for each in prepared if isinstance(each, MeerkatError)]:
        say(f"note: {number_of(len(unfit), 'row')} of {len(rows):,} cannot be used: counted, with slopes of zero")
        for error in unfit[:_SHOWN]:
            say(f"  {error}")
    return [None if isinstance(each, MeerkatError) else each for each in prepared]


def _prepare(problem: Problem, row: Row | MeerkatError, where: str) -> Any | MeerkatError:
    if isinstance(row, MeerkatError):
        return row
    try:
        (example,) = problem.prepare([row])
    except Exception as error:  # tokenizers and extensions raise many kinds
        return MeerkatError(f"{where}: {in_short(error)}")
    return example
