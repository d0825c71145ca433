"""The session stream: one gRPC call a site, over TLS, on which all frames of a run travel.

The coordinator listens; a site calls, shows its token or secret in the first frame, and stays. A peer that
falls silent is noticed by keepalive within `NOTICED_S` seconds, a closed connection at once.
"""

import asyncio
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from meerkat.agreement import Refused
from meerkat.engines import frames
from meerkat.engines.door import Door
from meerkat.engines.frames import BadFrame
from meerkat.engines.link import Event
from meerkat.engines.site import Site
from meerkat.errors import MeerkatError, RunFailed
from meerkat.progress import say

_SERVICE, _METHOD = "meerkat.Session", "Frames"
_HELLO_S = 10.0
"""Seconds that a caller has for its first frame."""
_ANSWER_S = 10.0
"""Seconds that a coordinator has for its first frame, before the site calls again."""
_FLUSH_S = 30.0
"""Seconds that a site which is let go has to read what was sent before; then it is dropped."""
_GRACE_S, _CLEAR_S = 2.0, 10.0
"""Seconds, at the end, for streams to be over; and then for the tasks that attended to them to be done."""
_STREAMS = 10_000
"""Streams at a time, those of strangers who have not said hello among them."""
_STOOD_S = 1.0
"""Seconds for which a stream without a frame after the welcome must have stood to count as one."""
_UNREAD = 8
"""Events of one site, over all its streams, that may wait to be handled; more are left in the network."""
_KEEPALIVE_S, _KEEPALIVE_TIMEOUT_S = 10, 5
NOTICED_S = _KEEPALIVE_S + _KEEPALIVE_TIMEOUT_S
"""Seconds after which a silent peer is taken to be gone."""
IDLE_S = 3600.0
"""Seconds without a frame after which a site ends its session, whatever the connection says."""

_OPTIONS = (
    ("grpc.max_receive_message_length", frames.LIMIT),
    ("grpc.max_send_message_length", frames.LIMIT),
    ("grpc.keepalive_time_ms", 1000 * _KEEPALIVE_S),
    ("grpc.keepalive_timeout_ms", 1000 * _KEEPALIVE_TIMEOUT_S),
    ("grpc.http2.ping_timeout_ms", 1000 * _KEEPALIVE_TIMEOUT_S),  # a minute otherwise, whatever the line above says
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000 * _KEEPALIVE_TIMEOUT_S),
    ("grpc.http2.bdp_probe", 0),  # frames are small: probing the bandwidth would cost more bytes than they do
    ("grpc.enable_retries", 0),
    ("grpc.so_reuseport", 0),  # two coordinators on one port would share out its callers between them
)


def _as_is(data: bytes) -> bytes:
    return data


@dataclass(eq=False)
class _Session:
    """A site's stream, as the coordinator holds it."""

    client: int
    outgoing: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)

    def retire(self) -> None:
        """End it: what was not sent is dropped, for its peer may never read it."""
        while not self.outgoing.empty():
            self.outgoing.get_nowait()
        self.outgoing.put_nowait(None)


