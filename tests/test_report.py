"""Reports: what must be said and shown, from short real runs and from folders written here."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from meerkat.algorithm.alignment import alignments
from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.estimators import ESTIMATORS
from meerkat.algorithm.extreme_clients import Vpcs, select
from meerkat.algorithm.replies import Scalars
from meerkat.algorithm.rounds import RoundPlan, RoundRecord
from meerkat.cli import main
from meerkat.errors import MeerkatError, RunFailed
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.problem import Better
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import RunLog
from meerkat.record.summary import Summary, outcome, work_by_kind
from meerkat.report import clients, write_comparison_report, write_run_report
from meerkat.report.client_figures import binned, grouped, running_mean, signal, split, thinned
from meerkat.report.comparison_page import comparison_page
from meerkat.report.facts import RunFacts
from meerkat.report.run_figures import layer_and_kind, mask_map
from meerkat.report.run_page import _training_loss, run_page
from meerkat.report.sentences import data_size, percent, summary_in_words
from meerkat.run.metrics import EvaluationMetric, metric_of, split_metric
from meerkat.run.summary import evaluated
from meerkat.settings.config import make_config


class Outline(HTMLParser):
    """Ids, what points to them, texts; fails on tags that do not pair."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', html))
        self.words = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        assert not any(name in ("src", "onload", "onclick") for name, _ in attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data


def checked(html: str) -> Outline:
    """A page that is whole: it needs nothing else, its tags pair, its ids are its own and are there."""
    outside = re.sub(r"xmlns(:xlink)?=\"[^\"]*\"", "", html)
    assert "http" not in outside
    assert "<script" not in html
    assert "@import" not in html
    outline = Outline(html)
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.references <= set(outline.ids)
    return outline


MASK = SparseMask(
    entries={"model.layers.0.mlp.up.weight": torch.arange(30), "model.layers.2.mlp.down.weight": torch.arange(3)},
    shapes={"model.layers.0.mlp.up.weight": (10, 10), "model.layers.2.mlp.down.weight": (10, 100)},
    fingerprint="f" * 64,
    total=33_000,
    density=1e-3,
    facts={"concentration": json.dumps([[1e-5, 0.01], [1e-3, 0.4], [0.1, 0.9], [1.0, 1.0]])},
    pretraining_gradient=torch.ones(33),
    theta_0=torch.zeros(33),
)


RESOLVED = {"lr": 0.1, "eps": 1e-3, "dtype": "float32", "server_lr": 1.0, "threads": 1, "tokens_per_pass": 4096}
"""Numbers in place of auto, as a run that has begun has them."""
BETTER: dict[str, Better] = {"accuracy": "higher", "loss": "lower"}


def write_run(
    root: Path,
    clients: int = 4,
    rounds: int = 3,
    *,
    extreme: int = 1,
    gradient: bool = True,
    done: bool = True,
    federation: str = "",
    **given: Any,
) -> Path:
    """A run of meerkat-vp with made-up numbers: the first clients fade, and are stopped."""
    settings = {"method": "meerkat-vp", "clients": clients, "rounds": rounds, "local_steps": 2}
    settings |= {"partition": f"mixed:{max(extreme, 1)}", "clients_per_round": clients, "task": "topics"}
    config = make_config(settings | RESOLVED | {"calibration_steps": 60} | given)
    folder, rng = RunFolder.create(root, config), np.random.default_rng(0)
    MASK.save(folder.mask_path)
    log = RunLog(folder.log_path)
    log.append({"kind": "open", "federation": federation})
    labels = ["sports", "music"]
    counts = np.tile([[10, 12]], (clients, 1))
    counts[:extreme] = [[20, 0]]
    folder.append_metric(split_metric(labels, counts))

    def evaluation(round: int, accuracy: float, loss: float) -> dict[str, Any]:
        scores, per_class = {"accuracy": accuracy, "loss": loss}, {"sports": 0.5, "music": 0.25}
        return EvaluationMetric(round, scores, BETTER, per_class, facts={"wall_s": 0.5}).to_json()

    folder.append_metric(evaluation(0, 0.25, 1.5))

    plan = RoundPlan(0, 0.1, 1e-3, 1, dict.fromkeys(range(clients), 60), "calibration")
    fade = np.where(np.arange(clients)[:, None] < extreme, np.exp(-np.arange(60) / 12), 1.0)
    g = (rng.normal(size=(clients, 60)) * fade).astype(np.float32)[..., None]
    inner = rng.normal(size=(60, 1)) if gradient else np.zeros((0, 1))
    selection = select({k: np.abs(g[k, :, 0]) for k in range(clients)}, {}, Vpcs(calibration_steps=60))
    calibration = CalibrationRecord(plan, dict(enumerate(g)), inner, selection, tuple(range(extreme)))
    log.append(calibration.to_json())
    folder.append_metric(metric_of(calibration, {"forward_s": 0.1}))

    for number in range(rounds if done else rounds - 1):
        steps = {k: 1 if k < extreme else 2 for k in range(clients)}
        plan = RoundPlan(number, 0.1, 1e-3, 1, steps)
        scalars = {k: rng.normal(size=(count, 1)).astype(np.float32) for k, count in steps.items()}
        weights = dict.fromkeys(steps, 1 / clients)
        total = np.zeros((max(steps.values()), 1), np.float32)
        for own in scalars.values():
            total[: len(own)] += own / clients
        inner = rng.normal(size=(len(total), 1)) if gradient else np.zeros((0, 1))
        record = RoundRecord(plan, scalars, inner, weights=weights, aggregate=total, theta_digest="a" * 64)
        log.append(record.to_json())
        replies = [Scalars(k, g, 1.4) for k, g in scalars.items()]
        folder.append_metric(metric_of(record, {"forward_s": 0.1}, replies))
        folder.append_metric(evaluation(number + 1, 0.7 - 0.4 / 2**number, 0.4 + 1 / 2**number))
    log.close()
    if done:
        stopped = list(range(extreme))
        scores = evaluated(config, EvaluationMetric.all_of(folder.metrics()))
        summed = outcome(config, MASK, work_by_kind(folder.log_path), stopped, "d" * 64, None)
        cost = {"wall_s": 6.0, "forward_s": 0.1 * rounds, "peak_rss_mb": 500.0}
        stated = Summary(**summed, **scores, **cost, extreme_clients=stopped, clients_without_budget=[])
        folder.summary_path.write_text(json.dumps(stated.to_json()))
    return root


def page_of(root: Path) -> Outline:
    return checked(run_page(RunFacts.read(root)).html())


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory, federation: Path) -> Callable[..., Path]:
    """Real runs over the tiny federation, each made once."""
    made: dict[str, Path] = {}

    def run(method: str, *more: str) -> Path:
        name = "-".join((method, *more)).replace("/", "_")
        if name not in made:
            made[name] = tmp_path_factory.mktemp("run") / "run"
            given = ["simulate", "--model", str(federation / "model"), "--task", "sst2", "--out", str(made[name])]
            given += ["--data", str(federation / "data"), "--text", str(federation / "text.jsonl"), "--clients", "3"]
            given += ["--partition", "iid", "--rounds", "4", "--batch-size", "4", "--eval-every", "2", "--threads", "1"]
            given += ["--density", "0.01", "--method", method, "--lr", "0.01", "--eps", "1e-3", *more]
            assert main(given) == 0
        return made[name]

    return run


