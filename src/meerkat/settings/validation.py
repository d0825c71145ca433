"""What files of settings share: values that are checked, with errors in one line, and paths relative to the file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

from meerkat.errors import MeerkatError, is_utf8


class Settings(BaseModel):
    """Settings from a file or from flags. A field's docstring is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _can_be_written(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, str) and (not is_utf8(value) or "\0" in value):
                raise ValueError(f"{name} {value!r:.80}: must be text in UTF-8, without zero bytes")
        return values


_M = TypeVar("_M", bound=BaseModel)


_T = TypeVar("_T")
_forms: dict[type, TypeAdapter[Any]] = {}


def form_of(values: type[_T]) -> TypeAdapter[_T]:
    """What checks the values of a dataclass's fields; made once, which takes milliseconds."""
    if values not in _forms:
        _forms[values] = TypeAdapter(values)
    return _forms[values]


def validate(model: type[_M], values: Mapping[str, Any], where: str = "--") -> _M:
    """Settings made from values.

    Args:
        where: stands before a setting's name in a message, such as "site.toml: "; "--" for flags.

    Raises:
        MeerkatError: the first error, in one line.
    """
    try:
        return model(**values)
    except ValidationError as error:
        errors = error.errors()
    first = errors[0]
    if not first["loc"]:  # of several settings together
        raise MeerkatError(first["msg"].removeprefix("Value error, "))
    path, fields = _place(model.model_fields, first["loc"])
    name = where + (path.replace("_", "-") if where == "--" else path)
    match first["type"]:
        case "extra_forbidden":
            raise MeerkatError(f"{name}: unknown; must be one of {', '.join(fields)}")
        case "missing":
            raise MeerkatError(f"{name}: missing; must be given")
        case "model_type":
            raise MeerkatError(f"{name} {_short(first['input'])}: must be a table of settings")
    # a value of two types, such as a number or auto, has an error for each
    required = [requirement(each["msg"]) for each in errors if _place(model.model_fields, each["loc"])[0] == path]
    others = [f", or {each.removeprefix('must be ')}" for each in required[1:]]
    raise MeerkatError(f"{name} {_short(first['input'])}: {required[0]}{''.join(others)}")


def requirement(message: str) -> str:
    """A message of pydantic's, reworded to follow the value that was received: `must be greater than 0`."""
    message = message.removeprefix("Value error, ").replace("Input should ", "must ", 1).split(", unable to parse")[0]
    message = message.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    return message[:1].lower() + message[1:]


def existing_path(file: Path, value: str) -> str:
    """A path relative to a file's folder, as an absolute one if it exists; otherwise as it is: it may be a hub name."""
    path = file.parent / value
    return str(path.resolve()) if value and os.path.exists(path) else value  # False for a name too long for any file


def check_new_folder(folder: Path) -> None:
    """Raise MeerkatError unless a folder is empty, or does not exist yet, and can be written to."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MeerkatError(f"'{folder}': is not an empty folder; give a new or empty one")
    check_writable(folder, f"'{folder}'", "another folder")


def check_writable(folder: Path, what: str, cure: str) -> None:
    """Raise MeerkatError unless a folder can be written to, or made; the message begins with `what`."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise MeerkatError(f"{what}: '{nearest}' cannot be written to; give {cure}")


def _place(fields: Mapping[str, FieldInfo], location: tuple[int | str, ...]) -> tuple[str, Mapping[str, FieldInfo]]:
    """The dotted name of the setting at pydantic's location, and the settings of the table that it is in."""
    names: list[str] = []
    for index, part in enumerate(location):
        names.append(str(part))
        if isinstance(part, str):
            if part not in fields or index == len(location) - 1:
                break
            annotation = fields[part].annotation
            inner = [kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")]
            if not inner and not isinstance(location[index + 1], int):
                break  # what follows are names of types
            fields = inner[0].model_fields if inner else {}
    return ".".join(names), fields


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
