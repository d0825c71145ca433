"""Killed, stopped and cut off, a federation ends as its record says, and nobody is left waiting."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from federation_processes import (
    NODES,
    ROUNDS,
    Course,
    Fault,
    Federation,
    Schedule,
    described,
    run_settings,
)
from nursery import Nursery

from meerkat import demo
from meerkat.federation.certificates import certify
from meerkat.federation.flower.stream import NOTICED_S
from meerkat.federation.site_folders import write_sites
from meerkat.record import verification
from meerkat.record.run_log import LogReader
from meerkat.run.simulation import simulate
from meerkat.settings.config import RunConfig

FINISHED = "the run is finished"
AT_ONCE_S = 3.5
"""What a busy machine takes for what needs no time; less than the patience of a site that is told nothing."""
WHOLE = {"clients_minimum": NODES, "quorum": NODES}


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with few rows of the demo, each site's share of them, and certificates."""
    root = tmp_path_factory.mktemp("sites")
    (root / "data").mkdir()
    for split, count in (("train", 36), ("validation", 8)):
        rows = (demo.TASKS["topics"] / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (root / "data" / f"{split}.jsonl").write_text("".join(rows[:count]))
    write_sites(RunConfig(**run_settings(root / "data", {})), root / "split")
    for folder in (root / "split").iterdir():
        folder.rename(root / folder.name)
    return root


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return certify(tmp_path_factory.mktemp("certificates") / "keys", ["127.0.0.1"], nodes=0)


@pytest.fixture(scope="module")
def simulated(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], str]:
    """The digest of theta after a simulation with the same settings."""
    known: dict[str, str] = {}

    def digest(settings: dict[str, Any]) -> str:
        name = json.dumps(settings)
        if name not in known:
            out = tmp_path_factory.mktemp("simulated") / "run"
            known[name] = simulate(RunConfig(**run_settings(sites / "data", settings)), out)["theta_digest"]
        return known[name]

    return digest


Make = Callable[..., Any]


@pytest.fixture
def federation(nursery: Nursery, sites: Path, keys: dict[str, Path], tmp_path: Path) -> Make:
    """Makes a federation; nothing of it is left after the `with`."""

    @contextmanager
    def make(settings: dict[str, Any] | None = None, **waiting: Any) -> Iterator[Federation]:
        made = Federation(nursery, tmp_path / "federation", sites, keys, settings or {}, waiting)
        try:
            yield made
        finally:
            made.close()

    return make


def check_outcome(federation: Federation) -> str:
    """The run is whole and sound; the digest of its theta."""
    replayed = verification.verify(federation.out)
    assert replayed.finished
    assert replayed.rounds == federation.settings["rounds"]
    assert not [*federation.out.glob("*.part")]
    summary = json.loads((federation.out / "summary.json").read_text())
    return str(summary["theta_digest"])


def go_through(make: Make, schedule: Schedule, simulated: Callable[[dict[str, Any]], str]) -> Course:
    """Go through a schedule, and check all that must be so after any."""
    waiting = WHOLE if schedule.whole else {}
    with make(schedule.settings, **waiting) as federation:
        course = Course(federation, schedule)
        try:
            course.run(limit_s=90)
            federation.wait_for(lambda: all(map(federation.is_free, federation.nodes())), 30, "the nodes are free")
            digest = check_outcome(federation)
            if schedule.whole:
                assert digest == simulated(schedule.settings)
            check_nodes(federation, course, digest)
        except BaseException:
            print(described(schedule), [(fault.what, rounds) for fault, rounds in course.met])
            print(federation.told())
            raise
        if not any(fault.what == "kill" for fault, _ in course.met):
            assert not [*federation.tmp.iterdir()]
    return course


def check_nodes(federation: Federation, course: Course, digest: str) -> None:
    """Who was there to the end has the run's theta; nobody was sent away for good."""
    for node in federation.nodes():
        notes = federation.notes(node)
        for note in notes:
            if note.get("why") == FINISHED:
                assert (note["round"], note["digest"]) == (ROUNDS, digest)
            assert not str(note.get("why")).startswith("BadFrame")  # Refused, by a new coordinator, is as it must be
        undisturbed = all(rounds < ROUNDS - 1 for fault, rounds in course.met if fault.who in (node, -1, -2))
        if course.whole and undisturbed and course.last_start < ROUNDS:
            assert notes[-1].get("why") == FINISHED


def once(seed: int, whole: bool, *faults: Fault, **settings: Any) -> Schedule:
    return Schedule(seed, whole, settings, faults)


