"""Ten thousand clients on one machine: a run, its check and its page, in the memory of a few."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from meerkat import demo

CLIENTS = 10_000


def meerkat(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "meerkat", *arguments], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "rounds"), [(200, 3), (CLIENTS, 1)])
def test_ten_thousand_clients_take_no_gibibyte(asked: int, rounds: int, tmp_path: Path) -> None:
    embedded, data = demo.TASKS[demo.DEFAULT_TASK], tmp_path / "data"
    data.mkdir()
    rows = (embedded / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(rows * (CLIENTS // rows.count("\n")))
    few = (embedded / "validation.jsonl").read_text().splitlines(keepends=True)[:20]
    (data / "validation.jsonl").write_text("".join(few))
    root = str(tmp_path / "run")
    given = {"task": demo.DEFAULT_TASK, "data": data, "clients": CLIENTS, "clients-per-round": asked}
    given |= {
        "partition": "iid",
        "rounds": rounds,
        "batch-size": 1,
        "eval-every": 0,
        "text-sequences": 4,
        "threads": 1,
        "out": root,
    }
    meerkat("simulate", *(word for name, value in given.items() for word in (f"--{name}", str(value))))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["client_steps"] == rounds * asked
    assert summary["peak_rss_mb"] < 1024
    meerkat("verify", root)
    meerkat("report", root)
    assert (tmp_path / "run" / "report.html").stat().st_size < 2**20
