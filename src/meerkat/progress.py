"""Progress of long work: a bar on a terminal, plain lines elsewhere; always on standard error."""

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

_T = TypeVar("_T")
_LINES = 5


def say(text: str) -> None:
    """One line for a person, above a bar where there is one."""
    tqdm.write(text, file=sys.stderr)


def track(items: Sequence[_T], description: str) -> Iterator[_T]:
    """The items, with their progress shown."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=description, leave=False, dynamic_ncols=True)
    else:
        yield from _plain(items, description)


def _plain(items: Sequence[_T], description: str) -> Iterator[_T]:
    for done, item in enumerate(items, 1):
        yield item
        if done * _LINES // len(items) > (done - 1) * _LINES // len(items):
            say(f"{description}: {done} of {len(items)}")
