"""A site's ledger, and the site that rests on it: nothing noisy leaves uncharged, twice drawn, or past a budget."""

import base64
import errno
import os
import shutil
from collections.abc import Callable, Sequence
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
from meerkat.federation import ledger as ledger_module
from meerkat.federation.frames import BadFrame, Closed, Frame, Kind
from meerkat.federation.ledger import Budget, Entry, Ledger, Request
from meerkat.federation.run_ledger import AHEAD
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

CHARGE = {"rate": 0.25, "noise_multiplier": 4.0}
EXACT = {"rate": None, "noise_multiplier": None}


def lines(path: Path, kind: str = "answer") -> list[dict[str, Any]]:
    """The file's lines of a kind."""
    return [record for record in LogReader(path) if record["kind"] == kind]


def asked(ledger: Ledger, round: int, steps: int = 2, run: str = RUN, phase: str = "training") -> None:
    about = {"phase": phase, "round": round, "question": "ab", "theta": "cd", "pointer": ledger.of(run, 0).pointer}
    ledger.append(run, 0, "question", {**about, "steps": steps})


def answered(ledger: Ledger, round: int, reply: bytes = b"", price: dict[str, Any] = CHARGE, run: str = RUN) -> None:
    about = {"phase": "training", "round": round, "scalars": 4, **price}
    ledger.append(run, 0, "answer", {**about, "reply": base64.b64encode(reply).decode()})


def reserved(ledger: Ledger, steps: int, price: dict[str, Any] = CHARGE) -> None:
    fields = {"from": ledger.of(RUN, 0).pointer, "steps": steps, "directions": 2, "boot": ledger.boot}
    ledger.append(RUN, 0, "reserve", {**fields, **price})


