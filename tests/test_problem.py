"""The seam between what is learned and how: a second problem goes through every command that the first one does."""

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import problems
import pytest
import torch
from federation import Federation, Setting
from torch import nn

from meerkat.algorithm import path
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.cli import main
from meerkat.comparison import compare as compare_module
from meerkat.errors import Diverged, MeerkatError
from meerkat.export.model import apply_delta
from meerkat.federation.site_settings import SiteConfig
from meerkat.problems.module import ModuleProblem, Score, Tensors, right
from meerkat.problems.problem import client_losses
from meerkat.record import run_log
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import LogReader
from meerkat.report import write_run_report
from meerkat.run.evaluate import evaluate, load_run
from meerkat.run.mask import make_mask
from meerkat.run.metrics import EvaluationMetric
from meerkat.run.setup import PROBLEMS, open_problem, resolve
from meerkat.settings.config import make_config

RUN = ["--problem", "shapes", "--threads", "1", "--device", "cpu", "--clients", "3", "--partition", "single-label"]
RUN += ["--density", "0.5", "--exclude", "none", "--rounds", "30", "--eval-every", "10", "--lr", "0.1"]
NUMBERS = ["--problem", "numbers", "--threads", "1", "--device", "cpu", "--clients", "2", "--partition", "iid"]
NUMBERS += ["--method", "full-fedzo", "--rounds", "20", "--eval-every", "10", "--lr", "0.05"]


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in problems.PROBLEMS.items():
        monkeypatch.setitem(PROBLEMS, name, make)


def simulated(capsys: pytest.CaptureFixture[str], out: Path, arguments: list[str]) -> dict[str, Any]:
    assert main(["simulate", *arguments, "--out", str(out), "--json"]) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out)
    return summary


