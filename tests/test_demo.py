import filecmp
import json
import subprocess
import sys
from pathlib import Path

import pytest

from meerkat import demo
from meerkat.cli import main
from meerkat.problems import causal_lm
from meerkat.problems.data import load_rows
from meerkat.problems.models import load_model
from meerkat.problems.tasks import encode

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_the_embedded_data_is_what_the_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPTS / "make_demo.py", "--data-only", "--out", tmp_path], check=True)
    made = {file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()}
    assert {Path("text.jsonl"), Path("data/topics/train.jsonl"), Path("data/reviews/task.toml")} <= made
    assert [file for file in made if not filecmp.cmp(tmp_path / file, demo.HERE / file, shallow=False)] == []


@pytest.mark.parametrize(("task", "chance"), [("topics", 0.25), ("reviews", 0.5)])
def test_the_embedded_model_stands_near_chance_before_fine_tuning(task: str, chance: float) -> None:
    model, tokenizer = load_model(str(demo.MODEL))
    loaded = demo.load_task(task)
    examples = encode(loaded, load_rows(str(demo.TASKS[task]), "validation"), tokenizer, 256)
    evaluation = causal_lm.evaluate(model, causal_lm.collate(examples, tokens_per_pass=2048), loaded.labels)
    assert abs(evaluation.scores["accuracy"] - chance) < 0.1


def test_the_demo_fits_into_a_repository() -> None:
    assert sum(file.stat().st_size for file in demo.HERE.rglob("*") if file.is_file()) < 5_000_000


@pytest.mark.draws
def test_simulate_without_arguments_runs_the_embedded_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", "--rounds", "2", "--text-sequences", "5"]) == 0
    out, err = capsys.readouterr()
    (folder,) = (tmp_path / "runs").iterdir()
    assert "meerkat on topics: accuracy 0." in out
    assert "2,209,792 bytes a round, 552,448 times as much" in out
    assert f"Run folder: runs/{folder.name}" in out
    assert "round    2 of 2: accuracy" in err
    assert (folder / "curves.png").stat().st_size > 10_000
    assert (folder / "curves.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_the_demo_learns_its_task(tmp_path: Path) -> None:
    assert main(["simulate", "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy_before"] < 0.35
    assert summary["accuracy"] >= 0.85
