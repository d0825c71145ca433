"""`verify` and `resume` take a record only as this version writes it, byte for byte, and believe no summary."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from meerkat.cli import main
from meerkat.errors import RunFailed
from meerkat.masks.sparse_mask import SparseMask
from meerkat.record.summary import as_text
from meerkat.run.ranks import Ranks
from meerkat.run.simulation import follow

Texts = list[bytes]
"""The JSON text of each record."""


@pytest.fixture(scope="module")
def finished(simulate_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private run of three rounds, with its summary."""
    out = tmp_path_factory.mktemp("form") / "run"
    private = ["--dp", "example", "--dp-epsilon", "8", "--dp-delta", "1e-2", "--lr", "1e-4"]
    assert main([*simulate_arguments, *private, "--rounds", "3", "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def rewrite(run: Path, change: Callable[[Texts], Texts]) -> None:
    """Change a log's records and chain them anew, as whoever holds the folder can."""
    texts = [line[65:] for line in (run / "rounds.log").read_bytes().splitlines()]
    link, lines = "0" * 64, []
    for text in change(texts):
        link = hashlib.sha256(link.encode() + text).hexdigest()
        lines.append(f"{link} ".encode() + text + b"\n")
    (run / "rounds.log").write_bytes(b"".join(lines))


def at(number: int, change: Callable[[bytes], bytes]) -> Callable[[Texts], Texts]:
    return lambda texts: [change(text) if i == number % len(texts) else text for i, text in enumerate(texts)]


def with_note(text: bytes) -> bytes:
    return text[:-1] + b',"note":"audited and approved by the regulator"}'


def with_keys_twice(text: bytes) -> bytes:
    """A reader that takes the first of two values sees another theta; Python takes the last."""
    return b'{"theta":"' + b"f" * 64 + b'","kind":"round",' + text[1:]


def with_space(text: bytes) -> bytes:
    return b"{  " + text[1:]


def in_another_order(text: bytes) -> bytes:
    record = json.loads(text)
    return json.dumps(dict(reversed(record.items())), separators=(",", ":")).encode()


def with_other_escapes(text: bytes) -> bytes:
    return text.replace(b'"kind"', b'"\\u006bind"')


def with_other_numbers(text: bytes) -> bytes:
    """The number of rounds as 3.0, of a round as 0.0, the format as 5.0: equal in Python, another text."""
    record = json.loads(text)
    name = next(name for name in ("format", "rounds", "round") if name in record)
    return json.dumps({**record, name: float(record[name])}, separators=(",", ":")).encode()


CHANGES = [with_note, with_keys_twice, with_space, in_another_order, with_other_escapes, with_other_numbers]


@pytest.mark.parametrize("number", [0, 1, -1], ids=["opening", "round", "closing"])
@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_a_record_in_another_form_is_refused_by_verify_and_resume(
    run: Path, number: int, change: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(run, at(number, change))
    before = (run / "rounds.log").read_bytes()
    assert main(["verify", str(run)]) == 1
    assert len([line for line in capsys.readouterr().err.splitlines() if "rounds.log" in line]) == 1
    (run / "summary.json").unlink()
    assert main(["resume", str(run)]) in (1, 2)
    assert (run / "rounds.log").read_bytes() == before, "a record that was written whole is not dropped"


@pytest.mark.parametrize("value", ["2 ![x](http://evil.example/t.png)", "2\n## Privacy", ["2"], 2, "", "2" * 99])
@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_an_opening_s_versions_are_versions(run: Path, name: str, value: Any) -> None:
    def change(text: bytes) -> bytes:
        return json.dumps(json.loads(text) | {name: value}, separators=(",", ":")).encode()

    rewrite(run, at(0, change))
    assert main(["verify", str(run)]) == 1


OTHER_KINDS = [[], {}, 7, False, None]


@pytest.mark.parametrize("value", OTHER_KINDS, ids=map(repr, OTHER_KINDS))
@pytest.mark.parametrize("name", ["rule", "federation", "estimator", "update_rule"])
def test_a_name_in_an_opening_is_text(run: Path, name: str, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def change(text: bytes) -> bytes:
        return json.dumps(json.loads(text) | {name: value}, separators=(",", ":")).encode()

    rewrite(run, at(0, change))
    said = f"rounds.log: {name} in the opening is not what any version writes"
    (run / "summary.json").unlink()
    for command in ("verify", "resume"):
        capsys.readouterr()
        assert main([command, str(run)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    with pytest.raises(RunFailed, match=said):
        follow(cast(Ranks, SimpleNamespace(hear=lambda: {"folder": str(run), "records": 1})))


def changed_summary(run: Path, **values: Any) -> None:
    path = run / "summary.json"
    path.write_text(as_text(json.loads(path.read_text()) | values))


FORGED = {
    "privacy": {"in_words": "epsilon 0.01"},
    "clients_without_budget": [2],
    "theta_digest": "0" * 64,
    "rounds": 4,
    "clients": 30,
    "payload_bytes_up": 1,
    "payload_bytes_down": 1,
    "payload_bytes_up_per_client_round": 1,
    "client_steps": 10**6,
    "calibration_steps": 1,
    "params_masked": 1,
    "dense_bytes_per_client_round": 1,
    "early_stopped_clients": [0],
    "attack": "collusion",
    "attacking_clients": [1],
    "aggregation": "krum",
    "method": "full-fedzo",
    "note": "audited and approved by the regulator",
    "wall_s": "a day",
    "evaluated_on": "sites",
    "score": "![x](http://evil.example/t.png)",
}


@pytest.mark.parametrize("name", FORGED)
def test_a_summary_says_what_the_log_says(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    changed_summary(run, **{name: FORGED[name]})
    assert main(["verify", str(run)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "summary.json" in said
    assert name in said


def test_a_promise_in_the_summary_is_computed_anew(run: Path) -> None:
    privacy = json.loads((run / "summary.json").read_text())["privacy"]
    changed_summary(run, privacy=privacy | {"epsilon": 0.01})
    assert main(["verify", str(run)]) == 1


def test_a_summary_without_all_that_it_must_say_is_refused(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    del summary["privacy"]
    (run / "summary.json").write_text(as_text(summary))
    assert main(["verify", str(run)]) == 1


def test_a_forged_accuracy_is_sound_until_it_is_computed_anew(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run), "--evaluate"]) == 0
    scores = json.loads((run / "summary.json").read_text())["scores"]
    changed_summary(run, scores=scores | {"accuracy": 0.999}, accuracy=0.999)
    capsys.readouterr()
    assert main(["verify", str(run)]) == 0
    assert "not checked: " in (said := capsys.readouterr().out)
    assert "scores and extreme_clients in summary.json (--evaluate)" in said
    assert main(["verify", str(run), "--evaluate"]) == 1
    assert "summary.json: scores: recorded" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "forged",
    [
        {"accuracy": 0.999},
        {"accuracy_before": 0.001},
        {"loss": 0.001},
        {"accuracy_worst_class": 0.999},
        {"per_class": {"great": 1.0, "terrible": 1.0}, "accuracy_worst_class": 1.0},
        {"better": {"accuracy": "lower", "loss": "lower"}},
        {"extreme_clients": [1]},
    ],
    ids=lambda forged: next(iter(forged)),
)
def test_every_score_is_computed_anew(run: Path, forged: dict[str, Any]) -> None:
    changed_summary(run, **forged)
    assert main(["verify", str(run), "--evaluate"]) == 1


def test_verify_says_what_it_did_not_check(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    assert "not checked: " in capsys.readouterr().out
    assert main(["verify", str(run), "--json"]) == 0
    never = json.loads(capsys.readouterr().out)["not_checked"]
    assert any("times" in each for each in never)
    assert {"metrics.jsonl", "pictures and reports"} <= {*never}
    assert main(["verify", str(run), "--evaluate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_checked"] == [each for each in never if "scores" not in each]


def test_other_rows_than_the_run_s_are_noticed(run: Path, federation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores on easier rows are not the run's."""
    rows = federation / "data" / "validation.jsonl"
    saved = rows.read_text()
    try:
        rows.write_text(saved.splitlines(keepends=True)[0] * 12)
        assert main(["verify", str(run), "--evaluate"]) == 1
    finally:
        rows.write_text(saved)
    assert "the rows, and which client has which" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "change", [{"kind": "random"}, {"facts": {"text": "![x](http://evil.example)"}}, {"total": 10**9}, {"density": 0.5}]
)
def test_what_a_mask_says_of_itself_is_the_run_s(run: Path, change: dict[str, Any]) -> None:
    """The model card and the report tell it as a fact."""
    mask = SparseMask.load(run / "mask.safetensors")
    replace(mask, **change).save(run / "mask.safetensors")
    assert main(["verify", str(run)]) == 1


def test_a_mask_with_more_in_it_is_refused(run: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file = run / "mask.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    save_file(tensors, file, metadata=metadata | {"note": "audited"})
    assert main(["verify", str(run)]) == 1
    save_file(tensors | {"more": tensors["theta_0"].clone()}, file, metadata=metadata)
    assert main(["verify", str(run)]) == 1
    save_file(tensors, file, metadata=metadata)
    assert main(["verify", str(run)]) == 0
