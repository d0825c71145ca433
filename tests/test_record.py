"""A federation's log: who joined is in it, and what cannot have been is refused."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import Federation, Setting, replay

from meerkat.algorithm import path
from meerkat.algorithm.calibration import CalibrationRecord, open_calibration
from meerkat.algorithm.extreme_clients import Vpcs, select
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import RoundPlan, RoundRecord
from meerkat.algorithm.server import ServerState
from meerkat.errors import RunFailed
from meerkat.record.members import Member
from meerkat.record.replay import Replay
from meerkat.record.run_folder import RunFolder
from meerkat.record.summary import Work
from meerkat.settings.config import SITES

Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def setting(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting.make(federation, tmp_path_factory.mktemp("sites"), rounds=3)


@pytest.fixture
def records(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Records:
    """Two clients from the start, a third before round 1; closed after three rounds."""
    federation = Federation.of(setting, monkeypatch, join=2)
    federation.round()
    federation.enter(2)
    federation.round()
    federation.round()
    closing = {"kind": "close", "rounds": 3, "theta": path.digest(federation.state.theta)}
    return [*federation.records, closing]


@pytest.mark.parametrize(("sends", "up", "down"), [("scalars", 4 * 2 * 3, 4 * 4 * 2 * 3), ("delta", 4 * 7, 4 * 7 * 4)])
def test_work_is_of_the_replies_that_came(sends: Any, up: int, down: int) -> None:
    plan = RoundPlan(0, 0.1, 1e-3, 2, dict.fromkeys(range(4), 3), sends=sends)
    scalars = {1: np.ones((3, 2), np.float32)} if sends == "scalars" else {}
    aggregate = np.ones((3, 2) if sends == "scalars" else 7, np.float32)
    unkept = {} if scalars else {1: 3}
    record = RoundRecord(
        plan, scalars, np.zeros((0, 2)), weights={1: 1.0}, aggregate=aggregate, theta_digest="", unkept=unkept
    )
    assert Work.of(record) == Work(up, down, 3)


def test_a_join_comes_out_as_it_went_in() -> None:
    join = Member(3, 1, 20, "a node")
    assert Member.from_json(join.to_json()) == join


@pytest.mark.parametrize(
    "change",
    [{"examples": 0}, {"client": -1}, {"round": "0"}, {"examples": 2.5}, {"more": 1}, {"node": None}],
)
def test_a_damaged_join_is_refused(setting: Setting, change: dict[str, Any]) -> None:
    with pytest.raises(RunFailed, match="damaged"):
        replay(setting, [{**Member(0, 0, 10, "n").to_json(), **change}])


def test_a_federation_s_log_is_gone_through_with_its_joins(setting: Setting, records: Records) -> None:
    kinds = [record["kind"] for record in records]
    assert kinds == ["join", "join", "round", "join", "round", "round", "close"]
    again = replay(setting, records)
    assert again.closed
    assert again.state.round == 3
    assert again.members.nodes == {k: f"node {k}" for k in range(3)}
    assert dict(again.settings.examples) == dict(enumerate(setting.sizes))


def test_a_federation_is_resumed_by_its_coordinator(setting: Setting, tmp_path: Path) -> None:
    for partition, said in ((SITES, "start its coordinator again with run folder"), ("iid", "'meerkat resume ")):
        folder = RunFolder.create(tmp_path / partition, setting.config.model_copy(update={"partition": partition}))
        assert folder.resumption.startswith(said)
        assert folder.cure.startswith(f"make room, then {said}")
        folder.metrics_path.write_text("{}\n")
        with pytest.raises(RunFailed, match=f"delete it, then {said}"):
            folder.metrics()


def without(number: int) -> Callable[[Records], Records]:
    return lambda records: records[:number] + records[number + 1 :]


def moved(number: int, to: int) -> Callable[[Records], Records]:
    def change(records: Records) -> Records:
        records = [*records]
        records.insert(to, records.pop(number))
        return records

    return change


def changed(number: int, **values: Any) -> Callable[[Records], Records]:
    def change(records: Records) -> Records:
        records = copy.deepcopy(records)
        records[number].update(values)
        return records

    return change


def again_from(number: int, **values: Any) -> Callable[[Records], Records]:
    return lambda records: [*records[:number], {**records[0], **values}, *records[number:]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed(3, round=2), "the round that client 2 joined before: recorded '2', found '1'"),
        (moved(3, 5), "the round that client 2 joined before|who never joined"),
        (without(3), "round 1 asks client 2, who never joined"),
        (without(0), "round 0 asks client 0, who never joined"),
        (changed(0, examples=9), "the weights of round 0"),
        (again_from(3, round=1, examples=9), "the weights of round 1"),
        (changed(3, client=3), "client 3 joined, of 3"),
        (moved(3, 6), "who never joined"),
        (lambda records: [*records, records[3]], "records follow the closing one"),
        (without(5), "the number of rounds"),
    ],
)
def test_what_cannot_have_been_is_refused(
    setting: Setting, records: Records, change: Callable[[Records], Records], said: str
) -> None:
    with pytest.raises(RunFailed, match=said) as told:
        replay(setting, change(records))
    assert len(str(told.value).splitlines()) == 1


def test_a_calibration_is_computed_no_longer_than_its_record_is(setting: Setting) -> None:
    """A billion steps that nobody made are a few bytes: they are refused before a direction is drawn."""
    long = setting.but(early_stop="vp", local_steps=2, calibration_steps=10**9)
    plan = open_calibration(ServerState(Replica(0, long.theta_0)), long.settings, [0])
    nobody = CalibrationRecord(plan, {}, np.zeros((0, plan.directions)), select({}, {}, Vpcs()), ())
    calibrated = {"kind": "calibration", **nobody.to_json()}
    with pytest.raises(RunFailed, match="the inner products of the calibration before round 0"):
        replay(long, [Member(0, 0, 10, "n").to_json(), calibrated])


def test_a_client_that_comes_back_with_other_data_is_no_damage(setting: Setting, records: Records) -> None:
    rejoined = again_from(6, round=3, examples=9)(records)
    assert replay(setting, rejoined).settings.examples[0] == 9


def test_a_join_in_a_simulation_s_log_is_refused(setting: Setting) -> None:
    settings = replace(setting.settings, examples=dict(enumerate(setting.sizes)))
    join = Member(0, 0, 10, "n").to_json()
    log, members = Path("rounds.log"), setting.members()
    with pytest.raises(RunFailed, match="unknown kind 'join'"):
        Replay([join], setting.theta_0, settings, setting.directions, None, log, members).run()