@pytest.mark.draws
def test_a_run_from_the_command_line(
    simulated: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = simulated("meerkat", "--local-steps", "3")
    capsys.readouterr()
    assert main(["report", str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(root / "report.html")}
    words = checked((root / "report.html").read_text()).words
    summary = json.loads((root / "summary.json").read_text())
    for value in (
        f"{summary['accuracy']:.3f}",
        f"{summary['params_masked']:,}",
        summary["theta_digest"],
        "48 bytes in all",
    ):
        assert value in words
    for section in ("Outcome", "Learning", "Bytes", "Data", "Signals in training", "What moves", "Settings"):
        assert section in words
    stems = {path.stem for path in (root / "figures").iterdir()}
    assert {"accuracy-rounds", "loss-bytes", "training-gradip", "alignment-cosine", "mask-layers", "split"} <= stems
    assert all((root / "figures" / f"{stem}.{form}").stat().st_size > 1000 for stem in stems for form in ("png", "svg"))

    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "neither a run nor a comparison" in said


@pytest.mark.draws
def test_two_renderings_are_the_same_bytes(tmp_path: Path) -> None:
    root = write_comparison(tmp_path / "c", study({"density": [0.1, 1.0]}, [row({"density": 0.1}, [0.5, 0.6])]))
    write_comparison_report(root)
    first = {path: path.read_bytes() for path in [root / "report.html", *(root / "figures").iterdir()]}
    assert {path.suffix for path in first} == {".html", ".png", ".svg"}
    write_comparison_report(root)
    assert all(path.read_bytes() == data for path, data in first.items())
    assert b"<dc:date>" not in b"".join(first.values())


def test_calibration_is_told_and_its_bytes_are_counted(tmp_path: Path) -> None:
    words = page_of(write_run(tmp_path / "run", clients=4, extreme=1)).words
    assert "calibration stopped 1 of 4 clients early (0)" in words
    assert "It stopped 1 of the 1 that have only one label, and 0 of the others." in words
    # three of the four make 2 steps in each of 3 rounds and one makes 1: 21 steps up of 4 bytes, 60 before
    assert f"sent {60 * 4 + 21:,} bytes in all, 240 of them to calibrate" in words
    assert f"{(240 * 4 + 84 + 4 * 2 * 3 * 4) / 4:.0f} B" in words  # up and down, a client


@pytest.mark.draws
def test_a_thousand_clients_have_bands_and_no_thousand_names(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", clients=1000, rounds=2, extreme=20)
    html = run_page(RunFacts.read(root)).html()
    outline = checked(html)
    assert len(html) < 3e6
    assert "several labels, continues (980)" in outline.words
    assert "one label, stopped early (20)" in outline.words
    assert "client 500" not in outline.words
    assert len(outline.words) < 30_000


def test_many_clients_of_one_step_have_bands_that_are_seen() -> None:
    values = {client: np.array([1.0 + client]) for client in range(20)}
    figure = signal(np.array([3.0]), values, grouped(range(20), (), ()), "local step", "|g|")
    axes = figure.axes[0]
    assert all(np.ptp(band.get_paths()[0].vertices[:, 0]) == 1 for band in axes.collections)
    assert [np.ptp(line.get_xdata()) for line in axes.lines] == [1]
    assert axes.get_xlim()[0] < 2.5 < 3.5 < axes.get_xlim()[1]


def test_columns_of_clients_with_equal_shares_stand_together() -> None:
    generator = np.random.default_rng(0)
    counts = np.eye(4, dtype=np.int64)[generator.integers(4, size=(1000, 2))].sum(1)  # two rows each
    image = split(["a", "b", "c", "d"], counts, ()).axes[0].images[0].get_array()
    changes = (np.diff(image, axis=1) != 0).any(0).sum()
    assert changes == len(np.unique(counts, axis=0)) - 1


@pytest.mark.draws
def test_one_client(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", clients=1, extreme=0)
    html = run_page(RunFacts.read(root)).html()
    assert html == run_page(RunFacts.read(root)).html()  # the same bytes each time
    words = checked(html).words
    assert "1 client, mixed:1 · 3 rounds of 2 local steps" in words
    assert "calibration stopped none of 1 client early" in words
    assert "There is only one client" in words


def test_an_unfinished_run_says_how_far_it_got(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", rounds=3, done=False)
    words = page_of(root).words
    assert "got to round 2 of 3" in words
    assert "Accuracy was 0.250 before training and 0.500 after 2 rounds." in words
    assert "of 4 clients; 1 holds one label" in words  # from the split, as there is no summary


def test_one_round_is_no_rounds(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", rounds=1)
    words = page_of(root).words
    assert "1 round of 2 local steps" in words
    assert "to 0.300 in 1 round, and the loss" in words
    assert "after 1 round, on validation rows" in summary_in_words(RunFacts.read(root).summary or {}, root)


@pytest.mark.draws
def test_names_of_a_mask_s_tensors_do_not_meet() -> None:
    parts = ("layernorm", "input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm")
    attention = (f"self_attn.{kind}" for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"))
    figure = mask_map([(f"model.layers.0.{name}.weight", 1, 100) for name in (*parts, *attention)])
    assert figure is not None
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert all(left.x1 + 2 < right.x0 for left, right in pairwise(boxes))


def test_what_metrics_do_not_have_is_counted_from_the_log(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    facts = RunFacts.read(root)
    payload, steps = facts.payload(), sum(m["steps"] for m in facts.of_kind("round"))
    (root / "metrics.jsonl").write_bytes((root / "metrics.jsonl").read_bytes().splitlines(keepends=True)[1])
    lost = RunFacts.read(root)
    assert (lost.payload(), sum(m["steps"] for m in lost.of_kind("round"))) == (payload, steps)
    words = page_of(root).words
    assert f"sent {60 * 4 + 21:,} bytes in all, 240 of them to calibrate" in words
    assert "wall time" not in words, "the log has no times"
    assert "No labels by client: metrics.jsonl has none" in words


def test_a_run_that_diverged_is_not_said_to_go_on(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    assert main([*simulate_arguments, "--lr", "1e30", "--out", str(root)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1].removeprefix("meerkat: ")
    words = page_of(root).words
    assert f"This run diverged after 0 of 6 rounds ({error})." in words
    assert "can be resumed" not in words
    assert re.search(r"accuracy\s*0\.\d{3} before the first round", words)
    assert main(["resume", str(root)]) == 1
    assert (root / "metrics.jsonl").read_text().count('"diverged"') == 1


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", make_config({"method": "meerkat-vp"} | RESOLVED))
    words = page_of(tmp_path / "run").words
    assert "got to round 0 of 200" in words
    for missing in ("No curves", "No bytes", "rounds.log has no calibration", "No signals", "No mask", "No digests"):
        assert missing in words


def test_what_is_absent_is_said(tmp_path: Path, simulated: Callable[..., Path]) -> None:
    words = page_of(write_run(tmp_path / "run", gradient=False)).words
    assert "this run's mask has no pre-training gradient" in words
    assert "GradIP while calibrating" not in words
    first_order = page_of(simulated("fo-fedavg")).words
    assert "No GradIP and no |g|: in a first-order run clients send weights" in first_order
    assert "every client ran backpropagation" in first_order
    whole = page_of(simulated("full-fedzo")).words
    assert "every entry of these tensors moves" in whole
    assert "No curve of sensitivity" in whole
    assert "Clients that agree" in whole  # one step a round: signs, not cosines


def test_sites_that_said_their_budget_was_spent_are_named(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", federation="0123456789abcdef")
    events = [
        {
            "event": "declined",
            "client": 2,
            "why": "epsilon: the privacy budget is spent: the site leaves",
        },
        {"event": "declined", "client": 1, "why": "task: the run asks for another"},
        *({"event": "declined", "client": [], "why": "epsilon: "}, {"event": "left", "client": 0}),
    ]
    (root / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert "Privacy budgets that do not last to the end of the run: client 2 (1 of 4)." in page_of(root).words


@pytest.mark.draws
def test_hostile_settings_are_escaped(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", task="<b>x", model="</title><script>alert(1)</script>", partition="column:<i>&")
    metrics = (root / "metrics.jsonl").read_text().replace('"sports"', json.dumps("$<u>\\\\frac{</svg>"))
    (root / "metrics.jsonl").write_text(metrics.replace('"music"', '"_\\u97f3"'))
    html = run_page(RunFacts.read(root)).html()
    checked(html)
    for raw in ("<b>x", "<script", "<i>&", "<u>"):
        assert raw not in html
    assert "&lt;b&gt;x" in html


def test_updates_are_compared_along_the_run_s_own_directions(
    simulated: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not at all where nobody here knows them."""
    extension = str(Path(__file__).parents[1] / "examples" / "extending" / "estimator.py")
    root = simulated("meerkat", "--directions", "2", "--estimator", "one-sided", "--extension", extension)
    laws: list[Any] = []

    def listening(record: RoundRecord, z: Directions) -> Any:
        laws.append(z.law)
        return alignments(record, z)

    monkeypatch.setattr(clients, "alignments", listening)
    page_of(root)
    assert laws
    assert all(law is ESTIMATORS["one-sided"].law for law in laws)
    assert ESTIMATORS["one-sided"].law is not ESTIMATORS["plain"].law
    monkeypatch.delitem(ESTIMATORS, "one-sided")
    assert "not known here, only plain; name its extension with --extension" in page_of(root).words


def test_damage_is_one_line(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    (root / "summary.json").write_text("[]")
    with pytest.raises(RunFailed, match="delete it, then 'meerkat resume"):
        write_run_report(root)
    with pytest.raises(MeerkatError, match=r"no run in it"):
        write_run_report(tmp_path)


# Comparisons


def row(setting: dict[str, Any], accuracy: list[float | None], **more: Any) -> dict[str, Any]:
    seeds = list(range(len(accuracy)))
    fields = {"setting": setting, "lr": 0.2, "rates": [], "seeds": seeds, "best": False}
    losses = [None if a is None else 1.5 - a for a in accuracy]
    fields |= {"scores": {"accuracy": accuracy, "loss": losses}, "loss": losses}
    fields |= {"accuracy": accuracy, "accuracy_before": [0.25] * len(seeds)}
    fields |= {"scores_before": {"accuracy": [0.25] * len(seeds), "loss": [1.0] * len(seeds)}}
    fields |= {"rounds": 40, "local_steps": setting.get("local_steps", 1), "params_masked": 553, "runs": []}
    fields |= {"payload_bytes_up_per_client": 1600.0, "payload_bytes_down_per_client": 1600.0}
    return (
        fields
        | {"client_steps": [400] * len(seeds), "wall_s": [2.0] * len(seeds), "early_stopped": [0] * len(seeds)}
        | more
    )


def study(axes: dict[str, list[Any]], rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    named = {"name": "a", "title": "A study", "note": "", "score": "accuracy", "better": BETTER}
    return named | {"axes": axes, "rows": rows, "checks": []} | more


def write_comparison(root: Path, *studies: dict[str, Any]) -> Path:
    root.mkdir(exist_ok=True)
    comparison = {
        "format": 2,
        "title": "Drift & steps",
        "model": "embedded",
        "task": "topics",
        "studies": list(studies),
    }
    (root / "compare.json").write_text(json.dumps(comparison))
    return root


@pytest.mark.draws
def test_a_comparison_with_a_diverged_rate_and_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = [[0.1, 0.93], [0.2, 0.51], [0.4, None]]
    setting = [{"partition": p, "local_steps": t} for p in ("iid", "dirichlet:0.5") for t in (1, 10)]
    rows = [
        row(setting[0], [0.90, 0.92], rates=rates, best=True, wall_s=[4.0, 4.0]),
        row(setting[1], [0.80], rates=rates, diverged=[1]),
        *(row(setting[2], [0.7, 0.72]), row(setting[3], [None, None])),
    ]
    pairs = [{"setting": {"partition": "iid"}, "mean": 0.0123, "se": 0.004, "limit": 0.01, "verdict": "holds"}]
    pairs.append(
        {"setting": {"partition": "dirichlet:0.5"}, "mean": -0.02, "se": None, "limit": None, "verdict": "undecided"}
    )
    checks = [{"claim": "local_steps: 1 > 10", "verdict": "undecided", "differences": pairs}]
    checks[0] |= {"measure": "accuracy", "mean": 0.0042, "se": 0.011}
    for seed in range(2):
        cell = tmp_path / "cells" / str(seed)
        cell.mkdir(parents=True)
        scores = {r: {"accuracy": 0.25 + r / 100, "loss": 1.0} for r in (0, 20, 40)}
        judged = [EvaluationMetric(r, reached, BETTER).to_json() for r, reached in scores.items()]
        (cell / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in judged))
    rows[0]["runs"] = ["cells/0", "cells/1"]
    axes = {"partition": ["iid", "dirichlet:0.5"], "local_steps": [1, 10]}
    write_comparison(tmp_path, study(axes, rows, checks=checks, note="Equal steps <everywhere>."))
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"Report: {tmp_path / 'report.html'}\n"
    html = (tmp_path / "report.html").read_text()
    words = checked(html).words
    for said in (
        "Drift & steps",
        "Equal steps <everywhere>.",
        "0.910 ± 0.014",
        "1 diverged",
        "+0.0123",
        "accuracy +0.0042 ± 0.0110",
        "0.0040",
        "1 > 10",
    ):
        assert said in words
    assert "1 study · 8 runs" in words
    assert words.index("Claims") < words.index("Outcomes") < words.index("Final accuracy")
    assert '<tr class="best"><td class="t">iid</td>' in html
    assert "2.00\N{MULTIPLICATION SIGN} 4.0 s" in words
    assert "Some curves are left out: their run folders are not here." in words
    stems = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert stems == {"a-accuracy-1", "a-loss-1", "a-final", "a-local-steps-1", "a-rates-1", "a-check-1"}


@pytest.mark.draws
def test_a_study_of_forty_rows_names_few_lines(tmp_path: Path) -> None:
    methods, steps = [f"method-{i}" for i in range(20)], [1, 10]
    rows = [row({"method": m, "local_steps": t}, [0.5 + i / 100]) for i, m in enumerate(methods) for t in steps]
    densities = [row({"density": u}, [0.5]) for u in (1e-4, 1e-2, 1.0)]
    one = study({"method": methods, "local_steps": steps}, rows)
    outline = checked(
        comparison_page(
            write_comparison(tmp_path / "c", one, study({"density": [1e-4, 1e-2, 1.0]}, densities, name="b"))
        ).html()
    )
    assert "13 others" in outline.words
    assert "Loss by share that moves" in outline.words


def test_a_comparison_that_cannot_be_read(tmp_path: Path) -> None:
    root = write_comparison(tmp_path, study({"method": []}, []))
    assert "none of its runs has ended yet" in checked(comparison_page(root).html()).words
    (root / "compare.json").write_text('{"format": 1}')
    with pytest.raises(MeerkatError, match="format 1 is not known, only 2"):
        write_comparison_report(root)
    (root / "compare.json").write_text("{")
    with pytest.raises(RunFailed, match="damaged"):
        write_comparison_report(root)


# Small parts


def test_clients_are_grouped_by_truth_and_by_what_was_done() -> None:
    groups = {group.name: group.clients for group in grouped(range(5), stopped=[0, 1], extreme=[1, 2])}
    assert groups == {
        "several labels, continues": (3, 4),
        "one label, stopped early": (1,),
        "one label, continues": (2,),
        "several labels, stopped early": (0,),
    }
    assert [group.name for group in grouped([0, 1], [1], None)] == ["continues", "stopped early"]


def test_a_round_whose_loss_was_lost_does_not_end_the_curve() -> None:
    losses = [1.0, 2.0, None, 4.0]
    rounds = [{"kind": "round", "round": i, "loss": loss} for i, loss in enumerate(losses)]
    run = cast(RunFacts, SimpleNamespace(of_kind=lambda _: rounds))
    assert _training_loss(run) == ([0.5, 1.5, 3.5], [1.0, 2.0, 4.0])
    rounds[:] = [dict(metric, loss=None) for metric in rounds]
    assert _training_loss(run) is None


def test_means_over_steps() -> None:
    assert running_mean(np.array([1.0, 2.0, 6.0]), 3).tolist() == [1.5, 3.0, 4.0]
    x, means = binned([np.array([0, 1, 2, 3]), np.array([2])], [np.array([1.0, 3.0, 5.0, 7.0]), np.array([9.0])], 2)
    assert x.tolist() == [1.0, 3.0]
    assert means[0].tolist() == [2.0, 6.0]
    assert np.isnan(means[1][0])
    assert means[1][1] == 9
    x, means = thinned(np.arange(4.0), np.array([[1.0, np.nan, np.nan, np.nan]]), 2)
    assert x.tolist() == [0.5, 2.5]
    assert means[0][0] == 1
    assert np.isnan(means[0][1])


def test_numbers_in_words() -> None:
    assert [percent(share) for share in (0, 1e-3, 0.0123, 0.5, 1, 4e-6)] == [
        "0%",
        "0.1%",
        "1.2%",
        "50%",
        "100%",
        "0.0004%",
    ]
    assert [data_size(count) for count in (4, 999, 1600, 2_209_792)] == ["4 B", "999 B", "1.6 kB", "2.21 MB"]
    assert layer_and_kind("model.layers.3.self_attn.q_proj.weight") == (3, "self_attn.q_proj")
    assert layer_and_kind("transformer.h.0.attn.c_attn.weight") == (0, "attn.c_attn")
    assert layer_and_kind("model.embed_tokens.weight") == (None, "embed_tokens")


def test_a_damaged_file_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_run(tmp_path / "run", clients=4)
    (root / "summary.json").write_text("{}")
    assert main(["report", str(root)]) == 1
    assert "a file in it is damaged" in capsys.readouterr().err
    (tmp_path / "half" / "cells").mkdir(parents=True)
    assert main(["report", str(tmp_path / "half")]) == 2
    assert "a comparison that is not finished" in capsys.readouterr().err
