"""Finished runs of comparisons, a line each in a CSV file that outlives their folders.

A run is known by what it starts from (weights, rows, text) and by its settings: whoever compares the same again, on any
machine, takes its outcome from the file. docs/formats.md describes the columns.
"""

import csv
import fcntl
import hashlib
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from meerkat.errors import DAMAGE, MeerkatError, in_short
from meerkat.masks.sparse_mask import SparseMask, fingerprint
from meerkat.problems.data import Row
from meerkat.problems.problem import Problem, Public
from meerkat.record.files import explain_disk_errors, write_text
from meerkat.settings.config import RunConfig

_IDENTIFIED_OTHERWISE = {"model", "data", "text", "mask", "device", "threads"}
"""Settings that are paths, which the digests stand for, or that say where and how fast a run is made."""
_PACKAGES = {"meerkat": "meerkat-fl", "torch": "torch", "transformers": "transformers"}
COLUMNS = (
    *("model", "parameters", "task", "method", "partition", "clients", "local_steps", "rounds", "batch_size", "seed"),
    *("held_back", "moving", "lr", "eps", "dtype", "outcome", "accuracy_before", "accuracy", "loss_before", "loss"),
    *("wall_s", "theta_digest", *_PACKAGES, "model_digest", "rows_digest", "text_digest", "settings", "summary"),
)


@dataclass(frozen=True)
class Origin:
    """What runs start from, as SHA-256."""

    model: str
    """Of the pre-trained weights: see `masks.sparse_mask.fingerprint`."""
    rows: str
    """Of the training and validation rows, as they are and as the model sees them."""
    text: str
    """Of the public text that masks are made from, likewise; empty where there is none."""

    @classmethod
    def of(cls, problem: Problem) -> Self:
        """Read it from a problem, whose model has no adapters."""
        rows = [problem.rows("train"), _validation_rows(problem)]
        public = problem.public()
        text = [] if public is None else [*_tokens(public), _seen(problem, public.rows)]
        seen = [[row, _seen(problem, row)] for row in rows]
        return cls(fingerprint(problem.model), _digest(seen), _digest(text) if text else "")


def _validation_rows(problem: Problem) -> list[Row]:
    """Empty where they cannot be read: a comparison whose runs need them was refused before."""
    try:
        return problem.rows("validation")
    except MeerkatError:
        return []


def _seen(problem: Problem, rows: Sequence[Row]) -> str:
    return problem.digest(problem.prepare(rows)) if rows else ""


def _tokens(public: Public) -> list[Any]:
    """Its examples; what is said of them, where a problem's examples are of a kind of its own."""
    return [example.tolist() if isinstance(example, Tensor) else dict(public.facts) for example in public.examples]


def check_origins(folder: Path, origins: Mapping[str, Origin]) -> None:
    """Keep what a comparison's folder rests on, and see that it does not change: finished runs are not looked into.

    Args:
        origins: by what tells a comparison's problems apart.

    Raises:
        MeerkatError: weights, rows or text are others than before, or runs were made before anybody noted these.
    """
    file = folder / "origins.json"
    cure = "give a new --out"
    if not file.exists() and any(any((folder / name).iterdir()) for name in ("cells", "search", "masks")):
        raise MeerkatError(f"'{folder}': was begun without --evidence, so what its runs used was not recorded; {cure}")
    try:
        known = dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
    except (OSError, *DAMAGE) as error:
        raise MeerkatError(f"{file}: damaged ({in_short(error)}); {cure}") from None
    new = {name: asdict(origin) for name, origin in origins.items()}
    if any(known[name] != new[name] for name in known.keys() & new.keys()):
        raise MeerkatError(f"'{folder}': its runs used other weights, rows or text than those here now; {cure}")
    write_text(file, json.dumps({**known, **new}, indent=1) + "\n")


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    lr: float
    """The learning rate that it began with."""
    summary: dict[str, Any] | None
    """As in its summary.json; None where it diverged."""


@dataclass(frozen=True)
class Entry:
    """One line of the file."""

    origin: Origin
    settings: Mapping[str, Any]
    """As `identity` has them."""
    model: str
    """The name of the model's folder."""
    outcome: Outcome


def identity(config: RunConfig, made: Path | None = None) -> dict[str, Any]:
    """A run's settings as JSON values, those at their defaults and all paths left out.

    Args:
        made: the folder of masks that were made for the comparison, and follow from the other settings. Any other mask
            is known by its entries.
    """
    settings = config.model_dump(mode="json", exclude=_IDENTIFIED_OTHERWISE, exclude_defaults=True)
    if "task" in settings:
        settings["task"] = Path(settings["task"]).stem
    if config.mask and (made is None or Path(config.mask).parent != made.resolve()):
        settings["mask"] = SparseMask.load(Path(config.mask)).digest()
    return settings


