"""What a folder from somebody else claims, costs and breaks: each attack changes a finished run and chains it anew."""

import base64
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from meerkat.cli import main
from meerkat.masks.sparse_mask import SparseMask
from meerkat.record import replay
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import LogReader

Record = dict[str, Any]
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def finished(simulate_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("foreign") / "run"
    assert main([*simulate_arguments, "--rounds", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def calibrated(simulate_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that calibrated before its first round."""
    out = tmp_path_factory.mktemp("foreign") / "run"
    steps = ["--local-steps", "2", "--calibration-steps", "4", "--initial-steps", "2", "--later-steps", "2"]
    assert main([*simulate_arguments, "--method", "meerkat-vp", *steps, "--rounds", "1", "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def records_of(run: Path) -> list[Record]:
    return list(LogReader(run / "rounds.log"))


def write_records(run: Path, records: list[Record]) -> None:
    """Write a log anew, for the settings that stand beside it now."""
    records[0]["config"] = hashlib.sha256((run / "config.toml").read_bytes()).hexdigest()
    link, lines = "0" * 64, []
    for record in records:
        text = json.dumps(record, separators=(",", ":")).encode()
        link = hashlib.sha256(link.encode() + text).hexdigest()
        lines.append(f"{link} ".encode() + text + b"\n")
    (run / "rounds.log").write_bytes(b"".join(lines))


def with_settings(run: Path, **values: Any) -> None:
    """Change settings, and the log's digest of them."""
    path, records = run / "config.toml", records_of(run)
    settings = RunFolder(run).config().model_dump() | values
    path.write_text(tomli_w.dumps({name: value for name, value in settings.items() if value is not None}))
    write_records(run, records)


def refused(command: list[str], capsys: pytest.CaptureFixture[str], *said: str, status: int = 1) -> None:
    """A command fails in one line, which says this."""
    capsys.readouterr()
    assert main(command) == status
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("meerkat: ")]
    assert len(line) == 1
    for each in said:
        assert each in line[0]


# --- what a folder costs whoever reads it ---------------------------------------------------------


@pytest.mark.parametrize("command", ["verify", "resume"])
def test_a_short_log_that_asks_for_many_steps_takes_no_memory(
    run: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """2^31 - 1 steps that nobody made, in a log of a kilobyte: their aggregate would be 17 GB."""
    many = 2**31 - 1
    mask = SparseMask.load(run / "mask.safetensors")
    replace(mask, pretraining_gradient=None).save(run / "mask.safetensors")
    with_settings(run, local_steps=many)
    opening, asked = records_of(run)[:2]
    (run / "summary.json").unlink()
    one = base64.b64encode(bytes(4)).decode()
    clients = len(asked["clients"])
    nobody = {"made": [0] * clients, "pointers": [0] * clients, "scalars": "", "weights": []}
    write_records(
        run,
        [{**opening, "gradient": ""}, {**asked, **nobody, "steps": [many] * clients, "inner": "", "aggregate": one}],
    )

    def aggregate(*_: Any) -> None:
        raise AssertionError("an aggregate as long as the plan says was made")

    monkeypatch.setattr(replay, "aggregate", aggregate)
    refused([command, str(run)], capsys, "rounds.log, line 2", "the aggregate's form")


@pytest.mark.parametrize("shape", [(2**62,) * 10_000 + (0,), (1,) * 9, (2**40,)], ids=["digits", "sizes", "size"])
def test_a_mask_s_shapes_are_bounded_before_they_are_multiplied(shape: tuple[int, ...]) -> None:
    """A few megabytes of sizes make a product of millions of digits: minutes, of whoever opens the mask."""
    mask = SparseMask({"x": None, "y": torch.tensor([0])}, {"x": shape, "y": (3,)}, "", 2**62)
    with pytest.raises(ValueError, match="at most 8 sizes, each below"):
        mask.check_form()


# --- what a folder claims -------------------------------------------------------------------------


def test_a_summary_with_a_key_twice_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A person reads the first of two values, Python the last."""
    path = run / "summary.json"
    path.write_text(path.read_text().replace("{\n", '{\n  "accuracy": 0.999,\n', 1))
    refused(["verify", str(run)], capsys, "summary.json: it is not written as this version writes a summary")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clients", [False, True, 2]),
        ("clients", [0, 1, 2.0]),
        ("rho_quie", lambda then: [-0.0 if x == 0 else x for x in then]),
        ("loud_above", str),
        ("rho_quie_from", 0),
        ("rho_quie_from", -0.0),
    ],
    ids=["bools", "fraction", "minus zeros", "text", "whole", "minus zero"],
)
def test_a_selection_in_other_types_is_refused(
    calibrated: Path, tmp_path: Path, name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(calibrated, tmp_path / "run"))
    records = records_of(run)
    selection = records[1]["selection"]
    forged = value(selection[name]) if callable(value) else value
    assert json.dumps(forged) != json.dumps(selection[name])
    selection[name] = forged
    write_records(run, records)
    refused(["verify", str(run)], capsys, "rounds.log, line 2")


def test_settings_say_the_mask_s_density(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_settings(run, density=0.5)
    refused(["verify", str(run)], capsys, "config.toml: density: recorded '0.5', found '0.01'")


# --- what breaks a report or an export ------------------------------------------------------------


def metrics(run: Path, kind: str, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    path = run / "metrics.jsonl"
    noted = map(json.loads, path.read_text().splitlines())
    path.write_text("".join(json.dumps(change(m) if m["kind"] == kind else m) + "\n" for m in noted))


def deep_metrics(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(DEEP + "\n")


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "nested metrics": deep_metrics,
    "nested summary": lambda run: (run / "summary.json").write_text(DEEP),
    "huge bytes": lambda run: metrics(run, "round", lambda m: {**m, "bytes_up": 10**400}),
    "huge round": lambda run: metrics(run, "evaluation", lambda m: {**m, "round": 10**400}),
    "words for scores": lambda run: metrics(
        run, "evaluation", lambda m: {**m, "scores": dict.fromkeys(m["scores"], "a")}
    ),
    "words for seconds": lambda run: metrics(run, "round", lambda m: {**m, "wall_s": "a"}),
    "ragged counts": lambda run: metrics(run, "split", lambda m: {**m, "counts": [[1], [1, 2]]}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_report_of_a_hostile_folder_fails_in_one_line(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    HOSTILE[name](run)
    refused(["report", str(run)], capsys, str(run))


@pytest.mark.parametrize("name", ["nested metrics", "words for scores"])
def test_an_export_of_a_hostile_folder_fails_in_one_line(
    run: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    HOSTILE[name](run)
    refused(["export", str(run), "--to", str(tmp_path / "model")], capsys, str(run))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "content",
    ['{"format": 2, "studies": ' + DEEP + "}", '{"format": 2, "studies": 7}', '{"format": 2, "studies": ["x"]}'],
)
def test_a_report_of_a_hostile_comparison_fails_in_one_line(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "compare.json").write_text(content)
    refused(["report", str(tmp_path)], capsys, str(tmp_path), "damaged")
