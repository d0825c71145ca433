import hashlib
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from conftest import full_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meerkat.errors import MeerkatError, RunFailed
from meerkat.record.run_log import LogReader, RunLog

RECORDS = [{"kind": "open", "n": 3}, {"kind": "round", "lr": 0.1}, {"kind": "round", "text": "ü\n"}, {"kind": "close"}]


def write(path: Path, records: list[dict[str, object]] = RECORDS) -> bytes:
    log = RunLog(path)
    for record in records:
        log.append(record)
    log.close()
    return path.read_bytes()


def read(path: Path) -> tuple[list[dict[str, Any]], LogReader]:
    """The sound records, and how the log ended."""
    reader = LogReader(path)
    return list(reader), reader


def test_what_was_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert read(path)[0] == []
    write(path)
    write(path, [{"kind": "more"}])
    records, reader = read(path)
    assert records == [*RECORDS, {"kind": "more"}]
    assert reader.count == 5
    assert reader.end == path.stat().st_size
    assert not reader.damage
    assert path.read_bytes().count(b"\n") == 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An undamaged log."""
    return write(tmp_path_factory.mktemp("whole") / "log")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_changed_byte_goes_unseen(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    path, changed = tmp_path / "log", bytearray(whole)
    at = data.draw(st.integers(0, len(whole) - 1))
    changed[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    records, reader = read(path)
    assert reader.damage
    assert records == RECORDS[: len(records)]
    ends = accumulate(len(line) for line in whole.splitlines(keepends=True))
    assert len(records) == sum(end <= at for end in ends)


@pytest.mark.parametrize("change", ["swap", "drop", "repeat"])
def test_lines_cannot_be_moved(tmp_path: Path, change: str) -> None:
    path = tmp_path / "log"
    lines = write(path).splitlines(keepends=True)
    lines = {
        "swap": [lines[0], lines[2], lines[1], lines[3]],
        "drop": [lines[0], *lines[2:]],
        "repeat": [lines[0], *lines],
    }[change]
    path.write_bytes(b"".join(lines))
    _, reader = read(path)
    assert reader.damage == "line 2 is damaged"
    assert not reader.torn
    with pytest.raises(RunFailed, match="line 2 is damaged, as no killed process leaves it"):
        RunLog(path)


def test_every_cut_of_the_last_record_is_torn_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log"
    whole = write(path)
    last = len(whole) - len(whole.splitlines(keepends=True)[-1])
    for end in range(last + 1, len(whole)):
        path.write_bytes(whole[:end])
        records, reader = read(path)
        assert reader.torn
        assert records == RECORDS[:3]
        log = RunLog(path)
        assert log.dropped == "line 4 is cut short"
        log.append(RECORDS[3])
        log.close()
        assert path.read_bytes() == whole


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = RunLog(path)
    with pytest.raises(MeerkatError, match="another process"):
        RunLog(path)
    log.close()
    RunLog(path).close()


def test_a_full_disk_loses_nothing_that_was_logged(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path)
    before = path.read_bytes()
    log = RunLog(path)
    with full_disk() as fill:
        fill(len(before) + 50)
        with pytest.raises(RunFailed, match="all earlier records are safe"):
            log.append({"kind": "round", "padding": "x" * 1000})
    log.close()
    assert path.read_bytes() == before


def test_a_record_too_deep_to_read_is_damage(tmp_path: Path) -> None:
    path, deep = tmp_path / "log", b'{"kind": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    path.write_bytes(hashlib.sha256(b"0" * 64 + deep).hexdigest().encode() + b" " + deep + b"\n")
    assert read(path)[1].damage == "line 1 is not as this version writes it"


def test_a_record_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "log"
    before = write(path)
    log = RunLog(path)
    with pytest.raises(ValueError, match="JSON"):
        log.append({"lr": float("nan")})
    log.close()
    assert path.read_bytes() == before
    assert json.loads(before.splitlines()[0][65:]) == RECORDS[0]


@pytest.mark.parametrize(
    "content", [b'{"text": "a row", "label": 0}', b"precious", b"0" * 64 + b" no record", b"\x00" * 10]
)
def test_another_kind_of_file_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    """A last line that is cut short would be dropped of a log."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(RunFailed, match="is another kind of file, and is left as it is"):
        RunLog(file)
    assert file.read_bytes() == content


@pytest.mark.parametrize("written", [1, 64, 65, 66, 80])
def test_a_first_record_that_was_cut_short_is_dropped(tmp_path: Path, written: int) -> None:
    log = RunLog(tmp_path / "log")
    log.append({"kind": "open", "name": "a run"})
    log.close()
    (tmp_path / "log").write_bytes((tmp_path / "log").read_bytes()[:written])
    again = RunLog(tmp_path / "log")
    assert again.dropped == "line 1 is cut short"
    again.close()
