"""What lies between a remote engine and its clients: who carries frames, what it tells, how long one waits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from meerkat.federation.admission import Guest


class Event(NamedTuple):
    """Something that a link has to tell."""

    what: Literal["arrived", "frame", "left"]
    client: int
    data: bytes = b""
    """The frame's bytes."""
    guest: Guest | None = None
    """Who arrived."""


class Link(Protocol):
    """Carries frames. What is given for a client goes out in order, or the client leaves."""

    bytes_sent: int
    """Of frames, to all clients."""
    bytes_received: int

    def send(self, frames: Mapping[int, Sequence[bytes]]) -> None:
        """Send each client its frames; returns at once."""

    def receive(self, timeout_s: float) -> Event | None:
        """The next event, or None when none came in time."""

    def drop(self, client: int, last: bytes) -> None:
        """Send a client a last frame, and let it go."""

    def close(self) -> None:
        """Let all go, and give back what was taken to reach them."""


@dataclass(frozen=True)
class Terms:
    """How a federation waits."""

    clients_minimum: int = 1
    """Clients that must be here and idle for a round to open."""
    clients_wanted: int = 1
    """Clients that the first round waits for, as long as `start_s` seconds."""
    start_s: float = 60.0
    quorum: int = 1
    """Replies that a round needs to close at its deadline, or without those who left."""
    deadline_s: float = 60.0
    """Seconds after which a round closes without the slow."""
    patience_s: float = 600.0
    """Seconds for which too few clients are waited for before the run stops, to be gone on with later."""
