"""A federation over a wire: equal to the simulation to the bit where all is well, and sound where it is not."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import Faults, Federation, Setting, counted, frame, opened, replay, write_rows
from tiny import CHAT_TEMPLATE

from meerkat.algorithm import path, server
from meerkat.algorithm.client_sampling import seeded_sample
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import RoundRecord
from meerkat.algorithm.server import ServerState
from meerkat.errors import RunFailed
from meerkat.federation import frames, remote_engine
from meerkat.federation.admission import Binding
from meerkat.federation.catch_up import RecentRounds
from meerkat.federation.certificates import make_signing_key
from meerkat.federation.frames import Closed, Frame, Kind
from meerkat.federation.site_settings import Refused
from meerkat.problems.data import load_rows
from meerkat.record.members import KeyRevocation
from meerkat.record.run_folder import Metric, RunFolder
from meerkat.record.signatures import Signer, SigningKey, fingerprint


@pytest.fixture(scope="module")
def setting(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting.make(federation, tmp_path_factory.mktemp("sites"))


def answered(record: RoundRecord) -> list[int]:
    return list(record.scalars)


def same_theta(federation: Federation, clients: Sequence[int]) -> bool:
    wanted = (federation.state.round, path.digest(federation.state.theta))
    return all(stands(federation, client) == wanted for client in clients)


def stands(federation: Federation, client: int) -> tuple[int, str]:
    said = Frame.decode(federation.ever[client].hello())
    return said.round, said.digest.hex()


# as the simulation

CALIBRATED = {"early_stop": "vp", "calibration_steps": 8, "initial_steps": 3, "later_steps": 3}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"directions": 2},
        {"dtype": "bfloat16", "eps": 3e-3},
        {"dtype": "float16", "local_steps": 2, "rounds": 2},
        {"local_steps": 5, "rounds": 2},
        {"local_steps": 5, "directions": 2, "rounds": 2, "lr_schedule": "linear"},
        {"clients_per_round": 2, "rounds": 5},
        {"local_steps": 3, "clients_per_round": 1, "rounds": 5},
        {"local_steps": 3, "weights": "equal"},
        {"local_steps": 3, **CALIBRATED},
        {"local_steps": 3, **CALIBRATED, "early_stop": "random", "recalibrate_every": 2, "vpcs_rule": "thresholds"},
        {"update_rule": "momentum", "server_lr": 0.7},
        {"local_steps": 2, "update_rule": "adam", "server_lr": 0.01},
        {"method": "feddyn", "feddyn_alpha": 0.1, "local_steps": 2},
        {"method": "feddyn", "feddyn_alpha": 0.1, "clients_per_round": 2, "rounds": 5},
    ],
    ids=str,
)
def test_a_federation_is_the_simulation_to_the_bit(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any]
) -> None:
    ours = setting.but(**changes)
    federation = Federation.of(ours, monkeypatch)
    state = federation.lived(tmp_path / "run")
    digests = [record["theta"] for record in federation.records if record["kind"] == "round"]
    assert digests == ours.simulated()
    assert path.digest(state.theta) == digests[-1] != path.digest(setting.theta_0)
    assert [record["kind"] for record in federation.records[:3]] == ["join"] * 3
    assert replay(ours, federation.records).closed


def test_sites_follow_the_run_s_chat_template(
    federation: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(federation, root)
    plain = Setting.make(root, tmp_path / "plain").simulated()
    (root / "model" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    ours = Setting.make(root, tmp_path / "sites", chat_template="on")
    chats = Federation.of(ours, monkeypatch)
    chats.lived(tmp_path / "run")
    digests = [record["theta"] for record in chats.records if record["kind"] == "round"]
    assert digests == ours.simulated() != plain


def test_metrics_are_noted_once_a_second_and_none_is_missing(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = setting.but(rounds=12, eval_every=10)
    federation = Federation.of(ours, monkeypatch)
    federation.wire.meddle = slow(1, 0.4)
    noted: list[tuple[str, int, float, int]] = []
    append_metric = RunFolder.append_metric

    def timed(folder: RunFolder, metric: Metric, sync: bool = True) -> None:
        logged = (tmp_path / "run" / "rounds.log").read_text().count('"kind":"round"')
        noted.append((metric["kind"], metric["round"], federation.wire.now, logged))
        append_metric(folder, metric, sync)

    monkeypatch.setattr(RunFolder, "append_metric", timed)
    federation.lived(tmp_path / "run")
    wanted = [("evaluation", 0), *(("round", r) for r in range(10)), ("evaluation", 10), ("round", 10), ("round", 11)]
    wanted += [("evaluation", 12)]
    assert [each[:2] for each in noted] == wanted
    assert [(m["kind"], m["round"]) for m in RunFolder(tmp_path / "run").metrics()] == wanted
    assert all(logged > at for kind, at, _, logged in noted if kind == "round")
    times = sorted({when for kind, _, when, _ in noted if kind == "round"})
    assert 3 <= len(times) <= 7  # 12 rounds of .4 s, and all that was left before an evaluation
    assert all(later - earlier >= 1 for earlier, later in pairwise(times[:3]))


def test_who_stops_early_makes_one_step(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = setting.but(local_steps=3, **CALIBRATED)
    federation = Federation.of(ours, monkeypatch)
    monkeypatch.setattr("meerkat.algorithm.calibration.select", everyone_but_first)
    record = federation.round()
    assert record.plan.steps == {0: 3, 1: 1, 2: 1}
    assert [len(g) for g in record.scalars.values()] == [3, 1, 1]
    assert federation.state.steps_made == {0: 11, 1: 9, 2: 9}


def everyone_but_first(magnitude: Any, *_: Any) -> Any:
    from meerkat.algorithm.extreme_clients import Selection

    clients = tuple(magnitude)
    return Selection(clients, clients[1:], (), (), (), 0.0, 0.0, 0.0, 0.0)


# time


def slow(client: int, seconds: float) -> Any:
    """A wire whose one client answers after so many seconds."""
    return lambda k, data, up: [(seconds if up and k == client else 0.0, data)]


def test_who_is_slow_is_not_waited_for_beyond_the_deadline(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting.but(rounds=9), monkeypatch)
    federation.wire.meddle = slow(2, 12.0)
    first = federation.round()
    assert (list(first.plan.steps), answered(first)) == ([0, 1, 2], [0, 1])
    assert federation.engine.facts()["round_s"] == pytest.approx(10.0)
    second = federation.round()
    assert list(second.plan.steps) == [0, 1]  # not asked again before it has answered
    federation.wire.receive(0)
    federation.wire.now += 5
    federation.wire.meddle = slow(2, 1.0)
    third = federation.round()
    assert federation.engine.counts["late"] == 1
    assert answered(third) == [0, 1, 2]
    assert federation.engine.sessions.caught_up == {"rounds": 1, "state": 0}
    federation.end()
    assert same_theta(federation, [0, 1, 2])
    assert federation.replayed().state.round == 3


def test_a_round_in_which_all_answer_does_not_wait(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch)
    federation.wire.meddle = slow(1, 3.0)
    federation.round()
    assert federation.wire.now == pytest.approx(3.0)
    assert federation.engine.facts() == {"round_s": pytest.approx(3.0), "here": 3}


def test_a_round_waits_for_its_quorum_beyond_the_deadline(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch, quorum=3)
    federation.wire.meddle = slow(0, 25.0)
    assert answered(federation.round()) == [0, 1, 2]
    assert federation.wire.now == pytest.approx(25.0)


def test_a_round_whose_clients_are_gone_opens_again_with_those_who_are_here(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation.of(setting.but(clients_per_round=1), monkeypatch, clients_minimum=1)
    federation.round()
    asked = seeded_sample(range(3), 1, federation.settings.seed, 1)[0]

    def cut(client: int, data: bytes, up: bool) -> list[tuple[float, bytes]] | None:
        return None if client == asked and not up else [(0.0, data)]

    federation.wire.meddle = cut
    record = federation.round()
    assert len(answered(record)) == 1
    assert asked not in answered(record)
    assert federation.wire.now == pytest.approx(10.0)  # until the deadline it could have come back
    assert federation.replayed().state.round == 2


def test_a_round_that_one_failure_leaves_short_of_its_quorum_opens_again(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, failures = Federation.of(setting, monkeypatch, quorum=3), iter([True])
    said = frames.encode_json({"why": "out of memory"})

    def once(client: int, data: bytes, up: bool) -> list[tuple[float, bytes]]:
        fails = up and client == 1 and next(failures, False)
        return [(0.0, frame(Kind.FAILED, client, federation.state, said) if fails else data)]

    federation.wire.meddle = once
    assert answered(federation.round()) == [0, 1, 2]
    assert path.digest(federation.state.theta) == setting.simulated()[0]
    assert federation.wire.now == 0.0


def test_too_few_replies_for_too_long_stop_the_run(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch, quorum=3)
    federation.round()
    federation.wire.meddle = slow(0, 1e4)
    with pytest.raises(RunFailed, match=r"round 1: 2 replies came in 4\d s, 3 are needed; what was logged is safe"):
        federation.round()
    assert federation.replayed().state.round == 1


def test_the_first_round_waits_for_those_that_are_wanted_and_later_ones_do_not(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation.of(setting, monkeypatch, join=1, clients_wanted=3)
    federation.wire.after(2.0, lambda: federation.enter(1) and None)
    federation.wire.after(8.0, lambda: federation.enter(2) and None)
    assert answered(federation.round()) == [0, 1]
    assert 5.0 <= federation.wire.now < 6.0
    assert answered(federation.round()) == [0, 1]
    federation.wire.now = 9.0
    assert answered(federation.round()) == [0, 1, 2]


def test_a_start_that_is_longer_than_the_patience_does_not_stop_the_run(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation.of(setting, monkeypatch, join=1, clients_wanted=3, start_s=60.0, patience_s=10.0)
    assert answered(federation.round()) == [0]
    assert federation.wire.now >= 60.0


def test_too_few_clients_for_too_long_stop_the_run(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch, join=1, clients_minimum=2)
    with pytest.raises(RunFailed, match=r"round 0: 1 client here and idle, 2 are needed, and no more came for 3"):
        federation.round()
    assert federation.records == []


# coming and going


def test_joins_are_logged_once_before_the_round_they_count_from(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation.of(setting, monkeypatch, join=2)
    federation.round()
    federation.enter(2)
    federation.round()
    federation.wire.disconnect(0)
    federation.wire.connect(federation.ever[0])
    federation.round()
    assert [r["kind"] for r in federation.records] == ["join", "join", "round", "join", "round", "round"]
    assert federation.records[3] == {
        "kind": "join",
        "round": 1,
        "client": 2,
        "examples": setting.sizes[2],
        "node": "node 2",
        **dict.fromkeys(("key", "signature", "handover"), ""),
    }
    again = federation.replayed()
    assert again.members.nodes == {0: "node 0", 1: "node 1", 2: "node 2"}
    assert dict(again.settings.examples) == dict(enumerate(setting.sizes))


def test_a_client_with_other_data_counts_anew(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    federation = Federation.of(setting, monkeypatch)
    federation.round()
    federation.wire.disconnect(1)
    write_rows(tmp_path, load_rows(str(setting.folder / "1"), "train")[:5])
    federation.enter(1, data=str(tmp_path))
    record = federation.round()
    assert federation.records[-2]["examples"] == 5
    assert record.weights[1] == pytest.approx(5 / (5 + setting.sizes[0] + setting.sizes[2]))
    assert federation.replayed().settings.examples[1] == 5


def test_a_client_with_other_data_is_not_asked_in_the_round_it_left(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    federation = Federation.of(setting, monkeypatch)
    write_rows(tmp_path, load_rows(str(setting.folder / "1"), "train")[:5])
    federation.wire.meddle = slow(2, 4.0)
    federation.wire.after(1.0, lambda: federation.wire.disconnect(1))
    federation.wire.after(2.0, lambda: federation.enter(1, data=str(tmp_path)) and None)
    federation.wire.meddle = lambda k, data, up: [(4.0 if up and k else 0.0, data)]
    first = federation.round()
    assert answered(first) == [0, 2]
    assert answered(federation.round()) == [0, 2]  # the round that it left closed without it: it is spared the next
    assert answered(federation.round()) == [0, 1, 2]
    assert federation.replayed().state.round == 3


@pytest.mark.parametrize("fresh", [False, True])
def test_a_stream_that_breaks_in_a_round_may_come_back_in_it(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    ours = setting.but(rounds=9)
    federation, quiet = Federation.of(ours, monkeypatch), Federation(ours)
    for client in range(3):
        quiet.enter(client)
    federation.round()
    federation.wire.meddle = slow(1, 5.0)
    site = federation.ever[1]
    federation.wire.after(1.0, lambda: federation.wire.disconnect(1))
    come = (lambda: federation.enter(1) and None) if fresh else (lambda: federation.wire.connect(site))
    federation.wire.meddle = lambda k, data, up: [(4.0 if up and k else 0.0, data)]
    federation.wire.after(2.0, come)
    assert answered(federation.round()) == [0, 1, 2]
    assert federation.wire.now == pytest.approx(4.0 + 2.0 + 0.0)
    monkeypatch.setattr(remote_engine, "time", quiet.wire)
    quiet.round()
    quiet.round()
    assert path.digest(quiet.state.theta) == path.digest(federation.state.theta)
    assert federation.engine.counts == dict.fromkeys(federation.engine.counts, 0)


def test_a_round_goes_on_without_those_who_left(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch)
    federation.wire.meddle = lambda k, data, up: None if up and k == 1 else [(0.0, data)]
    assert answered(federation.round()) == [0, 2]
    assert federation.wire.now == 0.0  # nobody waited for a deadline
    assert federation.engine.available() == [0, 2]


def test_a_client_that_comes_in_a_calibration_is_logged_before_it_is_asked(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = setting.but(local_steps=2, **CALIBRATED)
    federation = Federation.of(ours, monkeypatch, join=2)
    federation.wire.meddle = slow(1, 4.0)
    federation.wire.after(2.0, lambda: federation.enter(2) and None)
    federation.lived(tmp_path / "run")
    kinds = [(r["kind"], r.get("round"), r.get("client", r.get("clients"))) for r in federation.records[:5]]
    assert kinds == [
        ("join", 0, 0),
        ("join", 0, 1),
        ("calibration", 0, [0, 1]),
        ("join", 0, 2),
        ("round", 0, [0, 1, 2]),
    ]
    assert " of 3 clients make one local step a round from now on" in capsys.readouterr().err
    assert replay(ours, federation.records).closed


def test_a_calibration_has_longer_than_a_round(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has eight steps, where a round of ten seconds has two."""
    federation = Federation.of(setting.but(local_steps=2, **CALIBRATED), monkeypatch)
    federation.wire.meddle = slow(1, 39.0)
    federation.round()
    assert federation.records[3]["kind"] == "calibration"
    assert federation.records[3]["clients"] == [0, 1, 2]
    assert federation.records[4]["clients"] == [0, 1, 2]
    assert answered(federation.round()) == [0, 2]  # a round waits for ten


