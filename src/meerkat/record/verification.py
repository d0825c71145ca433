"""Verifying a run: it is replayed from its folder alone, and every step is checked."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from meerkat.algorithm import path
from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.directions import Directions, run_key
from meerkat.algorithm.rounds import RoundRecord
from meerkat.errors import DAMAGE, MeerkatError, RunFailed, UnknownName, in_short
from meerkat.masks.sparse_mask import MEASURED, SparseMask
from meerkat.privacy.mechanism import Guarantee
from meerkat.progress import one_line, track
from meerkat.record.members import Members
from meerkat.record.opening import Opening, file_digest, gradient_digest, steps_by_rows
from meerkat.record.replay import Replay, agree
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import LogReader
from meerkat.record.summary import Summary, Work, alike, as_text, outcome
from meerkat.settings import budget
from meerkat.settings.algorithm import directions
from meerkat.settings.config import SITES, RunConfig


@dataclass(frozen=True)
class VerifiedRun:
    """A run whose whole record was replayed and found sound."""

    config: RunConfig
    mask: SparseMask
    theta: Tensor
    """float32 [n], on the CPU"""
    rounds: int
    finished: bool
    opening: Opening
    examples: Mapping[int, int]
    """Rows of each client, by id; in a federation, of the clients that joined."""
    asked: int
    """Replies that rounds asked for, without calibrations."""
    answered: Mapping[int, int]
    """In how many rounds each client's reply counted, by id, without clients that have none."""
    calibration: CalibrationRecord | None
    """The last one; None if there was none."""
    log_hash: str
    """The hash chain after the last record, hexadecimal."""
    guarantee: Guarantee | None = None
    """Its differential privacy so far; None without `--dp`."""
    replies: int = 0
    """All replies, with calibrations."""
    signed: Mapping[tuple[int, str], int] = field(default_factory=dict)
    """Signed replies by (client, fingerprint of its key)."""
    work: Mapping[str, Work] = field(default_factory=dict)
    """What clients did, by kind of record."""
    steps_made: Mapping[int, int] = field(default_factory=dict)
    """Local steps that each client has made, by id."""
    early_stopped: Collection[int] = ()
    """Clients that make one step a round at the end."""
    summary: Summary | None = None
    """The outcome that the folder states, as far as the log tells it; None where it states none."""

    def not_checked(self, evaluated: bool = False) -> list[str]:
        """What stands in the folder and was not compared with anything; `evaluated`: scores were computed anew."""
        unchecked = ["metrics.jsonl", "pictures and reports"]
        if {*MEASURED} & self.mask.facts.keys():
            unchecked.append("what mask.safetensors says was measured")
        if self.opening.federation:
            unchecked.append("events.jsonl")
        if self.summary is None:
            return unchecked
        if self.opening.federation:
            unchecked.append("the network's counts and clients_without_budget in summary.json")
        if not evaluated and self.summary.evaluated_on == "sites":
            unchecked.append("evaluated_on, scores and extreme_clients in summary.json (made by the sites, it says)")
        elif not evaluated:
            who = "evaluated_on, " if self.opening.federation else ""
            unchecked.append(f"{who}scores and extreme_clients in summary.json (--evaluate)")
        return [*unchecked, "times and memory in summary.json"]


@dataclass(frozen=True)
class StoredRun:
    """A run in its folder, ready to be replayed: its settings and mask agree with the log's opening record."""

    folder: RunFolder
    config: RunConfig
    mask: SparseMask
    directions: Directions
    opening: Opening
    reader: LogReader
    replay: Replay

    @classmethod
    def open(
        cls, root: Path, listed: Collection[str] | None = None, revoked: Mapping[str, int] | None = None
    ) -> "StoredRun":
        """Open a folder; `listed` and `revoked` as in `verify`.

        Raises:
            MeerkatError: there is no run in the folder.
            RunFailed: its files are damaged, or do not agree.
        """
        folder = RunFolder.open(root)
        log, mask_file, reader = folder.log_path, folder.mask_path, LogReader(folder.log_path)
        with _damage_explained(root):
            records = iter(reader)
            if (first := next(records, None)) is None:
                starts = reader.torn or not reader.damage
                cure = f"to start the run: {folder.resumption}" if starts else "restore the file from a copy"
                raise RunFailed(f"{log}: {reader.damage or 'no record in it'}; {cure}")
            opening = Opening.from_json(first, log)
            agree(folder.config_path, "settings", opening.config, file_digest(folder.config_path))
            config, mask = folder.config(), folder.mask()
            if opening.federation:
                agree(folder.config_path, "partition", config.partition, SITES)
            else:
                agree(log, "the number of clients", str(len(opening.examples)), str(config.clients))
            if mask.theta_0 is None:
                raise RunFailed(f"{mask_file}: has no base values; restore it from a copy")
            agree(log, "the directions' key", opening.run_key, f"{run_key(config.seed):032x}")
            agree(folder.config_path, "density", config.density, mask.density)
            agree(mask_file, "model", opening.model, mask.fingerprint)
            agree(mask_file, "entries", opening.mask, mask.digest())
            agree(mask_file, "what it says of itself", opening.about_mask, mask.description_digest())
            agree(mask_file, "base values", opening.theta, path.digest(mask.theta_0))
            agree(mask_file, "pre-training gradient", opening.gradient, gradient_digest(mask))
            agree(log, "the rule of aggregation", opening.rule, config.aggregation)
            agree(log, "the estimator", opening.estimator, config.estimator)
            agree(log, "the update rule", opening.update_rule, config.update_rule)
            z, settings = directions(config, len(mask)), opening.settings(config, mask.theta_0)
            members, gradient = Members(opening.identity(config), listed), mask.pretraining_gradient
            replay = Replay(records, mask.theta_0, settings, z, gradient, log, members, revoked)
        return cls(folder, config, mask, z, opening, reader, replay)


