"""The session stream: one gRPC call a site, over TLS, that carries all frames of a run.

The coordinator listens; a site calls, shows its token or secret in the first frame, and stays connected. Keepalive
notices a silent peer within `NOTICED_S` seconds; a closed connection is noticed at once.

Anybody may reach the port. Connections are counted, and whoever has not been admitted is hung up on within seconds,
whatever they send or leave unread.
"""

import asyncio
import logging
import math
import queue
import resource
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from meerkat.errors import MeerkatError, RunFailed
from meerkat.federation import frames
from meerkat.federation.admission import Admission, AdmittedSite, TooSoon
from meerkat.federation.frames import BadFrame
from meerkat.federation.link import Event
from meerkat.federation.site import Site
from meerkat.federation.site_settings import Refused
from meerkat.progress import number_of, one_line, say

_SERVICE, _METHOD = "meerkat.Session", "Frames"
_REFUSAL = "meerkat-refusal-bin"
"""The key of the trailing metadata that carries the refusal of a first frame, which no caller can leave unread."""
_HANDSHAKE_S = 5.0
"""Seconds that a caller has for TLS and the settings of HTTP/2."""
_CALL_S = 3.0
"""Seconds that a connection may be without a call; gRPC may take twice as long to notice."""
_HELLO_S = 5.0
"""Seconds that a caller has to send its first frame."""
_REFUSED_S = 0.5
"""Seconds that a caller who is refused waits for it, and with them the next call on that connection."""
_AGE_S = 15.0
"""Seconds after which a connection takes no further call. The call that it has goes on."""
_STRANGERS = 1000
"""Connections at a time beyond one for each client."""
_FILES = 128
"""Files and connections that the run may open besides."""
_ANSWER_S = 10.0
"""Seconds that a coordinator has to send its first frame, before the site calls again."""
_FLUSH_S = 30.0
"""Seconds that a dropped site has to read what was sent before; then its stream ends."""
_GRACE_S, _CLEAR_S = 2.0, 10.0
"""Seconds, at the end, for streams to be over; and then for the tasks that attended to them to be done."""
_STREAMS = 8
"""Streams of one client at a time, with those that are over but for what it does not read."""
_STABLE_S = 1.0
"""Seconds that a stream with no frame after the welcome must have lasted to count as a connection."""
_UNSENT = 4
"""Sendings to one site, of a whole state each at most, that may wait for it to read; at the next its session ends."""
_UNREAD = 8
"""Events of one site, over all its streams, that may wait to be handled; more stay in the network."""
_UNREAD_ANSWERS = 8
"""Answers of a site that may wait to be read; a coordinator that asks on is misbehaving."""
_KEEPALIVE_S, _KEEPALIVE_TIMEOUT_S = 10, 5
NOTICED_S = _KEEPALIVE_S + _KEEPALIVE_TIMEOUT_S
"""Seconds after which a silent peer counts as gone."""
IDLE_S = 3600.0
"""Seconds without a frame after which a site ends its session, even if the connection is up."""

_OPTIONS = (
    ("grpc.max_send_message_length", frames.LIMIT),
    ("grpc.keepalive_time_ms", 1000 * _KEEPALIVE_S),
    ("grpc.keepalive_timeout_ms", 1000 * _KEEPALIVE_TIMEOUT_S),
    ("grpc.http2.ping_timeout_ms", 1000 * _KEEPALIVE_TIMEOUT_S),  # otherwise a minute, despite the line above
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000 * _KEEPALIVE_TIMEOUT_S),
    ("grpc.http2.bdp_probe", 0),  # frames are small: bandwidth probes would cost more bytes
    ("grpc.enable_retries", 0),
)
_CALLING_OPTIONS = (*_OPTIONS, ("grpc.max_receive_message_length", frames.LIMIT))
_UNREACHED = "the stream could not be reached; the site's own log says why"
"""All that a coordinator hears about a connection that failed: it must not learn what else a site can reach."""


def _listening_options(connections: int, longest_frame: int) -> tuple[tuple[str, int], ...]:
    """The options of the coordinator's end, beside `_OPTIONS`."""
    return (
        ("grpc.so_reuseport", 0),  # otherwise two coordinators on one port would share its callers
        ("grpc.max_receive_message_length", longest_frame),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.max_concurrent_streams", 1),  # of a connection
        ("grpc.server_handshake_timeout_ms", int(1000 * _HANDSHAKE_S)),
        ("grpc.max_connection_idle_ms", int(1000 * _CALL_S)),
        ("grpc.max_connection_age_ms", int(1000 * _AGE_S)),
    )


