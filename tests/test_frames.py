"""Frames: what was said comes out as it went in, anything else is refused, and the bytes stay as they are."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from meerkat.federation import frames
from meerkat.federation.frames import BadFrame, Closed, Frame, Kind, StateParts, Work

RUN = bytes(range(8))
DIGEST = bytes(range(100, 132))
HEADER = 52

_rates = st.floats(allow_nan=False)
_scalars = arrays.arrays(
    "f4", st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=st.floats(width=32, allow_nan=False)
)
_closed = st.builds(Closed, _rates, _rates, _scalars, st.booleans())
_work = st.builds(
    Work,
    st.sampled_from(["training", "calibration"]),
    _rates,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**62 - 1),
    st.lists(_closed, max_size=5).map(tuple),
)
_frames = st.builds(
    Frame,
    st.sampled_from([kind for kind in Kind if kind is not Kind.SIGNED]),
    st.binary(min_size=8, max_size=8),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(min_size=32, max_size=32),
    st.binary(max_size=300),
)


def same_closed(a: Closed, b: Closed) -> bool:
    return (a.lr, a.share, a.counted) == (b.lr, b.share, b.counted) and np.array_equal(a.aggregate, b.aggregate)


def closed_round(steps: int = 1, directions: int = 1) -> Closed:
    return Closed(0.5, 0.25, np.arange(steps * directions, dtype="f4").reshape(steps, directions), True)


@given(_frames)
def test_a_frame_comes_out_as_it_went_in(frame: Frame) -> None:
    assert Frame.decode(frame.encode()) == frame


@given(_frames, st.binary(min_size=32, max_size=300))
def test_a_signed_reply_comes_out_without_a_digest(frame: Frame, body: bytes) -> None:
    signed = frame._replace(kind=Kind.SIGNED, body=body)
    assert len(signed.encode()) == len(frame._replace(kind=Kind.REPLY, body=body).encode()) - 32
    assert Frame.decode(signed.encode()) == signed._replace(digest=bytes(32))


@given(st.sampled_from(["training", "calibration"]), _scalars, st.binary(min_size=64, max_size=64))
def test_a_reply_is_told_with_its_signature_or_without(phase: Any, scalars: np.ndarray, signature: bytes) -> None:
    body = frames.Answer(phase, 7, scalars).encode()
    for kind, front in ((Kind.REPLY, b""), (Kind.SIGNED, signature)):
        answer, signed = frames.decode_reply(Frame(kind, RUN, 1, 2, DIGEST, front + body))
        assert (answer.phase, answer.pointer, answer.scalars.tobytes(), signed) == (phase, 7, scalars.tobytes(), front)
    with pytest.raises(BadFrame):
        frames.decode_reply(Frame(Kind.SIGNED, RUN, 1, 2, DIGEST, signature[:50]))


@given(_work)
def test_work_comes_out_as_it_went_in(work: Work) -> None:
    again = Work.decode(work.encode())
    assert (again.phase, again.lr, again.steps, again.pointer) == (work.phase, work.lr, work.steps, work.pointer)
    assert len(again.closed) == len(work.closed)
    assert all(same_closed(a, b) for a, b in zip(again.closed, work.closed, strict=True))


@given(st.sampled_from(["training", "calibration"]), _scalars)
def test_scalars_come_out_to_the_bit(phase: Any, scalars: np.ndarray) -> None:
    decoded_phase, pointer, again = frames.Answer.decode(frames.Answer(phase, 2**62 - 1, scalars).encode())
    assert (decoded_phase, pointer) == (phase, 2**62 - 1)
    assert again.dtype == np.float32
    assert again.shape == scalars.shape
    assert again.tobytes() == scalars.tobytes()


@given(st.floats(), st.integers(0, 2**64 - 1), st.sampled_from(["accuracy", "squared error"]))
def test_a_score_comes_out_unless_there_can_be_none_such(value: float, rows: int, name: str) -> None:
    body = frames.encode_score(name, value, rows)
    possible = 0 <= value <= 1 if name == "accuracy" else abs(value) <= 1e30
    if possible and 0 < rows < 2**40:
        assert frames.decode_score(body, name, 2**40) == (value, rows)
    else:
        with pytest.raises(BadFrame, match=f"an evaluation with {name}"):
            frames.decode_score(body, name, 2**40)


def test_a_score_is_taken_under_the_run_s_name_alone() -> None:
    body = frames.encode_score("accuracy", 0.5, 4)
    for name in ("loss", "accurac", "accuracy2", ""):
        with pytest.raises(BadFrame, match="by another score"):
            frames.decode_score(body, name, 2**40)


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()), st.sampled_from([0, 32]))
def test_words_come_out_as_they_went_in(said: dict[str, Any], secret: int) -> None:
    hidden = bytes(range(secret))
    assert frames.decode_json(frames.encode_json(said, hidden), secret) == (hidden, said)


def decode_accuracy(body: bytes) -> tuple[float, int]:
    return frames.decode_score(body, "accuracy", 1000)


_DECODERS: list[Callable[[bytes], Any]] = [
    Frame.decode,
    Work.decode,
    frames.Answer.decode,
    decode_accuracy,
    frames.decode_json,
    lambda body: frames.decode_json(body, 32),
    StateParts(3).add,
]


@pytest.mark.parametrize("decode", _DECODERS)
@given(st.binary(max_size=200))
@example(b"")
@example(b"[" * 100_000)
@example(bytes(32) + b"\xff\xfe{}")
@example(b"9" * 5000)
def test_anything_else_is_a_bad_frame(decode: Callable[[bytes], Any], data: bytes) -> None:
    with contextlib.suppress(BadFrame):
        decode(data)


@given(_frames, st.data())
def test_a_header_with_any_body_is_decoded_or_a_bad_frame(frame: Frame, data: st.DataObject) -> None:
    made = frame.encode()[:HEADER] + data.draw(st.binary(max_size=100))
    body = Frame.decode(made).body
    with contextlib.suppress(BadFrame):
        frames.decode_reply(frame._replace(kind=Kind.SIGNED, body=body))
    for decode in _DECODERS[1:]:
        with contextlib.suppress(BadFrame):
            decode(body)


@pytest.mark.parametrize("decode", [Work.decode, frames.Answer.decode, decode_accuracy])
@given(data=st.data())
def test_a_body_that_is_cut_or_longer_is_refused(decode: Callable[[bytes], Any], data: st.DataObject) -> None:
    body = {
        Work.decode: Work("training", 0.1, 2, 3, (closed_round(2, 3), closed_round())).encode(),
        frames.Answer.decode: frames.Answer("training", 0, np.ones((2, 3), "f4")).encode(),
        decode_accuracy: frames.encode_score("accuracy", 0.75, 4),
    }[decode]
    other = data.draw(st.integers(0, len(body) + 20).filter(lambda size: size != len(body)))
    with pytest.raises(BadFrame):
        decode(body[:other].ljust(other, b"\1"))


def test_a_closed_round_without_a_step_is_refused() -> None:
    body = Work(closed=(Closed(0.5, 1.0, np.zeros((0, 1), "f4"), True),)).encode()
    with pytest.raises(BadFrame):
        Work.decode(body)


def test_what_is_not_of_this_protocol_is_told() -> None:
    good = Frame(Kind.END, RUN, 1, 2, DIGEST, b"{}").encode()
    for data, said in (
        (b"XX" + good[2:], "not a frame"),
        (good[:2] + b"\1" + good[3:], "frame format 1, this side speaks 5"),
        (good[:3] + b"\0" + good[4:], "unknown kind 0"),
        (good[:3] + b"\x0e" + good[4:], "unknown kind 14"),
        (good[: HEADER - 1], "must be 52 to"),
        (good + bytes(frames.LIMIT), "must be 52 to"),
    ):
        with pytest.raises(BadFrame, match=said):
            Frame.decode(data)
    with pytest.raises(BadFrame, match="at most"):
        Frame(Kind.STATE, RUN, 1, 2, DIGEST, bytes(frames.LIMIT)).encode()
    assert len(Frame(Kind.STATE, RUN, 1, 2, DIGEST, bytes(frames.LIMIT - HEADER)).encode()) == frames.LIMIT


def test_sizes_are_those_that_are_promised() -> None:
    work = Work("training", 0.1, 1, 7, (closed_round(),))
    assert len(closed_round().encode()) == 27
    assert len(Frame(Kind.WORK, RUN, 1, 2, DIGEST, work.encode()).encode()) <= 120
    reply = frames.Answer("training", 0, np.ones((1, 1), "f4")).encode()
    assert len(reply) == 15 + 4
    assert len(Frame(Kind.REPLY, RUN, 1, 2, DIGEST, reply).encode()) <= 80
    assert len(Frame(Kind.SIGNED, RUN, 1, 2, body=bytes(64) + reply).encode()) <= 110


def parts_of(values: np.ndarray, monkeypatch: pytest.MonkeyPatch, room: int = 10) -> list[bytes]:
    monkeypatch.setattr(frames, "LIMIT", HEADER + 16 + room)
    return frames.encode_state(values)


def test_a_state_comes_in_parts_that_fit_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.linspace(-1, 1, 9, dtype="f4")
    bodies = parts_of(values, monkeypatch)
    assert len(bodies) == 4  # 36 bytes, 10 at a time: a part may end within a value
    for body in bodies:
        assert len(Frame(Kind.STATE, RUN, 1, 2, DIGEST, body).encode()) <= frames.LIMIT
    parts = StateParts(9)
    for _ in range(2):  # and a second state after the first
        *early, last = [parts.add(body) for body in bodies]
        assert early == [None] * 3
        assert last is not None
        assert last.tobytes() == values.tobytes()


def test_parts_in_another_order_or_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = parts_of(np.ones(9, "f4"), monkeypatch)
    with pytest.raises(BadFrame, match="part 1"):
        StateParts(9).add(bodies[1])
    parts = StateParts(9)
    parts.add(bodies[0])
    for wrong in (2, 3):
        with pytest.raises(BadFrame, match=f"part {wrong}"):
            parts.add(bodies[wrong])
    with pytest.raises(BadFrame, match="36 bytes, where 40"):
        StateParts(10).add(bodies[0])
    short = StateParts(9)
    for body in bodies[:3]:
        short.add(body)
    with pytest.raises(BadFrame, match="34 bytes, where 36 were"):
        short.add(bodies[3][:-2])


def test_parts_hold_no_more_than_was_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = parts_of(np.ones(9, "f4"), monkeypatch)
    parts = StateParts(9)
    parts.add(bodies[0] + bytes(20))
    with pytest.raises(BadFrame, match="where 36 were announced"):
        parts.add(bodies[1])


def test_a_part_without_a_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = parts_of(np.ones(9, "f4"), monkeypatch)
    parts = StateParts(9)
    parts.add(bodies[0])
    with pytest.raises(BadFrame, match="a state of"):
        parts.add(bodies[1][:16])


def test_a_state_that_was_cut_off_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream broke between two parts: on the next one the whole state comes again."""
    values = np.arange(9, dtype="f4")
    bodies = parts_of(values, monkeypatch)
    parts = StateParts(9)
    parts.add(bodies[0])
    *_, state = [parts.add(body) for body in bodies]
    assert state is not None
    assert np.array_equal(state, values)