def verify(root: Path, listed: Collection[str] | None = None, revoked: Mapping[str, int] | None = None) -> VerifiedRun:
    """Replay a run from its folder alone, without model or data.

    Every record's bytes, hash, plan, signatures, weights and digest are checked, and all of the summary that follows
    from them: `VerifiedRun.not_checked` says what does not. `run.evaluate.check_scores` computes the scores anew.

    Args:
        listed: fingerprints of the sites' known keys: every reply must be signed by one of them. None to skip this.
        revoked: fingerprint -> the round from which a key is revoked, in addition to the log's revocations.

    Raises:
        MeerkatError: there is no run in the folder, or keys are listed for a simulation's.
        RunFailed: something in it is damaged or inconsistent; the message names the first such record and its signers.
    """
    run = StoredRun.open(root, listed, revoked)
    if listed is not None and not run.opening.federation:
        raise MeerkatError(f"{root}: a simulation, whose replies are not signed; leave --signers out")
    with _damage_explained(root):
        verified = _replayed(run)
    config, log, opening = run.config, run.folder.log_path, run.opening
    if config.dp == "example" and not opening.federation:  # a federation's sites compute their budgets themselves
        allowance = budget.allowance(config, opening.examples)
        agree(log, "the steps that privacy budgets last for", str(opening.allowance), str(allowance))
    verified = replace(verified, guarantee=budget.guarantee(config, steps_by_rows(log), verified.rounds))
    with _damage_explained(root):
        return replace(verified, summary=_checked_summary(run.folder, verified))


def _checked_summary(folder: RunFolder, run: VerifiedRun) -> Summary | None:
    """The summary, compared with what the log tells of the outcome. Raises RunFailed or ValueError."""
    if (stated := folder.summary()) is None:
        return None
    try:
        summary = Summary.from_json(stated)
        if folder.summary_path.read_bytes() != as_text(stated).encode():
            raise ValueError("it is not written as this version writes a summary")
    except ValueError as error:
        raise RunFailed(f"{folder.summary_path}: {one_line(error)}; restore the folder from a copy") from None
    if not run.finished:
        raise RunFailed(
            f"{folder.log_path}: ends after round {run.rounds} without a closing record, but the run has a summary; "
            "restore the file from a copy"
        )
    expected = outcome(run.config, run.mask, run.work, run.early_stopped, path.digest(run.theta), run.guarantee)
    # sites may have evaluated, in a federation without dp: no log says so
    if summary.evaluated_on != "sites" or not run.opening.federation or run.config.dp != "none":
        expected["evaluated_on"] = "held-back" if run.config.held_back else "validation"
    if not run.opening.federation:
        expected["clients_without_budget"] = budget.not_lasting(
            run.config, run.opening.allowance, run.steps_made, run.early_stopped, run.rounds
        )
    for name, value in expected.items():
        if not alike(getattr(summary, name), value, within=1e-6):  # accounting may differ in its last digits
            agree(folder.summary_path, name, getattr(summary, name), value)
    return summary


def _replayed(run: StoredRun) -> VerifiedRun:
    """Replay a run to its end."""
    folder, reader, replay = run.folder, run.reader, run.replay
    calibration: CalibrationRecord | None = None
    work: defaultdict[str, Work] = defaultdict(Work)

    def rounds() -> Iterator[RoundRecord]:
        nonlocal calibration
        for _, record in replay:
            work[record.kind] += Work.of(record)
            if isinstance(record, CalibrationRecord):
                calibration = record
            else:
                yield record

    asked, answered = 0, Counter[int]()
    for record in track(rounds(), "verifying", run.config.rounds):
        asked += len(record.plan.steps)
        answered.update(record.made.keys())
    state = replay.state
    if reader.damage:
        cure = f"to drop it and go on: {folder.resumption}" if reader.torn else "restore the file from a copy"
        content = f", it reads as {replay.read(reader.broken)}" if reader.damage.endswith("damaged") else ""
        raise RunFailed(
            f"{reader.path}: {reader.damage}{content}; the {reader.count} records before it are sound; {cure}"
        )
    return VerifiedRun(
        config=run.config,
        mask=run.mask,
        theta=state.theta,
        rounds=state.round,
        finished=replay.closed,
        opening=run.opening,
        examples=replay.settings.examples,
        asked=asked,
        answered=answered,
        calibration=calibration,
        log_hash=reader.hash,
        replies=replay.replies,
        signed=dict(replay.signed),
        work=work,
        steps_made=state.steps_made,
        early_stopped=state.early_stopped,
    )


@contextmanager
def _damage_explained(root: Path) -> Iterator[None]:
    """Raise RunFailed where something in a run's folder is malformed."""
    try:
        yield
    except (RunFailed, UnknownName):
        raise
    except (MeerkatError, *DAMAGE) as error:
        reason = error if isinstance(error, MeerkatError) else in_short(error)
        raise RunFailed(f"{root}: the run is damaged ({reason}); restore its folder from a copy") from None
