"""Each attack does what its source says, with what attackers can know; forged GradIP fools Meerkat-vp's rules."""

import dataclasses
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_compare import InThisProcess
from test_server import bowl_engine, config

from meerkat.algorithm import calibration
from meerkat.algorithm.attacks import IN_CALIBRATIONS, IN_ROUNDS, Attack, flipped, z_max
from meerkat.algorithm.extreme_clients import Vpcs
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.replies import LARGEST_LOSS, Reply, Scalars, check_reply
from meerkat.algorithm.robust import Aggregation
from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.server import ServerState, aggregate, client_weights, close_round, open_round
from meerkat.cli import main
from meerkat.comparison import processes
from meerkat.errors import MeerkatError
from meerkat.federation.coordinator_settings import read_federation
from meerkat.record import run_log
from meerkat.record.run_folder import RunFolder
from meerkat.run.local_engine import AttackedEngine
from meerkat.run.setup import open_problem, resolve
from meerkat.run.split import Split
from meerkat.settings.config import RunConfig, make_config

BAD = (1, 4)


@dataclasses.dataclass(frozen=True)
class Canned:
    """An engine whose replies are known."""

    replies: list[Reply]

    def run(self, *_: object) -> list[Reply]:
        return self.replies


def settings_of(**changes: Any) -> Any:
    many = {"clients": 6, "clients_per_round": 6, "examples": dict.fromkeys(range(6), 10), "lr": 1e-3}
    return config(**{**many, **changes})


def replies(
    attack: Attack, scale: float = 0.0, steps: int = 2, bad: tuple[int, ...] = BAD, round: int = 0, seed: int = 0
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray], RoundPlan]:
    """Scalars of a round by client: as honest clients made them, and as they were sent."""
    settings = settings_of(local_steps=steps)
    _, _, engine = bowl_engine()
    state = ServerState(Replica(round, engine.model.read()))
    plan = open_round(state, settings)
    honest = {r.client: r.scalars.astype(np.float64) for r in engine.run(state, plan)}
    sent = AttackedEngine(engine, attack, bad, scale, seed).run(state, plan)
    assert [r.client for r in sent] == list(plan.steps)
    assert all(r.scalars.dtype == np.float32 for r in sent)
    return honest, {r.client: r.scalars.astype(np.float64) for r in sent}, plan


@pytest.mark.parametrize("attack", IN_ROUNDS)
def test_honest_clients_are_left_as_they_are_and_attackers_are_not(attack: Attack) -> None:
    honest, sent, _ = replies(attack)
    for client, g in sent.items():
        assert np.array_equal(g, honest[client]) == (client not in BAD)


def test_sign_flip_sends_the_update_turned_round() -> None:
    honest, sent, _ = replies("sign-flip")
    assert all(np.array_equal(sent[k], -honest[k]) for k in BAD)
    honest, sent, _ = replies("sign-flip", 3.0)
    np.testing.assert_allclose(sent[1], -3 * honest[1], rtol=1e-6)


def test_gaussian_is_noise_of_its_own_for_each_attacker_round_and_seed() -> None:
    none = [Scalars(k, np.zeros((200, 2), np.float32)) for k in range(6)]

    def drawn(round: int, seed: int, scale: float = 0.0) -> dict[int, np.ndarray]:
        plan = RoundPlan(round, 0.1, 1e-3, 2, dict.fromkeys(range(6), 200))
        sent = AttackedEngine(Canned(none), "gaussian", BAD, scale, seed).run(
            ServerState(Replica(round, torch.zeros(1))), plan
        )
        return {r.client: r.scalars for r in sent}

    draws = [drawn(r, s)[k] for k in BAD for r in (0, 1) for s in (0, 1)]
    assert len({d.tobytes() for d in draws}) == len(draws)
    everything = np.concatenate([d.ravel() for d in draws])
    assert everything.std() == pytest.approx(200, rel=0.1)
    assert abs(everything.mean()) < 20
    assert drawn(0, 0, 0.5)[1].std() == pytest.approx(0.5, rel=0.2)
    assert np.array_equal(drawn(0, 0)[1], draws[0])


