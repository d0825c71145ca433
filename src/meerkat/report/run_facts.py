"""What a run's folder tells, read once: as far as the run got, and as far as its files are there."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from meerkat.errors import RunFailed
from meerkat.masks.sparse_mask import SparseMask
from meerkat.record import history
from meerkat.record.run_folder import Metric, RunFolder
from meerkat.run.summary import without_budget
from meerkat.settings.config import RunConfig


@dataclass(frozen=True)
class Story:
    """A run, finished or not."""

    root: Path
    config: RunConfig
    metrics: Sequence[Metric]
    summary: dict[str, Any] | None
    """The outcome; none where the run has not ended."""
    mask: SparseMask | None
    """None where the run ended before it had one."""
    records: history.Records
    without_budget: Sequence[int] = ()
    """Clients whose privacy budget does not last to the end of the run."""

    @classmethod
    def read(cls, root: Path) -> "Story":
        """Read a folder.

        Raises:
            MeerkatError: there is no run in it; RunFailed: something in it is damaged.
        """
        folder = RunFolder.open(root)
        try:
            summary = folder.summary()
        except ValueError as error:
            raise RunFailed(
                f"{folder.summary_path}: damaged ({error}); delete it, then 'meerkat resume {root}'"
            ) from None
        mask = folder.mask() if folder.mask_path.is_file() else None
        records = history.read(root)
        return cls(root, folder.config(), folder.metrics(), summary, mask, records, without_budget(folder))

    @property
    def first_order(self) -> bool:
        """Whether clients sent weights rather than scalars."""
        return self.config.recipe.update == "first-order"

    @cached_property
    def rounds(self) -> int:
        """Closed rounds."""
        noted: list[int] = [metric["round"] + 1 for metric in self.metrics if metric["kind"] == "round"]
        logged = [record.plan.round + 1 for record in self.records.rounds]
        return max([0, *noted, *logged])

    @cached_property
    def evaluations(self) -> list[Metric]:
        """Each time the model was judged, in order."""
        return sorted((m for m in self.metrics if m["kind"] == "evaluation"), key=lambda m: m["round"])

    def of_kind(self, kind: str) -> list[Metric]:
        """Metrics of one kind, in order of rounds."""
        return sorted((m for m in self.metrics if m["kind"] == kind), key=lambda m: m["round"])

    def payload(self, before: int | None = None, kinds: Sequence[str] = ("round", "calibration")) -> float:
        """Mean bytes of payload a client, up and down, in the rounds before one (in all)."""
        worked = [m for m in self.metrics if m["kind"] in kinds and (before is None or m["round"] < before)]
        return float(sum(m["bytes_up"] + m["bytes_down"] for m in worked)) / self.config.clients

    def sent(self, way: str, kind: str) -> float:
        """Mean bytes a client sent ("up") or was sent ("down") in rounds or in calibrations."""
        return float(sum(m[f"bytes_{way}"] for m in self.metrics if m["kind"] == kind)) / self.config.clients

    @cached_property
    def split(self) -> tuple[list[str], np.ndarray] | None:
        """Labels, and each client's rows of each, int [K, C]; a server does not know it."""
        found = self.of_kind("split")
        if not found:
            return None
        return [str(label) for label in found[-1]["labels"]], np.array(found[-1]["counts"], np.int64)

    @cached_property
    def extreme(self) -> tuple[int, ...] | None:
        """Clients that hold one label alone, as a simulation knows; None where nobody does."""
        if self.split is None:
            return None
        return tuple(int(k) for k in np.flatnonzero((self.split[1] > 0).sum(1) == 1))

    @cached_property
    def stopped(self) -> tuple[int, ...]:
        """Clients that made one step a round at the end."""
        calibrations = self.records.calibrations
        return calibrations[-1].early_stopped if calibrations else ()
