"""The run log: append-only, fsynced, hash-chained. It is checkpoint, audit trail and catch-up in one.

One record a line: the SHA-256 of (the previous line's SHA-256 and this line's text), a space, the text as JSON. It is
on the disk before anything is built on it, so a killed run loses at most the round it was in.
"""

import fcntl
import hashlib
import json
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from meerkat.errors import MeerkatError, RunFailed
from meerkat.record.files import owned

_START = "0" * 64
_BEGINS = re.compile(rb'[0-9a-f]{64} \{"|[0-9a-f]{0,64} ?\{?$')
"""How a log begins, or as much of that as was written."""
_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def _link(previous: str, text: bytes) -> str:
    return hashlib.sha256(previous.encode() + text).hexdigest()


class LogReader:
    """Iterating, once, gives a log's sound records, one in memory at a time; the attributes say how it ended.

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
        """What is wrong after them; empty if nothing is."""
        self.torn = False
        """Whether the damage is only in the last line, as an interrupted write leaves it."""
        self.broken = b""
        """The damaged line's text, without its hash."""

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
                    how = "cut short" if cut else "not as this version writes it" if linked else "damaged"
                    self.damage = f"line {self.count + 1} is {how}"
                    self.torn, self.broken = not linked and not file.read(1), text
                    return
                self.count, self.hash, self.end = self.count + 1, line[:64].decode(), self.end + len(line)
                yield record


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A record's text as a JSON object; None unless it is, byte for byte, what `RunLog` writes for that object."""
    try:
        record = json.loads(text)
        return record if isinstance(record, dict) and _JSON.encode(record).encode() == text else None
    except (ValueError, RecursionError):
        return None


class RunLog:
    """A log open for appending after its last sound record, by one process at a time."""

    def __init__(
        self,
        path: Path,
        again: str = "",
        read: Callable[[dict[str, Any]], None] = lambda _: None,
        may_drop: Callable[[LogReader], bool] = lambda reader: reader.torn,
    ) -> None:
        """Open a log, dropping a torn last record.

        Args:
            again: what to do once a full disk has room; empty for resuming the run.
            read: is given each record; what it raises is raised.
            may_drop: whether the end of a damaged log may be dropped.

        Raises:
            MeerkatError: another process has the log open.
            OSError: the file cannot be opened, or is a link.
            RunFailed: a record is damaged that may not be dropped, or is written as no `RunLog` writes it.
        """
        self.path = path
        self._again = again or f"'meerkat resume {path.parent}'"
        self._file = owned(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self.close = weakref.finalize(self, os.close, self._file)
        """Close the file, and let other processes open it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise MeerkatError(f"{path}: another process is writing it; wait for that process or stop it") from None
        reader = LogReader(path)
        try:
            for record in reader:
                read(record)
            if reader.damage and not may_drop(reader):
                raise RunFailed(
                    f"{path}: {reader.damage}, as no killed process leaves it; restore the file from a copy"
                )
            if reader.damage and not reader.count and not _BEGINS.match(path.read_bytes()):
                raise RunFailed(f"{path}: is another kind of file, and is left as it is; give another name")
        except BaseException:
            self.close()
            raise
        self.dropped = reader.damage
        """What was wrong with a last record that was dropped; empty if none was."""
        self._hash = reader.hash
        self.interrupted = False
        """Whether a signal ended an `append`: its line may be there, in whole or in part, and none may follow."""
        os.ftruncate(self._file, reader.end)
        os.fsync(self._file)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def append(self, record: Mapping[str, Any], sync: bool = True) -> None:
        """Add all of a record, or none of it; with `sync`, it is on the disk when this returns.

        Raises:
            RunFailed: the disk refused it. What was logged before is untouched. Or an earlier record was interrupted.
        """
        if self.interrupted:
            raise RunFailed(f"{self.path}: a record was interrupted by a signal; {self._again}")
        text = _JSON.encode(record).encode()
        link = _link(self._hash, text)
        try:
            append_line(self._file, link.encode() + b" " + text + b"\n", sync)
            self._hash = link
        except OSError as error:
            raise self._refused(error) from None
        except BaseException:
            self.interrupted = True
            raise

    def sync(self) -> None:
        """Return when all records are on the disk; from any thread. Raises RunFailed: the disk refused them."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> RunFailed:
        return RunFailed(f"{self.path}: {error.strerror}; all earlier records are safe: make room, then {self._again}")


def append_line(file: int, line: bytes, sync: bool = True) -> None:
    """Write all of a line at the end of an open file, or none of it; with `sync`, it is on the disk afterwards."""
    end = os.lseek(file, 0, os.SEEK_END)
    try:
        while line:
            line = line[os.write(file, line) :]
        if sync:
            os.fsync(file)
    except OSError:
        os.ftruncate(file, end)
        raise
