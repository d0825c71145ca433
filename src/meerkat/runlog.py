"""The run log: append-only, fsynced, hash-chained. It is checkpoint, audit trail and catch-up in one.

One record a line: the SHA-256 of (the line before's SHA-256 and this line's text), a space, the text as
JSON. Whoever changes, drops or swaps a line breaks every hash after it. A record is on the disk before
anything is built on it, so a killed run loses at most the round it was in.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meerkat.errors import MeerkatError, RunFailed

_START = "0" * 64


@dataclass(frozen=True)
class LogContents:
    """What a log holds up to its first damaged line."""

    records: list[dict[str, Any]]
    hash: str
    """The chain's value after the last sound record."""
    sound_bytes: int
    """Where the sound records end in the file."""
    damage: str = ""
    """What is wrong after that, or nothing."""
    torn: bool = False
    """Whether the damage is the last line alone, as an interrupted write leaves it."""


def read(path: Path) -> LogContents:
    """Read a log as far as it is sound. A missing file is an empty log."""
    data = path.read_bytes() if path.exists() else b""
    records: list[dict[str, Any]] = []
    previous, position = _START, 0
    while position < len(data):
        newline = data.find(b"\n", position)
        line = data[position : newline if newline >= 0 else len(data)]
        claimed, text = line[:64].decode("ascii", "replace"), line[65:]
        if newline < 0 or line[64:65] != b" " or claimed != _link(previous, text):
            return LogContents(
                records,
                previous,
                position,
                damage=f"line {len(records) + 1} is cut short"
                if newline < 0
                else f"line {len(records) + 1} is damaged",
                torn=newline < 0 or newline + 1 == len(data),
            )
        records.append(json.loads(text))
        previous, position = claimed, newline + 1
    return LogContents(records, previous, position)


def _link(previous: str, text: bytes) -> str:
    return hashlib.sha256(previous.encode() + text).hexdigest()


class RunLog:
    """A log open for appending, after its last sound record. One process at a time may hold it."""

    def __init__(self, path: Path, contents: LogContents) -> None:
        """Open the log that `read` returned, dropping a torn last record.

        Raises:
            MeerkatError: another process has the log open.
            RunFailed: a record before the last is damaged.
        """
        if contents.damage and not contents.torn:
            raise RunFailed(f"{path}: {contents.damage}, with records after it; restore the file from a copy")
        self.path = path
        self._hash = contents.hash
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock()
        os.ftruncate(self._file, contents.sound_bytes)
        os.fsync(self._file)
        _sync_folder(path.parent)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise MeerkatError(f"{self.path}: another process is writing this run; wait for it or stop it") from None

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; it is on the disk when this returns, or nothing of it is.

        Raises:
            RunFailed: the disk refused it. What was logged before is untouched.
        """
        text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
        link = _link(self._hash, text)
        line = link.encode() + b" " + text + b"\n"
        end = os.lseek(self._file, 0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, end)
            raise RunFailed(
                f"{self.path}: {error.strerror}; every record before is safe: make room, then 'meerkat resume'"
            ) from None
        self._hash = link

    def close(self) -> None:
        """Give the file back."""
        os.close(self._file)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
