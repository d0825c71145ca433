"""A signed run on the disk, and everything that can be done to its log: found, with the line and who signed it."""

import base64
import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import Federation, Setting, Wire, replay
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("cryptography")

from meerkat.algorithm import calibration, path, server
from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.replies import Reply, Scalars
from meerkat.algorithm.rounds import RoundRecord
from meerkat.algorithm.server import ServerState
from meerkat.cli import main
from meerkat.errors import MeerkatError, RunFailed
from meerkat.federation import coordinator as coordinator_module
from meerkat.federation import remote_engine
from meerkat.federation.admission import Admission
from meerkat.federation.certificates import make_signing_key
from meerkat.federation.coordinator import _check_same, coordinate
from meerkat.federation.coordinator_settings import FederationConfig
from meerkat.federation.frames import Frame, Kind
from meerkat.federation.link import Link
from meerkat.federation.offer import Offer
from meerkat.federation.site import Site
from meerkat.federation.site_settings import Refused, SiteConfig
from meerkat.record.forks import fork
from meerkat.record.members import KeyRevocation, Member
from meerkat.record.opening import file_digest
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import LogReader, RunLog
from meerkat.record.signatures import SigningKey, fingerprint, handover, reply_message
from meerkat.record.summary import as_text
from meerkat.record.verification import StoredRun, verify
from meerkat.run.setup import resolve
from meerkat.settings.auto import AUTO
from meerkat.settings.config import SITES, RunConfig, make_config

Record = dict[str, Any]
VP = {"local_steps": 2, "early_stop": "vp", "calibration_steps": 4, "initial_steps": 2, "later_steps": 2}
ROUNDS = 5
FIRST, ROTATED, RENEWED = ("k0", "k1", "k2"), "k1b", "k2b"


_NUMBER = count()


@dataclass
class Staged:
    """A `Control` whose nodes are sites in this process, with keys of their own; `course` says what happens when."""

    setting: Setting
    keys: dict[int, dict[str, str]]
    course: Callable[["Staged"], None] = lambda _: None
    sites: dict[int, Site] = field(default_factory=dict)

    def link(self, admission: Admission) -> Link:
        self.wire = Wire(admission)
        remote_engine.time = self.wire
        self.wire.meddle = lambda _, data, up: [(1.0 if up else 0.0, data)]
        return self.wire

    def open(self, admission: Admission, offer: Offer, stop: Callable[[str], None]) -> None:
        self.admission, self.offer, self.stop = admission, offer, stop
        for client, own in self.keys.items():
            self.enter(client, **own)
        self.course(self)

    def enter(self, client: int, **own: str) -> None:
        node = f"node {client}"
        folder = self.setting.folder
        defaults = {"data": str(folder / str(client)), "model": self.setting.config.model, "device": "cpu"}
        defaults["ledger"] = str(folder / f"{client}-{next(_NUMBER)}.ledger")
        if client in self.sites:
            self.sites[client].close()
        self.sites[client] = site = Site(
            replace(self.offer, token=self.admission.token(node)),
            SiteConfig(client=client, **{**defaults, **own}, accepts={"mask_minimum": 1}),
            node,
        )
        self.wire.connect(site)

    def stop_inviting(self) -> None:
        pass

    def close(self) -> None:
        for site in self.sites.values():
            site.close()


@dataclass
class Course:
    """Two sessions of one run: client 1 rotates its key in the first, client 2's is revoked before the second."""

    setting: Setting
    keys: Path

    def key(self, name: str) -> str:
        return str(self.keys / f"{name}.key")

    def signing(self, name: str) -> SigningKey:
        return SigningKey.load(self.key(name))

    def name(self, name: str) -> str:
        return fingerprint(self.signing(name).public)

    @property
    def listed(self) -> frozenset[str]:
        return frozenset(map(self.name, (*FIRST, ROTATED, RENEWED)))

    def config(self, **changes: Any) -> RunConfig:
        return self.setting.config.model_copy(update={"partition": SITES, "eval_every": 0, **changes})

    def federation(self, **given: Any) -> FederationConfig:
        return FederationConfig(**{"sign": True, "signers": str(self.keys / "signers"), "patience_s": 30.0, **given})

    def live(self, out: Path) -> None:
        first = {client: {"signing_key": self.key(name)} for client, name in enumerate(FIRST)}
        with pytest.raises(RunFailed, match="enough for today"):
            coordinate(self.config(), self.federation(), out, Staged(self.setting, first, self.rotate))
        then = {**first, 1: {"signing_key": self.key(ROTATED)}, 2: {"signing_key": self.key(RENEWED)}}
        gone = (self.name("k2"),)
        summary = coordinate(self.config(), self.federation(revoked=gone), out, Staged(self.setting, then))
        assert summary["rounds"] == ROUNDS

    def rotate(self, staged: Staged) -> None:
        own = {"signing_key": self.key(ROTATED), "signing_key_before": self.key("k1")}
        staged.wire.after(2.5, lambda: staged.wire.disconnect(1))
        staged.wire.after(2.6, lambda: staged.enter(1, **own))
        staged.wire.after(4.5, lambda: staged.stop("enough for today"))


class Evaluating(Staged):
    """Their nodes evaluate."""

    def enter(self, client: int, **own: Any) -> None:
        super().enter(client, **own, evaluate=True)


