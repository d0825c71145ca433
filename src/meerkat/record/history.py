"""A run after the fact, from its folder alone: GradIP trajectories, virtual paths, how updates align.

No model and no data are needed. Trajectories come from the log by one multiplication a step; paths and
alignments make directions again.
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
    """Number of each step, int64 [S], counted over the whole federation's training: round r begins at r T."""
    gradip: np.ndarray
    """float64 [S]; nan where the run's mask has no pre-training gradient."""
    abs_g: np.ndarray
    """|g|, float64 [S]"""


@dataclass(frozen=True)
class Records:
    """A log's records in order, as they stand there: chained by hash, not replayed."""

    rounds: list[RoundRecord]
    calibrations: list[CalibrationRecord]
    local_steps: int
    """T"""

    def trajectories(self) -> dict[int, Trajectory]:
        """GradIP and |g| of every client over training, by client id. A first-order run has none."""
        parts: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        for record in self.rounds:
            begun = record.plan.round * self.local_steps  # also after rounds of early-stopped clients alone
            for client, g in record.scalars.items():
                if record.plan.directions:
                    steps = begun + np.arange(len(g))
                    parts.setdefault(client, []).append((steps, gradip(g, record.inner), magnitude(g)))
        return {k: Trajectory(*map(np.concatenate, zip(*parts[k], strict=True))) for k in sorted(parts)}


def read(root: Path) -> Records:
    """The records of a run.

    Raises:
        MeerkatError: there is no run in the folder; RunFailed: a record is damaged.
    """
    folder = RunFolder.open(Path(root))
    reader, found = LogReader(folder.log_path), Records([], [], folder.config().local_steps)
    try:
        for held in reader:
            check_format(held, reader.path)
            if held.get("kind") == "round":
                found.rounds.append(RoundRecord.from_json(held))
            elif held.get("kind") == "calibration":
                found.calibrations.append(CalibrationRecord.from_json(held))
    except DAMAGE as error:
        said = in_short(error)
        raise RunFailed(f"{reader.path}: a record is damaged ({said}); restore the file from a copy") from None
    _check_whole(reader)
    return found


def _check_whole(reader: LogReader) -> None:
    """Raise RunFailed if records follow a damaged one; a torn last line is a killed run's, and no damage."""
    if reader.damage and not reader.torn:
        raise RunFailed(f"{reader.path}: {reader.damage}, with records after it; restore the file from a copy")


def client_path(root: Path, client: int, round: int) -> Iterator[Tensor]:
    """One client's virtual path: theta after each local step of a round, float32 [n], as the client had it.

    The log is replayed and checked up to that round.

    Raises:
        MeerkatError: there is no such round, or the client took no part in it, or made its steps by
            backpropagation; RunFailed: the record is damaged.
    """
    run = StoredRun.open(Path(root))
    for state, record in run.replay:
        if isinstance(record, RoundRecord) and record.plan.round == round:
            if client not in record.scalars or not record.plan.directions:
                raise MeerkatError(f"run '{root}': client {client} sent no scalars in round {round}; choose another")
            return (theta.clone() for theta in path.client_path(state.theta, record, client, run.directions))
    _check_whole(run.reader)
    raise MeerkatError(f"run '{root}': has no round {round}, only {run.replay.state.round}; choose an earlier one")


def updates(root: Path) -> Iterator[tuple[int, Mapping[int, Alignment]]]:
    """(round, norm and cosine of each client's update against the aggregated one), round by round.

    Raises:
        MeerkatError: there is no run in the folder; RunFailed: a record is damaged.
    """
    run = StoredRun.open(Path(root))
    for _, record in run.replay:
        if isinstance(record, RoundRecord):
            yield record.plan.round, alignments(record, run.directions)
    _check_whole(run.reader)