def test_nobody_left_after_a_calibration_is_waited_for(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = setting.but(local_steps=2, **CALIBRATED)
    federation = Federation.of(ours, monkeypatch, join=2)
    federation.wire.meddle = slow(1, 9.0)
    for client, seconds in ((0, 1.0), (1, 2.0)):  # the first has answered, the second never will
        site = federation.ever[client]
        federation.wire.after(seconds, lambda client=client: federation.wire.disconnect(client))
        federation.wire.after(seconds + 5, lambda site=site: federation.wire.connect(site))
    assert federation.lived(tmp_path / "run").round == 4
    assert replay(ours, federation.records).closed


def test_a_coordinator_that_starts_again_goes_on_where_its_log_ends(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = setting.simulated()
    first = Federation.of(setting, monkeypatch)
    first.round()
    first.round()
    again = first.replayed()
    second = Federation(setting, first.waiting, again.state, again.settings, again.members)
    monkeypatch.setattr(remote_engine, "time", second.wire)
    for client in range(3):
        second.enter(client)
    with pytest.raises(Refused, match="another node's"):
        second.enter(1, node="stranger")
    records = [*first.records]
    for _ in range(2):
        second.round()
    assert [r["kind"] for r in second.records] == ["round", "round"]  # nobody joins again
    assert path.digest(second.state.theta) == whole[-1]
    assert second.engine.sessions.caught_up["state"] == 3
    assert replay(setting, [*records, *second.records]).state.round == 4
    second.end()
    assert same_theta(second, [0, 1, 2])


# catching up


def test_few_rounds_are_told_as_rounds_and_many_as_the_state(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting.but(rounds=90), monkeypatch, join=1)
    federation.round()
    federation.round()
    federation.enter(1)
    federation.round()
    assert federation.engine.sessions.caught_up == {"rounds": 1, "state": 0}
    many = 4 * len(setting.mask) // 27 + 1
    while federation.state.round < many:
        federation.round()
    federation.enter(2)
    assert answered(federation.round()) == [0, 1, 2]
    assert federation.engine.sessions.caught_up == {"rounds": 1, "state": 1}
    federation.end()
    assert same_theta(federation, [0, 1, 2])


@pytest.mark.parametrize("changes", [{}, {"update_rule": "adam", "server_lr": 0.01}, {"method": "feddyn"}])
def test_a_site_that_holds_another_theta_gets_the_state_and_its_reply_counts(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    ours = setting.but(local_steps=2, **changes)
    federation = Federation.of(ours, monkeypatch)
    federation.round()
    federation.lead_astray(1)
    for _ in range(3):
        assert answered(federation.round()) == [0, 1, 2]
    assert federation.engine.counts["behind"] == 1
    assert path.digest(federation.state.theta) == ours.simulated()[-1]


def recent_rounds(state_bytes: int, rounds: int) -> RecentRounds:
    recent = RecentRounds(state_bytes, 10, bytes([10]) * 32)
    for number in range(rounds):
        closed = Closed(0.1, 1.0, np.full((1, 1), number, "f4"), False)
        recent.add(closed, frozenset({number % 2}), bytes([11 + number]) * 32)
    return recent


def test_recent_rounds_keep_what_is_shorter_than_the_state() -> None:
    recent = recent_rounds(27 * 3, 5)
    assert (recent.round, recent.digest) == (15, bytes([15]) * 32)
    assert [recent.recognises(r, bytes([r]) * 32) for r in range(10, 17)] == [
        False,
        False,
        True,
        True,
        True,
        True,
        False,
    ]
    assert not recent.recognises(13, bytes([12]) * 32)
    assert not recent.recognises(15, bytes([14]) * 32)
    assert [recent.shorter_than_state(r) for r in (11, 12, 15)] == [False, True, True]
    told = recent.missed_since(12, client=1)
    assert [c.aggregate.item() for c in told] == [2, 3, 4]
    assert [c.counted for c in told] == [False, True, False]
    assert recent.missed_since(15, client=1) == []


def test_recent_rounds_fit_a_frame_however_large_the_state() -> None:
    recent = RecentRounds(10**9, 0, bytes(32))
    closed = Closed(0.1, 1.0, np.zeros((100, 10), "f4"), False)
    for number in range(300):  # 4,023 bytes each, so more than a frame together
        recent.add(closed, frozenset(), number.to_bytes(32, "big"))
    first = next(r for r in range(300) if recent.shorter_than_state(r))
    assert first > 0
    told = frames.Work(closed=tuple(recent.missed_since(first, 0)))
    assert len(Frame(Kind.WORK, bytes(8), 0, 300, bytes(32), told.encode()).encode()) <= frames.LIMIT


# sites that do wrong


def reply(federation: Federation, client: int, scalars: Any, phase: Any = "training", **about: Any) -> bytes:
    state = replace(federation.state, replica=replace(federation.state.replica, **about))
    return frame(Kind.REPLY, client, state, frames.Answer(phase, 0, np.array(scalars, "f4")).encode())


BAD = {
    "NaN": lambda f: reply(f, 1, [[np.nan]]),
    "more than any loss": lambda f: reply(f, 1, [[np.float32(3e38)]]),
    "infinity": lambda f: reply(f, 1, [[-np.inf]]),
    "too many steps": lambda f: reply(f, 1, [[1.0], [2.0]]),
    "too many directions": lambda f: reply(f, 1, [[1.0, 2.0]]),
    "no scalar": lambda f: reply(f, 1, np.zeros((0, 1))),
    "garbage": lambda _: b"\x00\xff" * 50,
    "nothing": lambda _: b"",
    "cut short": lambda f: reply(f, 1, [[1.0]])[:-2],
    "another client's": lambda f: reply(f, 0, [[1.0]]),
    "another run's": lambda f: frame(Kind.REPLY, 1, f.state, b"", run="ff" * 8),
    "work": lambda f: frame(Kind.WORK, 1, f.state, frames.Work().encode()),
    "a hello": lambda f: frame(Kind.HELLO, 1, f.state, bytes(32) + b"{}"),
    "an accuracy above 1": lambda f: frame(Kind.SCORE, 1, f.state, frames.encode_score("accuracy", 3.0, 3)),
    "an accuracy that is no number": lambda f: frame(
        Kind.SCORE, 1, f.state, frames.encode_score("accuracy", float("nan"), 3)
    ),
    "another score": lambda f: frame(Kind.SCORE, 1, f.state, frames.encode_score("loss", 0.5, 3)),
    "a score on no rows": lambda f: frame(Kind.SCORE, 1, f.state, frames.encode_score("accuracy", 0.5, 0)),
    "a score on too many rows": lambda f: frame(Kind.SCORE, 1, f.state, frames.encode_score("accuracy", 0.5, 2**40)),
    "a failure without words": lambda f: frame(Kind.FAILED, 1, f.state, b"[]"),
}


@pytest.mark.parametrize("what", BAD)
def test_who_sends_what_cannot_be_is_shown_out_and_the_others_result_is_unharmed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    federation, without = Federation.of(setting, monkeypatch), Federation.of(setting, monkeypatch)
    monkeypatch.setattr(remote_engine, "time", federation.wire)
    federation.wire.meddle = lambda k, data, up: [(0.0, BAD[what](federation) if up and k == 1 else data)]
    without.wire.meddle = lambda k, data, up: None if up and k == 1 else [(0.0, data)]
    record = federation.round()
    assert answered(record) == [0, 2]
    assert federation.engine.counts["malformed"] == 1
    assert federation.engine.available() == [0, 2]
    federation.wire.settle()
    assert federation.ever[1].refused
    with pytest.raises(Refused):
        federation.wire.connect(federation.ever[1])
    assert answered(federation.round()) == [0, 2]
    monkeypatch.setattr(remote_engine, "time", without.wire)
    without.round()
    without.round()
    assert path.digest(federation.state.theta) == path.digest(without.state.theta)
    assert federation.replayed().state.round == 2


def test_replies_that_come_twice_or_too_late_do_not_count_twice(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation.of(setting, monkeypatch)
    federation.wire.meddle = lambda k, data, up: [(0.0, data)] * (2 if up and k == 0 else 1)
    federation.round()
    federation.round()
    federation.gather()
    assert federation.engine.counts["duplicate"] == 2
    assert federation.engine.available() == [0, 1, 2]
    assert path.digest(federation.state.theta) == setting.simulated()[1]


def test_frames_of_who_is_not_here_do_not_count(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch, join=2)
    federation.wire.say(2, reply(federation, 2, [[1.0]]))
    federation.wire.say(7, b"anything")
    assert answered(federation.round()) == [0, 1]
    assert federation.engine.counts["foreign"] == 2
    assert federation.engine.facts()["dropped"] == {"foreign": 2}


def test_a_reply_from_another_theta_is_asked_for_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch)
    wrong = [True]

    def meddle(client: int, data: bytes, up: bool) -> list[tuple[float, bytes]]:
        if up and client == 1 and wrong:
            wrong.clear()
            return [(0.0, reply(federation, 1, [[5.0]], theta=federation.state.theta + 1))]
        return [(0.0, data)]

    federation.wire.meddle = meddle
    assert answered(federation.round()) == [0, 1, 2]
    assert federation.engine.counts["behind"] == 1
    assert federation.engine.sessions.caught_up["state"] == 1
    assert path.digest(federation.state.theta) == setting.simulated()[0]


def test_who_never_comes_to_the_right_theta_is_shown_out(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch)
    behind = frame(Kind.BEHIND, 1, ServerState(Replica(federation.state.round, federation.state.theta + 1)))
    federation.wire.meddle = lambda k, data, up: [(0.0, behind if up and k == 1 else data)]
    assert answered(federation.round()) == [0, 2]
    assert federation.engine.counts["behind"] == 3
    assert federation.engine.available() == [0, 2]
    assert federation.wire.now == 0.0


def failing(federation: Federation, client: int, why: str = "diverged") -> Any:
    said = frames.encode_json({"why": why})
    return lambda k, data, up: [(0.0, frame(Kind.FAILED, k, federation.state, said) if up and k == client else data)]


def test_who_fails_three_times_in_a_row_is_shown_out(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting.but(rounds=9), monkeypatch)
    federation.wire.meddle = failing(federation, 1)
    for _ in range(2):
        assert answered(federation.round()) == [0, 2]
    federation.wire.meddle = slow(1, 0.0)
    assert answered(federation.round()) == [0, 1, 2]  # and is forgiven
    federation.wire.meddle = failing(federation, 1)
    for left in (3, 3, 2):
        assert answered(federation.round()) == [0, 2]
        assert federation.engine.facts()["here"] == left
    assert federation.engine.counts["failed"] == 5
    assert federation.wire.now == 0.0
    assert federation.replayed().state.round == 6


def test_where_everyone_fails_the_run_ends_at_once(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch)
    said = frames.encode_json({"why": "diverged"})
    federation.wire.meddle = lambda k, data, up: [(0.0, frame(Kind.FAILED, k, federation.state, said) if up else data)]
    with pytest.raises(RunFailed, match=r"round 0: nobody could make their steps \(diverged\)"):
        federation.round()
    assert federation.wire.now == 0.0


def test_a_lone_participant_that_fails_does_not_end_the_run(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """One client a round is asked, and one of the three fails whenever it is."""
    federation = Federation.of(setting.but(clients_per_round=1, rounds=12), monkeypatch)
    federation.wire.meddle = failing(federation, 1)
    took_part = [answered(federation.round()) for _ in range(12)]
    assert {client for (client,) in took_part} == {0, 2}
    assert federation.engine.counts["failed"] == 3
    assert federation.engine.available() == [0, 2]
    assert federation.wire.now == 0.0
    assert federation.replayed().state.round == 12


def test_the_only_site_that_came_so_far_cannot_end_the_run(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch, join=0)
    federation.enter(1)
    federation.wire.meddle = failing(federation, 1)
    federation.wire.after(20.0, lambda: federation.enter(0) and None)
    assert answered(federation.round()) == [0]
    assert federation.engine.available() == [0]


def test_to_come_back_does_not_undo_failures(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting.but(rounds=9), monkeypatch)
    federation.wire.meddle = failing(federation, 1)
    for _ in range(2):
        assert answered(federation.round()) == [0, 2]
    for failed in (3, 4):  # the third in a row; and whoever comes back after that has one more chance
        federation.enter(1)
        assert answered(federation.round()) == [0, 2]
        assert federation.engine.counts["failed"] == failed
        assert federation.engine.available() == [0, 2]


@pytest.mark.parametrize("leaves", [False, True])
def test_a_lone_participant_that_says_nothing_does_not_end_the_run(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """It is asked, and keeps silent or hangs up and comes back, again and again."""
    federation = Federation.of(setting.but(clients_per_round=1, rounds=12), monkeypatch)

    def silent(client: int, data: bytes, up: bool) -> Sequence[tuple[float, bytes]] | None:
        if client != 1 or not up:
            return [(0.0, data)]
        federation.wire.after(1.0, lambda: federation.enter(1) and None)
        return None if leaves else []

    federation.wire.meddle = silent
    took_part = [answered(federation.round()) for _ in range(12)]
    assert {client for (client,) in took_part} == {0, 2}
    assert federation.wire.now < 12 * 10.0
    assert federation.replayed().state.round == 12


def test_where_everyone_here_fails_the_run_waits_for_others_and_says_why_it_ends(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation.of(setting, monkeypatch, join=2)
    said = frames.encode_json({"why": "diverged"})
    federation.wire.meddle = lambda k, data, up: [(0.0, frame(Kind.FAILED, k, federation.state, said) if up else data)]
    with pytest.raises(RunFailed) as told:
        federation.round()
    words = "round 0: 0 clients here and idle, 1 are needed, and no more came for 30 s; clients 0, 1 could not make"
    assert str(told.value).startswith(words)
    assert "(diverged); where losses diverged, start a new run with a lower lr" in str(told.value)
    assert federation.wire.now < 40


def test_a_failure_that_is_told_twice_counts_once(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting.but(rounds=9), monkeypatch)
    once = failing(federation, 1)
    federation.wire.meddle = lambda k, data, up: [*once(k, data, up)] * (3 if up and k == 1 else 1)
    federation.round()
    federation.gather()
    assert federation.engine.available() == [0, 1, 2]
    assert federation.engine.counts["failed"] == 1


def test_a_site_s_words_are_not_said_again(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = Federation.of(setting, monkeypatch)
    federation.wire.meddle = failing(federation, 1, "\x1b[31mrow 3: a patient's text")
    federation.round()
    assert "client 1 could not make its steps: error" in capsys.readouterr().err
    why = frames.encode_json({"why": "no\n\x1b[31m more" + "x" * 1000})
    federation.wire.meddle = lambda k, d, up: [(0, frame(Kind.REFUSAL, k, federation.state, why) if up and k else d)]
    federation.round()
    said = capsys.readouterr().err
    assert "client 1 takes no part: no  [31m more" in said
    assert max(map(len, said.splitlines())) < 350
    assert federation.engine.available() == [0]


# signed replies


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four sites' private keys."""
    folder = tmp_path_factory.mktemp("keys")
    return [str(make_signing_key(folder / f"{client}.key").private) for client in range(4)]


def signing(setting: Setting, monkeypatch: pytest.MonkeyPatch, keys: list[str], **waiting: Any) -> Federation:
    """A federation whose three sites sign."""
    federation = Federation.of(replace(setting, signed=True), monkeypatch, join=0, **waiting)
    for client in range(3):
        federation.enter(client, signing_key=keys[client])
    return federation


@pytest.mark.parametrize("changes", [{}, {"local_steps": 3, "directions": 2, **CALIBRATED}], ids=str)
def test_who_signs_makes_the_same_theta_and_every_reply_is_checked(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, keys: list[str], changes: dict[str, Any]
) -> None:
    ours = setting.but(**changes)
    federation = signing(ours, monkeypatch, keys)
    for digest in ours.simulated():
        assert federation.round().theta_digest == digest
    assert {frame.kind for frame in federation.wire.up} == {Kind.SIGNED}
    again = federation.replayed()
    assert again.replies == sum(again.signed.values()) == 3 * (4 + bool(changes))


def resigned(key: str, **about: Any) -> Callable[[Federation, Frame], bytes]:
    """A reply that client 1 signed itself, with this key and about what it was not asked."""

    def change(federation: Federation, frame: Frame) -> bytes:
        (phase, pointer, scalars), _ = frames.decode_reply(frame)
        facts = {"round": 0, "theta": federation.state.theta, "pointer": 0, **about}
        plan = replace(server.open_round(federation.state, federation.settings, [1]), round=facts["round"])
        signer = Signer(
            federation.admission.members.identity, 1, federation.setting.sizes[1], "node 1", SigningKey.load(key), None
        )
        theta = bytes.fromhex(path.digest(facts["theta"]))
        signature = signer.sign(plan, theta, facts["pointer"], scalars)
        return frame._replace(body=signature + frames.Answer(phase, pointer, scalars).encode()).encode()

    return change


def scalar_changed(_: Federation, frame: Frame) -> bytes:
    (phase, pointer, scalars), signature = frames.decode_reply(frame)
    changed = frames.Answer(phase, pointer, np.nextafter(scalars, np.float32(9))).encode()
    return frame._replace(body=signature + changed).encode()


def bit_flipped(_: Federation, frame: Frame) -> bytes:
    return frame._replace(body=bytes([frame.body[0] ^ 1]) + frame.body[1:]).encode()


def stripped(federation: Federation, frame: Frame) -> bytes:
    digest = bytes.fromhex(path.digest(federation.state.theta))
    return frame._replace(kind=Kind.REPLY, digest=digest, body=frame.body[64:]).encode()


@pytest.mark.parametrize("what", ["its own", "another key", "theta", "round", "pointer", "scalar", "bit", "stripped"])
def test_a_reply_that_is_not_signed_as_it_must_be_is_refused_and_the_others_are_unharmed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, keys: list[str], what: str
) -> None:
    ours = setting.but(rounds=9)
    federation = signing(ours, monkeypatch, keys)
    change: Callable[[Federation, Frame], bytes] = {
        "its own": resigned(keys[1]),
        "another key": resigned(keys[3]),
        "theta": resigned(keys[1], theta=setting.theta_0 + 1),
        "round": resigned(keys[1], round=1),
        "pointer": resigned(keys[1], pointer=1),
        "scalar": scalar_changed,
        "bit": bit_flipped,
        "stripped": stripped,
    }[what]

    def meddle(client: int, data: bytes, up: bool) -> list[tuple[float, bytes]]:
        return [(0.0, change(federation, Frame.decode(data)) if up and client == 1 else data)]

    federation.wire.meddle = meddle
    record = federation.round()
    federation.wire.settle()
    if what == "its own":
        assert answered(record) == [0, 1, 2]
        return
    assert answered(record) == [0, 2]
    assert federation.engine.counts["malformed"] == 1
    name = fingerprint(SigningKey.load(keys[1]).public)
    why = f"is not signed; its key is {name}" if what == "stripped" else f"is not what its key {name} signed"
    assert federation.ever[1].ended == f"client 1's reply {why}"
    assert federation.ever[1].refused
    assert answered(federation.round()) == [0, 2]
    assert federation.replayed().state.round == 2


def test_who_joined_without_a_key_does_not_sign(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, keys: list[str]
) -> None:
    federation = Federation.of(setting, monkeypatch)

    def signed(client: int, data: bytes, up: bool) -> list[tuple[float, bytes]]:
        if not up or client != 1:
            return [(0.0, data)]
        body = SigningKey.load(keys[1]).sign(b"anything") + Frame.decode(data).body
        return [(0.0, Frame.decode(data)._replace(kind=Kind.SIGNED, body=body).encode())]

    federation.wire.meddle = signed
    assert answered(federation.round()) == [0, 2]
    federation.wire.settle()
    assert federation.ever[1].ended == "client 1's reply is signed, but it joined without a key"


def test_a_key_is_rotated_while_the_run_goes_on(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, keys: list[str]
) -> None:
    federation = signing(setting.but(rounds=9), monkeypatch, keys)
    federation.round()
    federation.wire.disconnect(1)
    with pytest.raises(Refused, match="nothing hands over"):
        federation.enter(1, signing_key=keys[3])
    federation.enter(1, signing_key=keys[3], signing_key_before=keys[1])
    assert answered(federation.round()) == [0, 1, 2]
    assert [record["kind"] for record in federation.records[-3:]] == ["round", "join", "round"]
    federation.wire.disconnect(1)
    federation.wire.connect(federation.ever[1])  # by its secret, and no news
    federation.wire.disconnect(1)
    federation.enter(1, signing_key=keys[3])
    assert answered(federation.round()) == [0, 1, 2]
    assert [record["kind"] for record in federation.records[-2:]] == ["round", "round"]
    names = [fingerprint(SigningKey.load(key).public) for key in keys]
    assert dict(federation.replayed().signed) == {
        (0, names[0]): 3,
        (1, names[1]): 1,
        (1, names[3]): 2,
        (2, names[2]): 3,
    }


def test_a_key_that_is_rotated_in_a_round_answers_after_it(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, keys: list[str]
) -> None:
    federation = signing(setting.but(rounds=9), monkeypatch, keys)
    federation.round()
    federation.wire.meddle = lambda k, data, up: [(4.0 if up and k else 0.0, data)]
    own = {"signing_key": keys[3], "signing_key_before": keys[1]}
    federation.wire.after(1.0, lambda: federation.wire.disconnect(1))
    federation.wire.after(2.0, lambda: federation.enter(1, **own) and None)
    for _ in range(2):  # the round that it left closed without it, so it is spared the next
        assert answered(federation.round()) == [0, 2]
    assert answered(federation.round()) == [0, 1, 2]
    assert federation.replayed().state.round == 4


def test_of_two_that_come_at_once_with_one_key_one_is_shown_out(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, keys: list[str]
) -> None:
    federation = Federation.of(setting, monkeypatch, join=0)
    for client in range(2):
        federation.enter(client, signing_key=keys[0])
    assert answered(federation.round()) == [0]
    federation.wire.settle()
    assert "of client 1 is client 0's" in federation.ever[1].ended
    assert federation.replayed().state.round == 1


@pytest.mark.parametrize("change", ["the site was registered anew", "the place was another's"])
def test_a_place_whose_node_changes_is_logged_and_its_log_goes_on(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, keys: list[str], tmp_path: Path, change: str
) -> None:
    """Between two starts, the coordinator's settings bind client 1 to another node."""
    ours = replace(setting, signed=True)
    first = signing(setting, monkeypatch, keys)
    first.round()
    again, records, key = first.replayed(), [*first.records], keys[1]
    if change == "the place was another's":
        revocation, key = KeyRevocation(1, fingerprint(SigningKey.load(keys[1]).public)), keys[3]
        records.append(revocation.to_json())
        again.members.revoke(revocation)
    bindings = [Binding(client=0), Binding(client=1, node="77"), Binding(client=2)]
    bindings[1] = bindings[1].model_copy(update={"key": fingerprint(SigningKey.load(key).public)})
    second = Federation(ours, first.waiting, again.state, again.settings, again.members, bindings)
    second.records = records
    monkeypatch.setattr(remote_engine, "time", second.wire)
    for client in (0, 2):
        second.enter(client, signing_key=keys[client])
    second.enter(1, node="77", signing_key=key, ledger=str(tmp_path / "ledger"))
    assert answered(second.round()) == [0, 1, 2]
    (join,) = [record for record in second.records[4:] if record["kind"] == "join"]
    assert (join["client"], join["node"]) == (1, "77")
    replayed = second.replayed()
    assert replayed.state.round == 2
    assert replayed.members.nodes[1] == "77"


def test_a_coordinator_that_starts_again_knows_the_keys(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, keys: list[str]
) -> None:
    ours = replace(setting, signed=True)
    first = signing(setting, monkeypatch, keys)
    first.round()
    again = first.replayed()
    second = Federation(ours, first.waiting, again.state, again.settings, again.members)
    monkeypatch.setattr(remote_engine, "time", second.wire)
    with pytest.raises(Refused, match="nothing hands over"):
        second.enter(1, signing_key=keys[3])
    with pytest.raises(Refused, match="signing_key"):
        second.enter(1)
    for client in range(3):
        second.enter(client, signing_key=keys[client])
    for _ in range(3):
        second.round()
    assert [record["kind"] for record in second.records] == ["round"] * 3
    assert path.digest(second.state.theta) == setting.simulated()[-1]
    assert replay(ours, [*first.records, *second.records]).state.round == 4


# evaluation, and the end


def test_an_evaluation_is_over_the_sites_that_agreed_to_it(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch, join=1)
    for client in (1, 2):
        federation.enter(client, evaluate=True)
    federation.round()
    correct, total = counted(federation)
    assert total == setting.sizes[1] + setting.sizes[2]
    assert 0 < correct < total
    assert {client for client, told in federation.wire.down if told.kind is Kind.EVALUATE} == {1, 2}
    federation.round()
    assert path.digest(federation.state.theta) == setting.simulated()[1]


def test_an_evaluation_does_not_wait_for_those_who_left_nor_beyond_the_deadline(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation.of(setting.but(rounds=9), monkeypatch, join=0)
    for client in range(3):
        federation.enter(client, evaluate=True)
    federation.round()
    federation.wire.meddle = lambda k, data, up: None if up and k == 1 else [(0.0, data)]
    assert counted(federation)[1] == setting.sizes[0] + setting.sizes[2]
    assert federation.wire.now == 0.0
    federation.wire.meddle = slow(2, 15.0)
    assert counted(federation)[1] == setting.sizes[0]
    assert federation.wire.now == pytest.approx(10.0)
    federation.wire.meddle = slow(2, 1.0)  # behind what is on its way: the stream keeps its order
    assert answered(federation.round()) == [0, 2]
    federation.round()


def test_a_score_of_another_evaluation_does_not_count(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting.but(rounds=9), monkeypatch, join=0)
    for client in range(2):
        federation.enter(client, evaluate=client == 0)
    stale = frame(Kind.SCORE, 0, federation.state, frames.encode_score("accuracy", 1.0, 1000))
    federation.round()
    now = frame(Kind.SCORE, 1, federation.state, frames.encode_score("accuracy", 1.0, 1000))

    def meddle(client: int, data: bytes, up: bool) -> list[tuple[float, bytes]]:
        if up and client == 0:
            federation.wire.say(1, now)  # it was not asked
            return [(0.0, stale), (1.0, data)]
        return [(0.0, data)]

    federation.wire.meddle = meddle
    correct, total = counted(federation)
    assert total == setting.sizes[0]
    assert correct <= total


def test_an_evaluation_gives_the_state_to_who_is_behind(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch, join=0)
    federation.enter(0, evaluate=True)
    federation.round()
    federation.lead_astray(0)
    assert counted(federation)[1] == setting.sizes[0]
    assert federation.wire.now == 0.0


def test_an_evaluation_does_not_wait_for_who_cannot(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch, join=0)
    federation.enter(0, evaluate=True)
    federation.round()
    federation.wire.meddle = failing(federation, 0, "out of memory")
    assert counted(federation) == (0, 0)
    assert federation.wire.now == 0.0


def test_at_the_end_everyone_has_the_last_theta_and_knows(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting.but(clients_per_round=1), monkeypatch)
    for _ in range(3):
        federation.round()
    federation.end()
    assert same_theta(federation, [0, 1, 2])
    assert {site.ended for site in federation.ever.values()} == {"the run is over"}
    assert not any(site.refused for site in federation.ever.values())
    assert federation.engine.available() == []


def test_who_comes_when_the_run_ends_is_told_so(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch, join=2)
    federation.round()
    federation.enter(2)
    federation.end()
    assert same_theta(federation, [0, 1, 2])
    assert federation.ever[2].ended == "the run is over"


def test_who_comes_when_the_run_is_stopped_is_told_so(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch, join=0)
    federation.enter(0)
    federation.engine.stop("the run was stopped")
    with pytest.raises(RunFailed, match="the run was stopped"):
        federation.engine._wait(1.0)
    federation.end()
    assert federation.ever[0].ended == "the run is over"


# under any trouble


TROUBLED: list[dict[str, Any]] = [
    {},
    {"local_steps": 3, "directions": 2},
    {"clients_per_round": 2, "update_rule": "momentum", "server_lr": 0.5},
    {"local_steps": 3, **CALIBRATED, "recalibrate_every": 3},
    {"method": "feddyn", "feddyn_alpha": 0.1, "local_steps": 2},
]


@pytest.mark.parametrize("seed", range(2))
def test_whatever_goes_wrong_no_signed_scalar_is_another_than_its_client_made(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, keys: list[str], seed: int
) -> None:
    """Bytes change on the way, in the scalars too: without signatures nobody could tell."""
    ours = replace(setting.but(rounds=8), signed=True)
    federation = Federation.of(ours, monkeypatch, join=0, patience_s=300.0)
    faults = Faults(federation, seed, damage=True, anywhere=True, own=lambda client: {"signing_key": keys[client]})
    for client in range(3):
        federation.enter(client, signing_key=keys[client])
    federation.wire.meddle = faults
    for _ in range(ours.config.rounds):
        federation.round()
    assert path.digest(federation.replayed().state.theta) == path.digest(federation.state.theta)
    assert all_are_honest(ours, federation.records)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of rates that were damaged on the way
@pytest.mark.parametrize("damage", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_whatever_goes_wrong_the_log_says_what_became_of_theta(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, seed: int, damage: bool
) -> None:
    ours = setting.but(rounds=8, **TROUBLED[seed % len(TROUBLED)])
    federation = Federation.of(ours, monkeypatch, patience_s=300.0)
    faults = Faults(federation, seed, damage)
    federation.wire.meddle = faults
    for _ in range(ours.config.rounds):
        federation.round()
    again = federation.replayed()
    assert path.digest(again.state.theta) == path.digest(federation.state.theta)
    assert again.state.steps_made == federation.state.steps_made
    if not damage:
        assert all_are_honest(ours, federation.records)
    federation.wire.meddle = lambda _, data, __: [(0.0, data)]
    idle = set(federation.engine.available()) & set(federation.wire.sites) - faults.damaged
    federation.end()
    assert same_theta(federation, sorted(idle))


def all_are_honest(setting: Setting, records: Sequence[dict[str, Any]]) -> bool:
    """Whether every scalar that was logged is what the client makes of that plan at that state, to the bit."""
    engine = setting.in_one_process()
    for state, record in opened(setting, records):
        before = replace(state, steps_made={**state.steps_made, **record.pointers})
        made = {reply.client: reply.scalars for reply in engine.run(before, record.plan)}
        if any(g.tobytes() != made[client].tobytes() for client, g in record.scalars.items()):
            return False
    return True