def test_a_killed_node_comes_back(federation: Make, simulated: Callable[[dict[str, Any]], str]) -> None:
    schedule = once(0, True, Fault("kill", 1, 5, 0.0, 0.0), local_steps=3)
    assert len(go_through(federation, schedule, simulated).met) == 1


def test_a_killed_coordinator_goes_on(federation: Make, simulated: Callable[[dict[str, Any]], str]) -> None:
    schedule = once(1, True, Fault("kill", -1, 5, 0.0, 0.0), update_rule="momentum")
    assert len(go_through(federation, schedule, simulated).met) == 1


def records(federation: Federation, kind: str) -> list[dict[str, Any]]:
    return [record for record in LogReader(federation.out / "rounds.log") if record["kind"] == kind]


def test_a_node_that_is_stopped_past_the_deadline_misses_rounds_and_catches_up(federation: Make) -> None:
    with federation({"rounds": 100}) as made:
        made.start_all()
        made.wait_for(lambda: made.rounds() >= 5, 30, "a few rounds")
        made.signal(2, signal.SIGSTOP)
        stopped = made.rounds()
        made.wait_for(lambda: made.rounds() >= stopped + 3, 30, "rounds without the stopped")
        made.signal(2, signal.SIGCONT)
        made.finish()
        digest = check_outcome(made)
        took_part = [2 in who_replied(record) for record in records(made, "round")]
        assert False in took_part[stopped:]
        assert True in took_part[took_part.index(False, stopped) :]
        ends = [made.notes(node)[-1] for node in range(NODES)]
        assert [(end["why"], end["round"], end["digest"]) for end in ends] == NODES * [(FINISHED, 100, digest)]


def test_a_node_that_is_late_at_the_end_still_gets_the_last_theta(federation: Make) -> None:
    with federation() as made:
        made.start_all()
        made.wait_for(lambda: made.rounds() >= 5, 30, "a few rounds")
        made.signal(2, signal.SIGSTOP)
        made.wait_for(lambda: bool(records(made, "close")), 30, "the last round")
        made.signal(2, signal.SIGCONT)
        made.finish()
        digest = check_outcome(made)
        for node in range(NODES):
            end = made.notes(node)[-1]
            assert (end["why"], end["round"], end["digest"]) == (FINISHED, ROUNDS, digest)


def who_replied(record: dict[str, Any]) -> list[int]:
    """Who replied in a round."""
    return [client for client, made in zip(record["clients"], record["made"], strict=True) if made]


def test_a_coordinator_that_is_told_to_stop_frees_its_nodes_at_once_and_goes_on_later(
    federation: Make, simulated: Callable[[dict[str, Any]], str]
) -> None:
    with federation(**WHOLE) as made:
        made.start_all()
        made.wait_for(lambda: made.rounds() >= 5, 30, "a few rounds")
        made.signal(-1, signal.SIGTERM)
        assert made.poll(-1, wait=True) == 1
        made.wait_for(lambda: all(map(made.is_free, range(NODES))), AT_ONCE_S, "the nodes are free")
        assert [made.notes(node)[-1]["why"] for node in range(NODES)] == NODES * ["the coordinator stopped"]
        stopped = verification.verify(made.out)
        assert not stopped.finished
        assert 5 <= stopped.rounds < ROUNDS
        assert "coordinator: the run was stopped; what was logged is safe" in made.log.read_text()
        made.start(-1)
        made.finish()
        assert check_outcome(made) == simulated({})


def test_nodes_are_free_again_after_a_coordinator_that_is_gone(federation: Make) -> None:
    with federation(site_patience_s=1.0, **WHOLE) as made:
        made.start_all()
        made.wait_for(lambda: made.rounds() >= 3, 30, "a few rounds")
        made.kill(-1)
        made.wait_for(lambda: all(map(made.is_free, range(NODES))), 1.0 + NOTICED_S, "the nodes are free")
        for node in range(NODES):
            assert "the stream could not be reached" in made.notes(node)[-1]["why"]


def test_a_node_that_heard_nothing_for_long_still_tries_to_come_back(federation: Make) -> None:
    with federation(site_patience_s=1.0, **WHOLE) as made:
        made.start_all()
        made.wait_for(lambda: made.rounds() >= 3, 30, "a few rounds")
        made.signal(1, signal.SIGSTOP)
        time.sleep(2.0)
        made.proxy.cut()
        made.proxy.mend()
        made.signal(1, signal.SIGCONT)
        made.finish()
        check_outcome(made)
        for node in range(NODES):
            assert [note["what"] for note in made.notes(node)] == ["starts", "begins", "free"]


