"""The token bucket: how often something may happen."""

from collections.abc import Callable


class TokenBucket:
    """Lets something happen `burst` times in quick succession, and then once every `every_s` seconds."""

    def __init__(self, burst: int, every_s: float, clock: Callable[[], float]) -> None:
        self._burst, self._every_s, self._clock = burst, every_s, clock
        self._tokens, self._filled_at = float(burst), clock()

    def take(self) -> bool:
        """Whether it may happen now; if so, that is counted."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) / self._every_s)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
