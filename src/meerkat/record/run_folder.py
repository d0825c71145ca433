"""A run's folder: its files, each written whole or not at all.

config.toml        all settings, resolved          mask.safetensors   which entries move, and their base values
rounds.log         the record (run_log.py)         metrics.jsonl      losses, accuracies, times
summary.json       the outcome                     curves.png/.svg    the picture
events.jsonl       who came and went, in a federation
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from meerkat.errors import MeerkatError, RunFailed
from meerkat.masks.sparse_mask import SparseMask
from meerkat.record.files import (
    check_no_links,
    explain_disk_errors,
    is_leftover,
    make_folder,
    owned,
    remove_leftovers,
    write_text,
)
from meerkat.record.run_log import append_line
from meerkat.settings.config import SITES, RunConfig, make_config, read_toml
from meerkat.settings.validation import check_writable

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
        self.track: Callable[[Metric], object] = lambda _: None
        """Is given each metric that is added."""
        self._files: dict[Path, int] = {}
        """Descriptors of the files that lines are added to. They stay open: a line must not need another file."""

    @classmethod
    def check_free(cls, root: Path) -> None:
        """Raise MeerkatError unless a run can be put in the folder: it does not exist yet, or is empty."""
        if (root / "config.toml").exists():
            raise MeerkatError(
                f"run folder '{root}': already holds a run; 'meerkat resume {root}' continues it, or give another --out"
            )
        if root.exists() and not root.is_dir():
            raise MeerkatError(f"run folder '{root}': is a file; give another --out")
        if root.is_dir() and any(not is_leftover(entry.name) for entry in root.iterdir()):
            raise MeerkatError(f"run folder '{root}': is not empty; give an empty or new folder as --out")
        check_no_links(root)
        check_writable(root, f"run folder '{root}'", "another --out")

    @classmethod
    def create(cls, root: Path, config: RunConfig) -> "RunFolder":
        """Make a run folder with the run's settings in it. Raises MeerkatError: it is not free, or cannot be made."""
        cls.check_free(root)
        try:
            make_folder(root)
        except OSError as error:
            raise MeerkatError(f"run folder '{root}': {error.strerror}; give another --out") from None
        folder = cls(root)
        write_text(folder.config_path, config.to_toml())
        return folder

    @classmethod
    def open(cls, root: Path) -> "RunFolder":
        """The folder of a run that was started. Raises MeerkatError: there is no run in it, or a link."""
        folder = cls(root)
        if root.is_file():
            raise MeerkatError(f"run folder '{root}': is a file; give the folder of a run")
        if not folder.config_path.is_file() and (root / "cells").is_dir():
            raise MeerkatError(
                f"'{root}': a comparison; give one of its runs, such as {root}/cells/NAME, or, to continue it, "
                f"give the same 'meerkat compare' command again, with --out {root}"
            )
        if not folder.config_path.is_file():
            raise MeerkatError(
                f"run folder '{root}': no run in it (no config.toml); start one with 'meerkat simulate --out {root}'"
            )
        check_no_links(root)
        return folder

    def config(self) -> RunConfig:
        """The run's settings."""
        config = make_config(read_toml(self.config_path), where=f"{self.config_path}: ")
        config.check_resolved(f"{self.config_path}: ")
        return config

    def mask(self) -> SparseMask:
        """The run's mask, with its base values."""
        return SparseMask.load(self.mask_path)

    def open_files(self) -> None:
        """Open metrics and event log for adding to, before the run accepts connections, which take files too."""
        for path in (self.metrics_path, self.events_path):
            with explain_disk_errors(path, self.cure):
                self._open(path)

    def close(self) -> None:
        """Close the files that lines were added to."""
        for path in [*self._files]:
            os.close(self._files.pop(path))

    def _open(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = owned(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        return self._files[path]

    def _append(self, path: Path, values: Mapping[str, Any], sync: bool) -> None:
        with explain_disk_errors(path, self.cure):
            append_line(self._open(path), (json.dumps(values) + "\n").encode(), sync)

    def append_metric(self, metric: Metric, sync: bool = True) -> None:
        """Add one line to the metrics, or nothing on an error; with `sync`, it is on the disk afterwards."""
        self._append(self.metrics_path, metric, sync)
        self.track(metric)

    def append_event(self, event: str, **facts: Any) -> None:
        """Add one event to a federation's event log: who came, who left, what was not counted. Not synced."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts}
        self._append(self.events_path, line, sync=False)

    def events(self) -> list[dict[str, Any]]:
        """A federation's event log, without lines that are malformed."""
        events: list[Any] = []
        if self.events_path.exists():
            for line in self.events_path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, RecursionError):
                    events.append(json.loads(line))
        return [event for event in events if isinstance(event, dict)]

    def metrics(self) -> list[Metric]:
        """All metrics, except a torn last line. Raises RunFailed: a line before the last is damaged."""
        if not self.metrics_path.exists():
            return []
        with suppress(ValueError):
            text = self.metrics_path.read_text(encoding="utf-8")
            metrics = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
            if all(isinstance(m, dict) and type(m.get("kind")) is str and type(m.get("round")) is int for m in metrics):
                return metrics
        raise self.damaged_metrics()

    def damaged_metrics(self) -> RunFailed:
        """What to raise where a line of the metrics is damaged."""
        return RunFailed(
            f"{self.metrics_path}: damaged; delete it, then {self.resumption}: the run itself is in the log"
        )

    def rewrite_metrics(
        self, keep: Callable[[Metric], bool], order: Callable[[Metric], Any], add: Sequence[Metric] = ()
    ) -> list[Metric]:
        """Rewrite the metrics file, sorted: the metrics to keep and those to add. Returns them."""
        metrics = sorted([*filter(keep, self.metrics()), *add], key=order)
        lines = "".join(json.dumps(metric) + "\n" for metric in metrics)
        write_text(self.metrics_path, lines, self.cure)
        if (replaced := self._files.pop(self.metrics_path, None)) is not None:
            os.close(replaced)
            self._open(self.metrics_path)
        for metric in add:
            self.track(metric)
        return metrics

    def summary(self) -> dict[str, Any] | None:
        """The outcome; None before the run has ended. Raises ValueError: the file is damaged."""
        if not self.summary_path.exists():
            return None
        summary = json.loads(self.summary_path.read_text(encoding="utf-8"))
        if not isinstance(summary, dict):
            raise ValueError(f"{self.summary_path} is not a JSON object")
        return summary

    def remove_leftovers(self) -> None:
        """Remove temporary files that a killed run left; the log must be open, so that no other process writes them."""
        remove_leftovers(self.config_path, self.mask_path, self.metrics_path, self.summary_path)

    @property
    def cure(self) -> str:
        """What to do after a disk error."""
        return f"make room, then {self.resumption}"

    @cached_property
    def resumption(self) -> str:
        """How the run is resumed."""
        with suppress(MeerkatError):
            if self.config().partition == SITES:
                return f"start its coordinator again with run folder {self.root}"
        return f"'meerkat resume {self.root}'"
