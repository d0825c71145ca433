"""Killed, stopped and cut off, a federation ends as its record says, and nobody is left waiting."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from federation_processes import (
    DEADLINE_S,
    NODES,
    ROUNDS,
    Course,
    Fault,
    Federation,
    Nursery,
    Schedule,
    described,
    run_settings,
)

from meerkat import audit, demo
from meerkat.certificates import certify
from meerkat.config import RunConfig
from meerkat.engines.flower.stream import NOTICED_S
from meerkat.experiment import simulate
from meerkat.sites import write_sites

FINISHED = "the run is finished"
WHOLE = {"clients_minimum": NODES, "quorum": NODES}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


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
    def make(settings: dict[str, Any] | None = None, **terms: Any) -> Iterator[Federation]:
        made = Federation(nursery, tmp_path / "federation", sites, keys, settings or {}, terms)
        try:
            yield made
        finally:
            made.close()

    return make


def check_outcome(federation: Federation) -> str:
    """The run is whole and sound; the digest of its theta."""
    replayed = audit.verify(federation.out)
    assert replayed.finished
    assert replayed.rounds == federation.settings["rounds"]
    assert not [*federation.out.glob("*.part")]
    summary = json.loads((federation.out / "summary.json").read_text())
    return str(summary["theta_digest"])


def go_through(make: Make, schedule: Schedule, simulated: Callable[[dict[str, Any]], str]) -> Course:
    """Go through a schedule, and check all that must be so after any."""
    terms = WHOLE if schedule.whole else {}
    with make(schedule.settings, **terms) as federation:
        course = Course(federation, schedule)
        try:
            course.run(limit_s=90)
            federation.wait_for(lambda: all(map(federation.is_free, range(NODES))), 30, "the nodes are free")
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
    for node in range(NODES):
        notes = federation.notes(node)
        for note in notes:
            if note.get("why") == FINISHED:
                assert (note["round"], note["digest"]) == (ROUNDS, digest)
            assert not str(note.get("why")).startswith("BadFrame")
        undisturbed = all(rounds < ROUNDS - 1 for fault, rounds in course.met if fault.who in (node, -1))
        if course.whole and undisturbed and course.last_start < ROUNDS:
            assert notes[-1].get("why") == FINISHED


def once(seed: int, whole: bool, *faults: Fault, **settings: Any) -> Schedule:
    return Schedule(seed, whole, settings, faults)


def test_a_killed_node_comes_back(federation: Make, simulated: Callable[[dict[str, Any]], str]) -> None:
    schedule = once(0, True, Fault("kill", 1, 5, 0.0, 0.0), local_steps=3)
    assert len(go_through(federation, schedule, simulated).met) == 1


def test_a_killed_coordinator_goes_on(federation: Make, simulated: Callable[[dict[str, Any]], str]) -> None:
    schedule = once(1, True, Fault("kill", -1, 5, 0.0, 0.0), server_optimizer="momentum")
    assert len(go_through(federation, schedule, simulated).met) == 1


def test_a_node_that_is_stopped_misses_rounds_and_catches_up(
    federation: Make, simulated: Callable[[dict[str, Any]], str]
) -> None:
    with federation({"rounds": 40}) as made:
        course = Course(made, once(2, False, Fault("stop", 2, 5, 0.0, 3 * DEADLINE_S)))
        course.run(60)
    print(simulated)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_any_faults(seed: int, federation: Make, simulated: Callable[[dict[str, Any]], str]) -> None:
    began = time.monotonic()
    course = go_through(federation, Schedule.drawn(seed), simulated)
    print(f"{len(course.met)} faults, {time.monotonic() - began:.1f} s")
    print(NOTICED_S)
