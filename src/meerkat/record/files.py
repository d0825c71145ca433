"""How files are written: for their owner alone, through no link, whole or not at all.

A folder may come from somebody else, with links in it to files of ours. So no file is opened for writing through a
link, a temporary file is a new one whose name nobody can know before, and `check_no_links` refuses a folder with links
in it before anything of it is read.
"""

import errno
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from meerkat.errors import MeerkatError, RunFailed

_FILE, _FOLDER = 0o600, 0o700
"""What is written may rest on private rows: others can read it once its owner lets them."""


def owned(path: str | Path, flags: int) -> int:
    """Open a file, but through no link, and make it readable by its owner alone; also an `opener` for `open`.

    Raises:
        OSError: it is a link, or cannot be opened.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a link, and links are not followed", str(path)) from None
        raise


def make_folder(path: Path) -> None:
    """Make a folder that only its owner can enter, unless it exists; folders above it are made as usual."""
    path.mkdir(mode=_FOLDER, parents=True, exist_ok=True)


def write_atomically(path: Path, fill: Callable[[Path], Any], cure: str = "make room, or write elsewhere") -> None:
    """Write all of a file or nothing: `fill` writes a temporary one beside it, which is then renamed.

    A link at `path` is replaced, and not what it points to.

    Raises:
        RunFailed: the disk refused it; `cure` says what to do.
    """
    with explain_disk_errors(path, cure):
        file, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(file)
        part = Path(name)
        try:
            fill(part)
            with part.open("rb+") as written:
                os.fsync(written.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str, cure: str = "make room, or write elsewhere") -> None:
    """Write a text as UTF-8: see `write_atomically`."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"), cure)


@contextmanager
def filling(folder: Path, cure: str) -> Iterator[None]:
    """Fill a folder that is new or empty whole or not at all: on an error, what was made is removed.

    Raises:
        RunFailed: the disk refused it; `cure` says what to do.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    before = {*folder.glob("*")}  # somebody may have put something there since it was checked
    with explain_disk_errors(folder, cure):
        try:
            yield
        except BaseException:
            for entry in {*folder.glob("*")} - before:
                with suppress(OSError):
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            for path in new:
                with suppress(OSError):  # it was not made, or somebody else uses it
                    path.rmdir()
            raise


def remove_leftovers(*paths: Path) -> None:
    """Remove temporary files that killed processes left. No other process may be writing these files meanwhile."""
    for path in paths:
        for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            part.unlink(missing_ok=True)


def is_leftover(name: str) -> bool:
    """Whether this is the name of a temporary file."""
    return name.endswith(".part")


def check_no_links(root: Path) -> None:
    """Raise MeerkatError where anything under a folder is a link, a pipe or the like: such as nobody here writes.

    The folder itself may be a link, as `runs/latest` often is: whoever names it knows it. A folder that cannot be
    listed, but entered, is refused: nobody knows what is in it.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            where = f"'{root}': '{Path(error.filename or root).relative_to(root)}'"
            raise MeerkatError(f"{where} cannot be listed ({error.strerror}), so it may hold links; chmod u+r it")

    for folder, folders, files in os.walk(root, onerror=refuse):
        for path in (Path(folder) / name for name in sorted([*folders, *files])):
            inside = f"'{root}': '{path.relative_to(root)}' is"
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # another process has renamed its temporary file
                continue
            if stat.S_ISLNK(mode):
                raise MeerkatError(f"{inside} a link, and links are not followed; put what it points to in its place")
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise MeerkatError(f"{inside} neither a file nor a folder; remove it")


@contextmanager
def explain_disk_errors(path: Path, cure: str) -> Iterator[None]:
    """Raise RunFailed in place of a disk's error: the file, the reason, what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunFailed(f"{path}: {reason}; {cure}") from None