def _room_for(clients: int) -> int:
    """How many connections to accept at a time. Raises the limit of open files for them, as far as it can be.

    Raises:
        MeerkatError: there cannot be one for each client.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = clients + _STRANGERS + _FILES
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if limit < clients + _FILES:
        raise MeerkatError(
            f"limit of open files {hard:,}: {number_of(clients, 'client')} take {clients + _FILES:,} at least; "
            "raise it (LimitNOFILE of the unit, or ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit - _FILES


@dataclass(eq=False)
class _Session:
    """A site's stream, at the coordinator's end."""

    client: int
    outgoing: asyncio.Queue[Sequence[bytes] | None] = field(default_factory=asyncio.Queue)
    """What is sent together, one after the other; None at the end."""
    reader: asyncio.Task[None] | None = None
    """Reads what the site sends."""
    writer: asyncio.Task[None] | None = None
    """Sends what is outgoing, and ends the stream."""

    def stop_reading(self) -> None:
        """Read no more of it."""
        if self.reader is not None:
            self.reader.cancel()

    def retire(self) -> None:
        """End it, without what was not sent yet: its peer may never read it, not even what is being sent."""
        self.stop_reading()
        while not self.outgoing.empty():
            self.outgoing.get_nowait()
        self.outgoing.put_nowait(None)
        if self.writer is not None:
            asyncio.get_running_loop().call_later(_CLEAR_S, self.writer.cancel)


class StreamLink:
    """The coordinator's end of all streams. See `link.Link`."""

    def __init__(
        self,
        admission: Admission,
        listen: str,
        certificate: Path,
        private_key: Path,
        longest_frame: int = frames.LIMIT,
    ) -> None:
        """Listen on host:port (port 0 for a free one) with a PEM certificate and its key.

        Args:
            longest_frame: bytes of a site's frame, at most. Of a longer one nothing is read.

        Raises:
            MeerkatError: the files cannot be read, the address cannot be listened on, or the limit of open files is
                too low.
        """
        self.bytes_sent = self.bytes_received = 0
        self.refused = 0
        """Streams that were refused."""
        self._admission = admission
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._queued: Counter[int] = Counter()
        """Events of each client, over all its streams. Written by the loop's thread only."""
        self._received: Counter[int] = Counter()
        """Those of them that were received. Written by the receiving thread only."""
        self._sessions: dict[int, _Session] = {}
        self._streams: Counter[int] = Counter()
        """Streams of each client, those among them that are over but for what it does not read."""
        options = (*_OPTIONS, *_listening_options(_room_for(admission.clients), longest_frame))
        try:
            pair = (private_key.read_bytes(), certificate.read_bytes())
        except OSError as error:
            raise MeerkatError(f"{error.filename}: {error.strerror}; see 'meerkat certify'") from None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="session streams", daemon=True)
        self._thread.start()
        try:
            self.port = self._call(self._listen(listen, grpc.ssl_server_credentials([pair]), options))
        except RuntimeError:
            self._stop_loop()
            causes = (
                "is the port free, is the host this machine's (if not, give 'listen'), is the key the certificate's?"
            )
            raise MeerkatError(f"stream {listen}: cannot listen there; {causes} Ask 'meerkat doctor'") from None

    def send(self, frames: Mapping[int, Sequence[bytes]]) -> None:
        """Send each client its frames, in order; those of a client that has left are lost."""
        self._loop.call_soon_threadsafe(self._put, frames)

    def receive(self, timeout_s: float) -> Event | None:
        """The next event, or None if none came in time."""
        try:
            event = self._events.get(timeout=timeout_s) if timeout_s > 0 else self._events.get_nowait()
        except queue.Empty:
            return None
        self._received[event.client] += 1
        return event

    def drop(self, client: int, last: bytes) -> None:
        """Send a client a last frame and end its stream."""
        self._loop.call_soon_threadsafe(self._drop, client, last)

    def close(self) -> None:
        """End all streams, those with frames to send after these are sent, and release the port."""
        self._call(self._shut())
        self._stop_loop()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # in the loop's thread

    async def _listen(self, listen: str, credentials: grpc.ServerCredentials, options: Any) -> int:
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_broken_call)
        self._server = grpc.aio.server(options=options)
        handler = grpc.stream_stream_rpc_method_handler(self._attend)  # bytes, as they are
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),))
        port: int = self._server.add_secure_port(listen, credentials)
        await self._server.start()
        return port

    async def _shut(self) -> None:
        for session in self._sessions.values():
            session.outgoing.put_nowait(None)
        await self._server.stop(grace=_GRACE_S)
        # gRPC waits for its calls, but not for the tasks that attend to them: it would call back into a closed loop
        me = asyncio.current_task()
        while others := asyncio.all_tasks() - {me}:
            await asyncio.wait(others, timeout=_CLEAR_S)
            for task in others:
                task.cancel()

    def _put(self, frames: Mapping[int, Sequence[bytes]]) -> None:
        for client, each in frames.items():
            if (session := self._sessions.get(client)) is None:
                continue
            if session.outgoing.qsize() < _UNSENT:
                session.outgoing.put_nowait(each)
            else:
                say(f"client {client}: reads nothing of what it is sent; its session ends")
                self._end(client)
                session.retire()

    def _end(self, client: int) -> _Session | None:
        """Take a client's session from it."""
        if (session := self._sessions.pop(client, None)) is not None:
            session.stop_reading()
            self._queue(Event("left", client))  # it may have come back since the caller last received events
        return session

    def _drop(self, client: int, last: bytes) -> None:
        if (session := self._end(client)) is not None:
            session.outgoing.put_nowait([last])
            session.outgoing.put_nowait(None)
            self._loop.call_later(_FLUSH_S, session.retire)

    async def _attend(self, _: AsyncIterator[bytes], context: Any) -> None:
        """One stream, from its first frame to its end."""
        try:
            async with asyncio.timeout(_HELLO_S):
                first = await context.read()
            site = self._admission.admit(first if isinstance(first, bytes) else b"")
        except TimeoutError:
            self.refused += 1
            return
        except (Refused, BadFrame) as error:
            self.refused += 1
            if self.refused <= 20:
                say(f"a stream from {context.peer()} is refused: {error}")
            await asyncio.sleep(_REFUSED_S)
            if isinstance(error, TooSoon):  # it is to try again, so it is not told that it is refused
                return
            context.set_trailing_metadata(((_REFUSAL, self._admission.refusal(one_line(error))),))
            return
        if self._streams[site.client] >= _STREAMS:
            self.refused += 1
            return
        self._streams[site.client] += 1
        try:
            await self._converse(site, context)
        finally:
            self._streams[site.client] -= 1

    async def _converse(self, site: AdmittedSite, context: Any) -> None:
        """An admitted site's stream, from its welcome on."""
        session = _Session(site.client)
        if (before := self._sessions.get(site.client)) is not None:
            before.retire()
        self._sessions[site.client] = session
        session.outgoing.put_nowait([site.welcome])
        self._queue(Event("arrived", site.client, site=site))
        session.writer = asyncio.current_task()
        session.reader = asyncio.create_task(self._read(session, context))
        try:
            while (together := await session.outgoing.get()) is not None:
                for frame in together:
                    self.bytes_sent += len(frame)
                    await context.write(frame)
        finally:
            session.stop_reading()
            if self._sessions.get(site.client) is session:
                del self._sessions[site.client]
                self._queue(Event("left", site.client))

    def _queue(self, event: Event) -> None:
        self._queued[event.client] += 1
        self._events.put(event)

    async def _read(self, session: _Session, context: Any) -> None:
        client = session.client
        try:
            while True:
                while self._queued[client] - self._received[client] >= _UNREAD:
                    await asyncio.sleep(0.01)
                if not isinstance(data := await context.read(), bytes):
                    break
                self.bytes_received += len(data)
                self._queue(Event("frame", client, data))
        except (grpc.RpcError, grpc.aio.UsageError):
            pass  # a broken connection ends like one that was closed
        session.outgoing.put_nowait(None)


