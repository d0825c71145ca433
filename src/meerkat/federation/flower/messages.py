"""Frames inside Flower's own messages: for networks that allow no second port, and many local steps a round.

Flower handles every message in a new process on the site, so the site is kept in Flower's context of the run between
messages. A round takes seconds where the stream takes milliseconds; the scalars, and so theta, are the same.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from meerkat.errors import MeerkatError
from meerkat.federation.admission import Admission
from meerkat.federation.frames import BadFrame
from meerkat.federation.link import Event
from meerkat.federation.offer import Offer
from meerkat.federation.site_settings import Refused
from meerkat.progress import one_line, say

MALFORMED = "its answer is malformed; use the same version of meerkat"
"""What is said of a node whose answer cannot be read."""
FRAMES = "train.frames"
"""The message type that carries frames in both directions."""
_MOST_FRAMES = 16
"""Frames of one answer that are read; a site has one to send."""
_POLL_S = 0.2


class MessageLink:
    """The coordinator's end. See `link.Link`."""

    def __init__(self, grid: Grid, admission: Admission) -> None:
        self.bytes_sent = self.bytes_received = 0
        """Of frames, to and from all clients; the Flower messages around them are longer."""
        self._grid = grid
        self._admission = admission
        self._nodes: dict[int, int] = {}
        self._dismissed: set[int] = set()
        """Nodes that are not to be invited again."""
        self._unanswered: dict[str, int] = {}
        """The client of each message that was not answered yet."""
        self._events: deque[Event] = deque()
        self._lock = threading.Lock()

    def admit(self, node: int, hello: bytes) -> str:
        """Admit a site by its first frame. Returns why it is refused, or an empty string."""
        try:
            site = self._admission.admit(hello)
        except (Refused, BadFrame) as error:
            return str(error)
        with self._lock:
            self._nodes[site.client] = node
        self._events.append(Event("arrived", site.client, site=site))
        return ""

    def nodes(self) -> set[int]:
        """The nodes that take part, and those that were dismissed: neither are to be invited."""
        with self._lock:
            return {*self._nodes.values(), *self._dismissed}

    def send(self, frames: Mapping[int, Sequence[bytes]]) -> None:
        """Send each client its frames in one message; those of a client that has left are lost."""
        present = [client for client, each in frames.items() if client in self._nodes and each]
        if not present:
            return
        self.bytes_sent += sum(len(frame) for client in present for frame in frames[client])
        ids = self._grid.push_messages([self._message(client, frames[client]) for client in present])
        for client, message_id in zip(present, ids, strict=True):
            if message_id is None:
                self._remove(client)
            else:
                self._unanswered[message_id] = client

    def receive(self, timeout_s: float) -> Event | None:
        """The next event, or None if none came in time."""
        end = time.monotonic() + timeout_s
        while not self._events:
            self._pull()
            left = end - time.monotonic()
            if self._events or left <= 0:
                break
            time.sleep(min(_POLL_S, left))
        return self._events.popleft() if self._events else None

    def drop(self, client: int, last: bytes) -> None:
        """Send a client a last frame, then dismiss it; its answer is not waited for."""
        if client in self._nodes:
            message = self._message(client, [last])
            with self._lock:
                self._dismissed.add(self._nodes.pop(client))
            self._grid.push_messages([message])

    def close(self) -> None:
        """Nothing to release."""

    def _message(self, client: int, frames: Sequence[bytes]) -> Message:
        return Message(pack(frames), dst_node_id=self._nodes[client], message_type=FRAMES)

    def _pull(self) -> None:
        for answer, client in answered(self._grid, self._unanswered):
            if answer is None:
                say(f"client {client}: {MALFORMED}")
                self._remove(client, dismiss=True)
                continue
            if (end := session_end(answer)) is not None:
                why, again = end
                say(f"client {client}: {why}")
                self._remove(client, dismiss=not again)
                continue
            for frame in unpack(answer.content)[:_MOST_FRAMES]:
                self.bytes_received += len(frame)
                self._events.append(Event("frame", client, frame))

    def _remove(self, client: int, dismiss: bool = False) -> None:
        with self._lock:
            node = self._nodes.pop(client, None)
            if node is not None and dismiss:
                self._dismissed.add(node)
        if node is not None:
            self._events.append(Event("left", client))


def offer_record(offer: Offer, token: str) -> ConfigRecord:
    """An offer as an invitation carries it, with the token for the node's first frame."""
    text, mask = offer.encode(token)
    return ConfigRecord({"offer": text, "mask": mask})


def offer_in(content: Mapping[str, Any]) -> Offer:
    """The offer in an invitation, or in a site's state. Raises MeerkatError: it is malformed, or of another version."""
    text, mask = (_value(content, "offer", name) for name in ("offer", "mask"))
    if not isinstance(text, str) or not isinstance(mask, bytes):
        raise MeerkatError("the invitation's offer is malformed; use the same version of meerkat")
    return Offer.decode(text, mask)


def pack(frames: Sequence[bytes]) -> RecordDict:
    """The content of a message that carries frames."""
    return RecordDict({"frames": ConfigRecord({"frames": list(frames)})})


def unpack(content: Any) -> list[bytes]:
    """The frames in a message's content; anything else becomes an empty frame, which is refused as malformed."""
    values = _value(content, "frames", "frames")
    return [frame if isinstance(frame, bytes) else b"" for frame in values] if isinstance(values, list) else [b""]


def answered(grid: Grid, waiting: dict[str, int]) -> Iterator[tuple[Message | None, int]]:
    """The messages of `waiting`, id -> whom it went to, that were answered by now; they wait no longer.

    An answer that cannot be read is None. Each is asked for by itself: what a node put into its answer can neither
    take others with it, nor say that it answers another's message.
    """
    for message_id, to in list(waiting.items()):
        try:
            answers: list[Message | None] = [*grid.pull_messages([message_id])]
        except (OSError, httpx.HTTPError):  # of the connection
            raise
        except Exception:  # of the content, which Flower does not expect to be malformed
            answers = [None]
        if answers:
            waiting.pop(message_id, None)
            yield answers[0], to


def hello_in(answer: Message) -> bytes | None:
    """The first frame in a node's answer, or None if it has none."""
    frame = _value(answer.content, "hello", "frame")
    return frame if isinstance(frame, bytes) else None


def session_end(answer: Message) -> tuple[str, bool] | None:
    """Why a node's session is over, in one line, and whether to invite it again; None if it goes on."""
    if answer.has_error():
        return one_line(answer.error.reason), True
    if "session" not in answer.content:
        return None
    why, again = (_value(answer.content, "session", name) for name in ("why", "again"))
    return one_line(why), again is True


def _value(content: Any, record: str, name: str) -> Any:
    """A value in a message's content, of any type: a node can put anything there. None if it is missing."""
    values = content.get(record)
    return values.get(name) if isinstance(values, ConfigRecord) else None