def test_it_runs_and_is_evaluated_verified_reported_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    summary = simulated(capsys, run, RUN)
    assert summary["problem"] == "shapes"
    assert (summary["model"], summary["task"]) == ("", "")
    assert summary["score"] == "accuracy"
    assert summary["better"] == {"accuracy": "higher", "loss": "lower"}
    assert summary["loss"] < summary["loss_before"]
    assert summary["scores"] == {"accuracy": summary["accuracy"], "loss": summary["loss"]}
    assert set(summary["per_class"]) == set(problems.SHAPES)
    assert summary["accuracy_worst_class"] == min(summary["per_class"].values())

    assert main(["verify", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["theta_digest"] == summary["theta_digest"]
    assert main(["evaluate", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["scores"] == summary["scores"]
    assert told["per_class"] == summary["per_class"]
    assert told["rows"] == 60

    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "meerkat on shapes" in page
    assert "embedded" not in page.split("<section")[0]
    assert main(["export", str(run), "--to", str(tmp_path / "whole")]) == 2
    assert "--form merged: writes a Hugging Face model, and that of problem 'shapes' is none; use --form delta" in (
        capsys.readouterr().err
    )
    assert main(["export", str(run), "--to", str(tmp_path / "delta"), "--form", "delta"]) == 0
    fresh = problems.shapes(make_config({"device": "cpu"}))
    apply_delta(fresh.model, tmp_path / "delta" / "delta.safetensors")
    batch = fresh.batch(fresh.prepare(fresh.rows("validation")))
    assert fresh.evaluate(batch).scores == summary["scores"]
    card = (tmp_path / "delta" / "README.md").read_text()
    assert "tuned for `shapes`" in card
    assert "causal" not in card
    assert "AutoModel" not in card


def test_it_resumes_after_a_kill_with_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = simulated(capsys, tmp_path / "whole", RUN)
    append, rounds = run_log.RunLog.append, 0

    def killed(self: run_log.RunLog, record: Mapping[str, Any]) -> None:
        nonlocal rounds
        append(self, record)
        rounds += record["kind"] == "round"
        if rounds == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_log.RunLog, "append", killed)
        assert main(["simulate", *RUN, "--out", str(tmp_path / "run")]) == 130
    assert len(list(LogReader(tmp_path / "run" / "rounds.log"))) == 8
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["theta_digest"] == whole["theta_digest"]


def test_other_rows_are_noticed_when_it_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated(capsys, tmp_path / "run", RUN)
    (tmp_path / "run" / "summary.json").unlink()
    plain = problems.pictures
    monkeypatch.setattr(problems, "pictures", lambda seed, each: plain(seed + (seed < 3), each))
    assert main(["resume", str(tmp_path / "run")]) == 2
    assert "the rows, their split or how they are prepared (task, tokenizer) was changed" in capsys.readouterr().err


def test_without_labels_and_public_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores of any name, of which less is better; what needs labels or public data says so in a line."""
    run = tmp_path / "run"
    summary = simulated(capsys, run, NUMBERS)
    assert (summary["score"], summary["better"]) == ("absolute error", {"absolute error": "lower", "loss": "lower"})
    assert summary["scores"]["absolute error"] < summary["scores_before"]["absolute error"]
    assert summary["loss"] == summary["scores"]["loss"]
    assert not {"accuracy", "accuracy_before", "accuracy_worst_class"} & set(summary)
    assert summary["per_class"] == {}
    assert not [m for m in RunFolder(run).metrics() if m["kind"] == "split"]
    page = write_run_report(run).read_text()
    assert "Absolute error on validation rows went from" in page
    assert "Mean absolute error on validation rows; lower is better." in page
    assert main(["export", str(run), "--to", str(tmp_path / "delta"), "--form", "delta"]) == 0
    assert "| after round | `absolute error` | `loss` |" in (tmp_path / "delta" / "README.md").read_text()
    for arguments, line in (
        (["--partition", "dirichlet:1"], "partition 'dirichlet:1': goes by labels, and these rows have none; use iid"),
        (["--attack", "label-flip", "--attackers", "1"], "attack label-flip: flips labels, and problem 'numbers' has"),
        (["--method", "meerkat"], "method meerkat: makes its mask from public data, and problem 'numbers' has none"),
        (["--method", "lora-fedzo"], "PEFT has no default LoRA layers"),
        (["--problem", "sounds"], "problem 'sounds': not known here"),
    ):
        capsys.readouterr()
        assert main(["simulate", *NUMBERS, *arguments, "--out", str(tmp_path / "none")]) == 2
        error = capsys.readouterr().err
        assert line in error
        assert len([text for text in error.splitlines() if text.startswith("meerkat: ")]) == 1


class Inline:
    """In place of processes of their own, which know no problem of a test's."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *_: object) -> None: ...

    def map_unique(self, _: str, tasks: Mapping[Any, tuple[Any, ...]], __: Callable[..., str]) -> dict[Any, Any]:
        return {key: task[0](*task[1:]) for key, task in tasks.items()}


def test_a_comparison_by_a_score_of_which_less_is_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "Pool", Inline)
    file, out = tmp_path / "compare.toml", tmp_path / "comparison"
    claims = ""
    for measure in ("", "loss"):
        claims += '[[study.check]]\nclaim = "more rounds learn more"\naxis = "rounds"\nbetter = 40\nthan = [1]\n'
        claims += f'measure = "{measure}"\n' if measure else ""
    file.write_text(
        'problem = "numbers"\nmethod = "full-fedzo"\npartition = "iid"\nclients = 2\ndevice = "cpu"\n'
        f"seeds = [0, 1, 2]\nlr = 0.05\nrounds = [1, 40]\n[[study]]\nname = 'errors'\n{claims}"
    )
    assert main(["compare", str(file), "--out", str(out), "--json"]) == 0
    study = json.loads(capsys.readouterr().out)["studies"][0]
    assert (study["score"], study["better"]["absolute error"]) == ("absolute error", "lower")
    short, long = study["rows"]
    assert (short["best"], long["best"]) == (False, True)
    assert np.mean(long["scores"]["absolute error"]) < np.mean(short["scores"]["absolute error"])
    for check, measure in zip(study["checks"], ("absolute error", "loss"), strict=True):
        assert check["measure"] == measure
        assert check["verdict"] == "holds"
        assert check["mean"] == pytest.approx(np.mean(short["scores"][measure]) - np.mean(long["scores"][measure]))
    with (out / "table.csv").open(newline="") as lines:
        table = list(csv.DictReader(lines))
    assert float(table[1]["absolute error_mean"]) == pytest.approx(np.mean(long["scores"]["absolute error"]))
    with (out / "results.csv").open(newline="") as lines:
        assert float(next(csv.DictReader(lines))["absolute error"]) == short["scores"]["absolute error"][0]
    page = (out / "report.html").read_text()
    assert "absolute error +" in page
    assert "embedded" not in page

    file.write_text(file.read_text().replace('"loss"', '"accuracy"'))
    assert main(["compare", str(file), "--out", str(tmp_path / "other")]) == 2
    assert "measure accuracy: must be one of the problem's scores, absolute error, loss" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_problem_is_no_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text('problem = ["numbers", "shapes"]\n')
    assert main(["compare", str(tmp_path / "c.toml"), "--out", str(tmp_path / "out")]) == 2
    assert "problem is no axis" in capsys.readouterr().err


# --- in a federation ---


def test_sites_learn_it_as_its_simulation_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites that take their rows from the problem end up where the same clients in one process do."""
    monkeypatch.setattr(SiteConfig, "check_settings", lambda *_: None)
    given = {"problem": "shapes", "density": 0.9, "exclude": "none", "clients": 1, "partition": "iid", "rounds": 4}
    config = resolve(make_config({**given, "lr": 0.1, "eps": 1e-3, "dtype": "float32", "threads": 1, "device": "cpu"}))
    setting = Setting(tmp_path, tmp_path, config, make_mask(config, open_problem(config)), [120])
    (tmp_path / "0").mkdir()
    federation = Federation.of(setting, monkeypatch, join=0)
    federation.enter(0, evaluate=True)
    for digest in setting.simulated():
        federation.round()
        assert path.digest(federation.state.theta) == digest
    told = federation.engine.evaluate(federation.state.theta, federation.state.round)
    problem = open_problem(setting.config)
    MaskedModel(problem.model, setting.mask).write_(federation.state.theta)
    here = problem.evaluate(problem.batch(problem.prepare(problem.rows("validation")), "evaluation"))
    assert (told.scores, told.rows) == ({"accuracy": here.scores["accuracy"]}, here.rows)


# --- a module as a problem ---


def test_losses_scores_and_digests_are_the_literal_ones() -> None:
    problem = problems.shapes(make_config({"device": "cpu"}))
    rows = problem.rows("validation")
    examples = problem.prepare(rows)
    losses = []
    for row in rows:
        logits = problem.model(row["input"][None])[0]
        losses.append((logits.logsumexp(0) - logits[row["label"]]).item())
    assert problem.row_losses(problem.batch(examples)).tolist() == pytest.approx(losses, rel=1e-5)
    evaluation = problem.evaluate(problem.batch(examples, "evaluation"))
    assert evaluation.rows == 60
    assert evaluation.scores["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    hits = [problem.model(row["input"][None]).argmax().item() == row["label"] for row in rows]
    assert evaluation.scores["accuracy"] == pytest.approx(np.mean(hits))
    for k, label in enumerate(problems.SHAPES):
        assert evaluation.per_class[label] == pytest.approx(np.mean(hits[k::3]))
    means = client_losses(problem, examples)([np.array([0, 3]), np.array([5])])()
    assert means.tolist() == pytest.approx([(losses[0] + losses[3]) / 2, losses[5]], rel=1e-5)
    assert problem.digest(examples) != problem.digest(examples[::-1])
    assert problem.digest(examples) == problem.digest(problem.prepare(problem.rows("validation")))
    assert not any(p.requires_grad for p in problem.model.parameters())


def test_a_score_that_is_not_finite_has_diverged() -> None:
    data = Tensors(torch.ones(2, 1), torch.tensor([0, 1]))
    problem = ModuleProblem(nn.Linear(1, 2), lambda o, _: o[:, 0] / 0, data, data, ("a", "b"), {"a": Score(right)})
    with pytest.raises(Diverged, match="the score loss is not finite"):
        problem.evaluate(problem.batch(problem.prepare(problem.rows("train"))))
    with pytest.raises(MeerkatError, match="split 'test': the problem has no such rows"):
        problem.rows("test")


def test_the_scores_of_a_run_are_those_of_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = simulated(capsys, tmp_path / "run", RUN)
    replayed, problem = load_run(tmp_path / "run")
    assert torch.equal(MaskedModel(problem.model, replayed.mask).read(), replayed.theta)
    assert evaluate(tmp_path / "run").scores == summary["scores"]
    assert open_problem(replayed.config).labels == problems.SHAPES


@pytest.mark.parametrize("method", ["meerkat-vp", "weight-magnitude", "task-mask", "feddyn", "fo-fedavg"])
def test_every_method_runs_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    options = ["--method", method, "--rounds", "2", "--local-steps", "2", "--lr", "1e-3"]
    summary = simulated(capsys, tmp_path / "run", [*RUN, *options])
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert summary["method"] == method


def test_evaluations_are_read_as_they_were_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "meerkat-vp", "--rounds", "2", "--local-steps", "2", "--calibration-steps", "60"]
    simulated(capsys, tmp_path / "run", [*RUN, *options, "--lr", "1e-3"])
    lines = RunFolder(tmp_path / "run").metrics()
    assert {line["kind"] for line in lines} == {"split", "evaluation", "round", "calibration"}
    for line in (line for line in lines if line["kind"] == "evaluation"):
        metric = EvaluationMetric.from_json(line)
        assert list(metric.to_json().items()) == list(line.items())
        assert EvaluationMetric.from_json(metric.to_json()) == metric
