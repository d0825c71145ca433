"""The session stream over real TLS on this machine: who is let in, what a hostile caller gets, what a broken one."""

import asyncio
import gc
import logging
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

import grpc
from proxy import Proxy
from stub import RUN, Attending, Coordinator, StubSite, scalars_of

from meerkat.errors import MeerkatError, RunFailed
from meerkat.federation import frames
from meerkat.federation.certificates import certify
from meerkat.federation.coordinator_settings import FederationConfig
from meerkat.federation.flower import stream
from meerkat.federation.frames import Frame, Kind
from meerkat.federation.site_settings import Refused

METHOD = "/meerkat.Session/Frames"
SECONDS = 20.0
"""For what must come at all: a busy machine's patience."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return certify(tmp_path_factory.mktemp("stream") / "keys", ["127.0.0.1"], nodes=0)


@pytest.fixture
def start_coordinator(keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Coordinator]]:
    """Makes coordinators, quick to refuse, that are closed when the test is over."""
    monkeypatch.setattr(stream, "_REFUSED_S", 0.0)
    made = []

    def make(clients: int, **waiting: float) -> Coordinator:
        given = {"clients_wanted": clients, "start_s": 60.0, "deadline_s": SECONDS, "patience_s": SECONDS, **waiting}
        config = FederationConfig(**given)
        made.append(Coordinator(keys, clients, config))
        return made[-1]

    yield make
    for each in made:
        each.close()
        assert not asyncio.all_tasks(each.link._loop)  # what is left pending is complained of later, in another's test


class Caller:
    """Someone who calls the coordinator and sends what he likes."""

    def __init__(self, to: Coordinator, port: int = 0, compression: grpc.Compression | None = None) -> None:
        options = [("grpc.max_send_message_length", -1)]
        credentials = grpc.ssl_channel_credentials(to.authority)
        self.channel = grpc.secure_channel(f"127.0.0.1:{port or to.port}", credentials, options, compression)
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        opened = self.channel.stream_stream(METHOD)
        self._call = opened(iter(self._outgoing.get, None), timeout=SECONDS)
        self._heard = chain(self._call, self._refusals())

    def _refusals(self) -> Iterator[bytes]:
        yield from (value for name, value in self._call.trailing_metadata() if name == stream._REFUSAL)

    def say(self, data: bytes) -> "Caller":
        self._outgoing.put(data)
        return self

    def hear(self) -> Frame | None:
        """The next frame, or the refusal at the end; None when the stream is over."""
        try:
            data = next(self._heard, None)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            return None
        return None if data is None else Frame.decode(data)

    def why(self) -> str:
        """The reason in the refusal that comes next."""
        frame = self.hear()
        assert frame is not None
        assert frame.kind is Kind.REFUSAL
        return str(frames.decode_json(frame.body)[1]["why"])

    def close(self) -> None:
        self._outgoing.put(None)
        self.channel.close()


def test_a_federation_closes_every_round_and_every_site_ends_at_the_same_theta(
    start_coordinator: Callable[..., Coordinator],
) -> None:
    coordinator = start_coordinator(3)
    sites = [coordinator.attending(client) for client in range(3)]
    records = list(coordinator.rounds(10))
    coordinator.close("the run is finished")
    assert len(records) == 10
    for number, record in enumerate(records):
        assert record.scalars == {client: scalars_of(client, number) for client in range(3)}
    for attending in sites:
        assert attending.end().error is None
        assert attending.site.ended == "the run is finished"
        assert (attending.site.round, attending.site.digest) == (10, coordinator.digest)
        assert attending.site.states == 0
    assert sum(coordinator.engine.counts.values()) == 0


def test_port_and_threads_are_given_back(start_coordinator: Callable[..., Coordinator], keys: dict[str, Path]) -> None:
    before = _threads()
    coordinator = start_coordinator(1)
    site = coordinator.attending(0)
    list(coordinator.rounds(2))
    idle = Caller(coordinator)
    with pytest.raises(MeerkatError, match=r"is the port free"):
        Coordinator(keys, 1, port=coordinator.port)
    coordinator.close()
    assert site.end().error is None
    idle.close()
    again = Coordinator(keys, 1, port=coordinator.port)
    again.close()
    gc.collect()
    assert _settles(lambda: not _threads() - before)


def test_a_link_is_closed_when_all_that_attends_to_its_streams_is_done(
    start_coordinator: Callable[..., Coordinator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC's server waits for its calls, and what attends to them may take longer."""
    read = stream.StreamLink._read

    async def slow_to_end(*arguments: Any) -> None:
        try:
            await read(*arguments)
        finally:
            await asyncio.sleep(0.5)

    monkeypatch.setattr(stream.StreamLink, "_read", slow_to_end)
    coordinator = start_coordinator(1)
    site = coordinator.attending(0)
    list(coordinator.rounds(1))
    coordinator.close()
    assert not asyncio.all_tasks(coordinator.link._loop)
    assert site.end().error is None


