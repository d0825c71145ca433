"""What connects the remote engine with its clients: the link that carries frames, and how long the engine waits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from meerkat.federation.admission import AdmittedSite


class Event(NamedTuple):
    """Something that happened on a link."""

    what: Literal["arrived", "frame", "left"]
    client: int
    data: bytes = b""
    """The frame's bytes."""
    site: AdmittedSite | None = None
    """The site that arrived."""


class Link(Protocol):
    """Carries frames. A client gets its frames in order, or leaves."""

    bytes_sent: int
    """Of frames, to all clients."""
    bytes_received: int

    def send(self, frames: Mapping[int, Sequence[bytes]]) -> None:
        """Send each client its frames; returns at once."""

    def receive(self, timeout_s: float) -> Event | None:
        """The next event, or None if none came in time."""

    def drop(self, client: int, last: bytes) -> None:
        """Send a client a last frame, then disconnect it."""

    def close(self) -> None:
        """Disconnect all clients, and release what the link uses."""


@dataclass(frozen=True)
class WaitingRules:
    """How long a federation waits, and for how many clients."""

    clients_minimum: int = 1
    """Clients that must be present and idle for a round to open."""
    clients_wanted: int = 1
    """Clients that the first round waits for, for at most `start_s` seconds."""
    start_s: float = 60.0
    quorum: int = 1
    """Replies that a round needs to close at its deadline, or without clients that left."""
    deadline_s: float = 60.0
    """Seconds after which a round closes without slow clients."""
    patience_s: float = 600.0
    """Seconds that the run waits with too few clients before it stops; it can be resumed."""
