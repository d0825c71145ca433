"""A site's ledger, and the site that rests on it: nothing noisy leaves uncharged, twice drawn, or past a budget."""

import errno
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import RUN, Federation, Setting
from test_site import Server, decoded, scalars_of, stands_at

from meerkat.algorithm.replica import Replica
from meerkat.algorithm.server import ServerState
from meerkat.errors import RunFailed
from meerkat.federation import frames
from meerkat.federation.frames import BadFrame, Closed, Frame, Kind
from meerkat.federation.ledger import Budget, Ledger, Request
from meerkat.federation.site import Site
from meerkat.federation.site_settings import Refused, SiteConfig
from meerkat.privacy.accounting import Charge, epsilon, steps_within
from meerkat.record import run_log
from meerkat.record.run_log import LogReader, RunLog

OTHER = "fedcba9876543210"
SPENT = "epsilon: the privacy budget is spent: the site leaves"
SIGMA, RATE, STEPS = 4.0, 4 / 16, 2
"""Of the setting below: 16 rows a client, batches of four, T = 2."""
STEP = Charge(RATE, SIGMA, 1)


# --- the file ---

ASKED = Request(RUN, 0, "training", 3)
CHARGE = Charge(0.25, 4.0, 2)


def charged(path: Path) -> list[dict[str, Any]]:
    return list(LogReader(path))


def test_a_charge_is_on_the_disk_and_its_reply_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    assert ledger.reply(ASKED) is None
    assert not ledger.has_charges(RUN)
    ledger.charge(ASKED, "ab", CHARGE, b"\x00reply\xff")
    (held,) = charged(path)
    assert held.keys() == {"run", "client", "phase", "round", "theta", "rate", "noise_multiplier", "steps", "reply"}
    with pytest.raises(RunFailed, match="training round 3 was answered before"):
        ledger.charge(ASKED, "cd", CHARGE, b"another")
    ledger.close()
    again = Ledger(path)
    assert again.reply(ASKED) == ("ab", b"\x00reply\xff")
    assert again.has_charges(RUN)
    assert not again.has_charges(OTHER)
    others = [ASKED._replace(run=OTHER), ASKED._replace(client=1), ASKED._replace(phase="calibration")]
    assert [again.reply(asked) for asked in (*others, ASKED._replace(round=2))] == [None] * 4
    again.close()