def _threads() -> set[threading.Thread]:
    """All threads, but the directions' workers and gRPC's poller, which gRPC keeps for the process."""
    kept = ("directions", "_poll_wrapper")
    return {thread for thread in threading.enumerate() if not any(name in thread.name for name in kept)}


def _settles(condition: Callable[[], bool]) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_a_coordinator_of_another_authority_is_not_spoken_to(
    start_coordinator: Callable[..., Coordinator], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator = start_coordinator(1)
    other = certify(tmp_path / "other", ["127.0.0.1"], nodes=0)
    site = coordinator.site(0)
    stranger = Attending(site, coordinator.port, other["authority"].read_bytes(), patience_s=0.5).end()
    assert isinstance(stranger.error, RunFailed)
    assert str(stranger.error) == stream._UNREACHED
    assert "CERTIFICATE_VERIFY_FAILED" in capsys.readouterr().err
    assert not site.welcomed
    assert coordinator.link.receive(0.1) is None
    # its token was not shown to anyone: it still serves
    right = Attending(site, coordinator.port, coordinator.authority)
    list(coordinator.rounds(1))
    coordinator.close()
    assert right.end().error is None


def test_a_coordinator_under_another_name_is_not_spoken_to(tmp_path: Path) -> None:
    elsewhere = Coordinator(certify(tmp_path / "keys", ["elsewhere.example.org"], nodes=0), 1)
    site = elsewhere.attending(0, patience_s=0.5).end()
    assert isinstance(site.error, RunFailed)
    assert not site.site.welcomed
    assert elsewhere.link.receive(0.1) is None
    elsewhere.close()


def test_a_key_that_is_not_the_certificate_s_is_told_plainly(keys: dict[str, Path], tmp_path: Path) -> None:
    other = certify(tmp_path / "other", ["127.0.0.1"], nodes=0)
    with pytest.raises(MeerkatError, match=r"the key the certificate's\?"):
        Coordinator({**keys, "server key": other["server key"]}, 1)
    with pytest.raises(MeerkatError, match="No such file"):
        Coordinator({**keys, "server": tmp_path / "nowhere.crt"}, 1)


def test_a_stolen_token_is_refused_and_its_owner_unharmed(start_coordinator: Callable[..., Coordinator]) -> None:
    coordinator = start_coordinator(1)
    site = coordinator.site(0)
    hello = site.hello()
    owner = Attending(site, coordinator.port, coordinator.authority)
    list(coordinator.rounds(2))
    thief = Caller(coordinator).say(hello)
    assert thief.why() == "the token was used before"
    assert thief.hear() is None
    thief.close()
    assert len(list(coordinator.rounds(2))) == 2
    coordinator.close()
    assert owner.end().error is None
    assert (owner.site.round, owner.site.digest, coordinator.link.refused) == (4, coordinator.digest, 1)


def test_without_a_token_nobody_comes_in(start_coordinator: Callable[..., Coordinator]) -> None:
    coordinator = start_coordinator(1)
    stranger = Attending(StubSite(0, "00" * 32), coordinator.port, coordinator.authority).end()
    assert isinstance(stranger.error, Refused)
    assert "no token of this session" in str(stranger.error)
    assert coordinator.link.receive(0.1) is None


OTHERS_RUN = bytes(8)


def _hello(body: bytes, run: bytes = bytes.fromhex(RUN)) -> bytes:
    return Frame(Kind.HELLO, run, 0, 0, body=body).encode()


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (b"", "a frame of 0 bytes"),
        (b"GET / HTTP/1.1\r\n" * 10, "not a frame of this protocol"),
        (b"MK\x09" + bytes(60), "frame format 9"),
        (b"MK\x05\xff" + bytes(60), "unknown kind 255"),
        (_hello(b"\xff" * 100), "no JSON object"),
        (_hello(b"[" * 4000), "no JSON object"),
        (_hello(b"[" * 100_000), "at most 4,096 are accepted"),
        (_hello(bytes(32) + b"{}"), "no token of this session"),
        (_hello(bytes(32) + b"{}", OTHERS_RUN), "a frame of another run"),
        (Frame(Kind.REPLY, bytes.fromhex(RUN), 0, 0).encode(), "does not begin with a hello"),
    ],
)
def test_garbage_in_place_of_a_hello_is_refused(
    start_coordinator: Callable[..., Coordinator], first: bytes, why: str
) -> None:
    coordinator = start_coordinator(1)
    caller = Caller(coordinator).say(first)
    assert why in caller.why()
    assert caller.hear() is None
    caller.close()
    assert coordinator.link.receive(0) is None


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


