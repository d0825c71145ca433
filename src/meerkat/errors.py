"""Errors that become one line on the command line, whatever they quote; and how other errors are quoted."""

_LONGEST = 3000
"""The most characters in a message."""


class MeerkatError(Exception):
    """A request that cannot be met: what was received, what is allowed, what to do. Exit status 2."""

    def __str__(self) -> str:
        return _one_line(super().__str__(), _LONGEST)


class UnknownName(MeerkatError):
    """A name that nobody here knows, and that an extension may define."""


class RunFailed(MeerkatError):
    """A valid run failed on the way, or its record is damaged. Exit status 1."""


class Diverged(RunFailed):
    """A loss or score is not finite: the learning rate is too high, or the weights' type too narrow."""


DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a reader of a malformed file or message raises, wherever it first uses a value of the wrong kind."""


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8. Half a surrogate pair cannot: JSON allows it, tokenizers do not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def in_short(error: Exception) -> str:
    """An error's type and message, in a line short enough to be quoted in another message."""
    text, kind = str(error), type(error).__name__
    return _one_line(f"{kind}: {text}" if text else kind, 300)


def _one_line(text: str, longest: int) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text[: longest + 1])
    return shown if len(shown) <= longest else f"{shown[: longest - 3]}..."