GOLDEN = {
    Kind.HELLO: (frames.encode_json({"examples": 3}, bytes(32)), "00" * 32 + b'{"examples":3}'.hex()),
    Kind.WELCOME: (frames.encode_json({}, bytes([7]) * 32), "07" * 32 + "7b7d"),
    Kind.WORK: (
        Work("calibration", 0.5, 2, 258, (Closed(1.0, 0.25, np.array([[1.0], [-2.0]], "f4"), True),)).encode(),
        "01000000000000e03f020000000201000000000000010001000000000000f03f000000000000d03f0200000001000000803f000000c0",
    ),
    Kind.REPLY: (
        frames.Answer("training", 258, np.array([[1.0, -2.0]], "f4")).encode(),
        "0002010000000000000100000002000000803f000000c0",
    ),
    Kind.CLOSED: (Work().encode(), "00" * 23),
    Kind.STATE: (
        frames.encode_state(np.array([1.0, 0.5], "f4"))[0],
        "000000000100000008000000000000000000803f0000003f",
    ),
    Kind.BEHIND: (b"", ""),
    Kind.EVALUATE: (Work("training", 0.0, 0, 1).encode(), "00" * 13 + "01" + "00" * 9),
    Kind.SCORE: (frames.encode_score("loss", 2.0, 4), "00" * 7 + "40" + "04" + "00" * 7 + "6c6f7373"),
    Kind.FAILED: (frames.encode_json({"why": "diverged"}), b'{"why":"diverged"}'.hex()),
    Kind.REFUSAL: (frames.encode_json({"why": "no"}), b'{"why":"no"}'.hex()),
    Kind.END: (frames.encode_json({"why": "done"}), b'{"why":"done"}'.hex()),
    Kind.SIGNED: (
        bytes([9]) * 64 + frames.Answer("training", 0, np.array([[1.0]], "f4")).encode(),
        "09" * 64 + "00" + "00" * 8 + "01000000" + "0100" + "0000803f",
    ),
}


@pytest.mark.parametrize("kind", Kind)
def test_the_format_is_what_version_5_wrote(kind: Kind) -> None:
    """Whoever has to change a line here changes frames.VERSION too."""
    body, expected = GOLDEN[kind]
    head = "4d4b05" + f"{kind:02x}" + RUN.hex() + "03000000" + "04010000"
    head += "" if kind is Kind.SIGNED else DIGEST.hex()
    assert Frame(kind, RUN, 3, 260, DIGEST, body).encode().hex() == head + expected
    assert frames.VERSION == 5


def test_a_body_of_words_is_json_that_any_reader_takes() -> None:
    body = frames.encode_json({"why": "naïve"})
    assert json.loads(body) == {"why": "naïve"}
    with pytest.raises(ValueError, match="JSON"):
        frames.encode_json({"loss": float("nan")})
