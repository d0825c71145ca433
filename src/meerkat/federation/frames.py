"""Frames: the messages of coordinator and site in a round, as bytes.

Every frame begins with the same 52 bytes: magic and version, kind, the run, the client, the round it belongs
to and the SHA-256 of theta at the start of that round. What follows depends on the kind, little-endian throughout.
A site's frames hold scalars, the run's score on its rows, their number, and words from a fixed list: they have no
field for a step's loss, a label or a text. A signed reply has no SHA-256: its signature covers it.
"""

import json
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from meerkat.algorithm.directions import PHASES, Phase
from meerkat.errors import MeerkatError
from meerkat.problems.problem import RANGES
from meerkat.record.signatures import SIGNATURE

VERSION = 5
LIMIT = 1 << 20
"""Bytes of a frame, at most."""

LONGEST_WORDS = 4096
"""Bytes of a site's frame of words, at most."""

_MAGIC = b"MK"
_ADDRESS = struct.Struct("<2sBB8sII")
_DIGEST = 32
_HEADER_SIZE = _ADDRESS.size + _DIGEST
_WORK = struct.Struct("<BdIQH")
_CLOSED = struct.Struct("<BddIH")
ROOM = LIMIT - _HEADER_SIZE
"""Bytes of a frame's body, at most."""
_REPLY = struct.Struct("<BQIH")
_MOST_STEPS = 2**62
_SCORE = struct.Struct("<dQ")
_MOST = 1e30
"""Largest magnitude of a score without bounds of its own: a mean over all sites stays finite."""
_PART = struct.Struct("<IIQ")
_F4 = np.dtype("<f4")
_PHASES: tuple[Phase, ...] = ("training", "calibration")
"""By their numbers in directions.PHASES."""


class BadFrame(MeerkatError):
    """A frame that is malformed, of another version, or not allowed now; the message says which."""


class Kind(IntEnum):
    """A frame's kind, and which side sends it."""

    HELLO = 1  # site: who I am and what I hold; a token or session secret in front
    WELCOME = 2  # coordinator: you are in, and your session secret
    WORK = 3  # coordinator: rounds closed since, and the steps to make now
    REPLY = 4  # site: the scalars, and how many steps it made before
    CLOSED = 5  # coordinator: rounds closed since, and nothing to do
    STATE = 6  # coordinator: a part of theta and what goes with it
    BEHIND = 7  # site: my theta is not the one you mean
    EVALUATE = 8  # coordinator: rounds closed since; evaluate on your own rows
    SCORE = 9  # site: the run's score on its own rows, and how many they are
    FAILED = 10  # site: I could not make my steps
    REFUSAL = 11  # either: no, and why, in one line; the session is over
    END = 12  # coordinator: the run is over
    SIGNED = 13  # site: a reply, with its signature in front


FAILURES = ("diverged", "out of memory", "error")
"""The reasons that a site may give for not making its steps."""


class Frame(NamedTuple):
    """One message."""

    kind: Kind
    run: bytes
    """The federation's id, 8 bytes."""
    client: int
    round: int
    digest: bytes = bytes(_DIGEST)
    """SHA-256 of the sender's theta at the start of the round; zeros in a SIGNED frame."""
    body: bytes = b""

    def encode(self) -> bytes:
        """The frame's bytes. Raises BadFrame if there are more than LIMIT."""
        data = _ADDRESS.pack(_MAGIC, VERSION, self.kind, self.run, self.client, self.round)
        data += self.body if self.kind is Kind.SIGNED else self.digest + self.body
        if len(data) > LIMIT:
            raise BadFrame(f"a frame of {len(data):,} bytes: at most {LIMIT:,} can be sent")
        return data

    @classmethod
    def decode(cls, data: bytes) -> "Frame":
        """The frame that `encode` wrote. Raises BadFrame if it is malformed, too long, or of another version."""
        if not _HEADER_SIZE <= len(data) <= LIMIT:
            raise BadFrame(f"a frame of {len(data):,} bytes: must be {_HEADER_SIZE} to {LIMIT:,}")
        magic, version, number, run, client, at = _ADDRESS.unpack_from(data)
        if magic != _MAGIC:
            raise BadFrame("not a frame of this protocol")
        if version != VERSION:
            raise BadFrame(f"frame format {version}, this side speaks {VERSION}: use the same version of meerkat")
        try:
            kind = Kind(number)
        except ValueError:
            raise BadFrame(f"a frame of unknown kind {number}") from None
        if kind is Kind.SIGNED:
            return cls(kind, run, client, at, body=data[_ADDRESS.size :])
        return cls(kind, run, client, at, data[_ADDRESS.size : _HEADER_SIZE], data[_HEADER_SIZE:])