@dataclass(frozen=True)
class Evidence:
    """The runs of one origin in a file, which need not exist yet."""

    file: Path
    origin: Origin
    made: Path | None = None
    """See `identity`."""

    def outcome(self, config: RunConfig) -> Outcome | None:
        """What came of a run; None where it is not in the file."""
        if not self.file.exists():
            return None
        return _outcomes(self.file, *_stamp(self.file)).get(_name(self.origin, identity(config, self.made)))

    def add(self, config: RunConfig, outcome: Outcome, resolved: RunConfig) -> None:
        """Append a run.

        Args:
            config: its settings as they were asked for.
            resolved: as its folder has them.

        Raises:
            RunFailed: the disk refused it.
        """
        summary = outcome.summary and {**outcome.summary, "model": Path(outcome.summary["model"]).name}
        facts = summary or {}
        line = {
            **{"model": Path(config.model).name, "parameters": facts.get("params_total")},
            **{"task": Path(resolved.task).stem, "method": config.method, "partition": config.partition},
            **{name: getattr(config, name) for name in ("clients", "local_steps", "rounds", "batch_size", "seed")},
            **{"held_back": config.held_back, "moving": facts.get("params_masked"), "lr": outcome.lr},
            **{"eps": resolved.eps, "dtype": resolved.dtype, "outcome": "finished" if summary else "diverged"},
            **{name: facts.get(name) for name in ("accuracy_before", "accuracy", "loss_before", "loss", "wall_s")},
            **{"theta_digest": facts.get("theta_digest")},
            **{name: version(package) for name, package in _PACKAGES.items()},
            **{f"{name}_digest": digest for name, digest in asdict(self.origin).items()},
            "settings": json.dumps(identity(config, self.made), sort_keys=True),
            "summary": json.dumps(summary),
        }
        with explain_disk_errors(self.file, "make room; the same command goes on from here"):
            _append(self.file, line)


def read(file: Path) -> list[Entry]:
    """All runs in a file, in its order; none where there is no such file. A last line that was cut off does not count.

    Raises:
        MeerkatError: it holds something else.
    """
    return list(_read(file, *_stamp(file))) if file.exists() else []


def _stamp(file: Path) -> tuple[int, int]:
    """Changes when the file does."""
    status = file.stat()
    return status.st_mtime_ns, status.st_size


def _name(origin: Origin, settings: Mapping[str, Any]) -> tuple[Origin, str]:
    return origin, json.dumps(settings, sort_keys=True)


@lru_cache(maxsize=4)
def _outcomes(file: Path, *stamp: int) -> dict[tuple[Origin, str], Outcome]:
    """Of each run, what the file says first."""
    return {_name(entry.origin, entry.settings): entry.outcome for entry in reversed(_read(file, *stamp))}


@lru_cache(maxsize=4)
def _read(file: Path, *_: int) -> tuple[Entry, ...]:
    try:
        text = file.read_text(encoding="utf-8")
        csv.field_size_limit(sys.maxsize)  # of many clients, a summary is long
        lines = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]), strict=True)
        return tuple(map(_entry, lines))
    except (OSError, csv.Error, *DAMAGE) as error:
        cure = "give the file of an earlier comparison, or one that does not exist yet"
        raise MeerkatError(f"evidence '{file}': holds no runs of comparisons ({in_short(error)}); {cure}") from None


def check_file(file: Path) -> None:
    """Raise MeerkatError unless runs can be read from a file and added to it, or it can be made."""
    if not file.parent.is_dir():
        raise MeerkatError(f"evidence '{file}': there is no folder '{file.parent}'; make it first")
    if file.is_dir():
        raise MeerkatError(f"evidence '{file}': is a folder; give a .csv file, which need not exist yet")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise MeerkatError(f"evidence '{file}': cannot be written here; give another file")
    if file.exists():
        _check_header(file, file.read_bytes())
    read(file)


def _check_header(file: Path, content: bytes) -> None:
    header = (",".join(COLUMNS) + "\n").encode()
    if content[: len(header)] != header[: len(content)]:
        raise MeerkatError(
            f"evidence '{file}': does not begin with the columns of runs; give the file of an earlier comparison, or "
            "one that does not exist yet"
        )


def _entry(line: Mapping[str, str]) -> Entry:
    origin = Origin(line["model_digest"], line["rows_digest"], line["text_digest"])
    outcome = Outcome(float(line["lr"]), json.loads(line["summary"]))
    return Entry(origin, json.loads(line["settings"]), line["model"], outcome)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _append(file: Path, line: Mapping[str, Any]) -> None:
    """Append a line, while no other process does, behind the last whole one; the first comes with its header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    with open(file, "a+b") as lines:
        fcntl.flock(lines, fcntl.LOCK_EX)
        lines.seek(0)
        content = lines.read()
        _check_header(file, content)
        whole = content.rfind(b"\n") + 1
        lines.truncate(whole)
        if not whole:
            writer.writeheader()
        writer.writerow(line)
        lines.write(out.getvalue().encode())
        lines.flush()
        os.fsync(lines.fileno())
