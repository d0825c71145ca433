"""`meerkat partition`: every site's file holds the rows, and yields the batches, of that client in a simulation."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import full_disk
from test_cli import fails

from meerkat.cli import main
from meerkat.problems.data import load_rows
from meerkat.problems.partition import ClientRows
from meerkat.run.setup import load_split, open_problem, resolve
from meerkat.run.split import Split
from meerkat.settings.config import make_config


@pytest.mark.parametrize("spec", ["dirichlet:0.5", "mixed:1"])
def test_each_file_is_that_client_s_rows_of_the_simulation(
    federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spec: str
) -> None:
    given = {"task": "sst2", "data": str(federation / "data"), "partition": spec, "clients": 3, "seed": 5}
    out = tmp_path / "sites"
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    assert main(["partition", *flags, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)

    model = {"model": str(federation / "model"), "text": str(federation / "text.jsonl")}
    config = resolve(make_config(given | model | {"threads": 1}))
    split = Split.of(config, open_problem(config))
    training = load_split(config, "train")
    files = [load_rows(str(out / f"site-{client}"), "train") for client in range(3)]
    assert told["rows"] == [len(rows) for rows in files]
    for client, rows in enumerate(split.partition.rows):
        assert files[client] == [training[row] for row in rows]
        there = ClientRows(client, rows, 4, config.seed)
        here = ClientRows(client, np.arange(len(rows)), 4, config.seed)
        for step in range(20):
            assert [files[client][i] for i in here.batch(step)] == [training[i] for i in there.batch(step)]
    together = [json.dumps(row) for rows in files for row in rows]
    assert sorted(together) == sorted(json.dumps(row) for row in training)


def test_rows_held_back_go_to_no_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["partition", "--task", "topics", "--clients", "2", "--held-back", "0.25", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    files = [load_rows(str(tmp_path / f"site-{client}"), "train") for client in range(2)]
    whole = load_split(make_config({"task": "topics"}), "train")
    assert sum(map(len, files)) == round(0.75 * len(whole))
    assert f"{sum(map(len, files))} rows in 2 folders" in said


def test_no_validation_rows_are_needed(federation: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes((federation / "data" / "train.jsonl").read_bytes())
    flags = ["--task", "sst2", "--data", str(tmp_path / "data"), "--clients", "2"]
    assert main(["partition", *flags, "--partition", "iid", "--out", str(tmp_path / "sites")]) == 0
    mask = ["--model", str(federation / "model"), "--text", str(federation / "text.jsonl"), "--method", "task-mask"]
    few = ["--task", "sst2", "--data", str(tmp_path / "data"), "--text-sequences", "4", "--density", "0.01"]
    assert main(["mask", *mask, *few, "--out", str(tmp_path / "mask.safetensors")]) == 0


def test_a_taken_folder_and_a_bad_split_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("")
    fails(["partition", "--task", "topics", "--out", str(tmp_path)], capsys, "not an empty folder")
    out = tmp_path / "new"
    fails(["partition", "--partition", "mixed:99", "--out", str(out)], capsys, "1 to the number of clients")
    assert not out.exists()
    beneath = tmp_path / "mine" / "new"
    fails(["partition", "--out", str(beneath)], capsys, f"'{beneath}': '{tmp_path / 'mine'}' cannot be written to")


@pytest.mark.parametrize("there", [False, True])
def test_what_a_full_disk_cut_short_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str], there: bool) -> None:
    out = tmp_path / "a" / "sites"
    if there:
        out.mkdir(parents=True)
    with full_disk() as fill:
        fill(10_000)
        fails(["partition", "--out", str(out)], capsys, "File too large; make room", status=1)
    assert [*tmp_path.rglob("*")] == ([tmp_path / "a", out] if there else [])
    assert main(["partition", "--out", str(out)]) == 0