class StreamLink:
    """The coordinator's end of all streams. See `link.Link`."""

    def __init__(self, door: Door, listen: str, certificate: Path, private_key: Path) -> None:
        """Listen on host:port (port 0 for a free one) with a PEM certificate and its key.

        Raises:
            MeerkatError: the files cannot be read, or the address is not to be had.
        """
        self.bytes_sent = self.bytes_received = 0
        """Frames' bytes, over all sites."""
        self.refused = 0
        """Streams that were not let in."""
        self._door = door
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._told: Counter[int] = Counter()
        """Events of each client, over all its streams. Only the loop's thread writes it."""
        self._taken: Counter[int] = Counter()
        """Those of them that were taken. Only the thread that receives writes it."""
        self._sessions: dict[int, _Session] = {}
        try:
            pair = (private_key.read_bytes(), certificate.read_bytes())
        except OSError as error:
            raise MeerkatError(f"{error.filename}: {error.strerror}; see 'meerkat certify'") from None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="session streams", daemon=True)
        self._thread.start()
        try:
            self.port = self._call(self._listen(listen, grpc.ssl_server_credentials([pair])))
        except RuntimeError:
            self._stop_loop()
            raise MeerkatError(
                f"stream {listen}: cannot listen there; is the port free, the host this machine's (if not, give "
                "'listen'), the key the certificate's? 'meerkat doctor' tells"
            ) from None

    def send(self, frames: Mapping[int, Sequence[bytes]]) -> None:
        """Send each client its frames, in order; those of a client that is gone are lost with it."""
        self._loop.call_soon_threadsafe(self._put, frames)

    def receive(self, timeout_s: float) -> Event | None:
        """The next event, or None when none came in time."""
        try:
            event = self._events.get(timeout=timeout_s) if timeout_s > 0 else self._events.get_nowait()
        except queue.Empty:
            return None
        self._taken[event.client] += 1
        return event

    def drop(self, client: int, last: bytes) -> None:
        """Send a client a last frame and end its stream."""
        self._loop.call_soon_threadsafe(self._drop, client, last)

    def close(self) -> None:
        """End all streams, those with frames to send after these are sent, and give the port back."""
        self._call(self._shut())
        self._stop_loop()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # in the loop's thread

    async def _listen(self, listen: str, credentials: grpc.ServerCredentials) -> int:
        self._server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=_STREAMS)
        handler = grpc.stream_stream_rpc_method_handler(self._attend, _as_is, _as_is)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),))
        port: int = self._server.add_secure_port(listen, credentials)
        await self._server.start()
        return port

    async def _shut(self) -> None:
        for session in self._sessions.values():
            session.outgoing.put_nowait(None)
        await self._server.stop(grace=_GRACE_S)
        # gRPC waits for its calls, but not for the tasks that attend to them, nor for what these still wait for: a loop
        # that closed before would leave them pending, and gRPC would call back into it
        me = asyncio.current_task()
        if others := asyncio.all_tasks() - {me}:
            await asyncio.wait(others, timeout=_CLEAR_S)
        while others := asyncio.all_tasks() - {me}:
            for task in others:
                task.cancel()
            await asyncio.wait(others)

    def _put(self, frames: Mapping[int, Sequence[bytes]]) -> None:
        for client, each in frames.items():
            if (session := self._sessions.get(client)) is not None:
                for frame in each:
                    session.outgoing.put_nowait(frame)

    def _drop(self, client: int, last: bytes) -> None:
        if (session := self._sessions.pop(client, None)) is not None:
            session.outgoing.put_nowait(last)
            session.outgoing.put_nowait(None)
            self._loop.call_later(_FLUSH_S, session.retire)
            self._tell(Event("left", client))  # it may have arrived, unseen yet, since whoever drops it last looked

    async def _attend(self, _: AsyncIterator[bytes], context: Any) -> None:
        """One stream, from its first frame to its end."""
        try:
            async with asyncio.timeout(_HELLO_S):
                first = await context.read()
            guest = self._door.admit(first if isinstance(first, bytes) else b"")
        except (Refused, BadFrame) as error:
            self.refused += 1
            if self.refused <= 20:
                say(f"a stream from {context.peer()} is refused: {error}")
            async with asyncio.timeout(_HELLO_S):
                await context.write(self._door.refuse(str(error)))
            return
        except TimeoutError:
            self.refused += 1
            return
        session = _Session(guest.client)
        if (before := self._sessions.get(guest.client)) is not None:
            before.retire()
        self._sessions[guest.client] = session
        session.outgoing.put_nowait(guest.welcome)
        self._tell(Event("arrived", guest.client, guest=guest))
        reader = asyncio.create_task(self._read(session, context))
        try:
            while (frame := await session.outgoing.get()) is not None:
                self.bytes_sent += len(frame)
                await context.write(frame)
        finally:
            reader.cancel()
            if self._sessions.get(guest.client) is session:
                del self._sessions[guest.client]
                self._tell(Event("left", guest.client))

    def _tell(self, event: Event) -> None:
        self._told[event.client] += 1
        self._events.put(event)

    async def _read(self, session: _Session, context: Any) -> None:
        client = session.client
        try:
            while True:
                while self._told[client] - self._taken[client] >= _UNREAD:
                    await asyncio.sleep(0.01)
                if not isinstance(data := await context.read(), bytes):
                    break
                self.bytes_received += len(data)
                self._tell(Event("frame", client, data))
        except (grpc.RpcError, grpc.aio.UsageError):
            pass  # the connection broke: it ends like one that was closed
        session.outgoing.put_nowait(None)


