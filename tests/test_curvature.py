"""The learning rates of a run that names none: from the curvature of its task's loss on public text."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Setting
from torch import Tensor

from meerkat.algorithm import curvature as module
from meerkat.algorithm.curvature import Curvature, curvature
from meerkat.algorithm.directions import Directions, run_key
from meerkat.algorithm.rounds import RoundPlan, Update
from meerkat.algorithm.update_rules import FedAdam, FedAvg, FedAvgM, UpdateRule
from meerkat.cli import main
from meerkat.errors import MeerkatError
from meerkat.masks.sparse_mask import CURVATURE, SparseMask
from meerkat.record import verification
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import LogReader
from meerkat.run.curvature import _roots, with_rates
from meerkat.run.setup import open_problem
from meerkat.settings.config import RunConfig


def gradients_of(rows: int, entries: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    scales = torch.logspace(1, -1, 20)[:, None]
    return torch.randn(rows, 20, generator=generator) @ (scales * torch.randn(20, entries, generator=generator))


# --- the matrix ---


@pytest.mark.parametrize("count", [1, 7, 16, 17, 333])
def test_trace_and_largest_eigenvalue_are_those_of_the_whole_matrix(count: int) -> None:
    gradients = gradients_of(count, 70)
    known = curvature(iter(gradients), rows=9)
    dense = gradients.double().T @ gradients.double() / 9
    assert known.trace == pytest.approx(float(dense.trace()), rel=1e-6)
    assert known.largest == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-3)


def test_of_long_gradients_some_entries_tell_the_share_of_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = gradients_of(100, 5000)
    whole = curvature(iter(gradients), rows=100)
    monkeypatch.setattr(module, "_MOST_ENTRIES", 700)
    part = curvature(iter(gradients), rows=100)
    assert part.trace == whole.trace
    assert part.largest != whole.largest
    assert part.largest == pytest.approx(whole.largest, rel=0.1)


def test_without_a_gradient_there_is_no_curvature() -> None:
    assert curvature(iter(torch.zeros(3, 5)), rows=3) == Curvature(0, 0)


@pytest.mark.parametrize("candidates", [2, 3, 7])
def test_roots_are_of_the_covariance_of_equally_likely_candidates(candidates: int) -> None:
    roots = _roots(candidates).double()
    equal = torch.full((candidates, candidates), 1 / candidates**2, dtype=torch.float64)
    assert torch.allclose(roots.T @ roots, torch.eye(candidates) / candidates - equal, atol=1e-7)
    assert len(roots) == candidates - 1


# --- the rate ---


@pytest.mark.parametrize("directions", [1, 2, 5])
def test_no_other_rate_descends_faster_on_the_average(directions: int) -> None:
    stiff = torch.tensor([4.0, 1.0, 0.5, 0.2], dtype=torch.float64)
    known = Curvature(float(stiff.sum()), 4.0)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(200_000, directions, 4, generator=generator, dtype=torch.float64)
    gradient = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    step = ((z @ gradient)[..., None] * z).mean(1)  # g z, averaged over directions
    slope, bend = float((step @ gradient).mean()), float((step.square() @ stiff).mean())
    # the loss changes by -eta slope + eta^2 / 2 bend on the average
    assert known.rate(directions) == pytest.approx(slope / bend, rel=0.02)


def test_exact_gradients_are_many_directions() -> None:
    known = Curvature(10.0, 4.0)
    assert known.rate(10**9) == pytest.approx(known.rate_of_gradients) == 0.25


@pytest.mark.parametrize(("steps", "directions"), [(1, 1), (9, 1), (2, 5)])
def test_rounds_count_as_much_by_adam_and_momentum_as_by_plain_steps(steps: int, directions: int) -> None:
    known, width, rounds = Curvature(4.0, 1.0), 40, 600
    rng, z = np.random.default_rng(2), Directions(run_key(3), width)
    rules: list[UpdateRule] = [FedAvg(), FedAvgM(0.1, beta1=0.9), FedAdam(known.adam_rate(steps, directions), 0.9)]
    thetas = [torch.zeros(width)] * len(rules)
    moments = [rule.init(theta) for rule, theta in zip(rules, thetas, strict=True)]
    middle = thetas
    for r in range(rounds):
        g = (known.slope * rng.normal(size=(steps, directions))).astype(np.float32)
        update = Update(RoundPlan(r, 0.1, 1e-3, directions, {0: steps}), g, 1.0)
        for which, rule in enumerate(rules):
            thetas[which], moments[which] = rule.apply(thetas[which], moments[which], update, z)
        if r == rounds // 2:  # Adam's second moment has grown to its size
            middle = [*thetas]
    plain, *others = ((theta - before).norm() for theta, before in zip(thetas, middle, strict=True))
    for moved in others:
        assert float(moved / plain) == pytest.approx(1, rel=0.15)


# --- runs ---


def dense_curvature(setting: Setting) -> Tensor:
    """H at the mask by backpropagation through each candidate's loss: float64 [n, n]."""
    problem = open_problem(setting.config)
    public = problem.public()
    assert public is not None
    parameters = dict(problem.model.named_parameters())
    moving = [parameters[name].requires_grad_() for name in setting.mask.entries]
    total = torch.zeros(len(setting.mask), len(setting.mask), dtype=torch.float64)
    count = len(problem.labels)
    for row in public.rows:
        each = []
        for label in range(count):
            loss = problem.row_losses(problem.batch(problem.prepare([{**row, "label": label}]), "gradient"))[0]
            parts = zip(torch.autograd.grad(loss, moving), setting.mask.entries.values(), strict=True)
            each.append(torch.cat([g.flatten() if at is None else g.flatten()[at] for g, at in parts]).double())
        apart = torch.stack(each) - torch.stack(each).mean(0)
        total += apart.T @ apart / count
    return total / len(public.rows)


