"""Valid input, changed a little: bytes and values near what a reader knows, where its mistakes are."""

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

import tomli_w
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from safetensors.torch import save

_DEEP, _LONG = "@deep@", "@long@"
"""Stand for what json.dumps cannot write: a list in lists in lists, and a number of 5,000 digits."""
_SPELLED = {f'"{_DEEP}"': "[" * 100_000 + "]" * 100_000, f'"{_LONG}"': "9" * 5_000}
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**15, 2**31 - 1, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**9, 10**30),
    *(0.5, -0.0, 1e-320, 1e308, 3.5e38, float("inf"), float("-inf"), float("nan")),
    *("", "x", "0", "-1", "nan", "none", "a/b", "\x00", "two\nlines", "\x1b[2J\u2028", "\ud800", "{", "é" * 300),
    *([], {}, [[]], [0], [None], {"": 0}, {"x": []}, _DEEP, _LONG),
)
_WORDS = (
    *(
        b"",
        b"\n",
        b"\r",
        b"\x00",
        b"\xff",
        b"\xed\xa0\x80",
        b" ",
        b'"',
        b"'",
        b"\\",
        b"\\ud800",
        b"{",
        b"}",
        b"[[",
        b"]]",
    ),
    *(b"=", b"# ", b"nan", b"-inf", b"1e999", b"0x", b"true", b"null", b"9" * 5_000, b"[" * 100_000, b'{"a":' * 5_000),
    *(b"{label}", b"{0}", b"{x!r}", b"{x:>9999999999}", b"\xef\xbb\xbf", b"1979-05-27T07:32:00Z"),
)


@st.composite
def edited_bytes(draw: DrawFn, seeds: Sequence[bytes], at_most: int = 4) -> bytes:
    """One of some seeds after a few edits: bits turned, pieces dropped, doubled, moved, cut off, words put in."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, at_most))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.sampled_from([1, 2, 4, 8, 16, 64, 1000]))
        edit = draw(st.sampled_from(["turn", "set", "number", "drop", "double", "move", "cut", "word"]))
        if edit == "turn" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif edit == "set" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif edit == "number":
            width = draw(st.sampled_from([1, 2, 4, 8]))
            number = draw(
                st.sampled_from([0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
            )
            data[at : at + width] = (number % 256**width).to_bytes(width, "little")
        elif edit == "drop":
            del data[at : at + size]
        elif edit == "double":
            data[at:at] = data[at : at + size]
        elif edit == "move":
            piece = data[at : at + size]
            del data[at : at + size]
            to = draw(st.integers(0, len(data)))
            data[to:to] = piece
        elif edit == "cut":
            del data[at:]
        else:
            data[at:at] = draw(st.sampled_from(_WORDS))
    return bytes(data)


@st.composite
def edited_values(draw: DrawFn, seed: Any, at_most: int = 3) -> Any:
    """JSON-like values after a few edits, each somewhere inside: an odd value, another's, one more, one less."""
    root = [copy.deepcopy(seed)]  # so that the whole can be replaced, too
    for _ in range(draw(st.integers(1, at_most))):
        # a place chosen level by level: what is high up is met as often as what is long
        parent, key = _place(draw, root)
        edit = draw(st.sampled_from(["odd", "odd", "near", "elsewhere", "drop", "double", "text"]))
        value = parent[key]
        if edit == "near" and isinstance(value, int | float) and not isinstance(value, bool):
            parent[key] = draw(st.sampled_from([value + 1, value - 1, -value, value * 2, float(value), str(value)]))
        elif edit == "elsewhere":
            other, where = _place(draw, root)
            parent[key] = copy.deepcopy(other[where])
        elif edit == "drop" and parent is not root:
            del parent[key]
        elif edit == "double" and isinstance(parent, list) and parent is not root:
            parent.insert(key, copy.deepcopy(value))
        elif edit == "double" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["more", "", str(key) + "_"]))] = copy.deepcopy(value)
        elif edit == "text" and isinstance(value, str) and value:
            parent[key] = draw(edited_bytes([value.encode(errors="replace")], 1)).decode(errors="replace")
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(_ODD)))
    return root[0]


