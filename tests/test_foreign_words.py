"""Words from somebody else's folder stay words: no Markdown in a model card, no HTML in a report."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from meerkat.cli import main
from meerkat.export.model_card import model_card
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.classification import Classification
from meerkat.problems.tasks import Task
from meerkat.record import verification
from meerkat.record.run_folder import RunFolder
from meerkat.report import write_comparison_report, write_run_report

FOREIGN = (
    "<img src=http://evil.example/a>",
    "![x](http://evil.example/b)",
    "`![x](http://evil.example/c)`",
    r"\|![x](http://evil.example/d)",
    "```\n![x](http://evil.example/e)\n```",
    "http://evil.example/f",
    "---\n\n![x](http://evil.example/g)",
    "&lt;![x](http://evil.example/h)\\",
)
HTML = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(2)>"


@pytest.fixture(scope="module")
def finished(simulate_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("words") / "run"
    assert main([*simulate_arguments, "--rounds", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture
def theirs(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def outside_of_code(card: str) -> str:
    """What a reader of Markdown takes for Markdown: the body without fenced, indented and inline code."""
    body = card.split("\n---\n", 1)[1]
    body = re.sub(r"^```.*?^```$", "", body, flags=re.MULTILINE | re.DOTALL)
    body = re.sub(r"^    .*$", "", body, flags=re.MULTILINE)
    cells = [cell for line in body.splitlines() for cell in (_cells(line) if line.startswith("|") else [line])]
    return "\n".join(re.sub(r"`[^`]+`", "", cell) for cell in cells)


def _cells(row: str) -> list[str]:
    """A table's row ends its cells at a pipe, even inside of code, unless there is an odd number of backslashes."""
    return re.findall(r"(?:\\.|[^|\\])+", row)


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_model_card_holds_no_markdown_of_others(theirs: Path, foreign: str) -> None:
    run, folder = verification.verify(theirs), RunFolder(theirs)
    evaluations = [m for m in folder.metrics() if m["kind"] == "evaluation"]
    folder.rewrite_metrics(lambda _: False, lambda m: m["round"], [_renamed(m, foreign) for m in evaluations])
    folder.append_event("shown out", client=foreign)
    folder.append_event("shown out", client={"a": foreign})
    given = {"task": foreign, "data": foreign, "partition": foreign, "model": foreign, "text": foreign}
    hostile = replace(
        run,
        config=run.config.model_copy(update=given),
        mask=replace(run.mask, kind=foreign, facts=dict.fromkeys(("scope", "text", "task", "excluded"), foreign)),
        opening=replace(run.opening, torch=foreign, transformers=foreign),
    )
    for config in (hostile.config, hostile.config.model_copy(update={"data": ""})):
        text = _card(folder, replace(hostile, config=config), foreign)
        assert "evil.example" in text, "the words themselves may stand there"
        assert "evil" not in outside_of_code(text)
        front = yaml.safe_load(text.split("---\n")[1])
        assert {*front} <= {"base_model", "library_name", "tags", "datasets", "metrics"}


def _renamed(metric: Mapping[str, Any], foreign: str) -> dict[str, Any]:
    scores = {foreign: 0.5, "loss": 1.0}
    return {**metric, "scores": scores, "better": dict.fromkeys(scores, "higher"), "per_class": {foreign: 0.5}}


def _card(folder: RunFolder, run: verification.VerifiedRun, foreign: str) -> str:
    task = Task(foreign, f"{{text}} {foreign} {{label}}", (foreign, "b"))
    return model_card(folder, run, Classification(nn.Module(), task=task), "delta")