def test_a_coordinator_that_was_stopped_in_the_last_evaluation_makes_it_when_it_starts_again(
    federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_engine, "time", remote_engine.time)  # which a staged federation replaces
    setting = Setting.make(federation, tmp_path / "sites", rounds=2)
    config = setting.config.model_copy(update={"partition": SITES, "eval_every": 0})
    asked, keys = FederationConfig(evaluate="sites", patience_s=30.0), dict[int, dict[str, str]]({0: {}, 1: {}, 2: {}})

    def stopped(staged: Staged) -> None:
        def meddle(_: int, data: bytes, up: bool) -> list[tuple[float, bytes]]:
            sent = Frame.decode(data)
            if not up and (sent.kind, sent.round) == (Kind.EVALUATE, 2):
                staged.stop("enough for today")
            return [(1.0 if up else 0.0, data)]

        staged.wire.meddle = meddle

    with pytest.raises(RunFailed, match="enough for today"):
        coordinate(config, asked, tmp_path / "run", Evaluating(setting, keys, stopped))
    again = coordinate(config, asked, tmp_path / "run", Evaluating(setting, keys))
    whole = coordinate(config, asked, tmp_path / "whole", Evaluating(setting, keys))
    assert again["scores"] == whole["scores"]
    assert again["scores"]["accuracy"] is not None