def test_scaled_puts_the_attackers_mean_in_the_place_of_everyones() -> None:
    honest, sent, plan = replies("scaled")
    weights = dict.fromkeys(sent, 1 / 6)
    total = aggregate([Scalars(k, g.astype(np.float32)) for k, g in sent.items()], weights, plan)
    of_honest = sum(honest[k] for k in honest if k not in BAD) / 6
    np.testing.assert_allclose(total, of_honest + np.mean([honest[k] for k in BAD], axis=0), rtol=1e-5)


def test_a_little_is_so_many_deviations_of_the_honest_ones_from_their_mean() -> None:
    honest, sent, _ = replies("little-is-enough", 1.5)
    good = np.stack([honest[k] for k in honest if k not in BAD])
    expected = good.mean(0) - 1.5 * good.std(0)
    assert all(np.allclose(sent[k], expected, rtol=1e-6) for k in BAD)
    honest, sent, _ = replies("little-is-enough")
    np.testing.assert_allclose(sent[1], good.mean(0) - z_max(6, 2) * good.std(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("clients", "bad", "expected"),
    [
        (50, 24, 1.4261),  # two supporters: Phi^-1(24 / 26)
        (50, 12, 0.3360),  # fourteen: Phi^-1(24 / 38)
        (10, 2, 0.0),
        (10, 4, 0.4307),
        (10, 5, 0.8416),
        (10, 6, 0.6745),
    ],
)
def test_z_max_is_baruchs(clients: int, bad: int, expected: float) -> None:
    """s = floor(n / 2 + 1) - m supporters, z = Phi^-1((n - m - s) / (n - m)), s at least one."""
    assert z_max(clients, bad) == pytest.approx(expected, abs=1e-4)


def test_z_max_of_a_round_with_nobody_honest_is_zero() -> None:
    assert z_max(2, 2) == 0
    assert z_max(3, 2) == 0


def test_colluders_send_the_same_and_turn_the_mean_round() -> None:
    honest, sent, plan = replies("collusion")
    good = np.mean([honest[k] for k in honest if k not in BAD], axis=0)
    assert np.array_equal(sent[1], sent[4])
    total = aggregate([Scalars(k, g.astype(np.float32)) for k, g in sent.items()], dict.fromkeys(sent, 1 / 6), plan)
    np.testing.assert_allclose(total, -4 / 6 * good, rtol=1e-5)
    _, sent, _ = replies("collusion", 0.1)
    np.testing.assert_allclose(sent[1], -0.1 * good, rtol=1e-6)


@pytest.mark.parametrize("attack", IN_ROUNDS)
@pytest.mark.parametrize("scale", [0.0, 1e9])
def test_whatever_is_sent_is_let_through(attack: Attack, scale: float) -> None:
    _, sent, plan = replies(attack, scale)
    for client, g in sent.items():
        check_reply(plan, client, g.astype(np.float32))
    if scale and attack in ("sign-flip", "gaussian", "collusion"):
        assert max(np.abs(sent[k]).max() for k in BAD) > 0.99 * LARGEST_LOSS / plan.eps


@pytest.mark.parametrize("attack", IN_ROUNDS)
def test_a_round_of_attackers_alone_is_one_too(attack: Attack) -> None:
    _, sent, plan = replies(attack, bad=tuple(range(6)))
    for client, g in sent.items():
        check_reply(plan, client, g.astype(np.float32))


@pytest.mark.parametrize("attack", IN_ROUNDS)
def test_clients_stopped_early_send_one_step_and_are_seen_as_such(attack: Attack) -> None:
    settings = settings_of()
    _, _, engine = bowl_engine()
    state = ServerState(Replica(0, engine.model.read()), early_stopped=frozenset({0, 1, 2, 3, 5}))
    plan = open_round(state, settings)
    honest = {r.client: r.scalars for r in engine.run(state, plan)}
    sent = {r.client: r.scalars for r in AttackedEngine(engine, attack, BAD).run(state, plan)}
    assert {k: len(g) for k, g in sent.items()} == {0: 1, 1: 1, 2: 1, 3: 1, 4: 3, 5: 1}
    good = np.mean([honest[k].astype(float) for k in (0, 2, 3, 5)], axis=0)
    if attack == "collusion":  # nobody honest made steps two and three
        np.testing.assert_allclose(sent[4], np.concatenate([-4 * good, np.zeros((2, 2))]), rtol=1e-5)


# --- who attacks, and with what rows ---------------------------------------------------------------


def test_attackers_are_drawn_by_the_seed() -> None:
    drawn = [make_config({"attack": "sign-flip", "attackers": 3, "seed": s}).attacking_clients for s in range(60)]
    assert all(len(set(a)) == 3 and a == tuple(sorted(a)) for a in drawn)
    assert set(np.concatenate(drawn)) == set(range(10))
    assert drawn[7] == make_config({"attack": "gaussian", "attackers": 3, "seed": 7}).attacking_clients
    more = make_config({"attack": "sign-flip", "attackers": 5, "seed": 7}).attacking_clients
    assert set(drawn[7]) < set(more)  # of two attackers and four, the two are among the four
    assert make_config({"attackers": 3}).attacking_clients == ()


def test_a_flipped_label_is_another_and_flipped_again_the_same() -> None:
    assert [flipped(label, 4) for label in range(4)] == [3, 2, 1, 0]
    assert [flipped(flipped(label, 5), 5) for label in range(5)] == list(range(5))


@pytest.mark.parametrize("attack", ["label-flip", "scaled", "sign-flip"])
def test_attackers_alone_have_their_labels_flipped(federation: Path, attack: Attack) -> None:
    given = {
        **{name: str(federation / name) for name in ("model", "data")},
        **{"text": str(federation / "text.jsonl"), "task": "sst2", "clients": 4, "partition": "iid", "threads": 1},
    }
    config = resolve(make_config(given))
    problem = open_problem(config)
    plain = Split.of(config, problem)
    turned_config = resolve(make_config({**given, "attack": attack, "attackers": 2}))
    turned = Split.of(turned_config, problem)
    bad = turned_config.attacking_clients
    for client, rows in enumerate(plain.partition.rows):
        assert np.array_equal(rows, turned.partition.rows[client])
        was, now = ([split.examples[i].label for i in rows] for split in (plain, turned))
        flips = attack != "sign-flip" and client in bad
        assert now == ([1 - label for label in was] if flips else was)
    assert (plain.digest == turned.digest) == (attack == "sign-flip")


# --- GradIP is no defence --------------------------------------------------------------------------

VPCS = Vpcs(calibration_steps=60, initial_steps=20, later_steps=20)


def settings_of_ten(rule: str = "automatic") -> Any:
    ten = {"clients": 10, "clients_per_round": 10, "examples": dict.fromkeys(range(10), 10), "lr": 1e-3}
    return config(**ten, directions=1, early_stop="vp", vpcs=dataclasses.replace(VPCS, rule=rule))


@lru_cache
def honest_traces(decaying: frozenset[int]) -> list[Reply]:
    """A calibration of ten clients on the Bowl, some of which learn all they have within a few steps."""
    _, _, engine = bowl_engine()
    state = ServerState(Replica(0, engine.model.read()))
    replies = engine.run(state, calibration.open_calibration(state, settings_of_ten()))
    decay = np.exp(-np.arange(VPCS.calibration_steps) / 8, dtype=np.float32)[:, None]
    return [dataclasses.replace(r, scalars=r.scalars * decay) if r.client in decaying else r for r in replies]


def calibrated(
    attack: Attack, scale: float, rule: str, decaying: set[int], seed: int = 0
) -> calibration.CalibrationRecord:
    """What a calibration finds where clients 2 and 7 attack."""
    settings, (_, mask, engine) = settings_of_ten(rule), bowl_engine()
    gradient = torch.randn(len(mask), generator=torch.Generator().manual_seed(3))
    state = ServerState(Replica(0, engine.model.read()))
    plan = calibration.open_calibration(state, settings)
    sent = AttackedEngine(Canned(honest_traces(frozenset(decaying))), attack, (2, 7), scale, seed).run(state, plan)
    return calibration.close_calibration(state, plan, sent, settings, engine.directions, gradient)[1]


@pytest.mark.parametrize("rule", ["automatic", "thresholds"])
def test_a_forged_trace_passes_where_the_honest_one_is_flagged(rule: str) -> None:
    honest = calibrated("none", 0.0, rule, {2, 7})
    assert honest.selection.extreme == honest.early_stopped == (2, 7)
    for seed in range(20):
        forged = calibrated("gradip-forgery", 0.0, rule, {2, 7}, seed)
        assert forged.selection.extreme == forged.early_stopped == ()


def test_a_forged_trace_is_as_loud_as_honest_ones_at_every_step() -> None:
    level = []
    for seed in range(30):
        record = calibrated("gradip-forgery", 0.0, "automatic", {2, 7}, seed)
        good = np.stack([np.abs(record.scalars[k][:, 0]) for k in range(10) if k not in (2, 7)]).astype(float)
        forged = np.abs(record.scalars[2][:, 0].astype(float))
        level.append(forged / np.sqrt((good**2).mean(0)))
    # half-normal: mean sqrt(2 / pi)
    np.testing.assert_allclose(np.mean(level, axis=0).mean(), np.sqrt(2 / np.pi), rtol=0.05)
    assert np.mean(level, axis=0).std() < 0.2


def test_a_quiet_trace_can_be_forged_too_to_be_stopped_early() -> None:
    assert calibrated("none", 0.0, "automatic", set()).selection.extreme == ()
    forged = calibrated("gradip-forgery", 1e-3, "automatic", set())
    assert forged.selection.extreme == forged.early_stopped == (2, 7)


@pytest.mark.parametrize("attack", [a for a in IN_ROUNDS if a not in IN_CALIBRATIONS])
def test_other_attacks_are_honest_in_a_calibration(attack: Attack) -> None:
    honest, attacked = calibrated("none", 0.0, "automatic", {2}), calibrated(attack, 0.0, "automatic", {2})
    assert all(np.array_equal(attacked.scalars[k], g) for k, g in honest.scalars.items())


def test_a_forger_that_passed_poisons_all_its_steps() -> None:
    _, sent, _ = replies("gradip-forgery", steps=3)
    honest, _, _ = replies("sign-flip", steps=3)
    assert all(np.array_equal(sent[k], -honest[k]) for k in BAD)


# --- whole runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("--attack", "gaussian", "--attack-scale", "2"),
        ("--attack", "scaled", "--aggregation", "median", "--clients-per-round", "4"),
        (
            *("--attack", "gradip-forgery", "--method", "meerkat-vp", "--local-steps", "2"),
            *("--calibration-steps", "6", "--initial-steps", "3", "--later-steps", "3"),
        ),
    ],
    ids=["gaussian", "scaled", "forgery"],
)
def test_an_attacked_run_is_resumed_to_the_same_bits_and_verified(
    simulate_arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
) -> None:
    arguments = [*simulate_arguments, *options, "--clients", "5", "--attackers", "2", "--rounds", "3"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    assert f"attack {options[1]} by clients " in capsys.readouterr().err
    append, count = run_log.RunLog.append, 0

    class Stopped(BaseException):
        pass

    def append_or_stop(log: run_log.RunLog, record: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise Stopped
        append(log, record)

    with monkeypatch.context() as patch:
        patch.setattr(run_log.RunLog, "append", append_or_stop)
        with pytest.raises(Stopped):
            main([*arguments, "--out", str(tmp_path / "cut")])
    assert main(["resume", str(tmp_path / "cut")]) == 0
    assert main(["verify", str(tmp_path / "cut")]) == 0
    assert (tmp_path / "whole" / "rounds.log").read_bytes() == (tmp_path / "cut" / "rounds.log").read_bytes()
    summary = RunFolder(tmp_path / "cut").summary()
    assert summary is not None
    settings = RunFolder(tmp_path / "cut").config()
    assert (summary["attack"], summary["aggregation"]) == (settings.attack, settings.aggregation)
    assert summary["attacking_clients"] == list(settings.attacking_clients)


def test_a_comparison_has_attacks_and_rules_as_axes_and_runs_what_says_nothing_once(
    federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
    text = f"""
model = {json.dumps(str(federation / "model"))}
data = {json.dumps(str(federation / "data"))}
text = {json.dumps(str(federation / "text.jsonl"))}
task = "sst2"
density = 0.01
clients = 5
partition = "iid"
batch_size = 4
rounds = 1
lr = 0.01
byzantine = 1
seeds = [0]
attack = ["none", "sign-flip"]
attackers = [1, 2]
aggregation = ["mean", "krum"]
"""
    (tmp_path / "studies.toml").write_text(text)
    assert main(["compare", str(tmp_path / "studies.toml"), "--jobs", "1", "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["studies"][0]["rows"]
    assert len(rows) == 8
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 6  # without an attack the number of attackers is idle


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"attack": "sign-flip"}, "attackers 0: attack sign-flip needs at least 1"),
        ({"attack": "sign-flip", "attackers": 10}, "fewer than clients, 10"),
        ({"attack": "sign-flip", "attackers": 2, "method": "fo-fedavg"}, "changes scalars, and fo-fedavg sends none"),
        ({"attack": "gradip-forgery", "attackers": 2}, "nobody is calibrated; use method meerkat-vp"),
        ({"attack": "sign-flip", "attackers": 2, "partition": "sites"}, "is for simulations"),
        ({"attack": "flip"}, "--attack flip: must be 'none', 'label-flip'"),
    ],
)
def test_attacks_that_cannot_be_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(MeerkatError, match=said) as told:
        make_config(given)
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--attackers", "2"), "attackers 2: does nothing with attack none; say which attack, or leave it out"),
        (("--attack-scale", "0.5"), "attack_scale 0.5: does nothing with attack none"),
        (
            ("--attack", "label-flip", "--attackers", "1", "--attack-scale", "7"),
            "attack_scale 7.0: does nothing with attack label-flip; use another, or leave it out",
        ),
        (("--method", "full-fedzo", "--exclude", "norms"), "exclude norms: does nothing with method full-fedzo"),
        (("--method", "lora-fedzo", "--mask-scope", "per-tensor"), "mask_scope per-tensor: does nothing with method"),
        (("--method", "fo-fedavg", "--directions", "4"), "directions 4: does nothing with method fo-fedavg"),
        (("--byzantine", "1"), "byzantine 1: does nothing with aggregation mean and mixing none; use trimmed-mean"),
        (("--aggregation", "median", "--byzantine", "1"), "byzantine 1: does nothing with aggregation median"),
        (("--clip-norm", "2"), "clip_norm 2.0: does nothing with clipping none; use clipping fixed, or leave it out"),
        (("--clipping", "median", "--clip-norm", "2"), "clip_norm 2.0: does nothing with clipping median"),
        (
            ("--dp", "example", "--dp-noise-multiplier", "1", "--missing-steps", "left-out"),
            "missing_steps left-out: does nothing with early_stop none; use method meerkat-vp",
        ),
        (("--dp-clip", "0.5"), "dp_clip 0.5: does nothing with dp none; use dp example or client, or leave it out"),
        (("--dp-delta", "1e-6"), "dp_delta 1e-06: does nothing with dp none"),
        (("--dp-relation", "replace"), "dp_relation replace: does nothing with dp none"),
        (("--server-beta1", "0.5"), "server_beta1 0.5: does nothing with update_rule sgd; use adam, or leave it out"),
        (
            ("--update-rule", "momentum", "--server-tau", "1e-3"),
            "server_tau 0.001: does nothing with update_rule momentum; use adam, or leave it out",
        ),
        (("--feddyn-alpha", "0.1"), "feddyn_alpha 0.1: does nothing with method meerkat; use method feddyn, or leave"),
        (("--recalibrate-every", "2"), "recalibrate_every 2: does nothing with early_stop none; use method meerkat-vp"),
        (("--rho-later", "3"), "rho_later 3.0: does nothing with early_stop none"),
        (("--calibration-steps", "70"), "calibration_steps 70: does nothing with early_stop none"),
        (
            ("--method", "meerkat-vp", "--sigma", "0.5"),
            "sigma 0.5: does nothing with vpcs_rule automatic; use thresholds, or leave it out",
        ),
        (("--method", "fo-fedavg", "--eps", "0.01"), "eps 0.01: does nothing with method fo-fedavg"),
        (("--method", "fo-fedavg", "--max-step-norm", "5"), "max_step_norm 5.0: does nothing with method fo-fedavg"),
        (("--method", "fo-fedavg", "--estimator", "one-sided"), "estimator one-sided: does nothing with method fo-"),
    ],
)
def test_a_new_run_with_a_setting_that_does_nothing_is_refused(
    simulate_arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: tuple[str, ...],
    said: str,
) -> None:
    assert main([*simulate_arguments, *given, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"meerkat: {said}")
    assert not (tmp_path / "run").exists()


def test_a_setting_that_does_nothing_is_taken_at_its_default_and_of_a_run_that_has_it(
    simulate_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = ("--attackers", "0", "--byzantine", "0", "--clip-norm", "0", "--dp-clip", "1", "--dp-delta", "1e-5")
    assert main([*simulate_arguments, *defaults, "--rounds", "1", "--out", str(tmp_path / "run")]) == 0
    with monkeypatch.context() as before:
        before.setattr(RunConfig, "check_none_idle", lambda _: None)
        old = [*simulate_arguments, "--attackers", "2", "--dp-clip", "3", "--rounds", "1", "--out", str(tmp_path / "o")]
        assert main(old) == 0
    (tmp_path / "o" / "summary.json").unlink()
    for command in ("resume", "verify", "report"):
        assert main([command, str(tmp_path / "o")]) == 0


def test_what_a_run_s_config_says_that_does_nothing_is_taken(simulate_arguments: list[str], tmp_path: Path) -> None:
    exact = [*simulate_arguments, "--method", "fo-fedavg", "--dtype", "bfloat16", "--rounds", "1"]
    assert main([*exact, "--out", str(tmp_path / "one")]) == 0
    assert main(["simulate", str(tmp_path / "one" / "config.toml"), "--out", str(tmp_path / "two")]) == 0


def test_a_run_says_who_attacks_and_how_replies_become_one(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When it starts, when it goes on, and on its page."""
    many = [*simulate_arguments, "--clients", "5", "--rounds", "2", "--eval-every", "0"]
    robust = ["--aggregation", "trimmed-mean", "--byzantine", "1", "--mixing", "nearest-neighbour"]
    attacked = ["--attack", "sign-flip", "--attackers", "1", "--clipping", "fixed", "--clip-norm", "0.5"]
    bad = make_config({"attack": "sign-flip", "attackers": 1, "clients": 5}).attacking_clients[0]
    attack, rule = (
        f"attack sign-flip by client {bad}, ",
        "aggregation trimmed-mean with f = 1, mixing nearest-neighbour",
    )
    for name, given, said in (
        ("plain", [], ""),
        ("robust", robust, rule),
        ("both", [*robust, *attacked], f"{attack}{rule}, clipping fixed at 0.5"),
        ("attacked", attacked[:4], f"{attack}aggregation mean"),
    ):
        run = tmp_path / name
        assert main([*many, *given, "--out", str(run)]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith(("attack", "aggregation"))] == [said] * bool(said)
        assert main(["report", str(run)]) == 0
        page = (run / "report.html").read_text().partition("All settings")[0]
        assert f"<p>{said[:1].upper()}{said[1:]}.</p>" in page if said else "ggregation" not in page
    (run / "summary.json").unlink()
    capsys.readouterr()
    assert main(["resume", str(run)]) == 0
    assert f"{attack}aggregation mean" in capsys.readouterr().err.splitlines()


def test_flipped_labels_need_no_scalars() -> None:
    made = make_config({"attack": "label-flip", "attackers": 2, "method": "fo-fedavg"})
    assert isinstance(made, RunConfig)


def test_a_federation_refuses_an_attack(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text('[run]\nattack = "sign-flip"\nattackers = 1\n')
    with pytest.raises(MeerkatError, match="attack sign-flip: is for simulations"):
        read_federation(tmp_path / "federation.toml")


def test_a_robust_rule_keeps_the_direction_that_the_mean_loses() -> None:
    settings = settings_of(local_steps=1, directions=4)
    _, _, engine = bowl_engine()
    state = ServerState(Replica(0, engine.model.read()))
    plan = open_round(state, settings)
    honest = engine.run(state, plan)
    weights = client_weights(settings, range(6))
    truth = aggregate([r for r in honest if r.client not in BAD], client_weights(settings, [0, 2, 3, 5]), plan)
    sent = AttackedEngine(engine, "collusion", BAD, scale=50.0).run(state, plan)
    assert float((aggregate(sent, weights, plan) * truth).sum()) < 0
    for rule in ("median", "trimmed-mean"):
        moved, record = close_round(
            state,
            plan,
            sent,
            dataclasses.replace(settings, aggregation=Aggregation(rule, 2)),
            engine.directions,
        )
        assert moved.round == 1
        assert float((record.aggregate * truth).sum()) > 0