class Closed(NamedTuple):
    """A closed round, as far as following it needs: 23 bytes and four a scalar."""

    lr: float
    share: float
    """Weight of the clients that took part over that of all."""
    aggregate: np.ndarray
    """G_r: float32 [T, P]"""
    counted: bool
    """Whether this client's own reply was among them."""

    def encode(self) -> bytes:
        """The round's bytes."""
        return _CLOSED.pack(self.counted, self.lr, self.share, *self.aggregate.shape) + _to_bytes(self.aggregate)


class Work(NamedTuple):
    """The body of WORK, CLOSED and EVALUATE: what happened since, and what to do now."""

    phase: Phase = "training"
    lr: float = 0.0
    steps: int = 0
    """T_k; 0 where there is nothing to do."""
    pointer: int = 0
    """Steps that the coordinator counted of the client: where a site begins that has no record of the run."""
    closed: Sequence[Closed] = ()
    """The rounds that end at the frame's own, oldest first."""

    def encode(self) -> bytes:
        """The body's bytes."""
        head = _WORK.pack(PHASES[self.phase], self.lr, self.steps, self.pointer, len(self.closed))
        return head + b"".join(closed.encode() for closed in self.closed)

    @classmethod
    def decode(cls, body: bytes) -> "Work":
        """The body that `encode` wrote. Raises BadFrame if it is malformed."""
        phase, lr, steps, pointer, count = _unpack(_WORK, body)
        at, closed = _WORK.size, []
        for _ in range(count):
            counted, rate, share, made, directions = _unpack(_CLOSED, body, at)
            start, at = at + _CLOSED.size, at + _CLOSED.size + 4 * made * directions
            if at > len(body):
                raise BadFrame("a body that is cut short")
            if not made:
                raise BadFrame("a closed round without a step")
            closed.append(Closed(rate, share, _to_floats(body[start:at]).reshape(made, directions), bool(counted)))
        if at != len(body) or phase >= len(_PHASES) or pointer >= _MOST_STEPS:
            raise BadFrame("a body that does not end where it should, or of more steps than anybody makes")
        return cls(_PHASES[phase], lr, steps, pointer, tuple(closed))


def longest_of_a_site(scalars: int) -> int:
    """Bytes of a site's frame, at most, in a run of so many scalars a round."""
    return max(LONGEST_WORDS, _HEADER_SIZE + SIGNATURE + _REPLY.size + 4 * scalars)


class Answer(NamedTuple):
    """The body of a REPLY."""

    phase: Phase
    pointer: int
    """Local steps that the site had made before, by its own count: where in its rows these steps begin."""
    scalars: np.ndarray
    """float32 [T_k, P]"""

    def encode(self) -> bytes:
        """The body's bytes."""
        return _REPLY.pack(PHASES[self.phase], self.pointer, *self.scalars.shape) + _to_bytes(self.scalars)

    @classmethod
    def decode(cls, body: bytes) -> "Answer":
        """The body that `encode` wrote. Raises BadFrame if it is malformed."""
        phase, pointer, steps, directions = _unpack(_REPLY, body)
        if phase >= len(_PHASES) or len(body) != _REPLY.size + 4 * steps * directions:
            raise BadFrame(f"a reply of {len(body)} bytes for {steps} steps of {directions} directions")
        if pointer >= _MOST_STEPS:
            raise BadFrame(f"a reply after {pointer} steps: nobody makes as many")
        return cls(_PHASES[phase], pointer, _to_floats(body[_REPLY.size :]).reshape(steps, directions))


