"""A coordinator that would have a site answer twice: about many thetas, about one row, or in two histories."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import Setting
from test_ledger import OTHER, Coordinator, lines, site_of, spend
from test_site import Server, decoded

from meerkat.algorithm.replica import Replica
from meerkat.algorithm.server import ServerState
from meerkat.errors import MeerkatError
from meerkat.federation.certificates import make_signing_key
from meerkat.federation.frames import Answer, BadFrame, Kind
from meerkat.federation.offer import Offer
from meerkat.federation.site import Site
from meerkat.federation.site_settings import Refused
from meerkat.record.opening import FORMAT, steps_by_rows
from meerkat.record.run_log import RunLog


@pytest.fixture(scope="module")
def setting(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting.make(federation, tmp_path_factory.mktemp("sites"), rounds=50, local_steps=2, directions=2)


@pytest.fixture
def invite(setting: Setting, tmp_path: Path) -> Callable[..., Site]:
    """A session of the same site, as each invitation begins one."""
    key = str(make_signing_key(tmp_path / "site.key").private)

    def session(ours: Setting = setting, **own: Any) -> Site:
        given = {"ledger": str(tmp_path / "site.ledger"), "signing_key": key, **own}
        return ours.site(0, node="n", **given)

    return session


def test_one_round_is_answered_about_one_theta_in_all_sessions(invite: Callable[..., Site], setting: Setting) -> None:
    for attempt in range(4):
        server, site = Server(setting), invite()
        closed = server.close(None)
        if attempt:  # the coordinator says that another theta came out
            server.state = ServerState(Replica(1, setting.theta_0 + np.float32(0.01 * attempt)))
            for part in server.whole_state():
                site.answer(part)
            with pytest.raises(BadFrame, match="where something else was asked before: not as agreed"):
                site.answer(server.ask())
        else:
            assert decoded(site.answer(server.ask([closed]))).kind is Kind.SIGNED
        site.close()


def test_before_the_first_round_there_is_one_theta(invite: Callable[..., Site], setting: Setting) -> None:
    server, site = Server(setting), invite()
    server.state = ServerState(Replica(0, setting.theta_0 + np.float32(0.01)))
    with pytest.raises(BadFrame, match="a theta to begin with that is not the offered one"):
        site.answer(server.whole_state()[0])
    site.close()


@pytest.mark.parametrize("what", ["earlier", "another of its round", "not finite"])
def test_a_theta_is_taken_where_it_is_lacking_alone(invite: Callable[..., Site], setting: Setting, what: str) -> None:
    server, site = Server(setting), invite()
    site.answer(server.ask([server.close(None), server.close(None)], Kind.CLOSED, steps=0))
    assert site.round == 2
    at, value = {"earlier": (1, 0.01), "another of its round": (2, 0.01), "not finite": (3, np.nan)}[what]
    server.state = ServerState(Replica(at, setting.theta_0 + np.float32(value)))
    with pytest.raises(BadFrame, match="not finite" if what == "not finite" else "nobody asked for"):
        site.answer(server.whole_state()[0])
    assert site.round == 2
    site.close()


def test_the_site_counts_its_steps_itself(invite: Callable[..., Site], setting: Setting) -> None:
    """A coordinator that says 0 each time would learn all there is of one row."""
    server, pointers = Server(setting), []
    closed: list[Any] = []
    for _ in range(5):
        site = invite()
        reply = site.answer(server.ask(closed, pointer=0))
        pointers.append(Answer.decode(decoded(reply).body[64:]).pointer)
        closed.append(server.close(None))
        site.close()
    assert pointers == [0, 2, 4, 6, 8]


def test_a_site_without_a_record_of_the_run_begins_where_the_coordinator_counted(
    setting: Setting, invite: Callable[..., Site]
) -> None:
    site, server = invite(), Server(setting)
    first = Answer.decode(decoded(site.answer(server.ask(pointer=17))).body[64:])
    closed = server.close(None)
    second = Answer.decode(decoded(site.answer(server.ask([closed], pointer=3))).body[64:])
    assert (first.pointer, second.pointer) == (17, 19)
    site.close()


def test_a_run_of_the_same_id_is_the_same_run(invite: Callable[..., Site], setting: Setting) -> None:
    invite().close()
    with pytest.raises(Refused, match="run: it began with other settings"):
        invite(setting.but(eps=2e-3))


def test_a_question_that_could_not_be_answered_is_still_the_only_one(
    invite: Callable[..., Site], setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether steps diverge says something of the rows, too."""
    server, site = Server(setting), invite()
    with monkeypatch.context() as patch:
        patch.setattr(site._client, "steps", lambda *_: (_ for _ in ()).throw(MemoryError))
        assert decoded(site.answer(server.ask(steps=1))).kind is Kind.FAILED
    with pytest.raises(BadFrame, match="where something else was asked before"):
        site.answer(server.ask(lr=0.5))
    assert decoded(site.answer(server.ask(steps=1))).kind is Kind.SIGNED  # and can be, later
    site.close()


