"""The run log: append-only, fsynced, hash-chained. It is checkpoint, audit trail and catch-up in one.

One record a line: the SHA-256 of (the line before's SHA-256 and this line's text), a space, the text as
JSON. Whoever changes, drops or swaps a line breaks every hash after it. A record is on the disk before
anything is built on it, so a killed run loses at most the round it was in.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meerkat.errors import MeerkatError, RunFailed

_START = "0" * 64
_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def _link(previous: str, text: bytes) -> str:
    return hashlib.sha256(previous.encode() + text).hexdigest()


class LogReader:
    """Iterating, once, gives a log's sound records, one in memory at a time; the attributes tell how it ended.

    A missing file is an empty log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        """Sound records."""
        self.hash = _START
        """The chain's value after the last sound record."""
        self.end = 0
        """Where the sound records end in the file, in bytes."""
        self.damage = ""
        """What is wrong after that, or nothing."""
        self.torn = False
        """Whether the damage is the last line alone, as an interrupted write leaves it."""
        self.broken = b""
        """What the damaged line says, as far as it can be told."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                text = line[65:-1]
                cut = not line.endswith(b"\n")
                linked = not cut and line[64:65] == b" " and line[:64] == _link(self.hash, text).encode()
                record = _parsed(text) if linked else None
                if record is None:
                    self.damage = f"line {self.count + 1} is {'cut short' if cut else 'damaged'}"
                    self.torn, self.broken = not file.read(1), text
                    return
                self.count, self.hash, self.end = self.count + 1, line[:64].decode(), self.end + len(line)
                yield record


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A record's text as JSON, or None where it is no object."""
    try:
        held = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return held if isinstance(held, dict) else None


class RunLog:
    """A log open for appending, after its last sound record. One process at a time holds it."""

    def __init__(self, path: Path, again: str = "") -> None:
        """Open a log, dropping a torn last record.

        Args:
            again: what to do once a full disk has room; empty for resuming the run.

        Raises:
            MeerkatError: another process has the log open.
            RunFailed: a record before the last is damaged.
        """
        self.path = path
        self._again = again or f"'meerkat resume {path.parent}'"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise MeerkatError(f"{path}: another process is writing it; wait for that process or stop it") from None
        found = LogReader(path)
        for _ in found:
            pass
        if found.damage and not found.torn:
            os.close(self._file)
            raise RunFailed(f"{path}: {found.damage}, with records after it; restore the file from a copy")
        self.dropped = found.damage
        """What was wrong with a last record that was dropped, or nothing."""
        self._hash = found.hash
        os.ftruncate(self._file, found.end)
        os.fsync(self._file)
        _sync_folder(path.parent)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; it is on the disk when this returns, or nothing of it is.

        Raises:
            RunFailed: the disk refused it. What was logged before is untouched.
        """
        text = _JSON.encode(record).encode()
        link = _link(self._hash, text)
        try:
            append_whole(self._file, link.encode() + b" " + text + b"\n")
        except OSError as error:
            raise RunFailed(
                f"{self.path}: {error.strerror}; every record before is safe: make room, then {self._again}"
            ) from None
        self._hash = link

    def close(self) -> None:
        """Give the file back."""
        os.close(self._file)


def append_whole(file: int, line: bytes, through: bool = True) -> None:
    """Write a line at the end of an open file, and `through` to the disk; on an error, nothing of it stays."""
    end = os.lseek(file, 0, os.SEEK_END)
    try:
        while line:
            line = line[os.write(file, line) :]
        if through:
            os.fsync(file)
    except OSError:
        os.ftruncate(file, end)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
