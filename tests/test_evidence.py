"""Evidence: finished runs in a CSV file, which stand for their folders in the same comparison anywhere."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_compare import InThisProcess, command, comparison_of, results, settings

from meerkat.cli import main
from meerkat.comparison import cells, processes
from meerkat.comparison.evidence import COLUMNS, Evidence, Origin, Outcome, read
from meerkat.errors import MeerkatError
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.classification import Classification
from meerkat.run.setup import open_problem, resolve
from meerkat.settings.config import make_config

GRID = """
seeds = [0, 1]
search = { trials = 3 }

[[study]]
name = "grid"
method = ["meerkat", "random-mask", "lora-fedzo"]
check = [{ claim = "it wins", axis = "method", better = "meerkat", than = ["random-mask"], measure = "loss" }]
"""


@pytest.fixture(scope="module")
def compared(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished comparison, out, and its evidence."""
    folder = tmp_path_factory.mktemp("evidence")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
        assert main(command(folder, settings(federation) + GRID, "--evidence", str(folder / "runs.csv"))) == 0
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
    for name in ("simulate", "resume"):
        monkeypatch.setattr(cells, name, None)


def lines(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as rows:
        return list(csv.DictReader(rows))


def test_every_run_and_trial_is_added_once(compared: Path) -> None:
    added = lines(compared / "runs.csv")
    assert len(added) == 3 * (3 + 2)
    assert len({line["settings"] for line in added}) == len(added)
    finished = {line["theta_digest"]: line for line in added if not float(line["held_back"])}
    for row in results(compared / "out"):
        line = finished[row["theta_digest"]]
        assert [line[name] for name in ("method", "seed", "lr", "accuracy", "loss")] == [
            row[name] for name in ("method", "seed", "lr", "accuracy", "loss")
        ]
    assert len({tuple(line[f"{name}_digest"] for name in ("model", "rows", "text")) for line in added}) == 1


def test_the_file_names_no_folder_of_this_machine(compared: Path, federation: Path) -> None:
    said = (compared / "runs.csv").read_text()
    assert str(federation) not in said
    assert str(compared) not in said


@pytest.mark.usefixtures("nothing_runs")
def test_what_stands_there_is_not_run_again_wherever_model_and_rows_lie(
    compared: Path, federation: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(federation, moved)
    shutil.copy(compared / "runs.csv", tmp_path)
    assert main(command(tmp_path, settings(moved) + GRID, "--evidence", str(tmp_path / "runs.csv"))) == 0
    assert not list((tmp_path / "out" / "masks").iterdir())
    assert lines(tmp_path / "runs.csv") == lines(compared / "runs.csv")
    new, old = comparison_of(tmp_path / "out")["studies"][0], comparison_of(compared / "out")["studies"][0]
    assert new["checks"] == old["checks"]
    assert [{**row, "runs": ""} for row in new["rows"]] == [{**row, "runs": ""} for row in old["rows"]]
    assert all(row["runs"] == [] for row in new["rows"])
    assert "it wins" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("here")
def test_only_what_is_missing_is_run(
    compared: Path, federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "runs.csv"
    whole = (compared / "runs.csv").read_text().splitlines(keepends=True)
    gone = next(i for i, line in enumerate(lines(compared / "runs.csv")) if line["method"] == "random-mask")
    file.write_text("".join(whole[: gone + 1] + whole[gone + 2 :]))
    made = []
    simulate = cells.simulate
    monkeypatch.setattr(cells, "simulate", lambda config, out: (made.append(config.method), simulate(config, out))[1])
    assert main(command(tmp_path, settings(federation) + GRID, "--evidence", str(file))) == 0
    assert made == ["random-mask"]
    assert sorted(map(_lasting, lines(file))) == sorted(map(_lasting, lines(compared / "runs.csv")))


def _lasting(line: dict[str, str]) -> list[str]:
    return [line[name] for name in ("settings", "theta_digest", "lr", "loss", "held_back")]


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("change", ["model", "data", "text"])
def test_other_weights_rows_or_text_are_another_origin(
    compared: Path, federation: Path, tmp_path: Path, change: str
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(federation, moved)
    if change == "model":
        weights = moved / "model" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    else:
        file = moved / {"data": "data/train.jsonl", "text": "text.jsonl"}[change]
        row = json.loads((rows := file.read_text().splitlines())[0])
        field = "sentence" if change == "data" else "text"
        file.write_text("\n".join([json.dumps({**row, field: "dull " + row[field]}), *rows[1:]]) + "\n")
    shutil.copy(compared / "runs.csv", tmp_path)
    with pytest.raises(TypeError):  # something is to be run
        main(command(tmp_path, settings(moved) + GRID, "--evidence", str(tmp_path / "runs.csv")))


ORIGIN = Origin("m", "r", "t")


def _summary(**more: Any) -> dict[str, Any]:
    return {"model": "/somewhere/model", "scores": {"loss": 0.1}, **more}


def test_a_line_that_was_cut_off_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    evidence, config = Evidence(file, ORIGIN), make_config({"lr": 0.5})
    evidence.add(config, Outcome(0.5, _summary()), config)
    whole = file.read_bytes()
    other = make_config({"lr": 0.25})
    evidence.add(other, Outcome(0.25, None), other)
    both = file.read_bytes()
    for cut in (len(whole) + 1, len(both) - 1):
        file.write_bytes(both[:cut])
        assert [entry.outcome.lr for entry in read(file)] == [0.5]
        assert evidence.outcome(other) is None
        evidence.add(other, Outcome(0.25, None), other)
        assert file.read_bytes() == both
    assert evidence.outcome(other) == Outcome(0.25, None)
    assert evidence.outcome(config) == Outcome(0.5, _summary(model="model"))
    assert Evidence(file, Origin("m", "r", "u")).outcome(config) is None


def test_a_given_mask_is_known_by_its_entries(compared: Path, tmp_path: Path) -> None:
    file, made = tmp_path / "runs.csv", (compared / "out" / "masks").resolve()
    mask = next(path for path in made.iterdir() if SparseMask.load(path).kind == "sensitivity")
    shutil.copy(mask, tmp_path / "copy.safetensors")
    of = {path: make_config({"mask": str(path), "lr": 0.5}) for path in (mask, tmp_path / "copy.safetensors")}
    given, theirs = Evidence(file, ORIGIN), Evidence(file, ORIGIN, made)
    given.add(of[mask], Outcome(0.5, None), of[mask])
    assert given.outcome(of[tmp_path / "copy.safetensors"]) is not None
    assert theirs.outcome(of[tmp_path / "copy.safetensors"]) is not None
    assert theirs.outcome(of[mask]) is None  # made for a comparison: it follows from other settings
    assert theirs.outcome(make_config({"lr": 0.5})) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,b\n1,2\n", "does not begin with the columns of runs"),
        (b'{"one": "line without an end"}', "does not begin with the columns of runs"),
        (b"\xff\xfe\n", "does not begin with the columns of runs"),
        (",".join([*COLUMNS[:-1], "other\n"]).encode(), "does not begin with the columns of runs"),
        (",".join(COLUMNS).encode() + b"\nm,1\n", "holds no runs of comparisons"),
        (",".join(COLUMNS).encode() + b"\n" + b"{," * (len(COLUMNS) - 1) + b"{\n", "holds no runs of comparisons"),
    ],
)
def test_another_file_is_refused_in_one_line_and_left_as_it_is(
    federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    file = tmp_path / "other.csv"
    file.write_bytes(content)
    assert main(command(tmp_path, settings(federation) + GRID, "--evidence", str(file))) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in message
    assert str(file) in message
    assert file.read_bytes() == content
    assert not (tmp_path / "out").exists()


def test_a_file_in_no_folder_is_refused(federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, settings(federation) + GRID, "--evidence", str(tmp_path / "no" / "runs.csv"))) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(command(tmp_path, settings(federation) + GRID, "--evidence", str(tmp_path))) == 2
    assert capsys.readouterr().err.endswith("is a folder; give a .csv file, which need not exist yet\n")
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_under_way_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    config = make_config({"lr": 0.5})
    file.write_text("a line without an end")
    with pytest.raises(MeerkatError, match="does not begin with the columns"):
        Evidence(file, ORIGIN).add(config, Outcome(0.5, None), config)
    assert file.read_text() == "a line without an end"


def test_a_long_summary_can_be_read_back(tmp_path: Path) -> None:
    config, evidence = make_config({"lr": 0.5}), Evidence(tmp_path / "runs.csv", ORIGIN)
    many = _summary(extreme_clients=[*range(50_000)])
    evidence.add(config, Outcome(0.5, many), config)
    outcome = evidence.outcome(config)
    assert outcome is not None
    assert outcome.summary == {**many, "model": "model"}


@pytest.mark.usefixtures("here")
def test_a_folder_whose_rows_were_replaced_is_refused(
    federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished runs are not looked into: what was run on other rows must not be told of these."""
    moved = tmp_path / "here"
    shutil.copytree(federation, moved)
    text = settings(moved, method="full-fedzo", lr=1e-3, seeds=[0])
    arguments = command(tmp_path, text, "--evidence", str(tmp_path / "runs.csv"))
    assert main(arguments) == 0
    rows = (moved / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (moved / "data" / "train.jsonl").write_text("".join(rows[1:]))
    before = (tmp_path / "runs.csv").read_bytes()
    assert main(arguments) == 2
    assert "used other weights, rows or text" in capsys.readouterr().err
    assert (tmp_path / "runs.csv").read_bytes() == before


@pytest.mark.usefixtures("here")
def test_a_folder_that_was_begun_without_evidence_gives_none(
    federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(tmp_path, settings(federation, method="full-fedzo", lr=1e-3, seeds=[0]))
    assert main(arguments) == 0
    assert main([*arguments, "--evidence", str(tmp_path / "runs.csv")]) == 2
    assert "was begun without --evidence" in capsys.readouterr().err
    assert not (tmp_path / "runs.csv").exists()
    (tmp_path / "out" / "origins.json").write_text("{")
    assert main([*arguments, "--evidence", str(tmp_path / "runs.csv")]) == 2
    assert "origins.json: damaged" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_runs")
def test_the_same_command_again_still_finds_its_runs(compared: Path, federation: Path) -> None:
    before = comparison_of(compared / "out")
    assert main(command(compared, settings(federation) + GRID, "--evidence", str(compared / "runs.csv"))) == 0
    assert comparison_of(compared / "out") == before
    assert all(len(row["runs"]) == 2 for row in before["studies"][0]["rows"])


def test_rows_and_texts_are_known_by_all_of_them(federation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A partition may look at fields that the model does not see, and a mask reads more of a text than a task does."""
    given = {name: str(federation / name) for name in ("model", "data")}
    given |= {"text": str(federation / "text.jsonl"), "task": "sst2"}
    problem = open_problem(resolve(make_config({**given, "threads": 1})))
    origin, rows, public = Origin.of(problem), problem.rows, problem.public()
    assert public is not None
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "rows", lambda _, split: [{**row, "site": 1} for row in rows(split)])
        assert Origin.of(problem) == replace(origin, rows=Origin.of(problem).rows) != origin
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "public", lambda _: replace(public, examples=public.examples[:-1]))
        assert Origin.of(problem) == replace(origin, text=Origin.of(problem).text) != origin
    assert Origin.of(problem) == origin


def test_a_default_that_changes_changes_what_evidence_says() -> None:
    """Settings at their defaults are left out: whoever changes one has to write the old value into the files."""
    defaults = make_config({}).model_dump(mode="json")
    changed = {name: value for name, value in DEFAULTS.items() if defaults[name] != value}
    assert not changed
    assert defaults.keys() == DEFAULTS.keys()


DEFAULTS: dict[str, Any] = {
    "model": "embedded",
    "task": "",
    "data": "",
    "text": "",
    "problem": "classification",
    "objective": "classification",
    "max_length": 2048,
    "chat_template": "off",
    "text_sequences": 256,
    "text_length": 256,
    "partition": "dirichlet:0.5",
    "held_back": 0.0,
    "max_eval_samples": 0,
    "method": "meerkat",
    "density": 0.001,
    "mask": "",
    "mask_scope": "global",
    "exclude": ["embeddings"],
    "local_steps": 1,
    "batch_size": 16,
    "estimator": "plain",
    "directions": 1,
    "eps": "auto",
    "lr": "auto",
    "lr_schedule": "linear",
    "update_rule": "sgd",
    "server_lr": "auto",
    "server_beta1": 0.9,
    "server_beta2": 0.99,
    "server_tau": 1e-09,
    "feddyn_alpha": 0.001,
    "clients": 10,
    "clients_per_round": 0,
    "rounds": 200,
    "weights": "examples",
    "eval_every": 20,
    "seed": 0,
    "dp": "none",
    "dp_epsilon": 0.0,
    "dp_delta": 1e-05,
    "dp_clip": 1.0,
    "dp_noise_multiplier": "auto",
    "dp_relation": "add-or-remove",
    "aggregation": "mean",
    "byzantine": 0,
    "mixing": "none",
    "clipping": "none",
    "clip_norm": 0.0,
    "max_step_norm": 100.0,
    "attack": "none",
    "attackers": 0,
    "attack_scale": "auto",
    "early_stop": "by-method",
    "vpcs_rule": "automatic",
    "calibration_steps": 100,
    "initial_steps": 30,
    "later_steps": 30,
    "rho_later": 2.0,
    "rho_quie": 0.5,
    "sigma": 0.25,
    "missing_steps": "zero",
    "gradip": "on",
    "recalibrate_every": 0,
    "device": "auto",
    "dtype": "auto",
    "quantize": "none",
    "batching": "auto",
    "micro_batch": 0,
    "tokens_per_pass": "auto",
    "threads": "auto",
    "tracker": "none",
}
