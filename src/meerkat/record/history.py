"""A run after the fact, from its folder alone: GradIP trajectories, virtual paths, alignment of updates.

No model and no data are needed. Trajectories cost a multiplication a step; paths and alignments make the directions
again.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from meerkat.algorithm import path
from meerkat.algorithm.alignment import Alignment, alignments
from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.gradip import gradip, magnitude
from meerkat.algorithm.rounds import RoundRecord
from meerkat.errors import DAMAGE, MeerkatError, RunFailed, in_short
from meerkat.record.opening import check_format
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import LogReader
from meerkat.record.verification import StoredRun


@dataclass(frozen=True)
class Trajectory:
    """One client's signal over its local steps."""

    steps: np.ndarray
    """Number of each step in the whole federation's training, int64 [S]: round r begins at r T."""
    gradip: np.ndarray
    """float64 [S]; nan if the run's mask has no pre-training gradient."""
    abs_g: np.ndarray
    """|g|, float64 [S]"""


@dataclass(frozen=True)
class Records:
    """A log's records in order: their hash chain is checked, but they are not replayed."""

    rounds: list[RoundRecord]
    calibrations: list[CalibrationRecord]
    local_steps: int
    """T"""

    def trajectories(self) -> dict[int, Trajectory]:
        """GradIP and |g| of every client over training, by client id; empty for a first-order run."""
        parts: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        for record in self.rounds:
            first = record.plan.round * self.local_steps  # also where all of a round's clients have stopped early
            for client, g in record.scalars.items():
                steps = first + np.arange(len(g))
                parts.setdefault(client, []).append((steps, gradip(g, record.inner), magnitude(g)))
        return {k: Trajectory(*map(np.concatenate, zip(*parts[k], strict=True))) for k in sorted(parts)}


def read(root: Path) -> Records:
    """The records of a run.

    Raises:
        MeerkatError: there is no run in the folder.
        RunFailed: a record is damaged.
    """
    folder = RunFolder.open(Path(root))
    reader, records = LogReader(folder.log_path), Records([], [], folder.config().local_steps)
    try:
        for record in reader:
            check_format(record, reader.path)
            if record.get("kind") == "round":
                records.rounds.append(RoundRecord.from_json(record))
            elif record.get("kind") == "calibration":
                records.calibrations.append(CalibrationRecord.from_json(record))
    except DAMAGE as error:
        reason = in_short(error)
        raise RunFailed(f"{reader.path}: a record is damaged ({reason}); restore the file from a copy") from None
    _check_end(reader)
    return records


def _check_end(reader: LogReader) -> None:
    """Raise RunFailed if a record is damaged. A torn last line is allowed: a killed run leaves it."""
    if reader.damage and not reader.torn:
        raise RunFailed(f"{reader.path}: {reader.damage}, as no killed process leaves it; restore the file from a copy")


def client_path(root: Path, client: int, round: int) -> Iterator[Tensor]:
    """One client's virtual path: theta after each local step of a round, float32 [n], as the client had it.

    The log is replayed and checked up to that round.

    Raises:
        MeerkatError: there is no such round, the client took no part in it, or its steps were made by
            backpropagation.
        RunFailed: a record is damaged.
    """
    run = StoredRun.open(Path(root))
    for state, record in run.replay:
        if isinstance(record, RoundRecord) and record.plan.round == round:
            if client not in record.scalars:
                raise MeerkatError(f"run '{root}': client {client} sent no scalars in round {round}; choose another")
            steps = path.walk(state.theta, record.plan, record.scalars[client], run.directions)
            return (theta.clone() for theta in steps)
    _check_end(run.reader)
    raise MeerkatError(f"run '{root}': has no round {round}, only {run.replay.state.round}; choose an earlier one")


def updates(root: Path) -> Iterator[tuple[int, Mapping[int, Alignment]]]:
    """(round, norm and cosine of each client's update against the aggregated one), round by round.

    Raises:
        MeerkatError: there is no run in the folder.
        RunFailed: a record is damaged.
    """
    run = StoredRun.open(Path(root))
    for _, record in run.replay:
        if isinstance(record, RoundRecord):
            yield record.plan.round, alignments(record, run.directions)
    _check_end(run.reader)
