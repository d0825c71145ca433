"""Frames inside Flower's own messages: for networks that allow no second port, and many local steps a round.

Every message meets a fresh process on the site, so between messages the site is kept in Flower's context of the
run. A round takes seconds where the stream takes milliseconds; the scalars, and so theta, are the same.
"""

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from meerkat.federation.admission import Door
from meerkat.federation.frames import BadFrame
from meerkat.federation.link import Event
from meerkat.federation.site_settings import Refused
from meerkat.progress import one_line, say

FRAMES = "train.frames"
"""The message type that carries frames, and brings frames back."""
_ANSWERS = 16
"""Frames of one answer that are looked at: a site has one to send."""
_POLL_S = 0.2


class MessageLink:
    """The coordinator's end. See `link.Link`."""

    def __init__(self, grid: Grid, door: Door) -> None:
        self.bytes_sent = self.bytes_received = 0
        """Of frames, to and from all clients; Flower's own messages around them are longer."""
        self._grid = grid
        self._door = door
        self._nodes: dict[int, int] = {}
        self._let_go: set[int] = set()
        self._out: dict[str, int] = {}
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def admit(self, node: int, hello: bytes) -> str:
        """Let a site in by its first frame. Returns why not, or nothing."""
        try:
            guest = self._door.admit(hello)
        except (Refused, BadFrame) as error:
            return str(error)
        with self._lock:
            self._nodes[guest.client] = node
        self._events.put(Event("arrived", guest.client, guest=guest))
        return ""

    def nodes(self) -> set[int]:
        """The nodes that take part, and those that were let go: neither is to be invited."""
        with self._lock:
            return {*self._nodes.values(), *self._let_go}

    def send(self, frames: Mapping[int, Sequence[bytes]]) -> None:
        """Send each client its frames in one message; those of a client that is gone are lost with it."""
        here = [(client, each) for client, each in frames.items() if client in self._nodes and each]
        if not here:
            return
        self.bytes_sent += sum(len(frame) for _, each in here for frame in each)
        ids = self._grid.push_messages([self._message(client, each) for client, each in here])
        for (client, _), sent in zip(here, ids, strict=True):
            if sent is None:
                self._gone(client)
            else:
                self._out[sent] = client

    def receive(self, timeout_s: float) -> Event | None:
        """The next event, or None when none came in time."""
        end = time.monotonic() + timeout_s
        while self._events.empty():
            self._pull()
            left = end - time.monotonic()
            if not self._events.empty() or left <= 0:
                break
            time.sleep(min(_POLL_S, left))
        try:
            return self._events.get_nowait()
        except queue.Empty:
            return None

    def drop(self, client: int, last: bytes) -> None:
        """Send a client a last frame, and let it go; nobody waits for its answer."""
        if client in self._nodes:
            message = self._message(client, [last])
            with self._lock:
                self._let_go.add(self._nodes.pop(client))
            self._grid.push_messages([message])

    def close(self) -> None:
        """Nothing was taken that has to be given back."""

    def _message(self, client: int, frames: Sequence[bytes]) -> Message:
        return Message(pack(frames), dst_node_id=self._nodes[client], message_type=FRAMES)

    def _pull(self) -> None:
        if not self._out:
            return
        for answer in self._grid.pull_messages(list(self._out)):
            client = self._out.pop(answer.metadata.reply_to_message_id, None)
            if client is None:
                continue
            if (why := session_end(answer)) is not None:
                say(f"client {client}: {why[0]}")
                self._gone(client, let_go=not why[1])
                continue
            for frame in unpack(answer.content)[:_ANSWERS]:
                self.bytes_received += len(frame)
                self._events.put(Event("frame", client, frame))

    def _gone(self, client: int, let_go: bool = False) -> None:
        with self._lock:
            gone = self._nodes.pop(client, None)
            if gone is not None and let_go:
                self._let_go.add(gone)
        if gone is not None:
            self._events.put(Event("left", client))


def pack(frames: Sequence[bytes]) -> RecordDict:
    """A message's content that carries frames."""
    return RecordDict({"frames": ConfigRecord({"frames": list(frames)})})


def unpack(content: Any) -> list[bytes]:
    """The frames that a message carries; what is none comes out as no bytes, and is found malformed."""
    held = _value(content, "frames", "frames")
    return [frame if isinstance(frame, bytes) else b"" for frame in held] if isinstance(held, list) else [b""]


def hello_in(answer: Message) -> bytes | None:
    """The first frame that a node's answer carries, or None where it has none."""
    held = _value(answer.content, "hello", "frame")
    return held if isinstance(held, bytes) else None


def session_end(answer: Message) -> tuple[str, bool] | None:
    """Why a node's session is over, in one line, and whether to invite it again; None where it is not."""
    if answer.has_error():
        return one_line(answer.error.reason), True
    if "session" not in answer.content:
        return None
    why, again = (_value(answer.content, "session", name) for name in ("why", "again"))
    return one_line(why), again is True


def _value(content: Any, record: str, name: str) -> Any:
    """What a message holds under two names. A node can put anything there, or nothing: then it is None."""
    held = content.get(record)
    return held.get(name) if isinstance(held, ConfigRecord) else None
