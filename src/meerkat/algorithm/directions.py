"""Directions z, N(0, I) or of another law: the same bits for everyone, from a key and a place (method, section 3).

The value of every entry is a pure function of (run key, phase, round, step, direction, entry). Raw
bits come from the counter-based generator Philox4x64-10 (Salmon et al. 2011), whose stream NumPy
guarantees; the place is its 256-bit counter, so no two places can collide. Each 16 bits then pick one
of 65,536 values from the table of a `Law`: for the normal one, quantiles that are shipped as data. No
logarithm, cosine or device is involved whose last bit could differ (numeric contract 1).
"""

import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from meerkat import seeds

PHASES = {"training": 0, "calibration": 1}
Phase = Literal["training", "calibration"]

ENTRIES_PER_BLOCK = 16
"""One Philox block is four 64-bit words; a word is four entries of z."""

_WORTH_A_THREAD = 1 << 15
"""From this many entries on, making a direction takes longer than handing it to a thread."""

_WORD = 2**64 - 1
_FRESH = {key: value for key, value in np.random.Philox(key=0).state.items() if key != "state"}
"""All of a generator's state but key and counter, before its first word."""

TABLE_SHA256 = "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"


def _load_table() -> np.ndarray:
    with resources.files("meerkat.algorithm").joinpath("normal_quantiles.npy").open("rb") as file:
        table: np.ndarray = np.load(file).astype("<f4", copy=False)
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    if digest != TABLE_SHA256:
        raise RuntimeError(f"the table of normal quantiles has SHA-256 {digest}, not {TABLE_SHA256}: reinstall meerkat")
    return table


@dataclass(frozen=True, eq=False)
class Law:
    """The distribution of z. Entries are independent, with mean 0 and variance 1 before they are scaled."""

    name: str
    table: np.ndarray
    """The value that each 16 bits stand for, all equally likely: float32 [65536]."""
    scale: np.ndarray | None = None
    """What entry i is multiplied by, float32 [n], so that z ~ N(0, diag(scale^2)); None for 1."""


NORMAL = Law("normal", _load_table())
RADEMACHER = Law("rademacher", np.repeat(np.array([-1, 1], "<f4"), 1 << 15))
"""-1 or 1: every direction has the same length, sqrt(n)."""


class Place(NamedTuple):
    """Where in a run a direction stands. Rounds, steps and directions count from zero."""

    phase: Phase
    round: int
    step: int
    direction: int


def run_key(seed: int) -> int:
    """The 128-bit key that all directions of a simulated run follow from."""
    return seeds.key(seed, "directions")


def direction(key: int, place: Place, count: int, start: int = 0, law: Law = NORMAL) -> np.ndarray:
    """Entries start .. start + count of the direction at a place: float32 [count].

    Philox's counter words, lowest first, are (block, step | direction << 32, round, phase).
    """
    block, skip = divmod(start, ENTRIES_PER_BLOCK)
    counter = (block, place.step | place.direction << 32, place.round, PHASES[place.phase])
    raw = _raw(key, counter, -(-(skip + count) // 4))
    z: np.ndarray = law.table.take(raw.astype("<u8", copy=False).view("<u2")[skip : skip + count])
    return z if law.scale is None else z * law.scale[start : start + count]


_THREAD = threading.local()


def _raw(key: int, counter: tuple[int, int, int, int], words: int) -> np.ndarray:
    """Philox's output for a key from a counter on: uint64 [words]. One generator a thread: making them costs more."""
    if not hasattr(_THREAD, "philox"):
        _THREAD.philox = np.random.Philox(key=0)
    at = {"counter": np.array(counter, np.uint64), "key": np.array([key & _WORD, key >> 64], np.uint64)}
    _THREAD.philox.state = _FRESH | {"state": at}
    raw: np.ndarray = _THREAD.philox.random_raw(words)
    return raw


class Directions:
    """The directions of one run on one device. They are made on the CPU, long ones ahead of need by a thread.

    It keeps at most two directions, the last one and the one that `prepare` announced: 8n bytes.
    """

    def __init__(self, key: int, count: int, device: torch.device | str = "cpu", law: Law = NORMAL) -> None:
        self.key = key
        self.count = count
        self.device = torch.device(device)
        self.law = law
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="directions")
        self._lock = threading.Lock()
        self._last: tuple[Place, Tensor] | None = None
        self._ahead: tuple[Place, Future[Tensor]] | None = None

    def slice(self, place: Place, start: int, count: int) -> np.ndarray:
        """Entries start .. start + count of z at a place, on the CPU: float32 [count]."""
        return direction(self.key, place, count, start, self.law)

    def _make(self, place: Place) -> Tensor:
        return torch.from_numpy(self.slice(place, 0, self.count)).to(self.device)

    def __call__(self, place: Place) -> Tensor:
        """z at a place: float32 [n] on the device. Shared: do not write into it."""
        with self._lock:
            if self._last is None or self._last[0] != place:
                if self._ahead is not None and self._ahead[0] == place:
                    ahead, self._ahead = self._ahead[1], None
                    self._last = (place, ahead.result())
                else:
                    self._last = (place, self._make(place))
            return self._last[1]

    def prepare(self, place: Place) -> None:
        """Start making z at a place that is needed next. A short one is made when it is needed."""
        if self.count < _WORTH_A_THREAD:
            return
        with self._lock:
            known = [kept[0] for kept in (self._last, self._ahead) if kept is not None]
            if place not in known:
                self._ahead = (place, self._maker.submit(self._make, place))