@pytest.mark.slow
def test_nodes_leave_a_frozen_coordinator_and_come_back_when_it_goes_on(
    federation: Make, simulated: Callable[[dict[str, Any]], str]
) -> None:
    with federation(site_patience_s=4.0, **WHOLE) as made:
        made.start_all()
        made.wait_for(lambda: made.rounds() >= 3, 30, "a few rounds")
        made.signal(-1, signal.SIGSTOP)
        # a second for the last try, and some for a busy machine
        made.wait_for(lambda: all(map(made.is_free, range(NODES))), 4.0 + NOTICED_S + 5.0, "the nodes are free")
        made.signal(-1, signal.SIGCONT)
        made.finish()
        assert check_outcome(made) == simulated({})


@pytest.mark.slow
def test_a_frozen_node_is_taken_to_be_gone_and_comes_back(
    federation: Make, simulated: Callable[[dict[str, Any]], str]
) -> None:
    with federation(deadline_s=60.0, **WHOLE) as made:
        made.start_all()
        made.wait_for(lambda: made.rounds() >= 3, 30, "a few rounds")
        made.signal(1, signal.SIGSTOP)
        made.wait_for(lambda: "client 1 left" in made.log.read_text(), NOTICED_S + 5.0, "the node is missed")
        made.signal(1, signal.SIGCONT)
        made.finish()
        assert check_outcome(made) == simulated({})


def test_a_full_disk_stops_the_run_in_one_line_and_it_goes_on_when_there_is_room(
    federation: Make, simulated: Callable[[dict[str, Any]], str]
) -> None:
    settings = {"rounds": 40}
    with federation(settings, **WHOLE) as made:
        for node in range(NODES):
            made.start(node)
        made.start(-1, room=16_000)
        assert made.poll(-1, wait=True) == 1
        made.wait_for(lambda: all(map(made.is_free, range(NODES))), AT_ONCE_S, "the nodes are free")
        (line,) = [line for line in made.log.read_text().splitlines() if line.startswith("coordinator: ")]
        assert "File too large" in line
        assert "make room" in line
        assert "Traceback" not in made.log.read_text()
        assert 0 < verification.verify(made.out).rounds < 40
        made.start(-1)
        made.finish()
        assert check_outcome(made) == simulated(settings)


CALIBRATED = {
    "local_steps": 3,
    "method": "meerkat-vp",
    "calibration_steps": 60,
    "initial_steps": 20,
    "later_steps": 20,
    "rounds": 4,
}


def test_who_comes_while_clients_are_calibrated_joins_the_next_round(federation: Make) -> None:
    with federation(CALIBRATED, clients_wanted=2, clients_minimum=2, quorum=2) as made:
        for who in (-1, 0, 1):
            made.start(who)
        made.wait_for(made.calibrates, 30, "the calibration")
        made.signal(1, signal.SIGSTOP)
        made.start(2)
        made.wait_for(lambda: "client 2 is here" in made.log.read_text(), 30, "the third")
        assert not records(made, "calibration")
        made.signal(1, signal.SIGCONT)
        made.finish()
        check_outcome(made)
        assert [record["round"] for record in records(made, "join")] == [0, 0, 0]
        assert records(made, "round")[0]["clients"] == [0, 1, 2]


@pytest.mark.slow
def test_a_round_waits_for_clients_when_all_have_left_since_they_were_calibrated(federation: Make) -> None:
    with federation(CALIBRATED, clients_wanted=2, deadline_s=30.0) as made:
        for who in (-1, 0, 1):
            made.start(who)
        made.wait_for(made.calibrates, 30, "the calibration")
        made.signal(1, signal.SIGSTOP)
        time.sleep(3)  # the other one has answered
        made.kill(0)
        made.kill(1)
        made.wait_for(lambda: bool(records(made, "calibration")), 10, "the calibration's end")
        made.start(0)
        made.finish()
        check_outcome(made)
        assert list(map(who_replied, records(made, "round"))) == 4 * [[0]]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_any_faults(seed: int, federation: Make, simulated: Callable[[dict[str, Any]], str]) -> None:
    began = time.monotonic()
    course = go_through(federation, Schedule.drawn(seed), simulated)
    print(f"{len(course.met)} faults, {time.monotonic() - began:.1f} s")