@pytest.fixture
def reboot(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes ledgers believe in a start of the machine, by its name."""
    return lambda name: monkeypatch.setattr(ledger_module, "_boot_id", lambda: name)


def test_what_was_asked_and_replied_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    asked(ledger, 3)
    assert ledger.of(RUN, 0).entries == {Request("training", 3): Entry("ab", "cd", 0, 2)}
    answered(ledger, 3, b"\x00reply\xff")
    ledger.close()
    again = Ledger(path)
    record = again.of(RUN, 0)
    assert record.entries == {Request("training", 3): Entry("ab", "cd", 0, 2, b"\x00reply\xff")}
    assert (record.pointer, record.last, record.scalars, again.scalars) == (2, {"training": 3}, 4, 4)
    assert record.charges == [Charge(0.25, 4.0, 2)]
    for run, client in ((OTHER, 0), (RUN, 1)):
        assert again.of(run, client).entries == {}
    again.close()


def test_budgets_cover_one_run_or_all(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    for at in range(3):
        asked(ledger, at)
        answered(ledger, at)
    asked(ledger, 0, 5, OTHER)
    answered(ledger, 0, price={"rate": 1.0, "noise_multiplier": 9.0}, run=OTHER)
    asked(ledger, 1, 5, OTHER)
    answered(ledger, 1, price=EXACT, run=OTHER)
    ours, everything = Budget(3.0, 1e-6, "replace", RUN), Budget(3.0, 1e-6, "replace")
    of_run, of_all = [Charge(0.25, 4.0, 6)], [Charge(0.25, 4.0, 6), Charge(1.0, 9.0, 5)]
    spent = [epsilon([*ledger.charges_against(budget)], 1e-6, "replace") for budget in (ours, everything)]
    assert spent == [epsilon(charges, 1e-6, "replace") for charges in (of_run, of_all)]
    assert 0 < spent[0] < spent[1]
    assert not [*ledger.charges_against(replace(ours, run="00" * 8))]
    left = [ledger.steps_left(budget, 0.5, 8.0, 9) for budget in (ours, everything)]
    assert left == [steps_within(3.0, 1e-6, 0.5, 8.0, "replace", 9, spent) for spent in (of_run, of_all)]
    ledger.close()


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({}, "taken"),
        ({"steps": 5}, "taken"),
        ({"unknown": True}, "refused"),
        ({"rows": "11"}, "refused"),
        ({"theta": "ee"}, "refused"),
        ({"rows": ""}, "refused"),
        ({"answered": True}, "refused"),
        ({"lost": True}, "refused"),
    ],
)
def test_a_question_about_changed_rows_takes_the_place_of_one_that_was_never_answered(
    tmp_path: Path, reboot: Callable[[str], None], more: dict[str, Any], what: str
) -> None:
    path, about = tmp_path / "ledger", {"phase": "training", "round": 3, "pointer": 0, "steps": 2}
    reboot("one")
    ledger = Ledger(path)
    reserved(ledger, 10)
    known = {} if more.pop("unknown", False) else {"rows": "11"}  # which older versions did not note
    ledger.append(RUN, 0, "question", {**about, "question": "ab", "theta": "cd", **known})
    if more.pop("answered", False):
        answered(ledger, 3)
    ledger.close()
    if more.pop("lost", False):
        reboot("two")
    ledger = Ledger(path)
    new = {**about, "question": "ef", "theta": "cd", "rows": "22", **more}
    if what == "refused":
        with pytest.raises(ValueError, match="asked twice"):
            ledger.append(RUN, 0, "question", new)
    else:
        ledger.append(RUN, 0, "question", new)
        answered(ledger, 3, b"reply")
        steps = new["steps"]
        assert ledger.of(RUN, 0).entries == {Request("training", 3): Entry("ef", "cd", 0, steps, b"reply", rows="22")}
        assert (ledger.of(RUN, 0).pointer, ledger.of(RUN, 0).charges) == (steps, [Charge(0.25, 4.0, steps)])
    ledger.close()


def test_a_site_whose_rows_are_changed_while_a_round_waits_for_it_answers_with_the_new_ones(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, server = tmp_path / "ledger", Coordinator(setting)
    site = site_of(setting, ledger)
    with monkeypatch.context() as patch:
        patch.setattr(site._client, "steps", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # the process is stopped after it was asked
            site.answer(server.ask())
    site.close()
    site = site_of(setting, ledger)
    with pytest.raises(BadFrame, match="where something else was asked before"):
        site.answer(server.ask(lr=9.0))  # the rows are the same
    site.close()
    shutil.copytree(setting.folder / "0", tmp_path / "rows")
    lines = (tmp_path / "rows" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows" / "train.jsonl").write_text("".join(lines[::-1]))
    site = site_of(setting, ledger, data=str(tmp_path / "rows"))
    first = site.answer(server.ask())
    assert site.answer(server.ask()) == first
    site.close()
    site = site_of(setting, ledger)  # the old rows are back, and the new ones are answered for
    with pytest.raises(BadFrame, match="where something else was asked before"):
        site.answer(server.ask())
    site.close()


def test_a_torn_last_line_is_dropped_for_its_reply_never_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    asked(ledger, 3)
    answered(ledger, 3, b"one")
    ledger.close()
    path.write_bytes(path.read_bytes()[:-9])
    again = Ledger(path)
    assert "line 2 is cut short; it is dropped" in capsys.readouterr().err
    assert again.of(RUN, 0).entries == {Request("training", 3): Entry("ab", "cd", 0, 2)}
    answered(again, 3, b"two")
    again.close()
    assert len(lines(path)) == 1


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_damaged_ledger_is_refused_and_stays_as_it_is(tmp_path: Path, which: int) -> None:
    """Also where it is the last line: its reply may have left, and dropped it would be drawn again."""
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    for at in range(3):
        asked(ledger, at)
        answered(ledger, at)
    ledger.close()
    sound = path.read_bytes().splitlines(keepends=True)
    for damaged in (
        sound[which].replace(b"training", b"traininG"),
        b"0" * 64 + sound[which][64:],
        b"\n",
        sound[which][:-20] + b"\n",
    ):
        changed = [*sound]
        changed[which] = damaged
        path.write_bytes(b"".join(changed))
        for _ in range(2):
            with pytest.raises(RunFailed, match=r"ledger .*is damaged.*restore the file from a copy"):
                Ledger(path)
        assert path.read_bytes() == b"".join(changed)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("answer", {"rate": rate}) for rate in (0.0, 1.5, "much")),
        *(("answer", change) for change in ({"noise_multiplier": -1.0}, {"reply": "?"}, {"round": 7}, {"scalars": -1})),
        *(("question", {"steps": steps}) for steps in (0, "inf", 1.5, -1)),
        *(("question", change) for change in ({"round": None}, {"round": True}, {"pointer": -1})),
        *((kind, change) for kind in ("question", "answer") for change in ({"client": 0.5}, {"run": 7}, {"kind": "?"})),
    ],
)
def test_a_line_that_cannot_be_is_refused(tmp_path: Path, kind: str, change: dict[str, Any]) -> None:
    """Chained anew, as nobody but this program should."""
    question = {"kind": "question", "run": RUN, "client": 0, "phase": "training", "round": 3, "question": "ab"}
    question |= {"theta": "cd", "pointer": 0, "steps": 2}
    answer = {
        "kind": "answer",
        "run": RUN,
        "client": 0,
        "phase": "training",
        "round": 3,
        "scalars": 4,
        **CHARGE,
        "reply": "",
    }
    changed = [question, answer]
    changed[kind == "answer"] = {**changed[kind == "answer"], **change}
    for records in (changed, [question, question], [question, answer, answer], [answer], [{}]):
        log = RunLog(tmp_path / "ledger")
        for record in records:
            log.append(record)
        log.close()
        for _ in range(2):  # the lock is given back
            with pytest.raises(RunFailed, match=r"ledger .*a record is damaged .*restore the file from a copy"):
                Ledger(tmp_path / "ledger")
        (tmp_path / "ledger").unlink()


def test_charges_of_an_earlier_version_still_count(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "ledger")
    for at in range(2):
        charge = {"run": RUN, "client": 0, "phase": "training", "round": at, "theta": "ab", **CHARGE, "steps": 2}
        log.append({**charge, "reply": base64.b64encode(b"noise").decode()})
    log.close()
    ledger = Ledger(tmp_path / "ledger")
    assert ledger.of(RUN, 0).charges == [Charge(0.25, 4.0, 2)] * 2
    assert ledger.of(RUN, 0).pointer == 4
    ledger.close()


def test_one_process_at_a_time_has_it_open(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    with pytest.raises(RunFailed, match=r"ledger .*another process is writing it"):
        Ledger(tmp_path / "ledger")
    ledger.close()
    Ledger(tmp_path / "ledger").close()


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"ledger '.*nowhere/ledger': No such file or directory; give a file"):
        Ledger(tmp_path / "nowhere" / "ledger")


# --- a machine that goes down ---


def test_reserved_steps_count_once_the_machine_went_down(tmp_path: Path, reboot: Callable[[str], None]) -> None:
    path = tmp_path / "ledger"
    reboot("monday")
    ledger = Ledger(path)
    reserved(ledger, 64)
    asked(ledger, 0)
    answered(ledger, 0)
    ledger.close()
    for _ in range(2):  # killed, and started again: all lines are there
        again = Ledger(path)
        assert (again.of(RUN, 0).pointer, again.of(RUN, 0).charges) == (2, [Charge(0.25, 4.0, 2)])
        again.close()
    reboot("tuesday")
    for _ in range(2):
        again = Ledger(path)
        assert again.of(RUN, 0).pointer == 64
        assert again.of(RUN, 0).charges == [Charge(0.25, 4.0, 2), Charge(0.25, 4.0, 62)]
        again.close()
    again = Ledger(path)
    reserved(again, 128)
    again.append(RUN, 0, "release", {})
    again.close()
    reboot("wednesday")
    again = Ledger(path)
    assert again.of(RUN, 0).pointer == 64  # nothing was reserved
    again.close()


def test_a_question_without_a_reply_counts_once_the_machine_went_down(
    tmp_path: Path, reboot: Callable[[str], None]
) -> None:
    """At the end of a run nothing more is reserved; the reply may have left, and its line be gone."""
    path = tmp_path / "ledger"
    reboot("monday")
    ledger = Ledger(path)
    reserved(ledger, 2)
    asked(ledger, 0)
    ledger.close()
    again = Ledger(path)  # killed, the site had not replied
    assert again.of(RUN, 0).charges == []
    again.close()
    reboot("tuesday")
    for _ in range(2):
        again = Ledger(path)
        assert again.of(RUN, 0).charges == [Charge(0.25, 4.0, 2)]
        assert again.of(RUN, 0).scalars == 4
        again.close()
    again = Ledger(path)
    reserved(again, 4)
    answered(again, 0)  # with noise of its own, and at a price of its own
    again.close()
    reboot("wednesday")
    again = Ledger(path)
    assert sum(charge.steps for charge in again.of(RUN, 0).charges) == 2 + 2 + 2
    again.close()


def test_where_no_start_is_told_from_another_a_process_that_lives_loses_nothing(
    tmp_path: Path, reboot: Callable[[str], None]
) -> None:
    path = tmp_path / "ledger"
    reboot("")
    ledger = Ledger(path)
    for at in range(4):
        reserved(ledger, 10 * at + 10)
        asked(ledger, at)
        answered(ledger, at)
    assert (ledger.of(RUN, 0).pointer, sum(charge.steps for charge in ledger.of(RUN, 0).charges)) == (8, 8)
    ledger.close()
    again = Ledger(path)  # another process: the worst counts
    assert again.of(RUN, 0).pointer == 40
    again.close()


def test_a_signal_in_the_middle_of_a_line_leaves_a_ledger_that_can_be_opened(
    federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting.make(federation, tmp_path / "sites", rounds=3, local_steps=2, directions=2)
    path, write = tmp_path / "ledger", os.write
    site, server = site_of(setting, path), Coordinator(setting)

    def interrupted(file: int, data: bytes) -> int:
        written = write(file, data)
        if b'"kind":"answer"' in data:
            raise SystemExit  # Flower's handler, as the system call returns
        return written

    with monkeypatch.context() as patch:
        patch.setattr(run_log.os, "write", interrupted)
        with pytest.raises(SystemExit):
            site.answer(server.ask())
    site.close()
    assert lines(path, "release") == []
    again = Ledger(path)
    assert again.of(RUN, 0).entries[Request("training", 0)].reply is not None
    again.close()


def test_steps_before_a_reservation_do_not_count_as_lost(tmp_path: Path, reboot: Callable[[str], None]) -> None:
    """A site that begins where the coordinator says it was has not made those steps."""
    reboot("monday")
    ledger = Ledger(tmp_path / "ledger")
    ledger.of(RUN, 0).pointer = 10**7
    reserved(ledger, 10**7 + 64)
    ledger.close()
    reboot("tuesday")
    again = Ledger(tmp_path / "ledger")
    assert again.of(RUN, 0).charges == [Charge(0.25, 4.0, 64)]
    again.close()


def test_where_nobody_knows_what_happened_to_the_machine_the_worst_counts(
    tmp_path: Path, reboot: Callable[[str], None]
) -> None:
    reboot("")
    ledger = Ledger(tmp_path / "ledger")
    reserved(ledger, 64, EXACT)
    ledger.close()
    again = Ledger(tmp_path / "ledger")
    assert (again.of(RUN, 0).pointer, again.of(RUN, 0).charges) == (64, [])
    again.close()


def test_a_damaged_end_may_be_dropped_after_the_machine_went_down(
    tmp_path: Path, reboot: Callable[[str], None]
) -> None:
    """Lines that were not synced can be anything then; the reservation before them was."""
    path = tmp_path / "ledger"
    reboot("monday")
    ledger = Ledger(path)
    reserved(ledger, 64)
    ledger.sync()
    durable = path.read_bytes()
    for at in range(3):
        asked(ledger, at)
        answered(ledger, at)
    ledger.close()
    whole = path.read_bytes()
    for end in (bytes(len(whole) - len(durable) - 1) + b"\n", b"\n" * 3, whole[len(durable) + 200 :]):
        path.write_bytes(durable + end)
        with pytest.raises(RunFailed, match="is damaged"):
            Ledger(path)
        reboot("tuesday")
        again = Ledger(path)
        assert again.of(RUN, 0).charges == [Charge(0.25, 4.0, 64)]
        again.close()
        reboot("monday")


def test_damage_before_the_last_reservation_is_refused(tmp_path: Path, reboot: Callable[[str], None]) -> None:
    """What was synced is not lost by itself: dropped, later charges would be gone with it."""
    path = tmp_path / "ledger"
    reboot("monday")
    ledger = Ledger(path)
    reserved(ledger, 64)
    asked(ledger, 0)
    answered(ledger, 0)
    reserved(ledger, 128)
    asked(ledger, 1)
    answered(ledger, 1)
    ledger.close()
    path.write_bytes(path.read_bytes().replace(b'"pointer":0', b'"pointer":1', 1))
    reboot("tuesday")
    with pytest.raises(RunFailed, match="line 2 is damaged"):
        Ledger(path)


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
    about = {"kind": "answer", "run": RUN, "client": 0, "phase": "calibration", "round": 0, "scalars": 4 * 2}
    body = base64.b64encode(decoded(calibrated).body).decode()
    assert lines(ledger) == [{**about, "rate": RATE, "noise_multiplier": SIGMA, "reply": body}]
    first = site.answer(server.ask())
    closed = server.close(scalars_of(first))
    short = site.answer(server.ask([closed], steps=1))  # as of a client that stops early
    assert scalars_of(short).shape == (1, 2)
    assert [(each["phase"], each["round"], each["pointer"], each["steps"]) for each in lines(ledger, "question")] == [
        ("calibration", 0, 0, 4),
        ("training", 0, 4, 2),
        ("training", 1, 6, 1),
    ]
    assert len(lines(ledger)) == 3
    site.close()


def test_a_disk_that_refuses_lets_nothing_leave(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "ledger of my own"
    server, site = Coordinator(setting), site_of(setting, ledger)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_log.os, "write", full)
        with pytest.raises(RunFailed) as told:
            site.answer(server.ask())
    assert str(told.value) == "the site's ledger cannot be used; its own log says why"  # the coordinator hears this
    assert "ledger of my own: No space left on device" in capsys.readouterr().err
    assert lines(ledger) == lines(ledger, "question") == []
    assert decoded(site.answer(server.ask())).kind is Kind.REPLY
    assert len(lines(ledger)) == 1
    site.close()


def test_steps_that_the_disk_does_not_know_of_are_not_made(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reservation that cannot be synced lets a site finish what was reserved before, and no more."""
    ours = setting.but(rounds=200, early_stop="none")
    server, site = Coordinator(ours), site_of(ours, tmp_path / "ledger")

    def failing(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(run_log.os, "fsync", failing)
        with pytest.raises(RunFailed, match="the site's ledger cannot be used"):
            spend(site, server, 2 * AHEAD)
    assert server.state.round <= AHEAD
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
    for other in ({"lr": 9.0}, {"steps": 1}):  # another question is refused, whatever is different
        with pytest.raises(BadFrame, match="training asked for in round 0, where something else was asked before"):
            site.answer(server.ask(**other))
    site.close()
    for run in (RUN, RUN.upper()):  # one id, however it is spelled
        another = site_of(setting, ledger, run)
        assert another.answer(server.ask()) == first
        closed = server.close(scalars_of(first))
        second = another.answer(server.ask([closed]))
        assert another.answer(server.ask([closed])) == second != first
        another.close()
        server = Coordinator(setting)
    assert len(lines(ledger)) == 2


def test_what_is_drawn_follows_from_no_seed(setting: Setting, tmp_path: Path) -> None:
    replies = []
    for name in ("a", "b"):
        site = site_of(setting, tmp_path / name)
        replies.append(site.answer(Coordinator(setting).ask()))
        site.close()
    assert replies[0] != replies[1]


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
        assert len(lines(ledger)) == done + 1
        trail = [server.close(scalars_of(answers[0]))]
    assert kept.keys() == {"round", "values", "h_lost", "behind", "joined"}  # nothing of a sample
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
    assert len(lines(ledger)) == 2
    with pytest.raises(Refused, match="the site has left the run"):  # it does not tell whether one step would fit
        site.answer(server.ask(steps=1))
    site.close()
    again = site_of(ours, ledger)  # which has the end to hear
    assert again.answer(server.ask(trail, Kind.CLOSED)) is None
    assert stands_at(again, server.state)
    with pytest.raises(Refused, match="the site has left the run"):
        again.answer(server.ask(steps=1))
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
    server.state = ServerState(Replica(1, setting.theta_0 * np.float32(1e30)))
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
    assert [len(lines(tmp_path / f"ledger {client}")) for client in range(3)] == [4, 2, 4]
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
    assert np.array_equal(record.scalars[1], frames.Answer.decode(Frame.decode(lost[0]).body).scalars)
    assert len(lines(Path(ledgers[1]))) == 1
    federation.end()
