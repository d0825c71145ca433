"""Progress of long work, on standard error: a bar on a terminal, plain lines elsewhere; no chatter of libraries."""

import logging
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

_T = TypeVar("_T")
_LINES = 5


def use_thread_lock() -> None:
    """Use no lock between processes: one that is killed would leave it behind."""
    tqdm.set_lock(threading.RLock())


def say(text: str) -> None:
    """Show one line, above the progress bar if there is one; what a terminal would act on becomes spaces."""
    tqdm.write(_printable(text), file=sys.stderr)


@contextmanager
def imported_quietly() -> Iterator[None]:
    """While a library is imported, silence its warnings, and what bitsandbytes, which PEFT imports, says of kernels."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its advice is about kernels that are not used here
    with warnings.catch_warnings(action="ignore"):
        yield


def one_line(text: object) -> str:
    """Text from another machine as one printable line of at most 300 characters, safe to show or log."""
    return _printable(str(text)[:300])


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def number_of(count: int, what: str) -> str:
    """A number and its noun, which takes an s unless the number is one."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def track(items: Iterable[_T], description: str, total: int | None = None) -> Iterator[_T]:
    """The items, with their progress shown; `total` is how many to expect, by default their length."""
    if total is None:
        total = len(items) if isinstance(items, Sized) else 0
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=description, leave=False, dynamic_ncols=True)
    else:
        yield from _plain(items, description, total)


def _plain(items: Iterable[_T], description: str, total: int) -> Iterator[_T]:
    for done, item in enumerate(items, 1):
        yield item
        if total and done * _LINES // total > (done - 1) * _LINES // total:
            say(f"{description}: {done} of {total}")
