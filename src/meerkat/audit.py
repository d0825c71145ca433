"""After a run: replaying it from its record, checking every step, judging the model it made."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from meerkat import models, path, runlog, server
from meerkat.config import RunConfig
from meerkat.directions import Directions
from meerkat.errors import RunFailed
from meerkat.mask import SparseMask
from meerkat.progress import track
from meerkat.rounds import Reply, RoundRecord
from meerkat.runfolder import RunFolder
from meerkat.workplace import Workplace, load_split, open_workplace
from meerkat.zeroth_order import MaskedModel


@dataclass(frozen=True)
class Replayed:
    """A run as its log tells it."""

    config: RunConfig
    mask: SparseMask
    theta: Tensor
    """float32 [n], on the CPU"""
    rounds: int
    finished: bool


def verify(root: Path) -> Replayed:
    """Replay a run from its mask and log alone: every hash, aggregate and digest of theta is compared.

    Raises:
        RunFailed: something does not agree.
    """
    folder = RunFolder.open(root)
    contents = runlog.read(folder.log_path)
    if contents.damage:
        raise RunFailed(
            f"{folder.log_path}: {contents.damage}; the {len(contents.records)} records before it are sound"
        )
    if not contents.records or contents.records[0]["kind"] != "open":
        raise RunFailed(f"{folder.log_path}: no run in it; 'meerkat resume {root}' starts it")
    if not folder.mask_path.is_file():
        raise RunFailed(f"{folder.mask_path}: missing; restore it from a copy")
    config, mask, opening = folder.config(), folder.mask(), contents.records[0]
    assert mask.theta_0 is not None
    _agree(folder.config_path, "settings", opening["config"], config.digest())
    _agree(folder.mask_path, "entries", opening["mask"], mask.digest())
    _agree(folder.mask_path, "base values", opening["theta"], path.digest(mask.theta_0))
    z = Directions(int(opening["run_key"], 16), len(mask))
    state = server.ServerState(0, mask.theta_0)
    finished = contents.records[-1]["kind"] == "close"
    replayed = contents.records[1 : -1 if finished else None]
    for held in track(replayed, "verifying"):
        record = RoundRecord.from_json(held)
        where = f"round {state.round}"
        if record.plan.round != state.round:
            raise RunFailed(f"{folder.log_path}: {where} is missing")
        replies = [Reply(k, g) for k, g in record.scalars.items()]
        again = server.aggregate(replies, record.weights, record.aggregate.shape)
        _agree(folder.log_path, f"{where}'s aggregate", record.aggregate.tobytes().hex(), again.tobytes().hex())
        state = server.replay(state, record, z)
        _agree(folder.log_path, f"theta after {where}", record.theta_digest, path.digest(state.theta))
    summary = folder.summary()
    if finished:
        _agree(folder.log_path, "the last theta", contents.records[-1]["theta"], path.digest(state.theta))
    elif summary is not None:
        raise RunFailed(
            f"{folder.log_path}: ends after round {state.round} without a closing record, but the run has a summary"
        )
    if summary is not None:
        _agree(folder.summary_path, "theta_digest", summary["theta_digest"], path.digest(state.theta))
    return Replayed(config, mask, state.theta, state.round, finished)


def _agree(file: Path, what: str, recorded: str, found: str) -> None:
    if recorded != found:
        raise RunFailed(f"{file}: {what}: recorded {recorded[:16]}, found {found[:16]}; the run is damaged")


def load_run(root: Path) -> tuple[Replayed, Workplace]:
    """A verified run, and its model with the run's theta in it."""
    replayed = verify(root)
    workplace = open_workplace(replayed.config)
    replayed.mask.check_fits(workplace.model)
    MaskedModel(workplace.model, replayed.mask).write_(replayed.theta.to(workplace.device))
    return replayed, workplace


def evaluate(root: Path, split: str = "validation") -> models.Evaluation:
    """Judge a run's model on one split of its data."""
    replayed, workplace = load_run(root)
    rows = load_split(replayed.config, workplace.task, split)
    batch = workplace.evaluation_batch(rows, replayed.config.micro_batch)
    return models.evaluate(workplace.model, batch, workplace.task.labels)