def attend(site: Site, address: str, authority: bytes, patience_s: float, idle_s: float = IDLE_S) -> None:
    """A site's whole session: call the coordinator, answer its frames, come back when the stream breaks.

    Args:
        address: host:port, as the coordinator's certificate has the host.
        authority: the federation's CA certificate, PEM: a coordinator without one of its is not spoken to.
        patience_s: seconds without a stream after which the site gives up.
        idle_s: seconds without a frame after which it does, though the stream stands.

    Raises:
        Refused: the coordinator will not have the site.
        RunFailed: the stream broke and could not be had again.
        BadFrame: the coordinator sent what no coordinator sends; it was told so.
    """
    credentials = grpc.ssl_channel_credentials(authority)
    lost, pause, calls = time.monotonic(), 0.1, 0
    while not site.ended:
        calls += 1
        trouble, called, heard = "it ended", time.monotonic(), 0
        with grpc.secure_channel(address, credentials, _OPTIONS) as channel:
            left_s = lost + patience_s - time.monotonic()
            call = _Call(channel, site.hello(), idle_s, min(max(left_s, 1.0), _ANSWER_S))
            try:
                for data in call:
                    heard += 1
                    if (answer := _answer(site, call, data)) is not None:
                        call.say(answer)
                        site.look_ahead()
                    if site.ended:
                        break
            except grpc.RpcError as error:
                trouble = _line_of(error)
            call.say(None)
            if call.idle:
                raise RunFailed(f"coordinator {address}: not a frame for {idle_s:g} s; the site is free again")
        if site.ended:
            break
        # a coordinator that lets the site in and hangs up at once is no stream
        if heard > 1 or (heard and time.monotonic() - called > _STOOD_S):
            lost, pause = time.monotonic(), 0.1
        if time.monotonic() - lost > patience_s:
            raise RunFailed(
                f"coordinator {address}: no stream for {patience_s:g} s ({trouble}); the site is free again"
            )
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
    if site.refused and not site.welcomed and calls > 1:
        # the token may have been spent by a call that broke before the answer came
        raise RunFailed(f"the coordinator refuses this site's second call: {site.ended}")
    if site.refused:
        raise Refused(f"the coordinator refuses this site: {site.ended}")


class _Call:
    """One stream of a site: iterating gives the coordinator's frames."""

    def __init__(self, channel: grpc.Channel, hello: bytes, idle_s: float, answer_s: float) -> None:
        self.answered = False
        """Whether a frame came."""
        self.idle = False
        """Whether it was ended because nothing came any more for so long."""
        self._idle_s, self._answer_s = idle_s, answer_s
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._outgoing.put(hello)
        self._call = channel.stream_stream(f"/{_SERVICE}/{_METHOD}", _as_is, _as_is)(iter(self._outgoing.get, None))
        self._heard = time.monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def __iter__(self) -> Iterator[bytes]:
        try:
            for data in self._call:
                self._heard = math.inf  # until it is answered: a site at work is not idle
                self.answered = True
                yield data
                self._heard = time.monotonic()
        finally:
            self._over.set()

    def say(self, frame: bytes | None) -> None:
        """Send a frame; None ends this side of the stream, after all that was said before."""
        self._outgoing.put(frame)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._idle_s)):
            if time.monotonic() - self._heard > (self._idle_s if self.answered else self._answer_s):
                self.idle = self.answered
                self._call.cancel()
                return


def _answer(site: Site, call: _Call, data: bytes) -> bytes | None:
    """The site's answer. What it cannot answer ends its session, and the coordinator is told in a word."""
    try:
        return site.answer(data)
    except Exception as error:
        call.say(site.refusal(str(error) if isinstance(error, MeerkatError) else "error"))
        call.say(None)
        time.sleep(0.2)  # the line goes out before the channel closes
        raise


def _line_of(error: grpc.RpcError) -> str:
    """What went wrong with a stream, in one line."""
    code = getattr(error, "code", lambda: None)()
    details = getattr(error, "details", lambda: None)()
    return " ".join(f"{getattr(code, 'name', code)}: {details}".split())[:400]
