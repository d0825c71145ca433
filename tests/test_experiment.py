"""A whole run over a tiny federation: its record, going on with it, replaying it, and bad input."""

import dataclasses
import json
import math
import resource
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import full_disk
from tiny import federation_model

from meerkat.algorithm import path
from meerkat.algorithm.replies import Scalars
from meerkat.algorithm.rounds import RoundRecord
from meerkat.algorithm.server import aggregate
from meerkat.cli import main
from meerkat.errors import RunFailed
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems import causal_lm
from meerkat.record import run_log, verification
from meerkat.record.run_folder import RunFolder
from meerkat.run.evaluate import evaluate


def simulate(arguments: list[str], out: Path, *more: str) -> dict[str, Any]:
    assert main([*arguments, *more, "--out", str(out)]) == 0
    summary = RunFolder(out).summary()
    assert summary is not None
    return summary


@pytest.fixture(scope="module")
def untouched(simulate_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a finished run with these options, made once: to look at, and to copy."""

    @cache
    def run(*options: str) -> Path:
        simulate(simulate_arguments, out := tmp_path_factory.mktemp("untouched") / "run", *options)
        return out

    return run


@pytest.fixture
def finished(untouched: Callable[..., Path], tmp_path: Path) -> Path:
    """The folder of a finished run, to do with as one likes."""
    return Path(shutil.copytree(untouched(), tmp_path / "run"))


def logged(folder: Path) -> list[dict[str, Any]]:
    return list(run_log.LogReader(folder / "rounds.log"))


def test_a_run_leaves_its_record(finished: Path) -> None:
    summary = RunFolder(finished).summary()
    records = logged(finished)
    assert summary is not None
    assert [r["kind"] for r in records] == ["open", *["round"] * 6, "close"]
    assert summary["theta_digest"] == records[-1]["theta"] == records[-2]["theta"]
    assert summary["params_masked"] == math.ceil(0.01 * summary["params_total"])
    assert (summary["payload_bytes_up_per_client_round"], summary["payload_bytes_down_per_client_round"]) == (4, 4)
    evaluations = [m for m in RunFolder(finished).metrics() if m["kind"] == "evaluation"]
    assert [m["round"] for m in evaluations] == [0, 2, 4, 6]
    assert summary["accuracy"] == evaluations[-1]["accuracy"]
    assert not list(finished.glob("*.part"))


def test_the_same_settings_give_the_same_bits_and_others_do_not(simulate_arguments: list[str], tmp_path: Path) -> None:
    first = simulate(simulate_arguments, tmp_path / "a")
    assert simulate(simulate_arguments, tmp_path / "b")["theta_digest"] == first["theta_digest"]
    assert simulate(simulate_arguments, tmp_path / "c", "--seed", "1")["theta_digest"] != first["theta_digest"]


def test_clients_together_have_the_losses_they_have_one_by_one(simulate_arguments: list[str], tmp_path: Path) -> None:
    options = ("--rounds", "1", "--clients", "5", "--directions", "2")
    for batching in ("auto", "off"):
        simulate(simulate_arguments, tmp_path / batching, *options, "--batching", batching)
    levels = [RunFolder(tmp_path / b).metrics()[2]["loss"] for b in ("auto", "off")]
    assert levels[0] == pytest.approx(levels[1], abs=1e-6)
    scalars = [RoundRecord.from_json(logged(tmp_path / b)[1]).scalars for b in ("auto", "off")]
    for k in range(5):  # g magnifies a loss' error by 1 / (2 eps)
        assert scalars[0][k] == pytest.approx(scalars[1][k], abs=2 * 1e-6 / 2e-3)


@pytest.mark.parametrize("options", [(), ("--local-steps", "3", "--directions", "2", "--clients-per-round", "2")])
@pytest.mark.parametrize("stop_after", range(7))
def test_a_run_stopped_anywhere_and_resumed_is_the_untouched_one(
    simulate_arguments: list[str],
    untouched: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int,
    options: tuple[str, ...],
) -> None:
    whole = untouched(*options)

    class Stopped(BaseException):
        pass

    append, count = run_log.RunLog.append, 0

    def append_or_stop(log: run_log.RunLog, record: Any) -> None:
        nonlocal count
        count += 1
        if count > 1 + stop_after:
            raise Stopped
        append(log, record)

    with monkeypatch.context() as patch:
        patch.setattr(run_log.RunLog, "append", append_or_stop)
        with pytest.raises(Stopped):
            main([*simulate_arguments, *options, "--out", str(tmp_path / "cut")])
    assert main(["resume", str(tmp_path / "cut")]) == 0
    summary, of_whole = RunFolder(tmp_path / "cut").summary(), RunFolder(whole).summary()
    assert summary is not None
    assert of_whole is not None
    assert summary["theta_digest"] == of_whole["theta_digest"]
    untimed = [
        [{k: v for k, v in m.items() if not k.endswith("_s")} for m in RunFolder(folder).metrics()]
        for folder in (whole, tmp_path / "cut")
    ]
    assert untimed[0] == untimed[1]
    assert (whole / "rounds.log").read_bytes() == (tmp_path / "cut" / "rounds.log").read_bytes()


def test_a_torn_record_is_dropped_and_its_round_run_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = finished / "rounds.log"
    whole = log.read_bytes()
    lines = whole.splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:4]) + lines[4][:100])
    (finished / "summary.json").unlink()
    assert main(["resume", str(finished)]) == 0
    assert "line 5 is cut short; that record is dropped" in capsys.readouterr().err
    assert log.read_bytes() == whole


def test_resuming_a_finished_run_says_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = {path: path.stat().st_mtime_ns for path in (finished, *finished.iterdir())}
    assert main(["resume", str(finished)]) == 0
    said = capsys.readouterr()
    assert "the run is finished, after 6 rounds" in said.err
    assert f"Picture: {finished / 'curves.png'}\n" in said.out
    assert {path: path.stat().st_mtime_ns for path in (finished, *finished.iterdir())} == written


# --- verify ---


def test_verify_replays_a_run_from_the_log_alone(finished: Path, federation: Path) -> None:
    hidden = federation.with_name("hidden")
    federation.rename(hidden)  # neither model nor data are needed
    try:
        run = verification.verify(finished)
    finally:
        hidden.rename(federation)
    assert run.finished
    assert path.digest(run.theta) == logged(finished)[-1]["theta"]


def rewrite(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change records and chain them anew, as a forger would."""
    records = logged(folder)
    change(records)
    (folder / "rounds.log").unlink()
    log = run_log.RunLog(folder / "rounds.log")
    for record in records:
        log.append(record)
    log.close()


def _swap_scalars(records: list[dict[str, Any]]) -> None:
    records[2]["scalars"] = records[3]["scalars"]


def _swap_rates(records: list[dict[str, Any]]) -> None:
    records[3]["lr"] *= 2


def _swap_rounds(records: list[dict[str, Any]]) -> None:
    del records[2]


def _swap_theta(records: list[dict[str, Any]]) -> None:
    records[-1]["theta"] = records[2]["theta"]


def _drop_the_end(records: list[dict[str, Any]]) -> None:
    del records[-2:]


def _drop_rounds_before_the_end(records: list[dict[str, Any]]) -> None:
    del records[4:-1]
    records[-1] |= {"rounds": 3, "theta": records[-2]["theta"]}


def _another_eps(records: list[dict[str, Any]]) -> None:
    records[2]["eps"] = 9.0


def _another_format(records: list[dict[str, Any]]) -> None:
    records[0]["format"] = 99


def _another_rule(records: list[dict[str, Any]]) -> None:
    records[0]["rule"] = "median"


def _another_key(records: list[dict[str, Any]]) -> None:
    records[0]["run_key"] = "0" * 32
    del records[1:]


def _other_rows(records: list[dict[str, Any]]) -> None:
    records[0]["examples"] = [1, 1, 1000]
    del records[1:]


def _one_round_more(records: list[dict[str, Any]]) -> None:
    records[-1] = records[-2] | {"round": 6}


def _a_list(records: list[dict[str, Any]]) -> None:
    records[2] = [1]


def _no_weights(records: list[dict[str, Any]]) -> None:
    del records[2]["weights"]


def _unknown_kind(records: list[dict[str, Any]]) -> None:
    records[2]["kind"] = "note"


def _heavy_client(records: list[dict[str, Any]]) -> None:
    """One client counts three times, and everything after is computed anew, digests included."""
    record = RoundRecord.from_json(records[1])
    weights = {0: 3.0, 1: 0.0, 2: 0.0}
    total = aggregate([Scalars(k, g) for k, g in record.scalars.items()], weights, record.plan)
    records[1] |= dataclasses.replace(record, weights=weights, aggregate=total).to_json()


FORGERIES = [
    *(_swap_scalars, _swap_rates, _swap_rounds, _swap_theta, _drop_the_end, _drop_rounds_before_the_end, _another_eps),
    *(_another_format, _another_rule, _no_weights, _unknown_kind, _heavy_client),
    *(_another_key, _other_rows, _one_round_more, _a_list),
]


@pytest.mark.parametrize("forge", FORGERIES)
def test_neither_verify_nor_resume_goes_on_from_a_forged_record(
    finished: Path, forge: Callable[[list[dict[str, Any]]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(finished, forge)
    assert main(["verify", str(finished)]) == 1
    assert str(finished) in capsys.readouterr().err
    if forge is not _drop_the_end:  # without its summary that one is a run cut short, and sound
        (finished / "summary.json").unlink()
        forged = (finished / "rounds.log").read_bytes()
        assert main(["resume", str(finished)]) in (1, 2)
        assert (finished / "rounds.log").read_bytes() == forged


@pytest.mark.parametrize("line", [0, 3, -1])
def test_verify_sees_a_flipped_bit_in_any_record(finished: Path, line: int) -> None:
    log = finished / "rounds.log"
    lines = [bytearray(text) for text in log.read_bytes().splitlines(keepends=True)]
    lines[line][-5] ^= 1
    log.write_bytes(b"".join(lines))
    assert main(["verify", str(finished)]) == 1


@pytest.mark.parametrize("name", ["config.toml", "mask.safetensors", "summary.json"])
def test_verify_sees_changed_files(finished: Path, name: str) -> None:
    file = finished / name
    if name == "mask.safetensors":
        mask = SparseMask.load(file)
        assert mask.pretraining_gradient is not None
        mask.pretraining_gradient[0] += 1
        mask.save(file)
    else:
        text = file.read_text()
        file.write_text(
            text.replace("0.01", "0.02") if name == "config.toml" else text.replace('digest": "', 'digest": "f')
        )
    assert main(["verify", str(finished)]) == 1


@pytest.mark.parametrize("name", ["config.toml", "mask.safetensors", "summary.json"])
@pytest.mark.parametrize("content", [b"", b"\xff{"])
def test_verify_of_a_garbled_file_is_one_line_and_status_one(
    finished: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / name).write_bytes(content)
    capsys.readouterr()
    assert main(["verify", str(finished)]) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("verifying")]
    assert len(err) == 1
    assert "restore" in err[0]


def test_a_torn_closing_record_is_written_again(finished: Path) -> None:
    log = finished / "rounds.log"
    whole = log.read_bytes()
    log.write_bytes(whole[:-20])
    assert main(["verify", str(finished)]) == 1
    assert main(["resume", str(finished)]) == 0
    assert log.read_bytes() == whole


def test_resume_refuses_other_base_values_and_another_model(
    finished: Path, federation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "summary.json").unlink()
    whole = (finished / "mask.safetensors").read_bytes()
    mask = SparseMask.load(finished / "mask.safetensors")
    assert mask.theta_0 is not None
    mask.theta_0[0] += 1
    mask.save(finished / "mask.safetensors")
    assert main(["resume", str(finished)]) == 1
    assert "to make it again delete it, then 'meerkat resume" in capsys.readouterr().err
    (finished / "mask.safetensors").write_bytes(whole)
    weights = federation / "model" / "model.safetensors"
    kept = weights.read_bytes()
    try:
        federation_model(seed=9).save_pretrained(federation / "model")
        assert main(["resume", str(finished)]) == 2
        assert "is not the one the run began with" in capsys.readouterr().err
    finally:
        weights.write_bytes(kept)
    assert main(["resume", str(finished)]) == 0


HALF_EVALUATIONS = (
    '{"kind": "evaluation", "round": 0}\n',
    '{"kind": "evaluation", "round": 0, "scores": 3, "better": {}}\n',
    '{"kind": "evaluation", "round": 0, "scores": {"loss": "low"}, "better": {"loss": "lower"}}\n',
    '{"kind": "evaluation", "round": 0, "scores": {}, "better": {}}\n',
    '{"kind": "evaluation", "round": 0, "scores": {"accuracy": 0.5}, "better": {}}\n',
)


@pytest.mark.parametrize("content", [b"\xff\n", b"{}\n", b"3\n", b"{\n", *(line.encode() for line in HALF_EVALUATIONS)])
def test_damaged_metrics_are_one_line(finished: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "metrics.jsonl").write_bytes(content)
    (finished / "summary.json").unlink()
    assert main(["resume", str(finished)]) == 1
    assert "delete it, then 'meerkat resume" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", ["{", "{}", "[]"])
def test_a_lost_summary_or_metrics_are_made_again(finished: Path, damaged: str) -> None:
    before = RunFolder(finished).summary()
    assert before is not None
    (finished / "summary.json").write_text(damaged)
    if damaged == "{":
        (finished / "metrics.jsonl").unlink()
    assert main(["resume", str(finished)]) == 0
    after = RunFolder(finished).summary()
    assert after is not None
    for name in ("accuracy_before", "accuracy", "theta_digest", "loss"):
        assert after[name] == before[name]


def test_resume_refuses_a_changed_task(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "task.toml"
    task.write_text('template = "{sentence} It was {label}"\nlabels = ["terrible", "great"]\n')
    simulate(simulate_arguments, tmp_path / "run", "--task", str(task))
    (tmp_path / "run" / "summary.json").unlink()
    task.write_text('template = "{sentence} It was {label}"\nlabels = ["great", "terrible"]\n')
    assert main(["resume", str(tmp_path / "run")]) == 2
    assert "the rows, their split or how they are prepared" in capsys.readouterr().err


def test_verify_of_an_unfinished_run_says_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (finished / "rounds.log").read_bytes().splitlines(keepends=True)
    (finished / "rounds.log").write_bytes(b"".join(lines[:4]))
    (finished / "summary.json").unlink()
    assert main(["verify", str(finished)]) == 0
    assert "not finished: 3 of 6 rounds" in capsys.readouterr().out


def test_resume_refuses_what_was_changed(finished: Path, federation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "summary.json").unlink()
    rows = (federation / "data" / "train.jsonl").read_text()
    try:
        (federation / "data" / "train.jsonl").write_text(rows.replace("film 3 ", "film 333 "))
        assert main(["resume", str(finished)]) == 2
    finally:
        (federation / "data" / "train.jsonl").write_text(rows)
    assert "the rows, their split or how they are prepared (task, tokenizer) was changed" in capsys.readouterr().err


# --- trouble on the way ---


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(
    simulate_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses, calls = causal_lm.row_losses, 0

    def failing(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return losses(*arguments) * (math.nan if calls > 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(causal_lm, "row_losses", failing)
        assert main([*simulate_arguments, "--eps", "1e-3", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("meerkat: round 2: the loss is nan")
    assert [r["kind"] for r in logged(tmp_path / "run")] == ["open", "round", "round"]
    assert main(["resume", str(tmp_path / "run")]) == 0


def test_a_full_disk_ends_the_run_with_one_line_and_it_can_be_resumed(
    simulate_arguments: list[str],
    untouched: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = (untouched() / "rounds.log").read_bytes()
    append = run_log.RunLog.append

    with monkeypatch.context() as patch, full_disk() as fill:

        def limited(log: run_log.RunLog, record: dict[str, Any]) -> None:
            fill(len(whole) // 2)  # which the log grows past in its third round
            append(log, record)
            fill(resource.RLIM_INFINITY)

        patch.setattr(run_log.RunLog, "append", limited)
        assert main([*simulate_arguments, "--out", str(tmp_path / "run")]) == 1
    assert "all earlier records are safe: make room" in capsys.readouterr().err.strip().splitlines()[-1]
    reader = run_log.LogReader(tmp_path / "run" / "rounds.log")
    assert len(list(reader)) == reader.count > 1
    assert not reader.damage
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert verification.verify(tmp_path / "run").finished
    assert (tmp_path / "run" / "rounds.log").read_bytes() == whole


@pytest.mark.parametrize("room", [1, 40, 120])
def test_a_full_disk_in_the_metrics_leaves_no_part_of_a_line(
    simulate_arguments: list[str],
    tmp_path: Path,
    room: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    note = RunFolder.append_metric

    with monkeypatch.context() as patch, full_disk() as fill:

        def limited(folder: RunFolder, metric: dict[str, Any], *through: Any, **how: Any) -> None:
            if metric["kind"] == "evaluation" and metric["round"] == 2:
                fill(folder.metrics_path.stat().st_size + room)
            note(folder, metric, *through, **how)

        patch.setattr(RunFolder, "append_metric", limited)
        assert main([*simulate_arguments, "--out", str(tmp_path / "run")]) == 1
    assert "File too large; make room, then 'meerkat resume" in capsys.readouterr().err.strip().splitlines()[-1]
    assert [m["round"] for m in RunFolder(tmp_path / "run").metrics()] == [0, 0, 0, 1]
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert [m["round"] for m in RunFolder(tmp_path / "run").metrics() if m["kind"] == "evaluation"] == [0, 2, 4, 6]


@pytest.mark.parametrize("lost", [0, 3])
def test_metrics_that_were_lost_are_made_again_from_the_log(
    simulate_arguments: list[str], tmp_path: Path, lost: int
) -> None:
    """All of them, or one round's: what a round's record does not tell is its training loss, and how long it took."""
    assert main([*simulate_arguments, "--out", str(tmp_path / "run")]) == 0
    folder = RunFolder(tmp_path / "run")
    whole, summary = folder.metrics(), folder.summary()
    assert [m["round"] for m in whole if m["kind"] == "round"] == [*range(6)]
    text = folder.metrics_path.read_text().splitlines(keepends=True)
    gone = [k for k, m in enumerate(whole) if m["kind"] == "round" and (not lost or m["round"] == lost)]
    folder.metrics_path.write_text("".join(line for k, line in enumerate(text) if k not in gone))
    folder.summary_path.unlink()
    assert main(["resume", str(tmp_path / "run")]) == 0
    again = folder.metrics()
    assert [(m["kind"], m["round"]) for m in again] == [(m["kind"], m["round"]) for m in whole]
    for k, (one, other) in enumerate(zip(whole, again, strict=True)):
        unknown = {"loss", "wall_s", "forward_s"} if k in gone else set()
        assert {name: one[name] for name in one.keys() - unknown} == {
            name: other[name] for name in one.keys() - unknown
        }
    remade = folder.summary()
    assert summary is not None
    assert remade is not None
    assert remade["payload_bytes_up"] == summary["payload_bytes_up"]


def test_a_torn_metric_is_made_again(simulate_arguments: list[str], tmp_path: Path) -> None:
    """As a machine that lost its power leaves it: the last round is logged, and its metric cut short."""
    assert main([*simulate_arguments, "--out", str(tmp_path / "run")]) == 0
    folder = RunFolder(tmp_path / "run")
    whole = folder.metrics()
    *lines, last, _ = folder.metrics_path.read_text().splitlines(keepends=True)
    folder.metrics_path.write_text("".join(lines) + last[:40])
    folder.summary_path.unlink()
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert [(m["kind"], m["round"]) for m in folder.metrics()] == [(m["kind"], m["round"]) for m in whole]


def test_metrics_of_another_kind_are_kept_and_those_of_no_kind_refused(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*simulate_arguments, "--out", str(tmp_path / "run")]) == 0
    folder = RunFolder(tmp_path / "run")
    text = folder.metrics_path.read_text()
    for line, status in (('{"kind": "note", "round": 1}', 0), ('{"kind": ["round"], "round": 1}', 1)):
        folder.metrics_path.write_text(f"{text}{line}\n")
        folder.summary_path.unlink()
        assert main(["resume", str(tmp_path / "run")]) == status
    assert "metrics.jsonl: damaged; delete it" in capsys.readouterr().err


def test_a_run_in_use_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "summary.json").unlink()
    log = run_log.RunLog(finished / "rounds.log")
    assert main(["resume", str(finished)]) == 2
    assert "another process" in capsys.readouterr().err
    log.close()


def test_a_mask_made_before_is_used(simulate_arguments: list[str], federation: Path, tmp_path: Path) -> None:
    made = tmp_path / "mask.safetensors"
    model, text = str(federation / "model"), str(federation / "text.jsonl")
    assert main(["mask", "--model", model, "--text", text, "--density", "0.01", "--out", str(made)]) == 0
    direct = simulate(simulate_arguments, tmp_path / "direct")
    given = simulate(simulate_arguments, tmp_path / "given", "--mask", str(made))
    assert given["theta_digest"] == direct["theta_digest"]


@pytest.mark.parametrize("method", ["full-fedzo", "weight-magnitude", "random-mask"])
def test_every_method_runs_and_verifies(simulate_arguments: list[str], tmp_path: Path, method: str) -> None:
    summary = simulate(simulate_arguments, tmp_path / "run", "--method", method, "--rounds", "2", "--lr", "1e-4")
    assert summary["method"] == method
    assert verification.verify(tmp_path / "run").finished


def test_the_run_folder_can_be_moved(finished: Path, tmp_path: Path) -> None:
    shutil.move(finished, tmp_path / "elsewhere")
    assert (
        evaluate(tmp_path / "elsewhere").scores["accuracy"]
        == json.loads((tmp_path / "elsewhere" / "summary.json").read_text())["accuracy"]
    )


def test_verify_needs_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(RunFailed, match="no record in it"):
        verification.verify(tmp_path)
