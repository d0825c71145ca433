"""Every method over the tiny federation: run, resumed anywhere, verified, forged, counted by hand."""

import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from test_experiment import logged, rewrite, simulate
from tiny import tiny_model
from torch import Tensor, nn

from meerkat import seeds
from meerkat.algorithm import path
from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.rounds import RoundRecord, Update, pack
from meerkat.cli import main
from meerkat.errors import MeerkatError, RunFailed
from meerkat.masks.sensitivity import sensitivity_mask
from meerkat.masks.sparse_mask import SparseMask
from meerkat.masks.top_entries import concentration
from meerkat.record import verification
from meerkat.record.run_folder import RunFolder
from meerkat.record.summary import as_text
from meerkat.report import summary_in_words
from meerkat.run.setup import classification
from meerkat.run.split import evenly, training_and_evaluation_rows
from meerkat.settings.methods import METHODS

ROUNDS, STEPS, CLIENTS, CALIBRATION = 3, 2, 3, 12
SMALL = ("--rounds", str(ROUNDS), "--local-steps", str(STEPS), "--eval-every", "0", "--text-sequences", "3")
SHORT = ("--calibration-steps", str(CALIBRATION), "--initial-steps", "4", "--later-steps", "4")
SOME = (*SHORT, "--vpcs-rule", "thresholds", "--rho-later", "0.62", "--rho-quie", "0")
"""A rule under which one of the three clients is extreme at first."""

RUNS: dict[str, tuple[str, ...]] = {
    **{method: ("--method", method) for method in METHODS},
    "full-fedzo": ("--method", "full-fedzo", "--lr", "1e-4"),
    "meerkat-vp": ("--method", "meerkat-vp", *SOME, "--recalibrate-every", "2"),
    "random-early-stop": ("--method", "random-early-stop", *SOME),
    "feddyn": ("--method", "feddyn", "--clients-per-round", "2", "--feddyn-alpha", "0.1"),
    "fo-fedavg": ("--method", "fo-fedavg", "--lr", "0.1", "--clients-per-round", "2"),
    "momentum": ("--server-optimizer", "momentum", "--directions", "2"),
    "adam": ("--server-optimizer", "adam"),
    "fo-fedavg by adam": ("--method", "fo-fedavg", "--server-optimizer", "adam", "--lr", "0.1"),
    "feddyn that stops early": ("--method", "feddyn", "--early-stop", "vp", *SOME, "--clients-per-round", "2"),
    "vp that leaves missing steps out": ("--method", "meerkat-vp", *SOME, "--missing-steps", "left-out"),
    "vp by momentum": ("--early-stop", "vp", *SHORT, "--server-optimizer", "momentum"),
}


@pytest.fixture(scope="session")
def arguments(federation: Path) -> list[str]:
    return [
        *("simulate", "--model", str(federation / "model"), "--task", "sst2", "--data", str(federation / "data")),
        *("--text", str(federation / "text.jsonl"), "--density", "0.01", "--clients", "3", "--partition", "iid"),
        *("--batch-size", "4", "--lr", "0.01", "--threads", "1", *SMALL),
    ]