OVERSIZED = """
import sys, grpc
port, authority, size, compression = sys.argv[1:]
channel = grpc.secure_channel(
    f"127.0.0.1:{port}",
    grpc.ssl_channel_credentials(open(authority, "rb").read()),
    [("grpc.max_send_message_length", -1)],
    grpc.Compression.Gzip if compression == "gzip" else None,
)
call = channel.stream_stream("/meerkat.Session/Frames", lambda data: data, lambda data: data)
try:
    print("heard", [data[3] for data in call(iter([bytes(int(size))]), timeout=100)])
except grpc.RpcError as error:
    print(error.code().name, error.details())
"""
"""A process that sends one frame of so many bytes."""


@pytest.mark.parametrize(
    ("size", "compression"),
    [
        (1 << 23, "none"),
        (1 << 26, "gzip"),
        pytest.param((1 << 30) - 1, "none", marks=pytest.mark.slow),
        pytest.param((1 << 30) - 1, "gzip", marks=pytest.mark.slow),
    ],
)
def test_a_frame_beyond_the_limit_is_refused_at_no_cost(
    start_coordinator: Callable[..., Coordinator], keys: dict[str, Path], size: int, compression: str
) -> None:
    coordinator = start_coordinator(1)
    site = coordinator.attending(0)
    list(coordinator.rounds(2))
    before = _peak_kib()
    command = [sys.executable, "-c", OVERSIZED, str(coordinator.port), str(keys["authority"]), str(size), compression]
    # a long run: the caller is left alone with its gigabyte, while rounds go on
    caller = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while caller.poll() is None:
        list(coordinator.rounds(1))
        time.sleep(0.02)
    assert caller.communicate()[0].split()[0] in ("RESOURCE_EXHAUSTED", "heard")
    assert _peak_kib() - before < 16 << 10
    assert coordinator.link.refused == 1
    coordinator.close()
    assert site.end().error is None
    assert site.site.digest == coordinator.digest


def _wrong_replies() -> dict[str, Callable[[StubSite], bytes]]:
    short = np.zeros((1, 1), np.float32)
    nan = np.full((1, 1), np.nan, np.float32)
    return {
        "garbage": lambda _: b"\x00\xff" * 100,
        "an empty frame": lambda _: b"",
        "a coordinator's frame": lambda site: site.frame(Kind.END, frames.encode_json({"why": "x"})),
        "NaN": lambda site: site.reply(nan),
        "infinity": lambda site: site.reply(nan + np.inf),
        "too many scalars": lambda site: site.reply(np.zeros((7, 1), np.float32)),
        "fewer bytes than announced": lambda site: site.reply(short)[:-1],
        "another client's": lambda site: Frame(
            Kind.REPLY, bytes.fromhex(RUN), 1, site.round, body=frames.Answer("training", 0, short).encode()
        ).encode(),
        "another run's": lambda site: Frame(
            Kind.REPLY, OTHERS_RUN, 0, site.round, body=frames.Answer("training", 0, short).encode()
        ).encode(),
    }


