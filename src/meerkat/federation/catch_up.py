"""What a client that was away has to be told: the rounds closed since, or, where that is shorter, theta itself.

Rounds are four bytes a scalar and 23 beside, and following one costs a direction of n normals a scalar; the state is
4n bytes at once. Rounds are told as long as they are fewer bytes, fit one frame, and are followed sooner than the
state would arrive over a slow line. How long a round takes to follow, the coordinator knows from closing it.
"""

from collections import deque

from meerkat.federation import frames
from meerkat.federation.frames import Closed, Work

SLOW_LINE = 1e6
"""Bytes a second that a site's line carries at least, when it comes to choosing."""
_SETTLE_S = 1.0
"""Seconds of following that nobody minds, however short the state is."""
_SMOOTHING = 0.1


class Trail:
    """The last closed rounds: as many as are worth following, in bytes and in time."""

    def __init__(self, state_bytes: int, round: int, digest: bytes) -> None:
        """A trail that begins where a run stands: after so many rounds, at the theta of a digest."""
        self.round = round
        self.digest = digest
        """SHA-256 of theta now."""
        self._room = min(state_bytes, frames.ROOM - len(Work().encode()))
        self._bytes = 0
        self._patience_s = _SETTLE_S + state_bytes / SLOW_LINE
        self._round_s = 0.0
        self._held: deque[tuple[bytes, Closed, frozenset[int]]] = deque()

    def add(self, closed: Closed, counted: frozenset[int], digest: bytes, made_s: float = 0.0) -> None:
        """Go on by one round, after which theta has this digest; it took `made_s` seconds to close."""
        self._round_s += _SMOOTHING * (made_s - self._round_s)
        self._held.append((self.digest, closed, counted))
        self.round, self.digest, self._bytes = self.round + 1, digest, self._bytes + closed.size
        while self._bytes > self._room:
            self._bytes -= self._held.popleft()[1].size

    def holds(self, round: int, digest: bytes) -> bool:
        """Whether a theta of this digest is the one that a round held here began with."""
        if round == self.round:
            return digest == self.digest
        back = self.round - round
        return 0 < back <= len(self._held) and self._held[-back][0] == digest

    def since(self, round: int, client: int) -> list[Closed]:
        """The rounds from one on, as a client is told of them."""
        back = self.round - round
        rounds = [self._held[i] for i in range(len(self._held) - back, len(self._held))]
        return [Closed(c.lr, c.share, c.aggregate, client in counted) for _, c, counted in rounds]

    def reaches(self, round: int) -> bool:
        """Whether the rounds from one on are all held, and are followed sooner than the state would arrive."""
        behind = self.round - round
        return behind <= len(self._held) and (behind <= 1 or behind * self._round_s <= self._patience_s)