def _is_no_broken_call(record: logging.LogRecord) -> bool:
    """False for what gRPC logs as an error, now and then, when a caller hangs up while it is answered."""
    return not str(record.msg).startswith("ExecuteBatchError raised in core by servicer method")


class StreamLost(RunFailed):
    """A session ended without its stream. The message is fit for the coordinator; the site's own log has the reason."""


def attend(site: Site, address: str, authority: bytes, patience_s: float, idle_s: float = IDLE_S) -> None:
    """A site's whole session: call the coordinator, answer its frames, and call again when the stream breaks.

    Args:
        address: host:port, from the site's own settings; the coordinator's certificate must name the host.
        authority: the federation's CA certificate, PEM; it must have signed the coordinator's.
        patience_s: seconds without a stream after which the site gives up.
        idle_s: seconds without a frame after which it gives up, even if the stream is up.

    Raises:
        Refused: the coordinator refuses the site.
        StreamLost: the stream broke, and the coordinator could not be reached again.
        RunFailed: no frame came for idle_s.
        BadFrame: the coordinator sent a malformed frame, or one that may not come now; it was informed.
    """
    credentials = grpc.ssl_channel_credentials(authority)
    connected_at, pause, calls = time.monotonic(), 0.1, 0
    while not site.ended:
        calls += 1
        reason, called_at, frames_read = "it ended", time.monotonic(), 0
        # without a scheme of its own, a host called unix would be a file's name
        with grpc.secure_channel(f"dns:///{address}", credentials, _CALLING_OPTIONS) as channel:
            left_s = connected_at + patience_s - time.monotonic()
            call = _Call(channel, site.hello(), idle_s, min(max(left_s, 1.0), _ANSWER_S))
            try:
                for data in call:
                    frames_read += 1
                    if (answer := _answer(site, call, data)) is not None:
                        call.send(answer)
                        site.prepare_next()
                    if site.ended:
                        break
            except grpc.RpcError as error:
                reason = _error_line(error)
            call.send(None)
            if call.idle:
                raise RunFailed(f"no frame for {idle_s:g} s; the site ends its session")
        if site.ended:
            break
        # a coordinator that admits the site and hangs up at once does not count as a connection
        if frames_read > 1 or (frames_read and time.monotonic() - called_at > _STABLE_S):
            connected_at, pause = time.monotonic(), 0.1
        if time.monotonic() - connected_at > patience_s:
            say(
                f"meerkat: coordinator {address}: no stream for {patience_s:g} s ({reason}); the run was stopped, or "
                "the coordinator is down or out of reach; the site ends its session"
            )
            raise StreamLost(_UNREACHED)
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
    if site.refused and not site.welcomed and calls > 1:
        # the token may have been spent by a call that broke before the answer came
        raise RunFailed(f"the coordinator refuses this site's second call: {site.ended}")
    if site.refused:
        raise Refused(f"the coordinator refuses this site: {site.ended}")