def test_a_site_is_calibrated_where_the_run_says_so(invite: Callable[..., Site], setting: Setting) -> None:
    ours = setting.but(early_stop="vp", calibration_steps=4, initial_steps=2, later_steps=2, recalibrate_every=2)
    server, site = Server(ours), invite(ours)
    for due in (True, False, True):
        ask = server.ask(phase="calibration", steps=4)
        if due:
            assert decoded(site.answer(ask)).kind is Kind.SIGNED
        else:
            with pytest.raises(BadFrame, match="4 steps of calibration asked for in round 1: not as agreed"):
                site.answer(ask)
        assert site.answer(server.ask([server.close(None)], Kind.CLOSED)) is None
    site.close()


@pytest.mark.parametrize("task", ["/etc/..", "../mine.toml", "a\\b", "a\nb"])
def test_a_task_s_name_is_no_path(setting: Setting, task: str) -> None:
    """Whether there is such a file would show in what a site signs."""
    text, mask = replace(setting.offer(), task_text="x").encode("00" * 32)
    with pytest.raises(MeerkatError, match="the coordinator's offer cannot be read"):
        Offer.decode(json.dumps({**json.loads(text), "task": task}), mask)


def test_scalars_are_bounded_over_all_runs(setting: Setting, tmp_path: Path) -> None:
    ledger, agreed = tmp_path / "ledger", {"scalars": 14}
    first = site_of(setting, ledger, accepts=agreed)
    spend(first, Coordinator(setting), 2)
    first.close()
    second, server = site_of(setting, ledger, OTHER, accepts=agreed), Coordinator(setting, OTHER)
    trail = spend(second, server, 1)
    with pytest.raises(Refused, match="scalars: the site has sent as many as it agreed to, over all runs"):
        second.answer(server.ask(trail))
    second.close()
    assert sum(line["scalars"] for line in lines(ledger)) == 12
    with pytest.raises(Refused, match="scalars"):
        site_of(setting, ledger, "77" * 8, accepts={"scalars": 13})


def test_steps_that_came_too_late_still_cost_privacy(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "rounds.log")
    log.append({"kind": "open", "examples": [], "format": FORMAT})
    for client in range(2):
        log.append({"kind": "join", "client": client, "examples": 16})
    for made, pointers in (([2, 2], [0, 0]), ([0, 2], [0, 2]), ([2, 2], [4, 4]), ([2, 2], [1, 6])):
        log.append({"kind": "round", "clients": [0, 1], "made": made, "pointers": pointers})
    log.close()
    assert steps_by_rows(tmp_path / "rounds.log") == {(0, 16): 8, (1, 16): 8}


def test_steps_before_a_change_of_rows_cost_what_fewer_rows_cost(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "rounds.log")
    log.append({"kind": "open", "examples": [], "format": FORMAT})
    for rows, pointer in ((16, 0), (1600, 10), (160, 20)):
        log.append({"kind": "join", "client": 0, "examples": rows})
        log.append({"kind": "round", "clients": [0], "made": [2], "pointers": [pointer]})
    log.close()
    assert steps_by_rows(tmp_path / "rounds.log") == {(0, 16): 2 + 8, (0, 1600): 2, (0, 160): 2 + 8}
