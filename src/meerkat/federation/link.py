"""What connects the remote engine with its clients: the link that carries frames."""

from collections.abc import Mapping, Sequence
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