@pytest.fixture
def setting(federation: Path, tmp_path: Path) -> Setting:
    return Setting.make(federation, tmp_path / "sites", density=0.02)


def settled(setting: Setting, **changes: Any) -> tuple[RunConfig, SparseMask]:
    config = setting.config.model_copy(update={"lr": "auto", **changes})
    return with_rates(config, open_problem(config), setting.mask)


def test_the_rate_is_measured_on_public_text(setting: Setting) -> None:
    dense = dense_curvature(setting)
    trace, largest = float(dense.trace()), float(torch.linalg.eigvalsh(dense)[-1])
    for directions in (1, 3):
        rate = 0.45 * directions / (trace + (directions + 1) * largest)
        assert settled(setting, directions=directions)[0].lr == pytest.approx(rate, rel=0.05)
    assert settled(setting, method="fo-fedavg")[0].lr == pytest.approx(0.45 / largest, rel=0.05)
    assert settled(setting, method="feddyn")[0].lr == pytest.approx(0.04 / (trace + 2 * largest), rel=0.05)


def test_adams_rate_is_the_size_of_the_scalars_on_public_text(setting: Setting) -> None:
    slope = math.sqrt(float(dense_curvature(setting).trace()))
    left: dict[str, Any] = {"lr": 0.5, "update_rule": "adam", "server_lr": "auto"}
    for steps, directions in ((1, 1), (9, 4)):
        config, mask = settled(setting, **left, local_steps=steps, directions=directions)
        assert config.server_lr == pytest.approx(slope / 4 * math.sqrt(steps / directions), rel=0.05)
        assert config.lr == 0.5
        assert CURVATURE in mask.facts
    clipped = {"dp": "example", "dp_epsilon": 8.0, "dp_clip": slope / 40}
    assert settled(setting, **left, **clipped)[0].server_lr == pytest.approx(slope / 40, rel=0.05)
    several = settled(setting, **left, **clipped, directions=4)[0].server_lr
    assert several == pytest.approx(slope / 40 / 4, rel=0.05)  # four are clipped together, and their mean is taken
    fixed = {"clipping": "fixed", "clip_norm": slope / 40, "local_steps": 9, "directions": 4}
    assert settled(setting, **left, **fixed)[0].server_lr == pytest.approx(slope / 40 / 4, rel=0.05)
    config, mask = settled(setting, **left, method="fo-fedavg", local_steps=3)
    assert config.server_lr == pytest.approx(3 * slope / 4 / math.sqrt(len(mask)), rel=0.05)


def test_a_server_rate_left_out_is_settled_once(simulate_arguments: list[str], tmp_path: Path) -> None:
    servers = {"momentum": ["--server-beta1", "0.8"], "adam": ["--lr", "auto"], "sgd": []}
    rates = {}
    for rule, more in servers.items():
        out = tmp_path / rule
        assert main([*simulate_arguments, "--update-rule", rule, *more, "--rounds", "2", "--out", str(out)]) == 0
        rates[rule] = RunFolder(out).config().server_lr
        assert verification.verify(out).finished
    assert main(["report", str(tmp_path / "adam")]) == 0
    assert f", adam at {rates['adam']:g}." in (tmp_path / "adam" / "report.html").read_text()
    known = json.loads(RunFolder(tmp_path / "adam").mask().facts[CURVATURE])
    adam = 0.25 * math.sqrt(known["trace"])
    assert rates == {"momentum": 0.2, "adam": pytest.approx(adam, rel=0.05), "sgd": 1.0}