class Liar(StubSite):
    """Answers wrongly from its third round on."""

    def __init__(self, client: int, token: str, lie: Callable[[StubSite], bytes]) -> None:
        super().__init__(client, token)
        self.lie = lie

    def reply(self, scalars: np.ndarray) -> bytes:
        if self.round < 2:
            return super().reply(scalars)
        truth, self.reply = self.reply, super().reply  # the lie may use the honest way to write a reply
        try:
            return self.lie(self)
        finally:
            self.reply = truth


@pytest.mark.parametrize("lie", list(_wrong_replies()))
def test_a_site_that_lies_is_shown_out_and_the_others_go_on(
    start_coordinator: Callable[..., Coordinator], lie: str
) -> None:
    coordinator = start_coordinator(2, clients_minimum=1)
    liar = Attending(
        Liar(0, coordinator.admission.token("node 0"), _wrong_replies()[lie]), coordinator.port, coordinator.authority
    )
    honest = coordinator.attending(1)
    records = list(coordinator.rounds(5))
    assert [sorted(record.scalars) for record in records] == [[0, 1], [0, 1], [1], [1], [1]]
    assert isinstance(liar.end().error, Refused)
    assert coordinator.engine.counts["malformed"] == 1
    coordinator.close()
    assert honest.end().error is None
    assert honest.site.digest == coordinator.digest


class Echoing(StubSite):
    """Sends every reply twice, and once more with the number of the round before."""

    def __init__(self, client: int, token: str) -> None:
        super().__init__(client, token)
        self.say: Callable[[bytes], None] = lambda _: None

    def answer(self, data: bytes) -> bytes | None:
        answer = super().answer(data)
        if answer is not None and self.round:
            wrong = Frame.decode(answer)
            self.say(Frame(wrong.kind, wrong.run, wrong.client, wrong.round - 1, wrong.digest, wrong.body).encode())
            self.say(answer)
        return answer


