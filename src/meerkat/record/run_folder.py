"""A run's folder: what is in it, and writing it so that nothing is ever half there.

config.toml        all settings, resolved          mask.safetensors   what moves, and its base values
rounds.log         the record (runlog.py)          metrics.jsonl      losses, accuracies, times
summary.json       the outcome                     curves.png/.svg    the picture
events.jsonl       who came and went, in a federation
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from meerkat.errors import MeerkatError, RunFailed
from meerkat.masks.sparse_mask import SparseMask
from meerkat.record.run_log import append_whole
from meerkat.settings.config import RunConfig, make_config, read_toml

Metric = Mapping[str, Any]


class RunFolder:
    """The files of one run, by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config_path = root / "config.toml"
        self.mask_path = root / "mask.safetensors"
        self.log_path = root / "rounds.log"
        self.metrics_path = root / "metrics.jsonl"
        self.summary_path = root / "summary.json"
        self.events_path = root / "events.jsonl"
        self._followers: list[Callable[[Metric], None]] = []

    def follow(self, follower: Callable[[Metric], None]) -> None:
        """Have each metric that is noted from now on given to a follower, too."""
        self._followers.append(follower)

    @classmethod
    def check_free(cls, root: Path) -> None:
        """Raise MeerkatError unless the folder does not exist or is empty, so that a run can be put there."""
        if (root / "config.toml").exists():
            raise MeerkatError(
                f"run folder '{root}': has a run in it; 'meerkat resume {root}' goes on with it, or give another --out"
            )
        if root.exists() and not root.is_dir():
            raise MeerkatError(f"run folder '{root}': is a file; give another --out")
        if root.is_dir() and any(not entry.name.endswith(".part") for entry in root.iterdir()):
            raise MeerkatError(f"run folder '{root}': is not empty; give an empty or new folder as --out")
        nearest = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise MeerkatError(f"run folder '{root}': '{nearest}' cannot be written to; give another --out")

    @classmethod
    def create(cls, root: Path, config: RunConfig) -> "RunFolder":
        """Take a free folder and settle the run's settings in it.

        Raises:
            MeerkatError: the folder holds something, or cannot be made.
        """
        cls.check_free(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MeerkatError(f"run folder '{root}': {error.strerror}; give another --out") from None
        folder = cls(root)
        write_whole(folder.config_path, lambda part: part.write_text(config.to_toml(), encoding="utf-8"))
        return folder

    @classmethod
    def open(cls, root: Path) -> "RunFolder":
        """A folder that a run was started in.

        Raises:
            MeerkatError: there is no run in it.
        """
        folder = cls(root)
        if not folder.config_path.is_file():
            raise MeerkatError(
                f"run folder '{root}': no run in it (no config.toml); start one with 'meerkat simulate --out {root}'"
            )
        return folder

    def config(self) -> RunConfig:
        """The run's settings."""
        config = make_config(read_toml(self.config_path), spell=f"{self.config_path}: ")
        config.check_resolved(f"{self.config_path}: ")
        return config

    def mask(self) -> SparseMask:
        """The run's mask, with its base values."""
        return SparseMask.load(self.mask_path)

    def note(self, metric: Metric, through: bool = True) -> None:
        """Add one line to the metrics: the whole of it, `through` to the disk, or nothing."""
        with told_plainly(self.metrics_path, self.cure):
            file = os.open(self.metrics_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                append_whole(file, (json.dumps(metric) + "\n").encode(), through)
            finally:
                os.close(file)
        self._tell_followers(metric)

    def _tell_followers(self, metric: Metric) -> None:
        for follower in self._followers:
            follower(metric)

    def tell(self, event: str, **facts: Any) -> None:
        """Add one event to the federation's structured log: who came, who left, what did not count. Not synced."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts}
        with told_plainly(self.events_path, self.cure), self.events_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """The federation's structured log; lines that were cut short or changed are left out."""
        if not self.events_path.exists():
            return []
        held: list[dict[str, Any]] = []
        for line in self.events_path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                held.append(json.loads(line))
        return [event for event in held if isinstance(event, dict)]

    def metrics(self) -> list[Metric]:
        """All metrics, a torn last line left out.

        Raises:
            RunFailed: a line before the last is damaged.
        """
        if not self.metrics_path.exists():
            return []
        try:
            text = self.metrics_path.read_text(encoding="utf-8")
            held = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
            if all(isinstance(m, dict) and type(m.get("kind")) is str and type(m.get("round")) is int for m in held):
                return held
            raise ValueError
        except ValueError:
            raise RunFailed(
                f"{self.metrics_path}: damaged; delete it, then 'meerkat resume {self.root}': "
                "the run itself is in the log"
            ) from None

    def keep_metrics(
        self, wanted: Callable[[Metric], bool], place: Callable[[Metric], Any], more: Sequence[Metric] = ()
    ) -> list[Metric]:
        """Drop the metrics that are not wanted, add more, put all in the order of their places, and return them."""
        kept = sorted([*(metric for metric in self.metrics() if wanted(metric)), *more], key=place)
        lines = "".join(json.dumps(metric) + "\n" for metric in kept)
        write_whole(self.metrics_path, lambda part: part.write_text(lines, encoding="utf-8"), self.cure)
        for metric in more:
            self._tell_followers(metric)
        return kept

    def summary(self) -> dict[str, Any] | None:
        """The outcome, if the run has ended.

        Raises:
            ValueError: the file is damaged.
        """
        if not self.summary_path.exists():
            return None
        held = json.loads(self.summary_path.read_text(encoding="utf-8"))
        if not isinstance(held, dict):
            raise ValueError(f"{self.summary_path} holds no JSON object")
        return held

    @property
    def cure(self) -> str:
        """What to do after the disk refused something."""
        return f"make room, then 'meerkat resume {self.root}'"


def write_whole(path: Path, fill: Callable[[Path], Any], cure: str = "make room, or write elsewhere") -> None:
    """Write a file whole or not at all: `fill` writes a part file, which then takes its name."""
    part = path.with_name(path.name + ".part")
    with told_plainly(path, cure):
        try:
            fill(part)
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def told_plainly(path: Path, cure: str) -> Iterator[None]:
    """Turn a disk's refusal into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunFailed(f"{path}: {reason}; {cure}") from None
