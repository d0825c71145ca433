"""What a client that was away needs to catch up: the rounds it missed, or theta itself where that is shorter.

A round is four bytes a scalar and 23 more, and following it takes a direction of n normals a scalar; the state is
4n bytes or more at once. Rounds are sent as long as they are fewer bytes, fit one frame, and are followed sooner than
the state would arrive over a slow line. The coordinator estimates the time to follow a round from closing it.
"""

from collections import deque
from collections.abc import Collection

import numpy as np

from meerkat.federation import frames
from meerkat.federation.frames import Closed, Work

SLOW_LINE = 1e6
"""Bytes a second that a site's line is assumed to carry."""
_NEGLIGIBLE_S = 1.0
"""Seconds of following that are acceptable however short the state is."""
_SMOOTHING = 0.1


class RecentRounds:
    """The last closed rounds: as many as are worth following, in bytes and in time."""

    def __init__(self, state_bytes: int, round: int, digest: bytes) -> None:
        """Begin where a run stands: after this many rounds, at the theta with this digest."""
        self.round = round
        self.digest = digest
        """SHA-256 of the present theta."""
        self._most_bytes = min(state_bytes, frames.ROOM - len(Work().encode()))
        self._bytes = 0
        self._longest_s = _NEGLIGIBLE_S + state_bytes / SLOW_LINE
        self._round_s = 0.0
        self._rounds: deque[tuple[bytes, Closed, int]] = deque()
        """Of each round: theta's digest at its start, the round, and a bit for each client whose reply counted."""

    def add(self, closed: Closed, counted: Collection[int], digest: bytes, made_s: float = 0.0) -> None:
        """Add a round with the clients whose replies counted, after which theta has this digest.

        It took `made_s` seconds to close.
        """
        self._round_s += _SMOOTHING * (made_s - self._round_s)
        flags = np.zeros(max(counted, default=0) + 1, bool)
        flags[[*counted]] = True
        bits = int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")
        self._rounds.append((self.digest, closed, bits))
        self.round, self.digest, self._bytes = self.round + 1, digest, self._bytes + len(closed.encode())
        while self._bytes > self._most_bytes:
            self._bytes -= len(self._rounds.popleft()[1].encode())

    def recognises(self, round: int, digest: bytes) -> bool:
        """Whether theta had this digest at the start of a round, if that round is still kept."""
        behind = self.round - round
        if behind == 0:
            return digest == self.digest
        return 0 < behind <= len(self._rounds) and self._rounds[-behind][0] == digest

    def missed_since(self, round: int, client: int) -> list[Closed]:
        """The rounds from one on, in the form that a client needs."""
        missed = [self._rounds[-behind] for behind in range(self.round - round, 0, -1)]
        return [closed._replace(counted=bool(bits >> client & 1)) for _, closed, bits in missed]

    def shorter_than_state(self, round: int) -> bool:
        """Whether the rounds from one on are all kept, and are followed sooner than the state would arrive."""
        behind = self.round - round
        return behind <= len(self._rounds) and (behind <= 1 or behind * self._round_s <= self._longest_s)