def decode_reply(frame: Frame) -> tuple[Answer, bytes]:
    """Answer and signature, empty in a REPLY, of a REPLY or SIGNED frame. Raises BadFrame if it is malformed."""
    signed = SIGNATURE if frame.kind is Kind.SIGNED else 0
    return Answer.decode(frame.body[signed:]), frame.body[:signed]


def encode_score(name: str, value: float, rows: int) -> bytes:
    """The body of SCORE: a score's mean over so many rows."""
    return _SCORE.pack(value, rows) + name.encode()


def decode_score(body: bytes, name: str, most: int) -> tuple[float, int]:
    """The value of the score of that name, and the number of rows that it is a mean over.

    Args:
        most: rows that the site may claim: they are its score's weight.

    Raises:
        BadFrame: it is malformed or another score, or its value or number of rows is impossible.
    """
    value, rows = _unpack(_SCORE, body)
    if body[_SCORE.size :] != name.encode():
        raise BadFrame(f"an evaluation by another score than the run's, {name}")
    low, high = RANGES.get(name, (-_MOST, _MOST))
    if not low <= value <= high or not 0 < rows <= most:
        raise BadFrame(f"an evaluation with {name} {value:g} on {rows:,} rows: 1 to {most:,} are accepted")
    return value, rows


def encode_state(values: np.ndarray) -> list[bytes]:
    """The bodies of the STATE frames that hold float32 values, as few as possible."""
    data, room = _to_bytes(values), LIMIT - _HEADER_SIZE - _PART.size
    parts = [data[at : at + room] for at in range(0, len(data), room)]
    return [_PART.pack(number, len(parts), len(data)) + part for number, part in enumerate(parts)]


class StateParts:
    """Puts the parts of a state together."""

    def __init__(self, count: int) -> None:
        """`count`: the float32 values that there must be."""
        self._size = 4 * count
        self._data = bytearray()
        self._next = 0

    def add(self, body: bytes) -> np.ndarray | None:
        """Take the next part; the values, float32 [count], once it was the last. The first begins anew.

        Raises:
            BadFrame: it is not the next part of that many values.
        """
        number, parts, size = _unpack(_PART, body)
        if number == 0:  # a broken stream may have left parts of an earlier state
            self._data, self._next = bytearray(), 0
        if size != self._size or number != self._next or number >= parts:
            raise BadFrame(f"part {number} of a state of {size:,} bytes, where {self._size:,} are expected")
        self._data += body[_PART.size :]
        self._next += 1
        received, last = len(self._data), self._next == parts
        if len(body) == _PART.size or received > size or (last and received < size):
            raise BadFrame(f"a state of {received:,} bytes, where {size:,} were announced")
        if not last:
            return None
        data, self._data = self._data, bytearray()
        return _to_floats(data)


def encode_json(values: Any, secret: bytes = b"") -> bytes:
    """The body of HELLO and WELCOME (32 secret bytes and JSON), of FAILED, REFUSAL and END (JSON)."""
    return secret + json.dumps(values, separators=(",", ":"), allow_nan=False).encode()


def decode_json(body: bytes, secret: int = 0) -> tuple[bytes, dict[str, Any]]:
    """The secret in front, of `secret` bytes, and the JSON object. Raises BadFrame if it is malformed."""
    try:
        values = json.loads(body[secret:])
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise BadFrame("a frame whose words are no JSON object")
    return body[:secret], values


def _to_bytes(values: np.ndarray) -> bytes:
    return values.astype(_F4, copy=False).tobytes()


def _to_floats(data: bytes | bytearray) -> np.ndarray:
    return np.frombuffer(data, dtype=_F4).astype(np.float32)


def _unpack(form: struct.Struct, data: bytes, at: int = 0) -> tuple[Any, ...]:
    if len(data) - at < form.size:
        raise BadFrame("a body that is cut short")
    return form.unpack_from(data, at)