@pytest.fixture(scope="module")
def course(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    keys = tmp_path_factory.mktemp("keys")
    for name in (*FIRST, ROTATED, RENEWED, "stranger"):
        make_signing_key(keys / f"{name}.key")
    listed = [(keys / f"{name}.pub").read_text() for name in (*FIRST, RENEWED)]
    (keys / "signers").write_text("# the sites' keys\n" + "".join(listed))
    clock = remote_engine.time
    setting = Setting.make(federation, tmp_path_factory.mktemp("sites"), rounds=ROUNDS, **VP)
    yield Course(setting, keys)
    remote_engine.time = clock


@pytest.fixture(scope="module")
def run(course: Course, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    course.live(out)
    return out


@pytest.fixture(scope="module")
def other(course: Course, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run of the same clients with the same keys, settings and seed: its scalars are the same, too."""
    out = tmp_path_factory.mktemp("runs") / "other"
    course.live(out)
    return out


def records_of(run: Path) -> list[Record]:
    return list(LogReader(run / "rounds.log"))


def forged(run: Path, copied: Path, records: list[Record], theta: str = "") -> Path:
    """A copy of a run with other records, chained anew as whoever holds the folder can, and a summary to match."""
    link, lines = "0" * 64, []
    for record in records:
        text = json.dumps(record, separators=(",", ":")).encode()
        link = hashlib.sha256(link.encode() + text).hexdigest()
        lines.append(link.encode() + b" " + text + b"\n")
    damaged(run, copied, b"".join(lines))
    if theta:
        summary = json.loads((run / "summary.json").read_text())
        (copied / "summary.json").write_text(as_text({**summary, "theta_digest": theta}))
    return copied


def damaged(run: Path, copied: Path, data: bytes) -> Path:
    """A copy of a run with another log."""
    if not copied.exists():
        shutil.copytree(run, copied)
    (copied / "rounds.log").write_bytes(data)
    return copied


def fails(run: Path, *said: str, **given: Any) -> str:
    with pytest.raises(RunFailed) as told:
        verify(run, **given)
    text = str(told.value)
    assert len(text.splitlines()) == 1
    for each in said:
        assert each in text
    return text


def line(records: list[Record], kind: str, number: int = 0) -> int:
    """Index of the n-th record of a kind."""
    return [i for i, record in enumerate(records) if record["kind"] == kind][number]


# the run itself


def test_the_run_has_every_kind_of_record_and_is_sound(course: Course, run: Path) -> None:
    kinds = [record["kind"] for record in records_of(run)]
    assert kinds == [
        *("open", "join", "join", "join", "calibration", "round", "round", "join", "round"),
        *("revoke", "join", "round", "round", "close"),
    ]
    verified = verify(run, listed=course.listed)
    assert verified.finished
    assert (
        verified.replies == sum(verified.signed.values()) == 3 * (ROUNDS + 1) - 2
    )  # who left in a round misses it, and is spared the next
    assert dict(verified.signed) == {
        (0, course.name("k0")): 6,
        (1, course.name("k1")): 2,
        (1, course.name(ROTATED)): 2,
        (2, course.name("k2")): 4,
        (2, course.name(RENEWED)): 2,
    }


def test_a_rotated_key_is_vouched_for_by_the_one_before(course: Course, run: Path) -> None:
    assert course.name(ROTATED) not in (course.keys / "signers").read_text()
    assert verify(run, listed=course.listed - {course.name(ROTATED)}).finished


def test_signing_changes_no_bit_of_theta(course: Course, run: Path) -> None:
    thetas = [record["theta"] for record in records_of(run) if record["kind"] == "round"]
    assert thetas[0] == course.setting.simulated()[0]


def test_an_unfinished_run_can_be_verified(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    records = records_of(run)
    for end in range(1, len(records)):
        assert not verify(forged(tmp_path / "run", tmp_path / "cut", records[:end])).finished


def test_the_outcome_is_told_in_a_line_and_a_line_a_key(
    course: Course, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(run)]) == 0
    first, *keys, unchecked = capsys.readouterr().out.splitlines()
    assert "16 of 16 replies signed, with 5 keys (as the log has them; --signers checks them against a list)" in first
    assert f"  client 0  {course.name('k0')}  6 replies" in keys
    assert len(keys) == 5
    assert unchecked.startswith("  not checked: metrics.jsonl, pictures and reports, events.jsonl")
    signers = course.keys / "signers"
    assert main(["verify", str(run), "--signers", str(signers), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["replies"], told["signed"], len(told["signers"])) == (16, 16, 5)
    assert told["signers"][0] == {"client": 0, "key": course.name("k0"), "replies": 6}


def test_a_federation_s_scores_are_computed_anew_on_the_coordinator_s_rows(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    assert main(["verify", str(copied), "--evaluate", "--json"]) == 0
    unchecked = json.loads(capsys.readouterr().out)["not_checked"]
    assert "the network's counts and clients_without_budget in summary.json" in unchecked
    assert not [each for each in unchecked if "scores" in each]
    summary = json.loads((copied / "summary.json").read_text())
    scores = {**summary["scores"], "accuracy": 0.999}
    (copied / "summary.json").write_text(as_text(summary | {"scores": scores, "accuracy": 0.999}))
    assert main(["verify", str(copied)]) == 0
    assert main(["verify", str(copied), "--evaluate"]) == 1
    (copied / "summary.json").write_text(as_text(summary | {"evaluated_on": "sites"}))
    capsys.readouterr()
    assert main(["verify", str(copied), "--evaluate"]) == 2
    assert "that its sites evaluated it" in capsys.readouterr().err


def with_settings(run: Path, copied: Path, **values: Any) -> Path:
    """A copy with other settings, and all that follows from them in log and summary."""
    shutil.copytree(run, copied)
    config = RunFolder(copied).config().model_copy(update=values)
    (copied / "config.toml").write_text(config.to_toml())
    records = records_of(run)
    records[0]["config"] = file_digest(copied / "config.toml")
    summary = json.loads((run / "summary.json").read_text())
    attacking = list(config.attacking_clients)
    summary |= {"partition": config.partition, "attack": config.attack, "attacking_clients": attacking}
    (copied / "summary.json").write_text(as_text(summary))
    return forged(run, copied, records)


def test_a_site_is_not_said_to_have_attacked(run: Path, tmp_path: Path) -> None:
    """Attacks are simulated, on a partition of one data set: a federation has its sites' rows, and no attackers."""
    accused = with_settings(run, tmp_path / "run", partition="iid", attack="sign-flip", attackers=1)
    assert json.loads((accused / "summary.json").read_text())["attacking_clients"]
    fails(accused, "config.toml: partition: recorded 'iid', found 'sites'")


def test_who_evaluated_is_checked_as_far_as_the_log_and_the_settings_tell(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That sites evaluated is not: `verify` says so. Rows that nobody held back are."""
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    summary = json.loads((copied / "summary.json").read_text())
    assert main(["verify", str(copied)]) == 0
    assert "evaluated_on, scores and extreme_clients in summary.json (--evaluate)" in capsys.readouterr().out
    (copied / "summary.json").write_text(as_text(summary | {"evaluated_on": "held-back"}))
    fails(copied, "summary.json: evaluated_on: recorded 'held-back', found 'validation'")
    (copied / "summary.json").write_text(as_text(summary | {"evaluated_on": "sites"}))
    assert main(["verify", str(copied)]) == 0
    said = "evaluated_on, scores and extreme_clients in summary.json (made by the sites, it says)"
    assert said in capsys.readouterr().out
    assert main(["verify", str(copied), "--evaluate"]) == 2
    assert "its summary says, and no log confirms" in capsys.readouterr().err.splitlines()[-1]


# who holds the folder, and changes it where it stands


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bit_that_is_flipped_is_found_with_its_line(run: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray((run / "rounds.log").read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    number = whole[:at].count(b"\n") + 1
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    fails(damaged(run, tmp_path / "run", bytes(whole)), f"line {number} is ")


def test_a_bit_in_each_field_of_each_record_is_found_with_its_line(run: Path, tmp_path: Path) -> None:
    lines = (run / "rounds.log").read_bytes().splitlines(keepends=True)
    for number, text in enumerate(lines, 1):
        places = [3, 64, *(text.index(f'"{name}":'.encode()) + 1 for name in json.loads(text[65:]))]
        places += [text.index(b":", at) + 1 for at in places[2:]]
        for at in places:
            changed = bytearray(text)
            changed[at] ^= 1
            data = b"".join([*lines[: number - 1], bytes(changed), *lines[number:]])
            fails(damaged(run, tmp_path / "run", data), f"line {number} is ")


def test_who_signed_a_damaged_line_is_told(course: Course, run: Path, tmp_path: Path) -> None:
    records = records_of(run)
    at = line(records, "round")
    lines = (run / "rounds.log").read_bytes().splitlines(keepends=True)
    text = lines[at].replace(scalars_of(records[at]), scalars_of(records[at]).swapcase())
    said = f"it reads as round 0: client 0's reply is not what its key {course.name('k0')} signed; the 5 records before"
    fails(damaged(run, tmp_path / "run", b"".join([*lines[:at], text, *lines[at + 1 :]])), f"line {at + 1} is", said)
    text = b"0" * 64 + lines[at][64:]
    said = f"it reads as round 0, signed by client 0 with {course.name('k0')}, client 1 with {course.name('k1')}"
    whole = b"".join([*lines[:at], text, *lines[at + 1 :]])
    fails(damaged(run, tmp_path / "run", whole), said, "what it says agrees, its hash does not")


def scalars_of(record: Record) -> bytes:
    return str(record["scalars"]).encode()


@pytest.mark.parametrize("change", ["drop", "swap", "repeat", "transplant"])
def test_lines_that_are_moved_are_found(run: Path, other: Path, tmp_path: Path, change: str) -> None:
    lines = (run / "rounds.log").read_bytes().splitlines(keepends=True)
    others = (other / "rounds.log").read_bytes().splitlines(keepends=True)
    for at in range(len(lines) - 1):
        changed = {
            "drop": [*lines[:at], *lines[at + 1 :]],
            "swap": [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]],
            "repeat": [*lines[: at + 1], *lines[at:]],
            "transplant": [*lines[:at], others[at], *lines[at + 1 :]],
        }[change]
        # a log that begins otherwise is sound in its first line, and in that alone
        number = at + 1 + (change == "repeat" or (change == "transplant" and at == 0))
        fails(damaged(run, tmp_path / "run", b"".join(changed)), f"line {number}")


# who holds the folder, and chains it anew


NOT_COVERED = {("open", "torch"), ("open", "transformers"), ("calibration", "selection")}
"""The coordinator's own word, and numbers that are compared with a tolerance."""


def changes(record: Record) -> Iterator[tuple[str, Record]]:
    """Each field of a record with the smallest change that there is."""
    for name, value in record.items():
        if (record["kind"], name) in NOT_COVERED:
            continue
        for changed in others_than(value):
            yield name, {**record, name: changed}


def others_than(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, np.nextafter(value, 9e9)] if isinstance(value, float) else [value + 1]
    if isinstance(value, list):
        return [[*value[:-1], other] for other in others_than(value[-1])] + [value[:-1]] if value else [[1]]
    if value is None:
        return [""]
    end = "A" if value[-4:-3] != "A" else "B"
    return [value[:-4] + end + value[-3:], value[:-1]] if len(value) > 4 else ["x" + value]


def test_every_field_that_is_changed_and_chained_anew_is_found(run: Path, tmp_path: Path) -> None:
    records = records_of(run)
    for at, record in enumerate(records):
        for name, changed in changes(record):
            run_of = forged(run, tmp_path / "forged", [*records[:at], changed, *records[at + 1 :]])
            with pytest.raises(RunFailed) as told:
                verify(run_of)
            assert len(str(told.value).splitlines()) == 1, name
            if at:
                assert int(str(told.value).split("line ")[1].split()[0]) >= at + 1, name


def test_a_field_that_should_not_be_there_is_found(run: Path, tmp_path: Path) -> None:
    records = records_of(run)
    for at in range(len(records) - 1):
        fails(forged(run, tmp_path / "forged", [*records[:at], {**records[at], "note": "x"}, *records[at + 1 :]]))


def test_a_record_that_is_removed_and_the_rest_chained_anew_is_found(run: Path, tmp_path: Path) -> None:
    records = records_of(run)
    for at in range(len(records)):
        fails(forged(run, tmp_path / "forged", [*records[:at], *records[at + 1 :]]))


def test_records_that_are_swapped_and_chained_anew_are_found(run: Path, tmp_path: Path) -> None:
    records = records_of(run)
    for at in range(len(records) - 1):
        changed = [*records[:at], records[at + 1], records[at], *records[at + 2 :]]
        if records[at]["kind"] == records[at + 1]["kind"] == "join":  # who came first before a round means nothing
            assert verify(forged(run, tmp_path / "forged", changed)).finished
        else:
            fails(forged(run, tmp_path / "forged", changed))


def test_a_record_of_another_run_is_found_though_it_says_the_same(
    course: Course, run: Path, other: Path, tmp_path: Path
) -> None:
    records, others = records_of(run), records_of(other)
    for at, record in enumerate(records):
        if record["kind"] in ("revoke", "close"):  # nobody signs these, and they are the same, word for word
            assert others[at] == record
            continue
        text = fails(forged(run, tmp_path / "forged", [*records[:at], others[at], *records[at + 1 :]]))
        if record["kind"] in ("round", "calibration"):
            assert {**others[at], "signatures": []} == {**record, "signatures": []}
            assert f"line {at + 1} ({record['kind']} {record['round']}): client 0's reply is not what its key" in text
            assert course.name("k0") in text
        elif record["kind"] == "join":
            assert f"line {at + 1} (join of client {record['client']}, key SHA256:" in text
            assert "has not signed its joining" in text


def told_anew(course: Course, run: Path, lie: Callable[[int, list[Reply]], list[Reply]]) -> tuple[list[Record], str]:
    """The log of a coordinator that tells of other replies: weights, aggregates and theta as they follow from them."""
    opened = StoredRun.open(run)
    settings, z, gradient = opened.replay.settings, opened.directions, opened.mask.pretraining_gradient
    state, made = ServerState(Replica(0, opened.mask.theta_0)), []
    for entry in records_of(run):
        match entry["kind"]:
            case "join":
                settings = Member.from_json(entry).added_to(settings)
            case "calibration":
                state = calibration.replay(state, CalibrationRecord.from_json(entry))
            case "round":
                record = RoundRecord.from_json(entry)
                replies = [Scalars(k, g, signature=record.signatures[k]) for k, g in record.scalars.items()]
                replies = lie(record.plan.round, replies)
                plan = server.open_round(state, settings, list(record.plan.steps))
                state, record = server.close_round(state, plan, replies, settings, z, gradient)
                entry = record.to_json()
            case "close":
                entry = {**entry, "theta": path.digest(state.theta)}
        made.append(entry)
    assert course.setting.config.rounds == state.round
    return made, path.digest(state.theta)


def test_a_coordinator_that_tells_of_itself_truly_is_believed(course: Course, run: Path, tmp_path: Path) -> None:
    records, theta = told_anew(course, run, lambda _, replies: replies)
    assert records == records_of(run)
    assert verify(forged(run, tmp_path / "forged", records, theta)).finished


@pytest.mark.parametrize("round", range(ROUNDS))
def test_scalars_that_the_coordinator_alters_are_found_whatever_it_computes_from_them(
    course: Course, run: Path, tmp_path: Path, round: int
) -> None:
    def lie(at: int, replies: list[Reply]) -> list[Reply]:
        *rest, last = replies
        changed = last.scalars.copy()
        changed[0, 0] = np.nextafter(changed[0, 0], np.float32(9))
        return [*rest, replace(last, scalars=changed)] if at == round else replies

    records, theta = told_anew(course, run, lie)
    key = course.name("k2" if round < 3 else RENEWED)
    at = line(records, "round", round)
    said = f"line {at + 1} (round {round}): client 2's reply is not what its key {key} signed"
    fails(forged(run, tmp_path / "forged", records, theta), said)


def test_a_reply_that_the_coordinator_leaves_out_is_found_in_the_round_after(
    course: Course, run: Path, tmp_path: Path
) -> None:
    """Every reply is signed about the theta that all before it made. After the last round nobody signs any more."""
    for left_out in range(ROUNDS):
        records, theta = told_anew(course, run, lambda at, r, left_out=left_out: r[1:] if at == left_out else r)
        lying = forged(run, tmp_path / "forged", records, theta)
        if left_out == ROUNDS - 1:
            (lying / "summary.json").unlink()  # the bytes that it counts tell
            assert verify(lying).replies == 15
        else:
            fails(lying, f"(round {left_out + 1}): client 0's reply is not what its key {course.name('k0')} signed")


def test_signatures_that_are_swapped_are_found(course: Course, run: Path, tmp_path: Path) -> None:
    records = records_of(run)
    at, then = line(records, "round"), line(records, "round", 2)
    swapped = copy.deepcopy(records)
    signatures = swapped[at]["signatures"]
    signatures[0], signatures[1] = signatures[1], signatures[0]
    fails(
        forged(run, tmp_path / "forged", swapped),
        f"line {at + 1}",
        f"client 0's reply is not what its key {course.name('k0')}",
    )
    between = copy.deepcopy(records)
    between[then]["signatures"][0] = records[at]["signatures"][0]
    fails(forged(run, tmp_path / "forged", between), f"line {then + 1}", "client 0's reply is not what its key")


def test_a_reply_that_is_put_under_another_client_is_told_whose_it_is(
    course: Course, run: Path, tmp_path: Path
) -> None:
    def lie(at: int, replies: list[Reply]) -> list[Reply]:
        first, second, *rest = replies
        moved = [replace(first, client=second.client), replace(second, client=first.client)]
        return [*moved, *rest] if at == 0 else replies

    records, theta = told_anew(course, run, lie)
    said = f"client 0's reply is not what its key {course.name('k0')} signed, but what client 1's key"
    fails(forged(run, tmp_path / "forged", records, theta), f"{said} {course.name('k1')} did")


@pytest.mark.parametrize("how", ["all", "one", "emptied", "cut"])
def test_a_signature_that_is_stripped_is_found(course: Course, run: Path, tmp_path: Path, how: str) -> None:
    records = copy.deepcopy(records_of(run))
    at = line(records, "round", 1)
    signatures = records[at]["signatures"]
    short = base64.b64encode(base64.b64decode(signatures[0])[:-1]).decode()
    records[at]["signatures"] = {
        "all": [],
        "one": ["", *signatures[1:]],
        "emptied": [""] * len(signatures),
        "cut": [short, *signatures[1:]],
    }[how]
    said = "not what its key" if how == "cut" else f"is not signed; its key is {course.name('k0')}"
    fails(forged(run, tmp_path / "forged", records), f"line {at + 1} (round 1): client 0's reply", said)


def unsigned(records: list[Record]) -> list[Record]:
    """The log as if nobody had ever signed."""
    bare = dict.fromkeys(("key", "signature", "handover"), "")
    stripped = {"open": {"signed": False}, "join": bare, "round": {"signatures": []}, "calibration": {"signatures": []}}
    return [{**record, **stripped.get(record["kind"], {})} for record in records if record["kind"] != "revoke"]


def test_a_run_that_takes_signed_replies_alone_has_no_unsigned_joining(run: Path, tmp_path: Path) -> None:
    records = unsigned(records_of(run))
    records[0]["signed"] = True
    fails(forged(run, tmp_path / "forged", records), "line 2 (join of client 0): client 0 has no key")


def test_a_log_that_is_stripped_of_all_signatures_says_so_and_is_found_by_who_knows_the_keys(
    course: Course, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stripped = forged(run, tmp_path / "forged", unsigned(records_of(run)))
    assert main(["verify", str(stripped)]) == 0
    assert "0 of 16 replies signed" in capsys.readouterr().out
    said = "client 0 has no key, where every reply must be signed, and the run took unsigned replies: there is nothing"
    fails(stripped, f"line 2 (join of client 0): {said} to check", listed=course.listed)


# keys that may not


def test_a_key_that_nobody_listed_is_found(course: Course, run: Path) -> None:
    for name, at in (("k0", 2), (RENEWED, 11)):
        said = f"line {at} (join of client", f"key {course.name(name)} of client", "is not among the listed ones"
        fails(run, *said, listed=course.listed - {course.name(name)})


def test_a_coordinator_that_invents_a_site_is_found_by_who_knows_the_keys(
    course: Course, run: Path, tmp_path: Path
) -> None:
    """With a key of its own it can sign as a site; nothing in the log can tell."""
    records, key = copy.deepcopy(records_of(run)), course.signing("stranger")
    joined, identity = Member.from_json(records[1]), StoredRun.open(run).replay.members.identity
    joining = identity.joining(0, joined.examples, joined.node, key.public)
    records[1] = replace(joined, key=key.public.hex(), signature=key.sign(joining).hex()).to_json()
    invented = signed_again(run, records, client=0, key=key)
    assert verify(forged(run, tmp_path / "forged", invented)).finished
    said = f"line 2 (join of client 0, key {course.name('stranger')})", "is not among the listed ones"
    fails(tmp_path / "forged", *said, listed=course.listed)


def signed_again(run: Path, records: list[Record], client: int, key: SigningKey) -> list[Record]:
    """The records with one client's replies signed by a key, as its holder would."""
    made = copy.deepcopy(records)
    joined, replay = b"", StoredRun.open(run).replay
    states = {(record.plan.phase, record.plan.round): before for before, record in replay}
    for record in made:
        if record["kind"] == "join" and record["client"] == client:
            join = Member.from_json(record)
            joined = replay.members.identity.joining(client, join.examples, join.node, bytes.fromhex(join.key))
        if record["kind"] in ("round", "calibration") and client in record["clients"]:
            before = states[record["phase"], record["round"]]
            read = RoundRecord if record["kind"] == "round" else CalibrationRecord
            told = read.from_json(record)
            message = reply_message(
                joining_digest=hashlib.sha256(joined).digest(),
                client=client,
                plan=told.plan,
                theta=bytes.fromhex(path.digest(before.theta)),
                pointer=told.pointers[client],
                scalars=told.scalars[client],
            )
            record["signatures"][[*told.scalars].index(client)] = base64.b64encode(key.sign(message)).decode()
    return made


def test_what_a_revoked_key_signs_is_found(course: Course, run: Path, tmp_path: Path) -> None:
    """A coordinator that wrote down a revocation and went on all the same."""
    records, name = records_of(run), course.name("k0")
    at = line(records, "round", 3)
    forgery = [*records[:at], KeyRevocation(3, name).to_json(), *records[at:]]
    said = f"line {at + 2} (round 3): client 0's reply is signed with key {name}, which is revoked from round 3 on"
    fails(forged(run, tmp_path / "forged", forgery), said)


def test_a_key_that_only_the_verifier_knows_to_be_revoked_is_found(
    course: Course, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = course.name("k0")
    fails(run, f"(join of client 0, key {name})", "revoked from round 0 on", revoked={name: 0})
    fails(run, f"(round 2): client 0's reply is signed with key {name}", revoked={name: 2})
    assert verify(run, revoked={name: ROUNDS, course.name("k1"): 3, course.name("k2"): 3}).finished
    # the handover of a key that was revoked by then is none
    gone = course.name("k1")
    fails(run, f"client 1's handover to key {course.name(ROTATED)} is signed with key {gone}", revoked={gone: 2})
    assert main(["verify", str(run), "--revoked", f"{name}@4"]) == 1
    assert "(round 4): client 0's reply" in capsys.readouterr().err
    (tmp_path / "revoked").write_text(f"# lost on Monday\n{name}@{ROUNDS}\n{course.name('k2')}@3\n")
    assert main(["verify", str(run), "--revoked", str(tmp_path / "revoked")]) == 0
    for bad in ("SHA256:short", f"{name}@soon", str(tmp_path / "none"), str(run)):
        assert main(["verify", str(run), "--revoked", bad]) in (1, 2)


def test_a_revoked_key_that_signed_nothing_is_said_to_have(
    course: Course, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger, pub = course.name("stranger"), str(course.keys / "stranger.pub")
    assert main(["verify", str(run), "--revoked", pub, "--revoked", f"{course.name('k2')}@3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["finished"]
    notes = [line for line in err.splitlines() if line.startswith("note")]
    assert notes == [f"note: --revoked {stranger}: no reply of this run is signed with it; is it the right one?"]
    assert main(["verify", str(run), "--revoked", str(course.keys / "k0.pub")]) == 1
    assert "revoked from round 0 on" in capsys.readouterr().err
    unsigned_one = forged(run, tmp_path / "forged", unsigned(records_of(run)))
    assert main(["verify", str(unsigned_one), "--revoked", pub]) == 0
    assert "note: --revoked: no reply of this run is signed, so there was nothing to check" in capsys.readouterr().err


def test_a_coordinator_that_is_told_of_a_key_nobody_has_says_so(
    course: Course, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    cut = forged(tmp_path / "run", tmp_path / "cut", records_of(run)[:9])
    gone = (course.name("stranger"), course.name("k2"))
    with pytest.raises(RunFailed):  # nobody comes
        coordinate(course.config(), course.federation(revoked=gone), cut, Staged(course.setting, {}))
    notes = [line for line in capsys.readouterr().err.splitlines() if "is it the right one?" in line]
    assert notes == [f"note: revoked {gone[0]}: no client of this run signs with it now; is it the right one?"]


def test_a_key_that_was_never_handed_over_is_found(course: Course, run: Path, tmp_path: Path) -> None:
    records = copy.deepcopy(records_of(run))
    at = line(records, "join", 3)
    records[at]["handover"] = ""
    said = f"line {at + 1} (join of client 1", f"signed with key {course.name('k1')}, and nothing hands over"
    fails(forged(run, tmp_path / "forged", records), *said)
    join = Member.from_json(records[at])
    joining = StoredRun.open(run).replay.members.identity.joining(1, join.examples, join.node, bytes.fromhex(join.key))
    records[at]["handover"] = course.signing("stranger").sign(handover(joining)).hex()
    fails(forged(run, tmp_path / "forged", records), f"key {course.name('k1')} has not handed over to")


# simulations, and the coordinator's settings


def test_a_simulation_is_said_to_have_no_signatures(
    simulate_arguments: list[str], course: Course, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*simulate_arguments, "--rounds", "1", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["verify", str(out)]) == 0
    assert "a simulation: no signatures; no differential privacy\n" in capsys.readouterr().out
    (tmp_path / "keys").write_text(course.name("k0"))
    assert main(["verify", str(out), "--signers", str(tmp_path / "keys")]) == 2
    assert "a simulation, whose replies are not signed; leave --signers out" in capsys.readouterr().err
    assert main(["verify", str(out), "--revoked", course.name("k0")]) == 0
    assert "note: --revoked: no reply of this run is signed" in capsys.readouterr().err
    records = records_of(out)
    records[1]["signatures"] = [base64.b64encode(bytes(64)).decode()] * 3
    fails(forged(out, tmp_path / "forged", records), "line 2 (round 0): client 0's reply is signed")


def test_sign_is_what_the_run_began_with(course: Course, run: Path) -> None:
    with pytest.raises(MeerkatError, match="began with sign = true"):
        coordinate(course.config(), course.federation(sign=False, signers=""), run, Staged(course.setting, {}))


def test_what_is_left_open_again_is_what_the_run_began_with(tmp_path: Path) -> None:
    given = make_config({"update_rule": "adam", "dp": "example", "dp_epsilon": 8.0})
    asked = resolve(given)
    left = {"lr", "server_lr", "eps", "dtype", "dp_noise_multiplier"}  # until the run begins
    assert all(getattr(asked, name) == AUTO for name in left)
    numbers = {name: "float32" if name == "dtype" else 0.5 for name in left}
    folder = RunFolder.create(tmp_path / "run", asked.model_copy(update=numbers))
    _check_same(given, asked, folder)
    elsewhere = {"threads": 99, "tokens_per_pass": 7, "device": "cuda:3"}  # what another machine fills in
    _check_same(given, asked.model_copy(update=elsewhere), folder)
    before = asked.model_copy(update={**numbers, "early_stop": "none"})  # as an earlier version wrote by-method down
    _check_same(given, asked, RunFolder.create(tmp_path / "before", before))
    with pytest.raises(MeerkatError, match="began with early_stop 'none', not 'vp'"):
        _check_same(given, asked.model_copy(update={"early_stop": "vp"}), folder)
    changes = {**dict.fromkeys(left - {"dtype"}, 0.25), **elsewhere}
    for name, value in changes.items():
        with pytest.raises(MeerkatError, match=f"began with {name} .*, not {value!r}"):
            _check_same(given.model_copy(update={name: value}), asked.model_copy(update={name: value}), folder)


def test_a_new_federation_with_a_setting_that_does_nothing_is_refused(course: Course, tmp_path: Path) -> None:
    with pytest.raises(MeerkatError, match="attackers 2: does nothing with attack none"):
        coordinate(course.config(attackers=2), course.federation(), tmp_path / "run", Staged(course.setting, {}))
    assert not (tmp_path / "run").exists()


def test_a_site_without_a_key_is_refused_where_all_must_sign(course: Course, tmp_path: Path) -> None:
    with pytest.raises(
        Refused, match="signing_key: the run takes only signed replies; make a key with 'meerkat keygen'"
    ):
        coordinate(course.config(), course.federation(), tmp_path / "run", Staged(course.setting, {0: {}}))


def test_after_a_revocation_a_new_key_must_be_listed(course: Course, run: Path, tmp_path: Path) -> None:
    """Whoever has stolen a key has perhaps the node, too: the coordinator's operator has to say which key is next."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    cut = forged(tmp_path / "run", tmp_path / "cut", records_of(run)[:9])  # before the revocation
    gone = {"revoked": (course.name("k2"),)}
    for more, said in (
        ({"signers": ""}, "was revoked: its successor must be in the coordinator's 'signers'"),
        ({}, "is not among the listed ones"),
    ):
        staged = Staged(course.setting, {2: {"signing_key": course.key("stranger")}})
        with pytest.raises(Refused, match=said):
            coordinate(course.config(), course.federation(**gone, **more), cut, staged)
    with pytest.raises(Refused, match="is revoked from round 3 on"):
        coordinate(
            course.config(),
            course.federation(**gone),
            cut,
            Staged(course.setting, {2: {"signing_key": course.key("k2")}}),
        )
    assert [record["kind"] for record in records_of(cut)].count("revoke") == 1


def test_a_federation_where_some_sign_is_gone_through(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = course.setting.but(early_stop="none", local_steps=1)
    federation = Federation.of(setting, monkeypatch, join=2)
    federation.enter(2, signing_key=course.key("k2"))
    federation.round()
    federation.round()
    again = replay(setting, federation.records)
    assert again.replies == 6
    assert dict(again.signed) == {(2, course.name("k2")): 2}
    for at, record in enumerate(federation.records):
        if record["kind"] == "round":
            assert [bool(text) for text in record["signatures"]] == [False, False, True]
            swapped = {**record, "signatures": [record["signatures"][2], "", ""]}
            with pytest.raises(RunFailed, match="client 0's reply is signed, but it joined without a key"):
                replay(setting, [*federation.records[:at], swapped, *federation.records[at + 1 :]])


# --- two histories of one federation ---


def half_lived(course: Course, out: Path, keys: dict[int, dict[str, str]]) -> None:
    """The first rounds of a federation."""

    def stop(staged: Staged) -> None:
        staged.wire.after(4.5, lambda: staged.stop("enough"))

    with pytest.raises(RunFailed, match="enough"):
        coordinate(course.config(), course.federation(), out, Staged(course.setting, keys, stop))


def signing(course: Course, ledgers: Path | None = None) -> dict[int, dict[str, str]]:
    keys = {client: {"signing_key": course.key(f"k{client}")} for client in range(3)}
    return {k: {**own, "ledger": str(ledgers / f"{k}.ledger")} for k, own in keys.items()} if ledgers else keys


def two_histories(course: Course, folder: Path, keys: dict[int, dict[str, str]]) -> tuple[Path, Path]:
    """One federation's folder, copied half way; the copy goes on without client 2, then with everyone."""
    one, other = folder / "one", folder / "other"
    half_lived(course, one, keys)
    shutil.copytree(one, other)
    coordinate(course.config(), course.federation(), one, Staged(course.setting, keys))

    def back(staged: Staged) -> None:
        staged.wire.after(3.5, lambda: staged.enter(2, **keys[2]))

    without = {client: own for client, own in keys.items() if client != 2}
    coordinate(course.config(), course.federation(start_s=1.0), other, Staged(course.setting, without, back))
    return one, other


def test_a_site_takes_part_in_one_history(course: Course, tmp_path: Path) -> None:
    """Each may be sound by itself; no site's replies are in both once they part."""
    with pytest.raises(RunFailed, match="round 4"):
        two_histories(course, tmp_path, signing(course, tmp_path))
    assert verify(tmp_path / "one").finished
    parted = fork(tmp_path / "one", tmp_path / "other")
    assert parted is None or parted.signed_both == ()


def test_two_histories_of_sites_that_keep_nothing_are_told_by_who_has_both(
    course: Course, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = two_histories(course, tmp_path, signing(course))
    assert verify(one).finished
    assert verify(other).finished
    parted = fork(one, other)
    assert parted is not None
    assert parted.signed_both == (0, 1)
    assert main(["verify", str(one), "--against", str(other)]) == 1
    said = capsys.readouterr().err
    assert f"fork at line {parted.line} of rounds.log, after round {parted.round}; clients 0, 1 signed" in said
    assert main(["verify", str(one), "--against", str(one)]) == 0
    assert "the same history, as far as both go" in capsys.readouterr().err


def test_a_forger_cannot_say_that_a_site_signed_twice(
    course: Course, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A federation of the same id, with keys and replies of the forger's own."""
    name = records_of(run)[0]["federation"]
    monkeypatch.setattr(coordinator_module.secrets, "token_hex", lambda _: name)
    keys = {k: {"signing_key": str(make_signing_key(tmp_path / f"{k}.key").private)} for k in range(3)}
    coordinate(course.config(), course.federation(signers=""), tmp_path / "forged", Staged(course.setting, keys))
    parted = fork(run, tmp_path / "forged")
    assert parted is not None
    assert parted.signed_both == ()
    signers = ["--signers", str(course.keys / "signers")]
    assert main(["verify", str(run), *signers, "--against", str(tmp_path / "forged")]) == 1
    assert "is not among the listed ones" in capsys.readouterr().err


def test_the_same_reply_under_a_new_key_is_no_second_one(run: Path, tmp_path: Path) -> None:
    """A site that rotated its key signs the reply of an open round again."""
    records = records_of(run)
    at = next(i for i, record in enumerate(records) if record["kind"] == "round")
    # as others, which need not be sound here
    signatures, theta = records[at]["signatures"][::-1], records[at]["theta"][::-1]
    records[at] = {**records[at], "signatures": signatures, "theta": theta}
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    (copied / "rounds.log").unlink()
    log = RunLog(copied / "rounds.log")
    for record in records[: at + 1]:
        log.append(record)
    log.close()
    parted = fork(run, copied)
    assert parted is None or parted.signed_both == ()


def test_a_history_that_ends_sooner_is_no_fork(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "sooner")
    log = tmp_path / "sooner" / "rounds.log"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-3]))
    assert fork(run, tmp_path / "sooner") is None


def test_logs_of_two_federations_are_not_compared(run: Path, other: Path) -> None:
    with pytest.raises(MeerkatError, match="not of one federation"):
        fork(run, other)
