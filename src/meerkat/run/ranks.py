"""The processes that share a run: what they say to each other, and what becomes of the rest when one of them ends.

Rank 0 makes the run and speaks; the others do what it asks, and answer in order of ranks. Messages are JSON, never
pickles, over torch.distributed's gloo, with GPUs too: scalars lie in main memory at both ends.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from meerkat.errors import Diverged, MeerkatError, RunFailed, in_short

PATIENCE = timedelta(days=30)
"""How long a message may take: a rank that ended is noticed at once, and one at work may need any time."""


class RankLost(RunFailed):
    """Another rank ended: its connection is closed."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this run ended, perhaps for lack of memory; what was logged is safe: "
            "'meerkat resume' continues the run, with any number of workers"
        )


class Ranks:
    """All ranks of a run, as one of them sees them."""

    def __init__(self, rank: int, size: int, connect: Callable[[], None]) -> None:
        """`connect` makes them a process group; it is called before the first message."""
        self.rank = rank
        self.size = size
        self._connect = connect
        self._asked = False

    # --- rank 0 ---

    def tell(self, message: Any, asks: bool = False) -> None:
        """Say something to all others; with `asks`, each answers, and `answers` must be called next."""
        self._broadcast(0, [asks, message])

    def answers(self) -> list[Any]:
        """What the other ranks answer, by rank. Raises Diverged, RunFailed: one could not do what it was asked."""
        answers = [self._broadcast(rank) for rank in range(1, self.size)]
        for rank, (failure, text) in enumerate(answers, 1):
            if failure is not None:
                raise Diverged(text) if failure == Diverged.__name__ else RunFailed(f"rank {rank}: {text}")
        return [answer for _, answer in answers]

    def end(self) -> None:
        """Let the others end. Raises RunFailed: one of them failed since it was last asked."""
        self.tell(None, asks=True)
        self.answers()

    # --- the others ---

    def heard(self) -> Iterator[Any]:
        """What rank 0 says, until it ends the run."""
        while (message := self.hear()) is not None:
            yield message

    def hear(self) -> Any:
        """What rank 0 says next; None for the end."""
        self._asked, message = self._broadcast(0)
        return message

    def answer(self, answer: Any, failure: str | None = None) -> None:
        """Answer what was asked."""
        self._asked = False
        for rank in range(1, self.size):
            self._broadcast(rank, [failure, answer])

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Whatever else ends here, rank 0 hears of it when it next asks."""
        failure, text = None, ""
        try:
            yield
        except RankLost:
            raise
        except Exception as error:  # of any kind: nobody else would hear of it
            failure, text = type(error).__name__, str(error) if isinstance(error, MeerkatError) else in_short(error)
        while not self._asked:
            self.hear()
        self.answer(text, failure)

    # --- all ---

    def _broadcast(self, source: int, message: Any = None) -> Any:
        """What one rank says, as all of them hear it."""
        text = bytearray(json.dumps(message).encode()) if source == self.rank else bytearray()
        try:
            if not dist.is_initialized():
                self._connect()
            size = torch.tensor([len(text)])
            dist.broadcast(size, source)
            data = torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, source)
        except RuntimeError:
            raise RankLost from None
        return json.loads(data.numpy().tobytes())