class _Call:
    """One stream, at the site's end: iterating gives the coordinator's frames."""

    def __init__(self, channel: grpc.Channel, hello: bytes, idle_s: float, answer_s: float) -> None:
        self.answered = False
        """Whether a frame has come."""
        self.idle = False
        """Whether it was ended because no frame came for `idle_s` seconds."""
        self._idle_s, self._answer_s = idle_s, answer_s
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._outgoing.put(hello)
        self._call = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")(iter(self._outgoing.get, None))
        self._last_frame_at = time.monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def __iter__(self) -> Iterator[bytes]:
        try:
            for data in chain(self._call, self._refusals()):
                self._last_frame_at = math.inf  # until it is answered: a site at work is not idle
                self.answered = True
                yield data
                self._last_frame_at = time.monotonic()
        finally:
            self._over.set()

    def _refusals(self) -> Iterator[bytes]:
        """What a coordinator that turns the site away says in the end."""
        yield from (value for name, value in self._call.trailing_metadata() or () if name == _REFUSAL)

    def send(self, frame: bytes | None) -> None:
        """Send a frame; None ends this side of the stream, after all frames sent before."""
        self._outgoing.put(frame)

    def check_read(self) -> None:
        """Raise BadFrame where the coordinator does not read what it asked for: a reply is longer than a question."""
        if self._outgoing.qsize() >= _UNREAD_ANSWERS:
            raise BadFrame(f"{_UNREAD_ANSWERS} answers wait unread, and more is asked: read them first")

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._idle_s)):
            if time.monotonic() - self._last_frame_at > (self._idle_s if self.answered else self._answer_s):
                self.idle = self.answered
                self._call.cancel()
                return


def _answer(site: Site, call: _Call, data: bytes) -> bytes | None:
    """The site's answer. A frame that it cannot answer ends its session, and the coordinator hears why in one line."""
    try:
        call.check_read()
        return site.answer(data)
    except Exception as error:
        call.send(site.refusal(str(error) if isinstance(error, MeerkatError) else "error"))
        call.send(None)
        time.sleep(0.2)  # let it go out before the channel closes
        raise


def _error_line(error: grpc.RpcError) -> str:
    """A stream's error, in one line."""
    code = getattr(error, "code", lambda: None)()
    details = getattr(error, "details", lambda: None)()
    return one_line(f"{getattr(code, 'name', code)}: {details}")
