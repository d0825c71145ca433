"""What one site can cost a run that waits for it: a few deadlines, whether it is late, silent or talks too much."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from federation import Federation, Setting, counted, frame

from meerkat.federation import frames
from meerkat.federation.frames import Frame, Kind

Carried = Callable[[int, bytes, bool], Sequence[tuple[float, bytes]] | None]
ROUNDS, DEADLINE_S = 100, 10.0


@pytest.fixture(scope="module")
def setting(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting.make(federation, tmp_path_factory.mktemp("sites"), rounds=1000)


def delayed(seconds: Callable[[int], float]) -> Carried:
    """Each client's replies take so many seconds."""
    return lambda client, data, up: [(seconds(client) if up else 0.0, data)]


def durations(federation: Federation, rounds: int) -> list[float]:
    """Seconds that each of the next rounds takes."""
    taken = []
    for _ in range(rounds):
        began = federation.wire.now
        federation.round()
        taken.append(federation.wire.now - began)
    return taken


def at_the_deadline(taken: Sequence[float]) -> int:
    return sum(seconds >= DEADLINE_S for seconds in taken)


def test_a_site_that_is_always_late_costs_ever_fewer_rounds(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch, deadline_s=DEADLINE_S)
    federation.wire.meddle = delayed(lambda client: DEADLINE_S + 0.5 if client == 2 else 1.0)
    assert at_the_deadline(durations(federation, ROUNDS)) <= 7  # 2 ** 7 > 100
    assert 2 in federation.engine.sessions.present()


def test_to_be_in_time_now_and_then_does_not_undo_it(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch, deadline_s=DEADLINE_S)
    replies = iter(range(10**6))
    federation.wire.meddle = delayed(lambda client: DEADLINE_S + 0.5 if client == 2 and next(replies) % 2 == 0 else 1.0)
    assert at_the_deadline(durations(federation, ROUNDS)) <= 7


def test_to_hang_up_just_before_the_deadline_is_to_be_late(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch, deadline_s=DEADLINE_S)

    def silent(client: int, data: bytes, up: bool) -> Sequence[tuple[float, bytes]]:
        if not (client == 2 and up):
            return [(1.0 if up else 0.0, data)]
        site = federation.ever[2]
        federation.wire.after(DEADLINE_S - 1.0, lambda: federation.wire.disconnect(2))
        federation.wire.after(DEADLINE_S - 0.5, lambda: federation.wire.connect(site))
        return []

    federation.wire.meddle = silent
    assert sum(seconds >= DEADLINE_S - 1.0 for seconds in durations(federation, ROUNDS)) <= 7


def test_to_fail_just_before_the_deadline_is_to_be_late(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch, deadline_s=DEADLINE_S)
    replies = iter(range(10**6))

    def fails(client: int, data: bytes, up: bool) -> Sequence[tuple[float, bytes]]:
        sent = Frame.decode(data)
        if not (client == 2 and up and sent.kind is Kind.REPLY and next(replies) % 3):  # every third reply is good
            return [(1.0 if up else 0.0, data)]
        failure = sent._replace(kind=Kind.FAILED, body=frames.encode_json({"why": "error"}))
        return [(DEADLINE_S - 0.5, failure.encode())]

    federation.wire.meddle = fails
    assert sum(seconds >= DEADLINE_S - 1.0 for seconds in durations(federation, ROUNDS)) <= 7


def test_who_was_late_for_a_while_takes_part_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch, deadline_s=DEADLINE_S)
    federation.wire.meddle = delayed(lambda client: DEADLINE_S + 0.5 if client == 2 else 1.0)
    durations(federation, 12)
    federation.wire.meddle = delayed(lambda _: 1.0)
    durations(federation, 12)
    assert all(2 in federation.round().scalars for _ in range(10))


def test_where_a_round_would_lack_clients_those_who_were_late_are_asked(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation.of(setting, monkeypatch, deadline_s=DEADLINE_S, clients_minimum=3)
    federation.wire.meddle = delayed(lambda client: DEADLINE_S + 0.5 if client == 2 else 1.0)
    for _ in range(4):
        assert list(federation.round().plan.steps) == [0, 1, 2]


def test_a_site_that_never_evaluates_costs_ever_fewer_evaluations(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation.of(setting, monkeypatch, join=0, deadline_s=DEADLINE_S)
    for client in range(2):
        federation.enter(client, evaluate=True)
    federation.round()
    waited = []
    federation.wire.meddle = lambda client, data, up: [] if up and client == 1 and is_score(data) else [(0.0, data)]
    for _ in range(20):
        began = federation.wire.now
        assert counted(federation)[1] == setting.sizes[0]
        waited.append(federation.wire.now - began)
        federation.round()
    assert at_the_deadline(waited) <= 5  # 2 ** 5 > 20
    assert 1 in federation.engine.available()


def is_score(data: bytes) -> bool:
    return frames.Frame.decode(data).kind is Kind.SCORE


@pytest.mark.parametrize("what", ["its reply", "a score", "a failure"])
def test_a_site_that_says_again_and_again_what_nobody_asked_for_is_removed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    federation = Federation.of(setting, monkeypatch)
    unasked = {
        "a score": frame(Kind.SCORE, 1, federation.state, frames.encode_score("accuracy", 0.5, 4)),
        "a failure": frame(Kind.FAILED, 1, federation.state, frames.encode_json({"why": "diverged"})),
    }
    federation.wire.meddle = lambda client, data, up: (
        [(0.0, data), *[(0.0, unasked.get(what, data))] * 200] if up and client == 1 else [(0.0, data)]
    )
    for _ in range(3):
        federation.round()
        federation.wire.now += 1.0
    federation.gather()
    assert federation.engine.sessions.present() == [0, 2]
    assert sum(federation.engine.counts[each] for each in ("duplicate", "late")) <= 20


def test_what_comes_twice_now_and_then_is_borne(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(setting, monkeypatch)
    federation.wire.meddle = lambda client, data, up: [(0.0, data)] * (5 if up and client == 1 else 1)
    durations(federation, 30)
    assert federation.engine.sessions.present() == [0, 1, 2]


def test_a_score_on_more_rows_than_a_site_may_claim_does_not_count(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation.of(setting, monkeypatch, join=0)
    for client in range(2):
        federation.enter(client, evaluate=True)
    federation.round()
    boast = frame(Kind.SCORE, 1, federation.state, frames.encode_score("accuracy", 1.0, 2**40 - 1))
    federation.wire.meddle = lambda client, data, up: [(0.0, boast if up and client == 1 else data)]
    assert counted(federation)[1] == setting.sizes[0]
    assert federation.engine.sessions.present() == [0]
