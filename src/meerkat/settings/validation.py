"""What files of settings share: values that are checked, with errors in one line, and paths relative to the file."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from meerkat.errors import MeerkatError

_M = TypeVar("_M", bound=BaseModel)


def validate(model: type[_M], values: Mapping[str, Any], where: str) -> _M:
    """Settings made from values.

    Args:
        where: stands before a setting's name in a message, such as "site.toml: ".

    Raises:
        MeerkatError: the first error, in one line.
    """
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
    name = where + ".".join(map(str, first["loc"]))
    match first["type"]:
        case "extra_forbidden":
            raise MeerkatError(f"{name}: unknown; must be one of {', '.join(_fields(model, first['loc'][:-1]))}")
        case "missing":
            raise MeerkatError(f"{name}: missing; must be given")
        case "model_type":
            raise MeerkatError(f"{name} {_short(first['input'])}: must be a table of settings")
    raise MeerkatError(f"{name} {_short(first['input'])}: {requirement(first['msg'])}")


def requirement(message: str) -> str:
    """A message of pydantic's, reworded to follow the value that was received: `must be greater than 0`."""
    message = message.removeprefix("Value error, ")
    if message.startswith("Input should "):
        return "must " + message.removeprefix("Input should ")
    return message[:1].lower() + message[1:]


def existing_path(file: Path, value: str) -> str:
    """A path relative to a file's folder, as an absolute one if it exists; otherwise as it is: it may be a hub name."""
    path = file.parent / value
    return str(path.resolve()) if value and os.path.exists(path) else value  # False for a name too long for any file


def _fields(model: type[BaseModel], path: Iterable[str | int]) -> Iterable[str]:
    """The names of a model's settings, or of the table in it that the path leads to."""
    fields = model.model_fields
    for name in path:
        fields = getattr(fields[str(name)].annotation, "model_fields", {})
    return fields


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