def _place(draw: DrawFn, root: list[Any]) -> tuple[Any, Any]:
    """A container among values, and the key of one of its members."""
    parent: Any = root
    key: Any = 0
    while isinstance(inner := parent[key], list | dict) and inner and draw(st.integers(0, 4)):
        parent = inner
        key = (
            draw(st.sampled_from(sorted(inner, key=str)))
            if isinstance(inner, dict)
            else draw(st.integers(0, len(inner) - 1))
        )
    return parent, key


def as_json(value: Any) -> bytes:
    """Values as JSON text, compact as a log's records are, with all that Python's reader takes."""
    text = json.dumps(value, separators=(",", ":"))
    for mark, spelled in _SPELLED.items():
        text = text.replace(mark, spelled)
    return text.encode()


def as_toml(value: Any) -> bytes:
    """A table as TOML text; what is no table is written bare, and is no TOML."""
    try:
        text = tomli_w.dumps(_without_none(value))
    except (TypeError, ValueError, AttributeError):
        text = str(value)
    for mark, spelled in _SPELLED.items():
        text = text.replace(mark, spelled)
    return text.encode(errors="surrogatepass")


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return "" if value is None else value


@st.composite
def edited_safetensors(draw: DrawFn, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file of sound form with other tensors and metadata: what the format's own checks let through."""
    parsed = {name: _parsed(text) for name, text in metadata.items()}
    told = draw(st.one_of(st.just(parsed), edited_values(parsed)))
    told = told if isinstance(told, dict) else {}
    texts = {
        str(k).encode(errors="replace").decode(): v if isinstance(v, str) else as_json(v).decode()
        for k, v in told.items()
    }
    texts = {name: text.encode(errors="replace").decode() for name, text in texts.items()}
    edited = dict(tensors)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(edited))) if edited else ""
        if name:
            _edit_tensor(draw, edited, name)
    return save(edited, metadata=texts)


def _edit_tensor(draw: DrawFn, tensors: dict[str, torch.Tensor], name: str) -> None:
    values = tensors[name]
    kind = draw(
        st.sampled_from(["type", "shape", "shorter", "longer", "reversed", "number", "drop", "rename", "scalar"])
    )
    if kind == "type":
        types = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.bool]
        tensors[name] = values.to(draw(st.sampled_from(types)))
    elif kind == "shape":
        tensors[name] = values.reshape(draw(st.sampled_from([(1, -1), (-1, 1)])))
    elif kind == "shorter":
        tensors[name] = values.flatten()[: draw(st.integers(0, values.numel()))].clone()
    elif kind == "longer":
        tensors[name] = values.repeat(2) if values.dim() == 1 else values.flatten().repeat(3)
    elif kind == "reversed":
        tensors[name] = values.flatten().flip(0).clone()
    elif kind == "number" and values.numel():
        changed = values.flatten().clone()
        whole = [0, 1, -1, 100, 2**31 - 1] if changed.dtype in (torch.int32, torch.int64) else [0, 1]
        numbers = [float("nan"), float("inf"), 6e4, -1.0] if changed.dtype.is_floating_point else whole
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.sampled_from(numbers))
        tensors[name] = changed
    elif kind == "drop":
        del tensors[name]
    elif kind == "rename":
        tensors[draw(st.sampled_from(["", "x", "indices/", "values/", "theta_0", "pretraining_gradient"]))] = (
            tensors.pop(name)
        )
    else:
        tensors[name] = torch.zeros(())


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def lines_of(values: Sequence[Any]) -> Iterator[bytes]:
    """Each value as a line of JSON."""
    for value in values:
        yield as_json(value)