def test_no_step_is_much_longer_than_theta(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meerkat.run.curvature.curvature", lambda *_: Curvature(1e-9, 1e-10))
    theta = setting.theta_0
    expected = 10 * float(theta.norm()) / (len(theta) * 1e-9) ** 0.5
    assert settled(setting)[0].lr == pytest.approx(expected, rel=0.05)
    assert expected < 0.45 / (1e-9 + 2e-10)


def test_a_rate_that_was_given_is_not_measured(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meerkat.run.curvature.curvature", None)  # whoever measures fails
    config, mask = settled(setting, lr=0.25)
    assert config.lr == 0.25
    assert mask is setting.mask


def test_a_mask_that_says_what_was_measured_on_the_same_rows_is_believed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, mask = settled(setting)
    assert json.loads(mask.facts[CURVATURE])["trace"] > json.loads(mask.facts[CURVATURE])["largest"] > 0
    assert mask.description_digest() == setting.mask.description_digest()
    assert mask.digest() == setting.mask.digest()
    monkeypatch.setattr("meerkat.run.curvature.curvature", None)
    again = replace(setting, mask=mask)
    assert settled(again)[0].lr == config.lr
    with pytest.raises(TypeError):  # fewer texts
        settled(again, text_sequences=1)


@pytest.mark.parametrize(
    "change", [{"trace": -1.0}, {"largest": 0.0}, {"trace": 1e999}, {"trace": "much"}, {"of": 7}, None]
)
def test_what_a_mask_cannot_have_measured_is_measured_again(setting: Setting, change: dict[str, Any] | None) -> None:
    config, mask = settled(setting)
    fact = "[]" if change is None else json.dumps(json.loads(mask.facts[CURVATURE]) | change)
    again = replace(setting, mask=replace(mask, facts={**mask.facts, CURVATURE: fact}))
    assert settled(again)[0].lr == config.lr
    assert settled(again)[1].facts == mask.facts


def test_what_was_measured_on_other_rows_is_not_said_of_a_run_whose_rate_was_given(setting: Setting) -> None:
    _, mask = settled(setting)
    same = replace(setting, mask=mask)
    assert settled(same, lr=0.25)[1].facts == mask.facts
    assert CURVATURE not in settled(same, lr=0.25, text_sequences=1)[1].facts


@pytest.mark.parametrize("method", ["meerkat", "full-fedzo", "lora-fedzo", "random-mask", "fo-fedavg"])
def test_a_rate_left_out_is_settled_once_and_used(simulate_arguments: list[str], tmp_path: Path, method: str) -> None:
    at = simulate_arguments.index("--lr")
    arguments = [*simulate_arguments[:at], *simulate_arguments[at + 2 :]]
    out = tmp_path / "run"
    assert main([*arguments, "--method", method, "--rounds", "2", "--out", str(out)]) == 0
    summary, records = RunFolder(out).summary(), [*LogReader(out / "rounds.log")]
    assert summary is not None
    assert summary["lr"] == RunFolder(out).config().lr == records[1]["lr"] > 0
    assert np.isfinite(summary["loss"])
    assert verification.verify(out).finished
    assert main(["report", str(out)]) == 0
    told = f"A learning rate that is left to auto follows from these. This run has learning rate {summary['lr']:g}."
    assert told in (out / "report.html").read_text()
    known = json.loads(RunFolder(out).mask().facts[CURVATURE])
    if method == "lora-fedzo":  # as its matrix B grows, A stiffens
        assert summary["lr"] == pytest.approx(0.08 / (known["trace"] + 2 * known["largest"]), rel=0.06)


def test_without_public_text_a_rate_is_asked_for(
    simulate_arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [*simulate_arguments, "--method", "weight-magnitude", "--text", "", "--lr", "auto"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert "lr auto: is measured on public text" in capsys.readouterr().err
    for lr, named, cure in (
        ("1", "server_lr", "--server-lr a number"),
        ("auto", "lr", "numbers for --lr and --server-lr"),
    ):
        assert main([*arguments, "--update-rule", "adam", "--lr", lr, "--out", str(tmp_path / "run")]) == 2
        line = f"{named} auto: is measured on public text, and there is none; give --text, or {cure}"
        assert line in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_mask_that_moves_no_score_has_no_rate(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meerkat.run.curvature.curvature", lambda *_: Curvature(0.0, 0.0))
    with pytest.raises(MeerkatError, match="lr auto: the mask's entries do not move the task's loss"):
        settled(setting)