def test_budgets_cover_one_run_or_all(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    for at in range(3):
        ledger.charge(Request(RUN, 0, "training", at), "", CHARGE, b"")
    ledger.charge(Request(OTHER, 0, "training", 0), "", Charge(1.0, 9.0, 5), b"")
    ours, everything = Budget(3.0, 1e-6, "replace", RUN), Budget(3.0, 1e-6, "replace")
    of_run, of_all = [Charge(0.25, 4.0, 6)], [Charge(0.25, 4.0, 6), Charge(1.0, 9.0, 5)]
    assert ledger.spent(ours) == epsilon(of_run, 1e-6, "replace")
    assert ledger.spent(everything) == epsilon(of_all, 1e-6, "replace") > ledger.spent(ours)
    assert ledger.spent(replace(ours, run="00" * 8)) == 0
    left = [ledger.steps_left(budget, 0.5, 8.0, 9) for budget in (ours, everything)]
    assert left == [steps_within(3.0, 1e-6, 0.5, 8.0, "replace", 9, spent) for spent in (of_run, of_all)]
    ledger.close()


def test_a_torn_last_record_is_dropped_for_its_reply_never_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    ledger.charge(ASKED, "ab", CHARGE, b"one")
    ledger.charge(ASKED._replace(round=4), "ab", CHARGE, b"two")
    ledger.close()
    path.write_bytes(path.read_bytes()[:-9])
    again = Ledger(path)
    assert "line 2 is cut short; that record is dropped: its reply never left" in capsys.readouterr().err
    assert again.reply(ASKED) == ("ab", b"one")
    assert again.reply(ASKED._replace(round=4)) is None
    again.charge(ASKED._replace(round=4), "ab", CHARGE, b"three")
    again.close()
    assert len(charged(path)) == 2


def test_a_damaged_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    for at in range(3):
        ledger.charge(ASKED._replace(round=at), "ab", CHARGE, b"one")
    ledger.close()
    path.write_bytes(path.read_bytes().replace(b'"steps":2', b'"steps":1', 1))
    for _ in range(2):  # and stays so: nothing was dropped
        with pytest.raises(RunFailed, match=r"ledger .*line 1 is damaged; restore"):
            Ledger(path)


def test_a_whole_last_line_that_does_not_hold_is_no_torn_one(tmp_path: Path) -> None:
    """Its reply may have left: dropped, it would be drawn again and charged once."""
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    for at in range(2):
        ledger.charge(ASKED._replace(round=at), "ab", CHARGE, b"one")
    ledger.close()
    head, last = path.read_bytes().splitlines(keepends=True)
    for damaged in (last.replace(b'"steps":2', b'"steps":1'), b"0" * 64 + last[64:], b"\n", last[:-20] + b"\n"):
        path.write_bytes(head + damaged)
        for _ in range(2):
            with pytest.raises(RunFailed, match=r"ledger .*line 2 is damaged; restore the file from a copy"):
                Ledger(path)
        assert path.read_bytes() == head + damaged


@pytest.mark.parametrize(
    "change",
    [
        *({"rate": 0.0}, {"rate": 1.5}, {"steps": 0}, {"steps": "inf"}, {"noise_multiplier": -1.0}),
        *({"steps": 1.5}, {"client": 0.5}, {"round": None}, {"round": True}, {"reply": "?"}),
    ],
)
def test_a_record_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """Chained anew, as nobody but this program should."""
    held = {**ASKED._asdict(), "theta": "ab", **CHARGE._asdict(), "reply": ""}
    for records in ([{**held, **change}], [held, held], [{}]):
        log = RunLog(tmp_path / "ledger")
        for record in records:
            log.append(record)
        log.close()
        for _ in range(2):  # the lock is given back
            with pytest.raises(RunFailed, match=r"ledger .*a record is damaged .*restore the file from a copy"):
                Ledger(tmp_path / "ledger")
        (tmp_path / "ledger").unlink()


def test_one_process_at_a_time_holds_it(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    with pytest.raises(RunFailed, match=r"ledger .*another process is writing it"):
        Ledger(tmp_path / "ledger")
    ledger.close()
    Ledger(tmp_path / "ledger").close()


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"ledger '.*nowhere/ledger': No such file or directory; give a file"):
        Ledger(tmp_path / "nowhere" / "ledger")


# --- the site ---


@pytest.fixture(scope="module")
def setting(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("sites")
    made = Setting.make(
        federation,
        folder,
        local_steps=STEPS,
        directions=2,
        dp="example",
        dp_noise_multiplier=SIGMA,
        dp_clip=0.5,
        early_stop="vp",
        calibration_steps=4,
        initial_steps=2,
        later_steps=2,
    )
    assert made.sizes == [16] * 3
    return made


class Coordinator(Server):
    """The coordinator's side by hand, of any run."""

    def __init__(self, setting: Setting, run: str = RUN) -> None:
        super().__init__(setting)
        self.run = run

    def frame(self, kind: Kind, body: bytes = b"", client: int = 0) -> bytes:
        return Frame.decode(super().frame(kind, body, client))._replace(run=bytes.fromhex(self.run)).encode()


def site_of(setting: Setting, ledger: Path, run: str = RUN, **own: Any) -> Site:
    given = {"client": 0, "data": str(setting.folder / "0"), "model": str(setting.root / "model"), "device": "cpu"}
    accepts = {"mask_minimum": 1, **own.pop("accepts", {})}
    own = {**given, "ledger": str(ledger), **own, "accepts": accepts}
    return Site(replace(setting.offer(), run=run), SiteConfig(**own))


def cost(steps: int) -> float:
    """A budget that lasts for so many steps, and not for one more."""
    return epsilon([STEP._replace(steps=steps)], 1e-5, "add-or-remove") * 1.0001


def test_every_reply_is_charged_before_it_leaves(setting: Setting, tmp_path: Path) -> None:
    server, site, ledger = Coordinator(setting), site_of(setting, tmp_path / "l"), tmp_path / "l"
    calibrated = site.answer(server.ask(phase="calibration", steps=4))
    assert charged(ledger)[-1] == {
        **Request(RUN, 0, "calibration", 0)._asdict(),
        "theta": decoded(calibrated).digest.hex(),
        **Charge(RATE, SIGMA, 4)._asdict(),
        "reply": charged(ledger)[-1]["reply"],
    }
    first = site.answer(server.ask())
    closed = server.close(scalars_of(first))
    short = site.answer(server.ask([closed], steps=1))  # as of a client that stops early
    assert scalars_of(short).shape == (1, 2)
    assert [(held["phase"], held["round"], held["steps"]) for held in charged(ledger)] == [
        ("calibration", 0, 4),
        ("training", 0, 2),
        ("training", 1, 1),
    ]
    site.close()


def test_a_disk_that_refuses_lets_nothing_leave(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "ledger of my own"
    server, site = Coordinator(setting), site_of(setting, ledger)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_log.os, "fsync", full)
        with pytest.raises(RunFailed) as told:
            site.answer(server.ask())
    assert str(told.value) == "the site's ledger cannot be used; its own log says why"  # the coordinator hears this
    assert "ledger of my own: No space left on device" in capsys.readouterr().err
    assert charged(ledger) == []
    assert site.snapshot()["last"] == b""
    assert decoded(site.answer(server.ask())).kind is Kind.REPLY
    assert len(charged(ledger)) == 1
    site.close()


def test_a_ledger_that_is_held_is_told_without_its_name(setting: Setting, tmp_path: Path) -> None:
    """As of a second session of the same site, whatever the run."""
    site = site_of(setting, tmp_path / "ledger")
    with pytest.raises(RunFailed) as told:
        site_of(setting, tmp_path / "ledger", OTHER)
    assert str(tmp_path) not in str(told.value)
    site.close()
    site_of(setting, tmp_path / "ledger", OTHER).close()


def test_the_same_question_has_the_same_answer_in_any_process(setting: Setting, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    server, site = Coordinator(setting), site_of(setting, ledger)
    first = site.answer(server.ask())
    assert site.answer(server.ask()) == first
    assert site.answer(server.ask(lr=9.0, steps=1)) == first  # with whatever else it comes
    site.close()
    for run in (RUN, RUN.upper()):  # one id, however it is spelled
        another = site_of(setting, ledger, run)
        assert another.answer(server.ask()) == first
        closed = server.close(scalars_of(first))
        second = another.answer(server.ask([closed]))
        assert another.answer(server.ask([closed])) == second != first
        another.close()
        server = Coordinator(setting)
    assert len(charged(ledger)) == 2


def test_what_is_drawn_follows_from_no_seed(setting: Setting, tmp_path: Path) -> None:
    replies = []
    for name in ("a", "b"):
        site = site_of(setting, tmp_path / name)
        replies.append(site.answer(Coordinator(setting).ask()))
        site.close()
    assert replies[0] != replies[1]


def test_a_round_is_answered_for_one_theta_alone_in_any_process(setting: Setting, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    server, site = Coordinator(setting), site_of(setting, ledger)
    first = site.answer(server.ask())
    kept = site.snapshot()
    site.close()
    honest = server.state
    server.state = ServerState(Replica(0, setting.theta_0 + 1e-3))
    for taken in ({}, kept):
        another = site_of(setting, ledger)
        if taken:
            another.restore(taken)
        for part in server.whole_state():
            another.answer(part)
        with pytest.raises(BadFrame, match="training asked for in round 0, after it was answered for another theta"):
            another.answer(server.ask())
        another.close()
    assert len(charged(ledger)) == 1
    server.state, third = honest, site_of(setting, ledger)
    assert third.answer(server.ask()) == first
    third.close()


def test_messages_meet_a_fresh_process_each_time(setting: Setting, tmp_path: Path) -> None:
    """Between messages a site is what it kept. What was charged and never kept is not drawn again."""
    ledger, server = tmp_path / "ledger", Coordinator(setting)
    kept: dict[str, Any] = {}
    trail: Sequence[Closed] = ()
    for done in range(3):
        answers = []
        for lost in (True, False):  # the process dies before it could keep anything, and the message comes again
            site = site_of(setting, ledger)
            if kept:
                site.restore(kept)
            answers.append(site.answer(server.ask(trail)))
            if not lost:
                kept = site.snapshot()
            site.close()
        assert answers[0] == answers[1]
        assert len(charged(ledger)) == done + 1
        trail = [server.close(scalars_of(answers[0]))]
    scalars = {"round", "values", "last", "h_lost", "joined", "round_training", "digest_training"}
    assert kept.keys() <= scalars  # nothing of a sample
    assert len(kept["values"]) == 4 * len(setting.mask)


def spend(site: Site, server: Coordinator, rounds: int) -> list[Closed]:
    trail: list[Closed] = []
    for _ in range(rounds):
        trail.append(server.close(scalars_of(site.answer(server.ask(trail[-1:])))))
    return trail


def test_a_site_leaves_before_its_budget_of_a_run_is_passed(setting: Setting, tmp_path: Path) -> None:
    ours, ledger = setting.but(dp_epsilon=cost(5)), tmp_path / "ledger"
    server, site = Coordinator(ours), site_of(ours, ledger)
    trail = spend(site, server, 2)
    with pytest.raises(Refused, match=SPENT) as told:
        site.answer(server.ask(trail[-1:]))
    assert len(str(told.value).splitlines()) == 1
    assert sum(held["steps"] for held in charged(ledger)) == 4
    assert scalars_of(site.answer(server.ask(steps=1))).shape == (1, 2)  # one step fits, and then none does
    site.close()
    again = site_of(ours, ledger)  # which has a reply to give again, and the end to hear
    last = again.answer(server.ask(trail, steps=1))
    assert scalars_of(last).shape == (1, 2)
    assert stands_at(again, server.state)
    closed = server.close(scalars_of(last))
    with pytest.raises(Refused, match=SPENT):
        again.answer(server.ask([closed], steps=1))
    again.close()
    another = site_of(ours, ledger, OTHER)  # another run has a budget of its own
    spend(another, Coordinator(ours, OTHER), 2)
    another.close()


def test_the_site_s_own_budget_is_over_all_runs(setting: Setting, tmp_path: Path) -> None:
    ledger, own = tmp_path / "ledger", {"accepts": {"epsilon": cost(6)}}
    first = site_of(setting, ledger, **own)
    spend(first, Coordinator(setting), 2)
    first.close()
    second, server = site_of(setting, ledger, OTHER, **own), Coordinator(setting, OTHER)
    trail = spend(second, server, 1)
    with pytest.raises(Refused, match=SPENT):
        second.answer(server.ask(trail))
    second.close()
    with pytest.raises(Refused, match=SPENT):
        site_of(setting, ledger, "22" * 8, **own)
    site_of(setting, ledger, "22" * 8).close()  # the lock was given back


@pytest.mark.parametrize("spent", [1, 3])
def test_a_refusal_does_not_say_what_was_spent_on_others(
    setting: Setting, tmp_path: Path, spent: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A coordinator hears the same words, whatever another one's run has cost."""
    ledger, own, ours = tmp_path / "ledger", {"accepts": {"epsilon": cost(8)}}, setting.but(local_steps=8)
    first = site_of(ours, ledger, **own)
    first.answer(Coordinator(ours).ask(steps=spent))
    first.close()
    second = site_of(ours, ledger, OTHER, **own)
    with pytest.raises(Refused) as told:
        second.answer(Coordinator(ours, OTHER).ask())
    second.close()
    assert str(told.value) == SPENT
    here = f"epsilon: the site's budget of {cost(8):g} at delta 1e-05 allows {8 - spent} more steps, not 8"
    assert here in capsys.readouterr().err


def test_a_run_of_hardly_any_noise_is_refused_by_a_budget(setting: Setting, tmp_path: Path) -> None:
    ours = setting.but(dp_noise_multiplier=1e-9, dp_epsilon=8.0)
    with pytest.raises(Refused, match=SPENT):
        site_of(ours, tmp_path / "ledger")


@pytest.mark.parametrize(
    ("run", "own", "said"),
    [
        ({}, {"ledger": ""}, "ledger: the run asks for noisy replies, the site accepts them only with a ledger"),
        ({"dp": "none"}, {"accepts": {"epsilon": 1.0}}, "dp: the run asks for dp none, the site accepts dp example"),
        ({"dp": "client"}, {"accepts": {"epsilon": 1.0}}, "dp: the run asks for dp client"),
    ],
)
def test_what_a_site_does_not_agree_to(
    setting: Setting, tmp_path: Path, run: dict[str, Any], own: dict[str, Any], said: str
) -> None:
    none = {"dp_noise_multiplier": "auto"} if run.get("dp") == "none" else {}
    other = {"weights": "equal", "early_stop": "none"} if run.get("dp") == "client" else {}
    with pytest.raises(Refused, match=said):
        site_of(setting.but(**run, **none, **other), data="no such folder", **{"ledger": tmp_path / "ledger", **own})
    assert not (tmp_path / "ledger").exists()


def test_nothing_exact_is_told_of_a_private_run_s_rows(setting: Setting, tmp_path: Path) -> None:
    server, site = Coordinator(setting), site_of(setting, tmp_path / "ledger", evaluate=True)
    _, said = frames.decode_json(Frame.decode(site.hello()).body, 32)
    assert said["evaluates"] is False
    with pytest.raises(BadFrame, match="has not agreed"):
        site.answer(server.ask(kind=Kind.EVALUATE))
    site.close()


def test_a_loss_that_is_no_number_is_not_told(setting: Setting, tmp_path: Path) -> None:
    """At a theta that is nowhere every loss is, and what leaves is noise."""
    server, site = Coordinator(setting), site_of(setting, tmp_path / "ledger")
    server.state = ServerState(Replica(0, setting.theta_0 * np.float32(1e30)))
    for part in server.whole_state():
        site.answer(part)
    reply = scalars_of(site.answer(server.ask()))
    assert np.isfinite(reply).all()
    assert np.abs(reply).max() < 10 * SIGMA * 0.5 / 4
    site.close()


# --- a federation ---


def test_a_federation_goes_on_without_a_site_whose_budget_is_spent(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = setting.but(early_stop="none")
    federation = Federation.of(ours, monkeypatch, join=0, quorum=2)
    for client in range(3):
        own = {"accepts": {"epsilon": cost(2 * STEPS + 1)}} if client == 1 else {}
        federation.enter(client, ledger=str(tmp_path / f"ledger {client}"), **own)
    took_part = [sorted(federation.round().scalars) for _ in range(4)]
    assert took_part == [[0, 1, 2], [0, 1, 2], [0, 2], [0, 2]]
    said = capsys.readouterr().err
    assert f"client 1 takes no part: {SPENT}" in said
    assert federation.replayed().state.round == 4
    assert [len(charged(tmp_path / f"ledger {client}")) for client in range(3)] == [4, 2, 4]
    federation.end()


def test_a_site_that_dies_after_its_charge_gives_the_round_the_same_scalars(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stream breaks on the way up; it comes back as another process, and the round still waits."""
    ours = setting.but(early_stop="none")
    federation = Federation.of(ours, monkeypatch, join=0, quorum=3)
    ledgers = [str(tmp_path / f"ledger {client}") for client in range(3)]
    for client in range(3):
        federation.enter(client, ledger=ledgers[client])
    lost: list[bytes] = []

    def meddle(client: int, data: bytes, up: bool) -> Sequence[tuple[float, bytes]] | None:
        if client == 1 and up and not lost:
            lost.append(data)
            return None
        return [(0.0, data)]

    def back(client: int, site: Site) -> None:
        site.close()
        federation.wire.after(1.0, lambda: federation.enter(client, ledger=ledgers[client]) and None)

    federation.wire.meddle, federation.wire.on_left = meddle, back
    record = federation.round()
    assert sorted(record.scalars) == [0, 1, 2]
    assert np.array_equal(record.scalars[1], frames.decode_scalars(Frame.decode(lost[0]).body)[1])
    assert len(charged(Path(ledgers[1]))) == 1
    federation.end()
