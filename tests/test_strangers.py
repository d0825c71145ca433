"""The stream's port under attack: by somebody who was never admitted, and by a site that means ill."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from stranger import Stranger
from stub import Attending, Coordinator, StubSite

from meerkat.errors import MeerkatError
from meerkat.federation import frames
from meerkat.federation.certificates import certify
from meerkat.federation.coordinator_settings import FederationConfig
from meerkat.federation.flower import stream
from meerkat.federation.frames import Kind

SECONDS = 30.0
"""For what must come at all: a busy machine's patience."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return certify(tmp_path_factory.mktemp("strangers") / "keys", ["127.0.0.1"], nodes=0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is not admitted has a second for everything."""
    for name in ("_HANDSHAKE_S", "_CALL_S", "_HELLO_S", "_AGE_S"):
        monkeypatch.setattr(stream, name, 1.0, raising=False)


@pytest.fixture(name="coordinator")
def impatient_coordinator(request: pytest.FixtureRequest, keys: dict[str, Path]) -> Iterator[Coordinator]:
    """A coordinator that is impatient with strangers."""
    request.getfixturevalue("impatient")
    coordinator = Coordinator(keys, 2, FederationConfig(clients_wanted=1, deadline_s=SECONDS, patience_s=SECONDS))
    yield coordinator
    coordinator.close()


Connect = Callable[[int], Stranger]


@pytest.fixture
def stranger() -> Iterator[Connect]:
    """Connects to a port; every connection is closed when the test is over."""
    made: list[Stranger] = []

    def connect(port: int) -> Stranger:
        made.append(Stranger(port))
        return made[-1]

    yield connect
    for each in made:
        each.close()