def test_replies_of_another_round_and_replies_twice_do_not_count(
    start_coordinator: Callable[..., Coordinator], monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = start_coordinator(1)
    site = Echoing(0, coordinator.admission.token("node 0"))
    made = stream._Call.__init__

    def wired(call: stream._Call, *arguments: object) -> None:
        made(call, *arguments)
        site.say = call.send

    monkeypatch.setattr(stream._Call, "__init__", wired)
    attending = Attending(site, coordinator.port, coordinator.authority)
    records = list(coordinator.rounds(10))
    assert [record.scalars for record in records] == [{0: scalars_of(0, number)} for number in range(10)]
    assert coordinator.engine.counts["duplicate"] >= 16
    coordinator.close()
    assert attending.end().error is None
    assert site.digest == coordinator.digest


def test_a_caller_who_says_nothing_is_hung_up_on_and_delays_nobody(
    start_coordinator: Callable[..., Coordinator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_HELLO_S", 4.0)  # ten rounds are over long before
    coordinator = start_coordinator(1)
    silent = [Caller(coordinator) for _ in range(5)]
    site = coordinator.attending(0)
    list(coordinator.rounds(10))
    assert coordinator.link.refused == 0  # they still hold the line
    assert [caller.hear() for caller in silent] == [None] * 5
    assert coordinator.link.refused == 5
    coordinator.close()
    assert site.end().error is None
    for caller in silent:
        caller.close()


def test_a_caller_who_hangs_up_at_once_leaves_nothing_behind(
    start_coordinator: Callable[..., Coordinator], caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = start_coordinator(1)
    for _ in range(5):
        Caller(coordinator).close()
    site = coordinator.attending(0)
    list(coordinator.rounds(2))
    coordinator.close()
    assert site.end().error is None
    assert not caplog.records


def test_what_grpc_logs_of_a_broken_call_is_not_shown(
    start_coordinator: Callable[..., Coordinator], caplog: pytest.LogCaptureFixture
) -> None:
    """It depends on which of two things gRPC hears of first, so what it logs then is logged here."""
    start_coordinator(1).close()
    log = logging.getLogger("grpc._cython.cygrpc")
    log.error("ExecuteBatchError raised in core by servicer method [%s]", "/meerkat.Session/Frames")
    assert not caplog.records
    log.error("Unexpected [%s] raised by servicer method [%s]", "KeyError", "/meerkat.Session/Frames")
    assert len(caplog.records) == 1


def _flood(caller: Caller, count: int) -> None:
    for _ in range(count):
        caller.say(bytes(frames.LIMIT))


@pytest.mark.parametrize("calls", [1, 8])
def test_a_flood_from_one_site_waits_in_the_network(start_coordinator: Callable[..., Coordinator], calls: int) -> None:
    """Of a site that sends on, in one stream or in one after another, a few frames are held: no more are read."""
    coordinator = start_coordinator(2, clients_wanted=1)
    first = coordinator.site(0)
    for _ in range(calls):
        flooding = Caller(coordinator).say(first.hello())
        welcome = flooding.hear()
        assert welcome is not None
        first.answer(welcome.encode())
        _flood(flooding, 30)
        assert _settles(lambda: coordinator.link.bytes_received >= frames.LIMIT)
        received = -1
        while received != coordinator.link.bytes_received:  # nobody handles them: it comes to rest
            received = coordinator.link.bytes_received
            time.sleep(0.3)
        if calls > 1:
            flooding.close()
    assert 1 <= coordinator.link.bytes_received / frames.LIMIT <= stream._UNREAD
    honest = coordinator.attending(1)
    assert _settles(lambda: set(next(coordinator.rounds(1)).scalars) == {1})
    assert coordinator.engine.counts["malformed"] >= 1
    coordinator.close()
    assert honest.end().error is None
    flooding.close()


def test_what_an_old_stream_did_not_read_is_not_kept(start_coordinator: Callable[..., Coordinator]) -> None:
    coordinator = start_coordinator(1)
    site = coordinator.site(0)
    first = Caller(coordinator).say(site.hello())
    welcome = first.hear()
    assert welcome is not None
    site.answer(welcome.encode())
    old = coordinator.link._sessions[0]
    for _ in range(4):
        coordinator.link.send({0: [bytes(frames.LIMIT)] * 20})
    assert _settles(lambda: old.outgoing.qsize() > 1)
    again = Caller(coordinator).say(site.hello())
    assert again.hear() is not None
    assert old.outgoing.qsize() <= 1
    for caller in (first, again):
        caller.close()


def test_what_a_site_that_was_let_go_does_not_read_is_not_kept(
    start_coordinator: Callable[..., Coordinator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_FLUSH_S", 0.3)
    coordinator = start_coordinator(1)
    caller = Caller(coordinator).say(coordinator.site(0).hello())
    assert caller.hear() is not None
    session = coordinator.link._sessions[0]
    for _ in range(4):
        coordinator.link.send({0: [bytes(frames.LIMIT)] * 20})
    coordinator.link.drop(0, b"last")
    assert _settles(lambda: session.outgoing.qsize() > 1)
    assert _settles(lambda: session.outgoing.qsize() <= 1)
    caller.close()


def test_a_stream_that_breaks_before_its_welcome_leaves_nothing_behind(
    start_coordinator: Callable[..., Coordinator],
) -> None:
    coordinator = start_coordinator(1)
    hello = coordinator.site(0).hello()

    class Broken:
        async def read(self) -> bytes:
            return hello

        async def write(self, _: bytes) -> None:
            raise grpc.aio.UsageError("the stream is gone")

    with pytest.raises(grpc.aio.UsageError):
        coordinator.link._call(coordinator.link._attend(iter(()), Broken()))
    assert not coordinator.link._sessions
    events = [coordinator.link.receive(5.0) for _ in range(2)]
    assert [event and event.what for event in events] == ["arrived", "left"]


def test_a_site_that_is_shown_out_just_after_it_came_back_is_not_waited_for(
    start_coordinator: Callable[..., Coordinator],
) -> None:
    """What made the coordinator drop it stands in the queue before its new arrival: that arrival is stale."""
    coordinator = start_coordinator(2, clients_wanted=1, deadline_s=1.0)
    honest = coordinator.attending(1)
    list(coordinator.rounds(1))
    site = coordinator.site(0)
    first = Caller(coordinator).say(site.hello())
    welcome = first.hear()
    assert welcome is not None
    site.answer(welcome.encode())
    first.say(b"garbage")
    assert _settles(lambda: coordinator.link.bytes_received > 0)
    again = Caller(coordinator).say(site.hello())
    assert again.hear() is not None
    assert first.hear() is None  # a client has one stream
    assert _settles(lambda: set(next(coordinator.rounds(1)).scalars) == {1} and coordinator.engine.facts()["here"] == 1)
    coordinator.close()
    assert honest.end().error is None
    for caller in (first, again):
        caller.close()


@pytest.fixture
def proxied(start_coordinator: Callable[..., Coordinator]) -> Iterator[Callable[..., tuple[Coordinator, Proxy]]]:
    """Makes a coordinator, and a proxy in front of it."""
    made = []

    def make(clients: int, delay_s: float = 0.0, jitter_s: float = 0.0, **waiting: float) -> tuple[Coordinator, Proxy]:
        coordinator = start_coordinator(clients, **waiting)
        made.append(Proxy(coordinator.port, delay_s, jitter_s))
        return coordinator, made[-1]

    yield make
    for each in made:
        each.close()


def test_a_site_comes_back_with_its_secret_after_its_connection_broke(
    proxied: Callable[..., tuple[Coordinator, Proxy]],
) -> None:
    coordinator, proxy = proxied(2, clients_minimum=2)
    sites = [coordinator.attending(0), coordinator.attending(1, proxy.port)]
    list(coordinator.rounds(3))
    for _ in range(3):
        proxy.cut()
        proxy.mend()
        records = list(coordinator.rounds(3))
        assert [record.scalars for record in records[1:]] == [
            {client: scalars_of(client, record.plan.round) for client in range(2)} for record in records[1:]
        ]
    assert proxy.connections == 4
    coordinator.close()
    for attending in sites:
        assert attending.end().error is None
        assert (attending.site.round, attending.site.digest) == (12, coordinator.digest)
        assert attending.site.states == 0
    assert (
        coordinator.engine.counts["behind"] == coordinator.engine.counts["malformed"] == coordinator.link.refused == 0
    )


def test_a_site_that_was_away_catches_up(proxied: Callable[..., tuple[Coordinator, Proxy]]) -> None:
    """Ten rounds are told one by one; for more rounds than theta is long, theta is sent."""
    coordinator, proxy = proxied(2, clients_minimum=1, clients_wanted=2)
    sites = [coordinator.attending(0), coordinator.attending(1, proxy.port)]
    list(coordinator.rounds(2))
    for away, whole in ((10, 0), (200, 1)):
        proxy.cut()
        alone = list(coordinator.rounds(away))
        assert set(alone[-1].scalars) == {0}
        proxy.mend()
        assert _settles(lambda: set(next(coordinator.rounds(1)).scalars) == {0, 1})
        assert sites[1].site.states == whole
    coordinator.close()
    for attending in sites:
        assert attending.end().error is None
        assert attending.site.digest == coordinator.digest


def test_a_site_whose_coordinator_is_gone_gives_up_within_its_patience(
    proxied: Callable[..., tuple[Coordinator, Proxy]], capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator, proxy = proxied(1, patience_s=3.0)
    site = coordinator.attending(0, proxy.port, patience_s=1.0)
    list(coordinator.rounds(2))
    began = time.monotonic()
    proxy.cut()
    assert isinstance(site.end().error, RunFailed)
    assert str(site.error) == stream._UNREACHED
    assert "the site ends its session" in capsys.readouterr().err
    assert time.monotonic() - began >= 1.0  # it did try
    assert not site.site.ended
    with pytest.raises(RunFailed, match="0 clients here"):
        list(coordinator.rounds(1))


def test_a_site_that_hears_nothing_for_long_is_free_again(
    start_coordinator: Callable[..., Coordinator],
) -> None:
    coordinator = start_coordinator(1)
    before = _threads()
    site = coordinator.attending(0, idle_s=1.5)
    list(coordinator.rounds(2))
    assert isinstance(site.end().error, RunFailed)
    assert "no frame for 1.5 s" in str(site.error)
    assert _settles(lambda: not _threads() - before)


def test_a_site_that_works_for_long_is_not_idle(start_coordinator: Callable[..., Coordinator]) -> None:
    coordinator = start_coordinator(1)
    site = coordinator.attending(0, compute_s=2.5, idle_s=1.0)
    assert len(list(coordinator.rounds(1))) == 1
    coordinator.close()
    assert site.end().error is None


class Failing(StubSite):
    """Cannot go on in its third round."""

    def reply(self, scalars: np.ndarray) -> bytes:
        if self.round == 2:
            raise ValueError("row 17 says 'patient Jane Doe'")
        return super().reply(scalars)


def test_a_site_that_fails_says_so_without_a_word_of_its_data(
    start_coordinator: Callable[..., Coordinator], capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator = start_coordinator(2, clients_minimum=1)
    failing = Attending(Failing(0, coordinator.admission.token("node 0")), coordinator.port, coordinator.authority)
    other = coordinator.attending(1)
    assert [sorted(record.scalars) for record in coordinator.rounds(4)] == [[0, 1], [0, 1], [1], [1]]
    assert isinstance(failing.end().error, ValueError)
    coordinator.close()
    assert other.end().error is None
    said = capsys.readouterr().err
    assert "client 0 takes no part: error" in said
    assert "Jane" not in said


def _timed(rounds: Iterator[object]) -> Sequence[float]:
    """Seconds of each round."""
    times, began = [], time.monotonic()
    for _ in rounds:
        times.append(time.monotonic() - began)
        began = time.monotonic()
    return times


def _lower_quartile(times: Sequence[float]) -> float:
    """What a round takes: now and then the machine does something else."""
    return sorted(times)[len(times) // 4]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "hold"])
def test_over_a_slow_network_a_round_takes_one_round_trip(
    proxied: Callable[..., tuple[Coordinator, Proxy]], how: str
) -> None:
    """50 ms each way: nothing in a round waits twice. Then one node is away for twenty rounds."""
    delay, compute, deadline = 0.05, 0.05, 2.0
    coordinator, proxy = proxied(3, delay, 0.01, clients_minimum=2, deadline_s=deadline)
    away = Proxy(coordinator.port, delay, 0.01)
    sites = [coordinator.attending(client, port, compute) for client, port in ((0, proxy.port), (1, proxy.port))]
    sites.append(coordinator.attending(2, away.port, compute))
    list(coordinator.rounds(3))
    times = _timed(coordinator.rounds(40))
    assert _lower_quartile(times) <= 1.3 * (2 * delay + compute)
    getattr(away, how)()
    times = _timed(coordinator.rounds(20))
    assert max(times) <= deadline + 1.0
    assert _lower_quartile(times) <= 1.3 * (2 * delay + compute)
    away.mend()
    assert _settles(lambda: set(next(coordinator.rounds(1)).scalars) == {0, 1, 2})
    assert len(list(coordinator.rounds(5))[-1].scalars) == 3
    coordinator.close()
    for attending in sites:
        assert attending.end().error is None
        assert attending.site.digest == coordinator.digest
    away.close()
