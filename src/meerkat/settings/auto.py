"""`auto` in place of a number: the setting says that a fitting number is chosen when the run starts.

A setting of type `float | Auto` holds the word as it was given. `run.setup.resolve` puts the number there, or, where it
depends on the mask or on the rows, whatever starts the run does; config.toml has only numbers.
"""

from typing import Final, Literal, TypeVar

Auto = Literal["auto"]
AUTO: Final = "auto"

_Number = TypeVar("_Number", bound=float)
_Default = TypeVar("_Default", bound=float | None)


def number(value: _Number | Auto) -> _Number:
    """The number that a resolved setting holds."""
    assert not isinstance(value, str), "a setting that says auto was not resolved"
    return value


def number_or(value: _Number | Auto, default: _Default) -> _Number | _Default:
    """The number that a setting holds, or `default` where it says auto."""
    return default if isinstance(value, str) else value