def settles(condition: Callable[[], bool], timeout_s: float = SECONDS) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def attacked(keys: dict[str, Path], run: Path, limits: tuple[int, int], stranger: Connect) -> dict[str, object]:
    """What becomes of a run, in a process with these limits of open files, while 300 callers say nothing."""
    run.mkdir()
    program = [sys.executable, str(Path(__file__).with_name("open_run.py")), str(keys["authority"].parent), str(run)]
    process = subprocess.Popen(
        [*program, *map(str, limits), "1.0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin
    assert process.stdout
    try:
        port, token = json.loads(process.stdout.readline())
        for _ in range(300):
            stranger(port)
        site = StubSite(1, token)
        Attending(site, port, keys["authority"].read_bytes(), patience_s=SECONDS)
        settles(lambda: site.round > 3 or process.poll() is not None)
        process.stdin.close()
        outcome: dict[str, object] = json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return outcome


def test_idle_connections_beyond_the_limit_of_open_files_do_not_end_the_run(
    keys: dict[str, Path], tmp_path: Path, stranger: Connect
) -> None:
    """And a site can join while they last: their places are free again after seconds."""
    outcome = attacked(keys, tmp_path / "run", (256, 256), stranger)
    assert (outcome["failed"], outcome["clients"], outcome["limit"]) == ("", [0, 1], 256)
    noted = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(noted) == outcome["rounds"]
    assert (tmp_path / "run" / "events.jsonl").read_text().count('"arrived"') == 2


def test_the_limit_of_open_files_is_raised_at_the_start(
    keys: dict[str, Path], tmp_path: Path, stranger: Connect
) -> None:
    outcome = attacked(keys, tmp_path / "run", (256, 2000), stranger)
    assert (outcome["failed"], outcome["clients"]) == ("", [0, 1])
    assert outcome["limit"] == 2 + stream._STRANGERS + stream._FILES


def test_a_limit_of_open_files_too_low_for_all_clients_is_told(
    keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream.resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(MeerkatError, match=r"limit of open files 64: 2 clients take 130 at least; raise it"):
        Coordinator(keys, 2)


STALLS: dict[str, Callable[[Stranger, Path], object]] = {
    "TCP alone": lambda caller, _: caller,
    "TLS alone": lambda caller, authority: caller.shake_hands(authority),
    "half a preface": lambda caller, authority: caller.shake_hands(authority).send(b"PRI * HTTP"),
    "no call": lambda caller, authority: caller.shake_hands(authority).begin(),
    "half the headers": lambda caller, authority: caller.shake_hands(authority).begin().call(ended=False),
    "a call without a word": lambda caller, authority: caller.shake_hands(authority).begin().call(),
    "half a hello": lambda caller, authority: caller.shake_hands(authority).begin().call().say(bytes(100), 200),
    "a refusal left unread": lambda caller, authority: (
        caller.shake_hands(authority).begin(window=0).call().say(b"garbage")
    ),
}
"""How far a stranger goes before falling silent."""


@pytest.mark.parametrize("stall", list(STALLS))
def test_whoever_stalls_before_being_admitted_is_hung_up_on(
    coordinator: Coordinator, keys: dict[str, Path], stranger: Connect, stall: str
) -> None:
    site = coordinator.attending(0)
    strangers = [stranger(coordinator.port) for _ in range(3)]
    for caller in strangers:
        STALLS[stall](caller, keys["authority"])
    assert settles(lambda: len(list(coordinator.rounds(1))) == 1 and not any(each.connected for each in strangers))
    coordinator.close()
    assert site.end().error is None
    assert site.site.round == coordinator.state.round


def test_whoever_calls_again_and_again_is_hung_up_on(
    coordinator: Coordinator, keys: dict[str, Path], stranger: Connect
) -> None:
    caller = stranger(coordinator.port).shake_hands(keys["authority"]).begin()
    numbers = iter(range(1, 10_000, 2))

    def calls_again() -> bool:
        time.sleep(0.2)
        try:
            caller.call(number := next(numbers)).say(b"garbage", stream=number)
            return caller.answer()
        except OSError:
            return False

    assert settles(lambda: not calls_again())
    assert coordinator.link.refused > 1


@pytest.mark.usefixtures("impatient")
def test_a_frame_that_no_site_can_mean_is_refused_when_it_begins(
    keys: dict[str, Path], stranger: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of one scalar a round lets a caller make the coordinator hold 4,096 bytes, not the frame's own limit."""
    monkeypatch.setattr(stream, "_HELLO_S", SECONDS)
    coordinator = Coordinator(keys, 1, longest_frame=frames.longest_of_a_site(1))
    caller = stranger(coordinator.port).shake_hands(keys["authority"]).begin()
    caller.call().say(bytes(4096), size=frames.LONGEST_WORDS + 1)
    assert settles(lambda: coordinator.link.refused == 1)  # long before the hello is overdue
    assert caller.answer()
    site = coordinator.attending(0)
    assert len(list(coordinator.rounds(3))) == 3
    coordinator.close()
    assert site.end().error is None
    caller.close()


def test_a_connection_has_one_call_at_a_time(
    coordinator: Coordinator, keys: dict[str, Path], stranger: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise one connection could make the coordinator hold a frame for each of thousands of calls."""
    monkeypatch.setattr(stream, "_HELLO_S", SECONDS)
    caller = stranger(coordinator.port).shake_hands(keys["authority"]).begin()
    for number in range(1, 41, 2):
        caller.call(number)
    assert settles(lambda: caller.connected and caller.ended == 19)
    caller.close()


def test_a_session_outlives_the_age_at_which_connections_take_no_further_call(coordinator: Coordinator) -> None:
    site = coordinator.attending(0)
    end = time.monotonic() + 3 * stream._AGE_S
    while time.monotonic() < end:
        list(coordinator.rounds(1))
    coordinator.close()
    assert site.end().error is None
    assert site.site.round == coordinator.state.round
    assert site.site.states == 0


def admitted(caller: Stranger, site: StubSite, authority: Path) -> bool:
    """Whether a caller who says a site's hello, and takes a WELCOME and nothing more, gets that WELCOME."""
    caller.shake_hands(authority).begin(window=len(site.frame(Kind.WELCOME, bytes(34))) + 5).call().say(site.hello())
    settles(lambda: not caller.connected or bool(caller.ended or caller.messages))
    return bool(caller.messages)


def test_a_site_cannot_pile_up_streams_that_it_does_not_read(
    coordinator: Coordinator, keys: dict[str, Path], stranger: Connect
) -> None:
    site = coordinator.site(1)
    callers: list[Stranger] = []
    for _ in range(stream._STREAMS):
        callers.append(stranger(coordinator.port))
        assert admitted(callers[-1], site, keys["authority"])
        site.answer(callers[-1].messages[0])
        for _ in range(2):
            coordinator.link.send({1: [bytes(1000)]})
        assert settles(lambda: coordinator.link._sessions[1].outgoing.qsize() == 1)  # it waits for the first
    beyond = stranger(coordinator.port)
    assert not admitted(beyond, site, keys["authority"])
    assert settles(lambda: not beyond.connected)
    for caller in callers:
        caller.close()
    again = stranger(coordinator.port)
    assert settles(lambda: not coordinator.link._streams[1])
    assert admitted(again, site, keys["authority"])


@pytest.mark.usefixtures("impatient")
def test_a_site_that_comes_back_all_the_time_is_let_in_once_in_a_while(
    keys: dict[str, Path], stranger: Connect
) -> None:
    now = 0.0
    waiting = FederationConfig(clients_wanted=1, deadline_s=SECONDS, patience_s=SECONDS)
    coordinator = Coordinator(keys, 2, waiting, clock=lambda: now)
    honest = coordinator.attending(0)
    list(coordinator.rounds(1))
    restless = coordinator.site(1)

    def is_let_in() -> bool:
        caller = stranger(coordinator.port)
        if heard := admitted(caller, restless, keys["authority"]):
            restless.answer(caller.messages[0])
        caller.close()
        return heard

    assert [is_let_in() for _ in range(12)] == [True] * 10 + [False] * 2
    now = 1.0
    assert [is_let_in() for _ in range(2)] == [True, False]
    assert settles(lambda: next(coordinator.rounds(1)).scalars.keys() == {0})
    coordinator.close()
    assert honest.end().error is None


MALFORMED = """
import sys
from pathlib import Path
from meerkat.federation.flower.stream import StreamLink
from stub import Coordinator
from stranger import Stranger, _frame, _headers

keys = {name: Path(path) for name, path in zip(("authority", "server", "server key"), sys.argv[1:])}
coordinator = Coordinator(keys, 1)
stranger = Stranger(coordinator.port).shake_hands(keys["authority"]).begin()
for call in range(50):
    stranger.send(_frame(1, 5, 2 * call + 1, _headers().replace(b"POST", b"PUTX")))
stranger.answer()
honest = coordinator.attending(0)
[record] = coordinator.rounds(1)
coordinator.close()
honest.end()
print(*record.scalars)
"""


def test_malformed_calls_write_nothing_to_standard_error(keys: dict[str, Path]) -> None:
    """Each would be a line, at 12 MB a second from one stranger."""
    given = [str(keys[name]) for name in ("authority", "server", "server key")]
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", MALFORMED, *given],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == ["0"]
    assert "PUTX" not in done.stderr


def test_a_session_that_reads_nothing_ends_before_it_takes_much_memory(coordinator: Coordinator) -> None:
    """Of a site that does not read, and says time and again that it is behind: a whole state waits each time."""
    link, session = coordinator.link, stream._Session(1)
    link._sessions[1] = session
    for _ in range(3 * stream._UNSENT):
        link.send({1: [b"a state", b"and work"]})
    assert settles(lambda: 1 not in link._sessions)
    event = link.receive(SECONDS)
    assert event is not None
    assert (event.what, event.client) == ("left", 1)
    assert session.outgoing.qsize() == 1  # the end


def test_a_removed_site_is_read_no_more_and_its_stream_ends_though_it_reads_nothing(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_FLUSH_S", "_CLEAR_S"):
        monkeypatch.setattr(stream, name, 0.1)
    link, session = coordinator.link, stream._Session(1)

    async def converse() -> tuple["asyncio.Task[None]", "asyncio.Task[None]"]:
        reader, writer = (asyncio.create_task(asyncio.sleep(10 * SECONDS)) for _ in range(2))  # which nothing wakes
        session.reader, session.writer, link._sessions[1] = reader, writer, session
        return reader, writer

    reader, writer = link._call(converse())
    link.drop(1, b"removed")
    assert settles(reader.cancelled)
    assert settles(writer.cancelled)
