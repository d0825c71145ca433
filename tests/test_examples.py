"""The examples run as they are, and every comparison they describe can be read."""

from collections.abc import Callable
from pathlib import Path

import pytest
from nursery import Command

from meerkat.comparison.studies import read_comparison

EXAMPLES = Path(__file__).parents[1] / "examples"


RunExample = Callable[..., Command]


def test_the_library_example_learns_in_sixty_lines(run_example: RunExample) -> None:
    script = EXAMPLES / "library.py"
    assert len(script.read_text().splitlines()) <= 60
    outcome = run_example(script)
    assert outcome.returncode == 0, outcome.stderr
    said = outcome.stdout
    before, after = (float(said.split(word)[0].split()[-1]) for word in (" before", " after"))
    assert after > before + 0.05


@pytest.mark.parametrize(("data", "status", "said"), [("data", 0, "Report: "), ("nowhere", 2, "make llm: data ")])
def test_a_language_model_is_tuned_and_its_page_is_shown(
    run_example: RunExample, federation: Path, tmp_path: Path, data: str, status: int, said: str
) -> None:
    named = ["--model", "model", "--data", f"./{data}", "--text", "text.jsonl", "--rounds", "2"]
    outcome = run_example(EXAMPLES / "llm.py", [*named, "--out", str(tmp_path / "run")], folder=federation)
    assert outcome.returncode == status, outcome.stderr
    [line] = [line for line in (outcome.stdout + outcome.stderr).splitlines() if line.startswith(said)]
    if not status:
        assert Path(line.removeprefix(said)).is_file()


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("claims/**/*.toml")), ids=lambda file: file.stem)
@pytest.mark.parametrize("quick", [False, True])
def test_a_claim_s_comparison_can_be_read(file: Path, quick: bool) -> None:
    comparison = read_comparison(file, {}, quick)
    assert all(study.title and study.note for study in comparison.studies)
    if file.stem != "tasks":  # a pilot
        assert len(comparison.seeds) >= (2 if quick else 3)
        assert any(study.check for study in comparison.studies)