class Tags(HTMLParser):
    """The tags of a page, their attributes' names, and the values of those that could be an address or a style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value for name, value in attrs if value and name not in ("aria-label", "class", "d")]


def check_inert(html: str) -> None:
    page = Tags(html)
    assert not page.tags & {"script", "img", "iframe", "object", "link", "base", "form"}
    assert not [name for name in page.attributes if name.startswith("on") or name == "src"]
    assert not [value for value in page.addresses if "://evil" in value]


@pytest.mark.draws
def test_a_report_holds_no_html_of_others(theirs: Path) -> None:
    folder = RunFolder(theirs)
    metrics = [_with_html(metric) for metric in folder.metrics()]
    folder.metrics_path.write_text("".join(json.dumps(metric) + "\n" for metric in metrics))
    mask = SparseMask.load(folder.mask_path)
    replace(mask, kind=HTML, facts={**mask.facts, "text": HTML, "scope": HTML, "excluded": HTML}).save(folder.mask_path)
    summary = json.loads(folder.summary_path.read_text())
    summary |= {"task": HTML, "problem": HTML, "model": HTML, "theta_digest": HTML, "privacy": {"in_words": HTML}}
    folder.summary_path.write_text(json.dumps(summary))
    folder.append_event(HTML, client=HTML, why=HTML, round=0)
    config = folder.config().model_copy(update={"task": HTML, "data": HTML, "text": HTML, "model": HTML})
    folder.config_path.write_text(config.to_toml())
    html = write_run_report(theirs).read_text()
    assert "&lt;script&gt;" in html
    check_inert(html)


def _with_html(metric: Mapping[str, Any]) -> dict[str, Any]:
    if metric["kind"] == "evaluation":
        return {**metric, "per_class": {HTML + name: value for name, value in metric["per_class"].items()}}
    if metric["kind"] == "split":
        return {**metric, "labels": [HTML + label for label in metric["labels"]]}
    return {**metric, "note": HTML}


def a_comparison(root: Path, word: str, run: str = "cells/a") -> None:
    """A comparison whose every word is somebody else's."""
    root.mkdir()
    axes = {word: [word, "b"], "lr": [0.1, 0.2]}
    numbers = {"seeds": [0, 1], "diverged": [], "wall_s": [1.0, 1.0], "client_steps": [4, 4], "rates": [[0.1, 1.0]]}
    more = {"rounds": 2, "local_steps": 1, "params_masked": 3, "payload_bytes_up_per_client": 4.0, "best": True}
    more |= {
        "payload_bytes_down_per_client": 4.0,
        "early_stopped": [[], []],
        "calibration_steps": [0, 0],
        "runs": [run],
    }
    scores = {"scores": {word: [0.5, 0.6]}, "scores_before": {word: [0.1, 0.1]}, "worst_class": [None, None]}
    rows = [
        {"setting": {word: value, "lr": lr}, "lr": lr, "loss": [1.0, 1.0], **numbers, **more, **scores}
        for value in axes[word]
        for lr in axes["lr"]
    ]
    check = {"claim": word, "measure": word, "verdict": word, "mean": 0.1, "se": 0.1, "differences": []}
    study = {"name": word, "title": word, "note": word, "axes": axes, "score": word, "better": {word: "higher"}}
    studies = [{**study, "rows": rows, "checks": [check]}]
    content = {"format": 2, "title": word, "model": word, "task": word, "studies": studies}
    (root / "compare.json").write_text(json.dumps(content))


@pytest.mark.draws
def test_a_comparison_s_report_holds_no_html_of_others(tmp_path: Path) -> None:
    a_comparison(tmp_path / "all", HTML)
    html = write_comparison_report(tmp_path / "all").read_text()
    assert "&lt;script&gt;" in html
    check_inert(html)


def test_no_name_in_a_comparison_leads_out_of_its_folder(tmp_path: Path) -> None:
    outside = "/../" * 9 + str(tmp_path)[1:] + "/planted"
    a_comparison(tmp_path / "all", outside)
    (tmp_path / "all" / "figures").mkdir()
    for part in range(9):  # so that the system finds what it is to go back from
        (tmp_path / "all" / "figures" / f"study-{part}").mkdir()
    before = {*tmp_path.iterdir()}
    write_comparison_report(tmp_path / "all")
    assert {*tmp_path.iterdir()} == before


@pytest.mark.parametrize("run", ["../secret", "/etc", "cells/../../secret"])
def test_a_comparison_s_runs_are_in_its_folder(tmp_path: Path, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Else a report would show another's evaluations as this one's."""
    a_comparison(tmp_path / "all", "x", run)
    assert main(["report", str(tmp_path / "all")]) == 1
    assert "is not in its folder" in capsys.readouterr().err
