"""Randomness as a function of (seed, purpose, place), without global state.

A key is the SHA-256 of all three, so two purposes or places never share a stream, and a resumed run
draws the same values again (numeric contract 5). Directions have their own counter-based scheme:
see directions.py.
"""

import hashlib

import numpy as np


def key(seed: int, purpose: str, *place: int) -> int:
    """A 128-bit key: the first half of a SHA-256 of its arguments."""
    text = "/".join([purpose, str(seed), *map(str, place)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def generator(seed: int, purpose: str, *place: int) -> np.random.Generator:
    """The NumPy generator for one purpose at one place."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *place)))


def permutation(count: int, seed: int, purpose: str, *place: int) -> np.ndarray:
    """A permutation of range(count), int64 [count], from Philox's raw words alone.

    NumPy guarantees the raw stream, not what `Generator.permutation` makes of it.
    """
    words = np.random.Philox(key=key(seed, purpose, *place)).random_raw(count)
    return np.argsort(words, kind="stable")