@pytest.fixture(scope="session")
def run_of(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a finished run, made once: look, don't write."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("methods") / "run"
            simulate(arguments, made[name], *RUNS[name])
        return made[name]

    return run


def copied(whole: Path, to: Path) -> Path:
    shutil.copytree(whole, to)
    return to


def summary_of(folder: Path) -> dict[str, Any]:
    summary = RunFolder(folder).summary()
    assert summary is not None
    return summary


# --- running, resuming, verifying ---


@pytest.mark.parametrize("name", RUNS)
def test_it_runs_moves_and_verifies(run_of: Callable[[str], Path], name: str) -> None:
    folder = run_of(name)
    summary, records = summary_of(folder), logged(folder)
    assert summary["method"] == RunFolder(folder).config().method
    assert [r["kind"] for r in records if r["kind"] != "calibration"] == ["open", *["round"] * ROUNDS, "close"]
    replayed = verification.verify(folder)
    assert replayed.finished
    assert path.digest(replayed.theta) == summary["theta_digest"] != records[0]["theta"]
    assert len({r["theta"] for r in records if r["kind"] == "round"}) == ROUNDS


def test_every_method_is_among_them() -> None:
    assert METHODS.keys() <= RUNS.keys()


def test_no_two_methods_go_the_same_way(run_of: Callable[[str], Path]) -> None:
    assert len({summary_of(run_of(name))["theta_digest"] for name in RUNS}) == len(RUNS)


CUTS = [*((name, 3) for name in RUNS if name != "meerkat-vp"), *(("meerkat-vp", after) for after in range(1, 7))]
"""(run, records that are left of its log)"""


@pytest.mark.parametrize(("name", "after"), CUTS)
def test_resumed_after_any_record_it_is_the_untouched_run(
    run_of: Callable[[str], Path], tmp_path: Path, name: str, after: int
) -> None:
    whole, cut = run_of(name), copied(run_of(name), tmp_path / "cut")
    lines = (whole / "rounds.log").read_bytes().splitlines(keepends=True)
    assert after < len(lines)
    (cut / "rounds.log").write_bytes(b"".join(lines[:after]))
    (cut / "summary.json").unlink()
    assert main(["resume", str(cut)]) == 0
    assert (cut / "rounds.log").read_bytes() == (whole / "rounds.log").read_bytes()
    untimed = [
        [{k: v for k, v in m.items() if not k.endswith("_s")} for m in RunFolder(folder).metrics()]
        for folder in (whole, cut)
    ]
    assert untimed[0] == untimed[1]
    assert summary_of(cut)["theta_digest"] == summary_of(whole)["theta_digest"]


def test_two_of_these_cuts_lie_between_a_calibration_and_its_round(run_of: Callable[[str], Path]) -> None:
    kinds = [r["kind"] for r in logged(run_of("meerkat-vp"))]
    assert kinds == ["open", "calibration", "round", "round", "calibration", "round", "close"]


def test_the_rule_stops_some_clients_and_not_all(run_of: Callable[[str], Path]) -> None:
    for name in ("meerkat-vp", "random-early-stop", "feddyn that stops early"):
        stopped = [len(r["early_stopped"]) for r in logged(run_of(name)) if r["kind"] == "calibration"]
        assert any(0 < count < CLIENTS for count in stopped), name


# --- forged records ---


def _calibrations(records: list[dict[str, Any]]) -> list[int]:
    return [at for at, record in enumerate(records) if record["kind"] == "calibration"]


def _another_decision(records: list[dict[str, Any]]) -> None:
    (first, *_) = _calibrations(records)
    records[first]["early_stopped"] = sorted({0, 1, 2} - set(records[first]["early_stopped"]))


def _another_extreme(records: list[dict[str, Any]]) -> None:
    (first, *_) = _calibrations(records)
    records[first]["selection"]["extreme"] = [0, 1, 2]


def _another_reason(records: list[dict[str, Any]]) -> None:
    (first, *_) = _calibrations(records)
    records[first]["selection"]["rho_later"][1] *= 1.001


def _no_reasons(records: list[dict[str, Any]]) -> None:
    (first, *_) = _calibrations(records)
    records[first]["selection"] |= {"rho_quie": [], "later": []}


def _inner(record: dict[str, Any], factor: float) -> None:
    inner = np.frombuffer(CalibrationRecord.from_json(record).inner.tobytes()).copy()
    inner[3] *= factor
    record["inner"] = pack(inner, "<f8")


def _another_inner_product(records: list[dict[str, Any]]) -> None:
    (first, *_) = _calibrations(records)
    _inner(records[first], 1.0001)


def _no_inner_product(records: list[dict[str, Any]]) -> None:
    records[2]["inner"] = ""


def _another_round_s_inner_products(records: list[dict[str, Any]]) -> None:
    records[2]["inner"] = records[3]["inner"]


def _dropped(records: list[dict[str, Any]]) -> None:
    del records[_calibrations(records)[-1]]


def _doubled(records: list[dict[str, Any]]) -> None:
    last = _calibrations(records)[-1]
    records.insert(last, records[last])


def _another_learning_rate(records: list[dict[str, Any]]) -> None:
    (first, *_) = _calibrations(records)
    records[first]["lr"] *= 2


def _as_a_round(records: list[dict[str, Any]]) -> None:
    (first, *_) = _calibrations(records)
    records[first]["phase"] = "training"


def _one_who_goes_on(records: list[dict[str, Any]]) -> None:
    """A client that stopped early is asked for all steps again."""
    record = records[2]
    record["steps"] = [STEPS] * CLIENTS


def _replies_cut_short(records: list[dict[str, Any]]) -> None:
    (first, *_) = _calibrations(records)
    record = CalibrationRecord.from_json(records[first])
    short = {k: g[:-1] for k, g in record.scalars.items()}
    records[first] |= dataclasses.replace(record, scalars=short).to_json()


VP_FORGERIES = [
    *(_another_decision, _another_extreme, _another_reason, _no_reasons, _another_inner_product, _no_inner_product),
    *(_another_round_s_inner_products, _dropped, _doubled, _another_learning_rate, _as_a_round, _one_who_goes_on),
    _replies_cut_short,
]


@pytest.mark.parametrize("forge", VP_FORGERIES)
def test_verify_refuses_a_forged_calibration(
    run_of: Callable[[str], Path],
    tmp_path: Path,
    forge: Callable[[list[dict[str, Any]]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = copied(run_of("meerkat-vp"), tmp_path / "run")
    rewrite(run, forge)
    assert (run / "rounds.log").read_bytes() != (run_of("meerkat-vp") / "rounds.log").read_bytes()
    assert main(["verify", str(run)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("meerkat:")]
    assert len(lines) == 1
    assert str(run) in lines[0]


def test_verify_refuses_reasons_left_out_for_a_single_client(arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    simulate(arguments, run, "--method", "meerkat-vp", "--clients", "1", "--rounds", "1")
    rewrite(run, _no_reasons)
    with pytest.raises(RunFailed, match="rho_quie"):
        verification.verify(run)


def theta_of(folder: Path) -> Tensor:
    theta = SparseMask.load(folder / "mask.safetensors").theta_0
    assert theta is not None
    return theta


def _another_delta(records: list[dict[str, Any]]) -> None:
    record = RoundRecord.from_json(records[2])
    delta = record.aggregate.copy()
    delta[5] += 1e-3
    records[2]["aggregate"] = pack(delta)


def _no_delta(records: list[dict[str, Any]]) -> None:
    records[2]["aggregate"] = ""


def _scalars_in_place_of_a_delta(records: list[dict[str, Any]]) -> None:
    records[2]["sends"] = "scalars"


@pytest.mark.parametrize("forge", [_another_delta, _no_delta, _scalars_in_place_of_a_delta])
def test_verify_refuses_a_forged_delta(
    run_of: Callable[[str], Path], tmp_path: Path, forge: Callable[[list[dict[str, Any]]], None]
) -> None:
    run = copied(run_of("fo-fedavg"), tmp_path / "run")
    rewrite(run, forge)
    with pytest.raises(RunFailed):
        verification.verify(run)


def forged_last_round(run: Path, delta: np.ndarray) -> None:
    """Give the last round a delta, and make every digest after it agree."""
    before = theta_of(run)
    for record in (RoundRecord.from_json(r) for r in logged(run) if r["kind"] == "round"):
        if record.plan.round < ROUNDS - 1:
            before = path.moved(
                before, Update(record.plan, record.aggregate), verification.StoredRun.open(run).directions
            )
    theta = path.digest(before + torch.from_numpy(delta))

    def forge(records: list[dict[str, Any]]) -> None:
        records[-2] |= {"aggregate": pack(delta), "theta": theta}
        records[-1]["theta"] = theta

    rewrite(run, forge)
    summary = summary_of(run)
    (run / "summary.json").write_text(as_text(summary | {"theta_digest": theta}))


def test_verify_refuses_a_delta_where_scalars_say_what_moved_though_all_digests_agree(
    run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run = copied(run_of("meerkat"), tmp_path / "run")
    forged_last_round(run, np.ones(len(theta_of(run)), np.float32))
    with pytest.raises(RunFailed, match="aggregate"):
        verification.verify(run)


def test_verify_refuses_a_delta_of_another_length_though_all_digests_agree(
    run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run = copied(run_of("fo-fedavg"), tmp_path / "run")
    forged_last_round(run, np.ones(1, np.float32))
    with pytest.raises(RunFailed, match="aggregate"):
        verification.verify(run)


def test_inner_products_of_a_faint_gradient_cannot_be_forged_either(
    arguments: list[str], run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    mask = SparseMask.load(run_of("meerkat") / "mask.safetensors")
    assert mask.pretraining_gradient is not None
    faint = dataclasses.replace(mask, pretraining_gradient=mask.pretraining_gradient * 1e-10, theta_0=None)
    faint.save(tmp_path / "faint.safetensors")
    run = tmp_path / "run"
    simulate(arguments, run, *RUNS["meerkat-vp"], "--mask", str(tmp_path / "faint.safetensors"), "--rounds", "1")
    assert verification.verify(run).finished

    def forge(records: list[dict[str, Any]]) -> None:
        inner = RoundRecord.from_json(records[2]).inner.copy()
        inner[1] *= 1.01
        records[2]["inner"] = pack(inner, "<f8")

    rewrite(run, forge)
    with pytest.raises(RunFailed, match="inner products"):
        verification.verify(run)


def test_the_papers_rule_without_a_pretraining_gradient_is_refused_before_anything_runs(
    arguments: list[str], run_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = SparseMask.load(run_of("meerkat") / "mask.safetensors")
    bare = tmp_path / "bare.safetensors"
    dataclasses.replace(mask, pretraining_gradient=None, theta_0=None).save(bare)
    out = tmp_path / "run"
    at = arguments.index("--text")
    without = [*arguments[:at], *arguments[at + 2 :]]
    assert main([*without, *RUNS["meerkat-vp"], "--mask", str(bare), "--out", str(out)]) == 2
    assert "GradIP" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
    simulate(without, out, "--method", "meerkat-vp", "--mask", str(bare), "--rounds", "1")
    assert verification.verify(out).finished


# --- what is counted and told ---


def test_payload_and_steps_are_counted_by_hand(run_of: Callable[[str], Path]) -> None:
    plain = summary_of(run_of("meerkat"))
    assert plain["payload_bytes_up_per_client_round"] == plain["payload_bytes_down_per_client_round"] == 4 * STEPS
    assert plain["payload_bytes_up"] == plain["payload_bytes_down"] == 4 * STEPS * CLIENTS * ROUNDS
    assert plain["client_steps"] == STEPS * CLIENTS * ROUNDS
    assert plain["calibration_steps"] == 0
    assert plain["early_stopped_clients"] == []

    two = summary_of(run_of("momentum"))  # two directions a step
    assert two["payload_bytes_up"] == two["payload_bytes_down"] == 2 * plain["payload_bytes_up"]
    assert two["client_steps"] == plain["client_steps"]

    sampled = summary_of(run_of("feddyn"))
    assert sampled["payload_bytes_up"] == sampled["payload_bytes_down"] == 4 * STEPS * 2 * ROUNDS

    first_order = summary_of(run_of("fo-fedavg"))
    n = first_order["params_masked"]
    assert first_order["payload_bytes_up_per_client_round"] == 4 * n
    assert first_order["payload_bytes_up"] == first_order["payload_bytes_down"] == 4 * n * 2 * ROUNDS
    assert first_order["client_steps"] == STEPS * 2 * ROUNDS


def test_calibrations_and_missing_steps_are_counted_by_hand(run_of: Callable[[str], Path]) -> None:
    folder = run_of("meerkat-vp")
    summary, records = summary_of(folder), logged(folder)
    made, down = 0, 0
    for record in records[1:-1]:
        if record["kind"] == "calibration":
            made += CALIBRATION * CLIENTS
            stopped = record["early_stopped"]
        else:
            steps = [1 if k in stopped else STEPS for k in range(CLIENTS)]
            assert record["steps"] == record["made"] == steps
            made += sum(steps)
            down += 4 * max(steps) * CLIENTS
    assert summary["client_steps"] == made
    assert summary["calibration_steps"] == 2 * CALIBRATION * CLIENTS
    assert summary["payload_bytes_up"] == 4 * made
    assert summary["payload_bytes_down"] == down
    assert summary["early_stopped_clients"] == stopped


@pytest.mark.parametrize("name", ["meerkat", "meerkat-vp", "fo-fedavg"])
def test_a_run_is_told_as_it_was(run_of: Callable[[str], Path], name: str) -> None:
    summary = summary_of(run_of(name))
    told = summary_in_words(summary, run_of(name))
    assert ("no client ran backpropagation" in told) == (name != "fo-fedavg")
    assert ("every client ran backpropagation" in told) == (name == "fo-fedavg")
    assert f"about {summary['payload_bytes_up'] / CLIENTS:,.0f} in all" in told


def test_metrics_hold_the_signals_of_calibrations_and_rounds(run_of: Callable[[str], Path]) -> None:
    metrics = RunFolder(run_of("meerkat-vp")).metrics()
    records = [r for r in logged(run_of("meerkat-vp")) if r["kind"] in ("round", "calibration")]
    noted = [m for m in metrics if m["kind"] in ("round", "calibration")]
    assert [m["kind"] for m in noted] == [r["kind"] for r in records]
    for metric, record in zip(noted, records, strict=True):
        assert metric["clients"] == record["clients"]
        assert [len(a) for a in metric["abs_g"]] == [len(a) for a in metric["gradip"]] == record["made"]
        if metric["kind"] == "calibration":
            assert metric["early_stopped"] == record["early_stopped"]
            np.testing.assert_allclose(metric["rho_later"], record["selection"]["rho_later"], rtol=1e-4)
    assert not any("abs_g" in m for m in RunFolder(run_of("fo-fedavg")).metrics())


# --- the task mask, and how sensitivity is concentrated ---


def dense(mask: SparseMask, model: nn.Module) -> Tensor:
    parts = [
        torch.isin(torch.arange(p.numel()), mask.entries.get(name, torch.zeros(0).long()))
        for name, p in model.named_parameters()
    ]
    return torch.cat(parts)


def candidates(row: dict[str, Any], tokenizer: Any) -> list[tuple[list[int], int]]:
    """Each candidate's tokens, and how many at the end cover the label's characters."""
    pairs = []
    for label in ("terrible", "great"):
        ids = tokenizer(f"{row['sentence']} It was {label}")["input_ids"]
        lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(ids)]
        pairs.append((ids, next(n for n in range(1, len(ids)) if sum(lengths[-n:]) >= len(label))))
    return pairs


@pytest.mark.parametrize("limit", [48, 5])
def test_the_task_mask_is_the_literal_one(arguments: list[str], tmp_path: Path, limit: int) -> None:
    options = ("--method", "task-mask", "--rounds", "1", "--local-steps", "1", "--exclude", "none")
    simulate(arguments, tmp_path / "run", *options, "--text-sequences", str(limit))
    folder = RunFolder(tmp_path / "run")
    problem = classification(folder.config())
    training, _ = training_and_evaluation_rows(folder.config(), problem.rows)
    mask = folder.mask()
    assert mask.kind == "task"
    assert mask.facts["sequences"] == str(limit)
    assert mask.pretraining_gradient is not None  # of the text, for GradIP
    drawn = seeds.permutation(len(training), 0, "task mask")[:limit]
    model = problem.model.requires_grad_(True)
    expected = reference.union_mask_scores(
        model,
        [training[i] for i in drawn],
        lambda model, row: reference.candidate_loss(model, candidates(row, problem.tokenizer), row["label"]),
    )
    moving = dense(mask, model)
    assert len(mask) == moving.sum() == math.ceil(0.01 * len(expected))
    # float32 sums may swap entries whose scores agree closely
    assert expected[moving].min() >= expected[~moving].max() * (1 - 1e-3)
    assert (moving == reference.top_n_mask(expected, len(mask))).float().mean() > 0.9999


def test_concentration_is_that_of_a_full_sort() -> None:
    rng = np.random.default_rng(0)
    scores = {"a": torch.from_numpy(rng.lognormal(0, 3, (300, 70)).astype(np.float32)), "b": torch.zeros(40)}
    every = np.sort(np.concatenate([t.numpy().ravel() for t in scores.values()]).astype(np.float64))[::-1]
    cumulative = np.concatenate([[0], np.cumsum(every)]) / every.sum()
    curve = concentration(scores)
    assert [share for share, _ in curve] == [float(f"{s:.3g}") for s in np.logspace(-5, 0, 31)]
    for share, part in zip(np.logspace(-5, 0, 31), (part for _, part in curve), strict=True):
        exact = np.interp(share * len(every), np.arange(len(every) + 1), cumulative)
        assert part == pytest.approx(exact, rel=1 / 128, abs=2e-5)
    assert curve[-1] == (1.0, 1.0)
    assert curve == sorted(curve)


def test_where_nothing_is_sensitive_there_is_no_concentration() -> None:
    assert concentration({"a": torch.zeros(9)}) == []


def test_a_gradient_that_is_not_a_number_is_one_line_not_a_crash() -> None:
    model = tiny_model()

    def loss(_: Tensor) -> Tensor:
        weight = next(model.parameters())
        return -((weight - weight.detach()) ** 2).sum().sqrt()

    with pytest.raises(MeerkatError, match="not all finite"):
        sensitivity_mask(model, [torch.zeros(3).long()], loss, 0.01)


def test_a_mask_made_without_text_gets_its_gradient_from_the_run_s(
    simulate_arguments: list[str], federation: Path, tmp_path: Path
) -> None:
    mask = tmp_path / "random.safetensors"
    settings = ["--model", str(federation / "model"), "--density", "0.01"]
    assert main(["mask", *settings, "--method", "random-mask", "--out", str(mask)]) == 0
    assert SparseMask.load(mask).pretraining_gradient is None
    assert main([*simulate_arguments, "--mask", str(mask), "--out", str(tmp_path / "run")]) == 0
    loaded = SparseMask.load(tmp_path / "run" / "mask.safetensors")
    assert loaded.pretraining_gradient is not None
    assert loaded.digest() == SparseMask.load(mask).digest()
    assert main(["verify", str(tmp_path / "run")]) == 0


def test_a_mask_of_another_density_than_was_asked_for_is_refused(
    run_of: Callable[[str], Path], arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--mask", str(run_of("meerkat") / "mask.safetensors"), "--density", "0.02", "--out", str(tmp_path / "run")]
    assert main([*arguments, *given]) == 2
    assert "density 0.02: mask" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_given_mask_says_itself_how_it_was_chosen(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = tmp_path / "mask.safetensors"
    made = ["mask", *_for_a_mask(arguments), "--exclude", "none", "--mask-scope", "per-tensor", "--out", str(mask)]
    assert main(made) == 0
    simulate(arguments, tmp_path / "run", "--mask", str(mask))
    config = RunFolder(tmp_path / "run").config()
    assert (config.exclude, config.mask_scope) == ((), "per-tensor")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "Never chosen" not in (tmp_path / "run" / "report.html").read_text()
    capsys.readouterr()
    for flags, said in (
        (
            ("--exclude", "embeddings,norms"),
            "exclude embeddings,norms: mask '{}' was made with none; leave one of them",
        ),
        (("--exclude", "norms"), "exclude norms: mask '{}' was made with none; leave one of them out"),
    ):
        assert main([*arguments, *flags, "--mask", str(mask), "--out", str(tmp_path / "refused")]) == 2
        assert said.format(mask) in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_a_run_that_stops_otherwise_than_its_method_says_so(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(arguments, tmp_path / "vp", "--rounds", "1", "--method", "meerkat-vp", "--early-stop", "none")
    assert "note: early_stop is none as asked; method meerkat-vp by itself has vp" in capsys.readouterr().err


def test_another_method_than_a_run_s_stops_as_it_does_by_itself(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(arguments, tmp_path / "one", "--rounds", "1", "--local-steps", "2")
    assert 'early_stop = "by-method"' in (tmp_path / "one" / "config.toml").read_text()
    capsys.readouterr()
    file = str(tmp_path / "one" / "config.toml")
    assert main(["simulate", file, "--method", "meerkat-vp", "--out", str(tmp_path / "vp")]) == 0
    said = capsys.readouterr().err
    assert "calibrating 3 clients" in said
    assert "early_stop" not in said


def test_exclude_is_the_same_in_any_order(arguments: list[str], tmp_path: Path) -> None:
    mask = tmp_path / "mask.safetensors"
    assert main(["mask", *_for_a_mask(arguments), "--exclude", "norms,embeddings", "--out", str(mask)]) == 0
    runs = [tmp_path / "a", tmp_path / "b"]
    for run, exclude in zip(runs, ("embeddings,norms", "norms,embeddings,norms"), strict=True):
        simulate(arguments, run, "--exclude", exclude, "--mask", str(mask), "--rounds", "1")
    assert summary_of(runs[0])["theta_digest"] == summary_of(runs[1])["theta_digest"]


def _for_a_mask(arguments: list[str]) -> list[str]:
    """Of a run's flags those that `meerkat mask` takes."""
    names = ("--model", "--text", "--density", "--text-sequences")
    pairs = itertools.pairwise(arguments)
    return [part for name, value in pairs if name in names for part in (name, value)]


# --- GradIP, masks that are given, and rows that are evaluated on ---


@pytest.mark.parametrize("name", ["meerkat", "full-fedzo", "lora-fedzo", "meerkat by automatic rule"])
def test_without_gradip_a_run_is_the_same_but_for_it(
    run_of: Callable[[str], Path], arguments: list[str], tmp_path: Path, name: str
) -> None:
    options = (*RUNS.get(name, ("--method", "meerkat-vp")), "--gradip", "off")
    simulate(arguments, tmp_path / "run", *options)
    assert RunFolder(tmp_path / "run").mask().pretraining_gradient is None
    assert not _gradip(tmp_path / "run")
    assert verification.verify(tmp_path / "run").finished
    assert main(["report", str(tmp_path / "run")]) == 0
    if name in RUNS:
        assert _gradip(run_of(name))
        assert summary_of(tmp_path / "run")["theta_digest"] == summary_of(run_of(name))["theta_digest"]


def _gradip(run: Path) -> list[Any]:
    return [metric["gradip"] for metric in RunFolder(run).metrics() if metric.get("gradip")]


def test_the_papers_rule_needs_gradip(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*arguments, *RUNS["meerkat-vp"], "--gradip", "off", "--out", str(tmp_path / "run")]
    assert main(given) == 2
    assert "gradip off: vpcs_rule thresholds reads GradIP; use on" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["full-fedzo", "lora-fedzo", "weight-magnitude", "random-mask"])
def test_a_methods_own_mask_may_be_given_and_makes_the_same_run(
    run_of: Callable[[str], Path], arguments: list[str], tmp_path: Path, name: str
) -> None:
    own = run_of(name)
    simulate(arguments, tmp_path / "run", *RUNS[name], "--mask", str(own / "mask.safetensors"))
    assert summary_of(tmp_path / "run")["theta_digest"] == summary_of(own)["theta_digest"]


@pytest.mark.parametrize(("name", "other"), [("full-fedzo", "meerkat"), ("random-mask", "weight-magnitude")])
def test_a_mask_of_another_kind_is_refused(
    run_of: Callable[[str], Path],
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    other: str,
) -> None:
    given = ["--mask", str(run_of(other) / "mask.safetensors"), "--out", str(tmp_path / "run")]
    assert main([*arguments, *RUNS[name], *given]) == 2
    assert f"and method {name} moves entries of kind" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("most", "taken"), [(5, [0, 1, 2, 4, 5]), (1, [0]), (7, [*range(7)]), (9, [*range(7)]), (0, [*range(7)])]
)
def test_evenly(most: int, taken: list[int]) -> None:
    assert [row["at"] for row in evenly([{"at": i} for i in range(7)], most)] == taken


@pytest.mark.parametrize(("most", "held_back"), [(3, "0"), (3, "0.5"), (0, "0"), (10**6, "0")])
def test_evaluation_rows_are_taken_evenly(arguments: list[str], tmp_path: Path, most: int, held_back: str) -> None:
    options = ("--held-back", held_back, "--rounds", "1")
    simulate(arguments, tmp_path / "all", *options)
    config = RunFolder(tmp_path / "all").config()
    problem = classification(config)
    training, every = training_and_evaluation_rows(config, problem.rows)
    fewer = config.model_copy(update={"max_eval_samples": most})
    assert training_and_evaluation_rows(fewer, problem.rows)[0] == training
    taken = training_and_evaluation_rows(fewer, problem.rows)[1]
    count = min(most, len(every)) or len(every)
    assert taken == evenly(every, most)
    assert len(taken) == count
    summary = simulate(arguments, tmp_path / "some", *options, "--max-eval-samples", str(most))
    assert summary["theta_digest"] == summary_of(tmp_path / "all")["theta_digest"]
    assert (summary["loss"] == summary_of(tmp_path / "all")["loss"]) == (count == len(every))
    scores = problem.evaluate(problem.batch(problem.prepare(taken), "evaluation")).scores
    assert scores["loss"] == pytest.approx(summary["scores_before"]["loss"], abs=1e-6)
