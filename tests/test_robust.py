"""Robust rules against literal ones, their promises by properties, and what is always on: checks and the step's cap."""

import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bowl import KEY, live, moved_by, rules_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_server import bowl_engine, config

from meerkat.algorithm import calibration, path
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.extreme_clients import Vpcs
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.replies import LARGEST_LOSS, Delta, Reply, Scalars, check_reply
from meerkat.algorithm.robust import MEAN, RULES, Aggregation, capped, clipped, mixed, norm, robust
from meerkat.algorithm.rounds import RoundPlan, pack, unpack
from meerkat.algorithm.server import (
    ServerConfig,
    ServerState,
    aggregate,
    check_rate,
    client_weights,
    close_round,
    open_round,
    share_of,
)
from meerkat.algorithm.update_rules import FedAvg, FedAvgM, FedDyn
from meerkat.cli import main
from meerkat.errors import Diverged, MeerkatError, RunFailed
from meerkat.record import run_log
from meerkat.record.members import Members
from meerkat.record.replay import Replay
from meerkat.record.signatures import RunIdentity
from meerkat.settings.config import RunConfig, make_config

Rows = list[list[float]]
NEEDS_F = ("trimmed-mean", "krum", "multi-krum")

# --- literal twins: lists, one number after another ------------------------------------------------


def literal_median(rows: Rows, _: int) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def literal_trimmed_mean(rows: Rows, f: int) -> list[float]:
    kept = []
    for column in zip(*rows, strict=True):
        left = list(column)
        for _ in range(f):
            left.remove(min(left))
            left.remove(max(left))
        kept.append(statistics.fmean(left))
    return kept


def squared(a: Sequence[float], b: Sequence[float]) -> float:
    return math.dist(a, b) ** 2


def literal_scores(rows: Rows, f: int) -> list[float]:
    return [
        math.fsum(sorted(squared(row, other) for j, other in enumerate(rows) if j != i)[: len(rows) - f - 2])
        for i, row in enumerate(rows)
    ]


def literal_krum(rows: Rows, f: int) -> list[float]:
    scores = literal_scores(rows, f)
    return rows[scores.index(min(scores))]


def literal_multi_krum(rows: Rows, f: int) -> list[float]:
    scores = literal_scores(rows, f)
    best = sorted(range(len(rows)), key=scores.__getitem__)[: len(rows) - f]
    return [statistics.fmean(rows[i][d] for i in best) for d in range(len(rows[0]))]


def literal_mixed(rows: Rows, f: int) -> Rows:
    made = []
    for row in rows:
        by_distance = sorted((squared(row, other), i) for i, other in enumerate(rows))
        near = [rows[i] for _, i in by_distance[: len(rows) - f]]
        made.append([statistics.fmean(column) for column in zip(*near, strict=True)])
    return made


LITERAL: dict[str, Callable[[Rows, int], list[float]]] = {
    "median": literal_median,
    "trimmed-mean": literal_trimmed_mean,
    "krum": literal_krum,
    "multi-krum": literal_multi_krum,
}


def rows_of(clients: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(clients, width))


@pytest.mark.parametrize("rule", LITERAL)
@pytest.mark.parametrize(("clients", "f"), [(5, 1), (8, 2), (9, 3), (11, 4)])
@pytest.mark.parametrize("width", [1, 6])
def test_a_rule_is_the_literal_one(rule: str, clients: int, f: int, width: int) -> None:
    for seed in range(5):
        rows = rows_of(clients, width, seed)
        np.testing.assert_allclose(RULES[rule](rows, f), LITERAL[rule](rows.tolist(), f), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("clients", "f"), [(3, 1), (8, 2), (9, 4)])
def test_mixing_is_the_literal_one(clients: int, f: int) -> None:
    for seed in range(5):
        rows = rows_of(clients, 4, seed)
        np.testing.assert_allclose(mixed(rows, f), literal_mixed(rows.tolist(), f), rtol=0, atol=1e-12)


def test_rules_on_numbers_that_can_be_checked_by_hand() -> None:
    rows = np.array([[0.0], [1.0], [2.0], [4.0], [100.0]])
    assert RULES["median"](rows, 0).item() == 2
    assert RULES["median"](rows[:4], 0).item() == 1.5
    assert RULES["trimmed-mean"](rows, 1).item() == pytest.approx(7 / 3)
    assert RULES["krum"](rows, 1).item() == 1  # two nearest: 1 + 1, of the others at least 4 + 1
    assert RULES["multi-krum"](rows, 1).item() == 7 / 4
    assert mixed(rows, 1).ravel().tolist() == [7 / 4] * 4 + [107 / 4]


# --- promises, by properties ----------------------------------------------------------------------

values = st.floats(-100, 100, allow_nan=False, width=32)
anything = st.floats(-4e4, 4e4, allow_nan=False, width=32)


@st.composite
def attacked(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Honest rows, f rows of any numbers, and f; K is enough for every rule."""
    f, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    count = draw(st.integers(f + 3, f + 6))
    honest = [draw(st.lists(values, min_size=width, max_size=width)) for _ in range(count)]
    wrong = [draw(st.lists(anything, min_size=width, max_size=width)) for _ in range(f)]
    return np.array(honest), np.array(wrong), f


@settings(max_examples=150, deadline=None)
@given(attacked(), st.sampled_from(["median", "trimmed-mean"]), st.randoms())
def test_f_replies_cannot_move_a_coordinate_out_of_the_honest_ones(
    drawn: tuple[np.ndarray, np.ndarray, int], rule: str, order: Any
) -> None:
    honest, wrong, f = drawn
    rows = np.concatenate([honest, wrong])
    places = list(range(len(rows)))
    order.shuffle(places)
    combined = robust(rows[places], Aggregation(rule=rule, byzantine=f))
    slack = 1e-9 * (1 + np.abs(honest).max())
    assert (combined >= honest.min(0) - slack).all()
    assert (combined <= honest.max(0) + slack).all()


@settings(max_examples=150, deadline=None)
@given(
    attacked(),
    st.sampled_from(["median", "trimmed-mean", "krum", "multi-krum"]),
    st.sampled_from(["none", "nearest-neighbour"]),
)
def test_f_replies_cannot_move_a_rule_far_from_the_honest_mean(
    drawn: tuple[np.ndarray, np.ndarray, int], rule: str, mixing: str
) -> None:
    honest, wrong, f = drawn
    combined = robust(np.concatenate([honest, wrong]), Aggregation(rule=rule, byzantine=f, mixing=mixing))
    centre = honest.mean(0)
    spread = max(np.linalg.norm(row - centre) for row in honest)
    # (f, kappa)-robustness, which all these rules have, is of this form: what the attackers send is not in it
    assert np.linalg.norm(combined - centre) <= 12 * math.sqrt(honest.shape[1]) * spread + 1e-6


def test_the_mean_and_a_rule_that_expects_too_few_are_moved_without_bound() -> None:
    rows = np.concatenate([rows_of(7, 3), np.full((2, 3), 1e4)])
    assert np.abs(RULES["mean"](rows, 0)).max() > 1e3
    assert np.abs(robust(rows, Aggregation("trimmed-mean", 1))).max() > 1e3
    assert np.abs(robust(rows, Aggregation("trimmed-mean", 2))).max() < 5


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_order_of_replies_does_not_matter_to_the_bit(data: st.DataObject) -> None:
    clients = data.draw(st.integers(5, 9))
    rule = data.draw(st.sampled_from([*RULES]))
    by = Aggregation(
        rule=rule,
        byzantine=1,
        mixing="none" if rule == "mean" else data.draw(st.sampled_from(["none", "nearest-neighbour"])),
        clipping=data.draw(st.sampled_from(["none", "median", "fixed"])),
        clip_norm=1.0,
    )
    steps = {k: data.draw(st.integers(1, 3)) for k in range(clients)}
    replies = [Scalars(k, rows_of(t, 2, 7 + k).astype(np.float32)) for k, t in steps.items()]
    plan = RoundPlan(0, 1e-3, 1e-3, 2, steps)
    weights = client_weights(config(examples={k: k + 1 for k in steps}), list(steps))
    shuffled = data.draw(st.permutations(replies))
    expected = aggregate(replies, weights, plan, by)
    assert aggregate(shuffled, weights, plan, by).tobytes() == expected.tobytes()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mixing", ["none", "nearest-neighbour"])
def test_who_is_which_client_does_not_matter_to_a_rule(rule: str, mixing: str) -> None:
    rows = rows_of(9, 4)
    by = Aggregation(rule=rule, byzantine=2, mixing=mixing)
    for order in itertools.islice(itertools.permutations(range(9)), 0, 9000, 1000):
        np.testing.assert_allclose(robust(rows[list(order)], by), robust(rows, by), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_equal_replies_are_what_comes_out(rule: str) -> None:
    rows = np.tile(rows_of(1, 5), (9, 1))
    np.testing.assert_allclose(robust(rows, Aggregation(rule, 2, "nearest-neighbour")), rows[0], rtol=1e-15)


# --- rounds: missing steps, few replies, weights ---------------------------------------------------


def mean_as_it_was(replies: Sequence[Reply], weights: dict[int, float], plan: RoundPlan) -> np.ndarray:
    """The server's mean before there was any other rule."""
    total = np.zeros((max(plan.steps.values()), plan.directions), dtype=np.float64)
    for reply in sorted(replies, key=lambda reply: reply.client):
        total[: len(reply.scalars)] += weights[reply.client] * reply.scalars.astype(np.float64)
    return total.astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 99)), min_size=1, max_size=12), st.integers(0, 99))
def test_the_mean_keeps_its_bits(drawn: list[tuple[int, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    replies = [Scalars(k, rng.normal(size=(t, 2)).astype(np.float32)) for k, (t, _) in enumerate(drawn)]
    plan = RoundPlan(0, 0.1, 1e-3, 2, {k: t for k, (t, _) in enumerate(drawn)})
    weights = client_weights(config(examples={k: n for k, (_, n) in enumerate(drawn)}), range(len(drawn)))
    expected = mean_as_it_was(replies, weights, plan)
    assert aggregate(replies, weights, plan).tobytes() == expected.tobytes()
    assert aggregate(replies, weights, plan, MEAN, 1e6).tobytes() == expected.tobytes()


@pytest.mark.parametrize("rule", ["median", *NEEDS_F])
def test_a_step_is_aggregated_over_those_who_made_it_and_counts_by_their_share(rule: str) -> None:
    by = Aggregation(rule=rule, byzantine=1)
    steps = {0: 1, 1: 4, 2: 4, 3: 1, 4: 4, 5: 4, 6: 4, 7: 2}
    g = {k: rows_of(t, 2, k).astype(np.float32) for k, t in steps.items()}
    combined = by.combine(g, {}, (4, 2))
    for first, last in ((0, 1), (1, 2), (2, 4)):
        made = [k for k, t in steps.items() if t >= last]
        expected = robust(np.stack([g[k][first:last].ravel().astype(float) for k in made]), by)
        np.testing.assert_allclose(combined[first:last].ravel(), len(made) / 8 * expected, rtol=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_missing_steps_that_are_left_out_count_nothing(data: st.DataObject) -> None:
    """Each step is then aggregated as if those that made it had replied alone, each with its share of their weights."""
    rule = data.draw(st.sampled_from([*RULES]))
    steps = {k: data.draw(st.integers(1, 3)) for k in range(8)}
    g = {k: rows_of(t, 2, 7 + k).astype(np.float32) for k, t in steps.items()}
    weights = {k: (k + 1) / 36 for k in g}
    combined = Aggregation(rule=rule, byzantine=1, missing_steps="left-out").combine(g, weights, (4, 2))
    for step in range(3):
        made = [k for k, t in steps.items() if t > step]
        if rule == "mean" and made:
            share = sum(weights[k] for k in made)
            expected = sum(weights[k] / share * g[k][step].astype(float) for k in made)
            np.testing.assert_allclose(combined[step], expected, rtol=1e-12, atol=1e-14)  # a sum may nearly cancel
    assert not combined[max(steps.values()) :].any()
    ones = {k: np.ones_like(each) for k, each in g.items()}
    for_ones = Aggregation(rule=rule, byzantine=1, missing_steps="left-out").combine(ones, weights, (4, 2))
    np.testing.assert_allclose(for_ones[: max(steps.values())], 1.0, rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_for_equal_replies_every_rule_is_the_mean_missing_steps_included(rule: str) -> None:
    g = {k: np.ones((1 if k < 3 else 3, 1), np.float32) for k in range(8)}
    combined = Aggregation(rule=rule, byzantine=1).combine(g, dict.fromkeys(g, 1 / 8), (3, 1))
    np.testing.assert_allclose(combined.ravel(), [1, 5 / 8, 5 / 8], rtol=1e-15)


@pytest.mark.parametrize("rule", NEEDS_F)
@pytest.mark.parametrize("mixing", ["none", "nearest-neighbour"])
def test_where_too_few_replied_for_the_rule_they_take_the_median(rule: str, mixing: str) -> None:
    by = Aggregation(rule=rule, byzantine=2, mixing=mixing)
    assert by.least == (5 if rule == "trimmed-mean" else 7)
    for clients in range(1, by.least):
        rows = rows_of(clients, 3, clients)
        np.testing.assert_array_equal(robust(rows, by), np.median(rows, axis=0))
    rows = rows_of(by.least, 3) + np.arange(by.least)[:, None]
    assert not np.array_equal(robust(rows, by), np.median(rows, axis=0)) or rule == "trimmed-mean"


def test_all_count_equally_but_under_the_mean() -> None:
    for rule in RULES:
        by_rule = config(aggregation=Aggregation(rule, 1))
        weights = client_weights(by_rule, [0, 1])
        assert weights == ({0: 0.25, 1: 0.75} if rule == "mean" else {0: 0.5, 1: 0.5})
        assert share_of(by_rule, [0, 1]) == pytest.approx(40 / 45 if rule == "mean" else 2 / 3)


def test_nobody_is_no_step() -> None:
    for rule in RULES:
        assert not Aggregation(rule, 1, clipping="median").combine({}, {}, (2, 1)).any()


# --- clipping --------------------------------------------------------------------------------------


def test_a_long_reply_keeps_its_direction_and_gets_the_norm_it_may_have() -> None:
    rows = {0: np.array([[3.0], [4.0]]), 1: np.array([[0.3], [0.4]])}
    shortened = clipped(rows, Aggregation(clipping="fixed", clip_norm=2.0))
    np.testing.assert_allclose(shortened[0].ravel(), [1.2, 1.6])
    assert shortened[1] is rows[1]


def test_lengths_are_clipped_to_their_median_whatever_the_number_of_steps() -> None:
    rows = {k: np.full((t, 1), level) for k, (t, level) in enumerate([(1, 1.0), (4, 2.0), (9, 7.0)])}
    shortened = clipped(rows, Aggregation(clipping="median"))
    np.testing.assert_allclose([shortened[k].ravel()[0] for k in range(3)], [1, 2, 2])


@settings(max_examples=60, deadline=None)
@given(attacked())
def test_a_minority_cannot_be_longer_than_the_longest_honest_reply(drawn: tuple[np.ndarray, np.ndarray, int]) -> None:
    honest, wrong, _ = drawn
    shortened = clipped({k: row[None] for k, row in enumerate([*honest, *wrong])}, Aggregation(clipping="median"))
    longest = max(np.linalg.norm(row) for row in honest)
    assert all(np.linalg.norm(row) <= longest * (1 + 1e-9) for row in shortened.values())


# --- always on: the cap on a round's step ----------------------------------------------------------


def test_a_norm_is_the_norm_in_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    values = rows_of(1, 1001).astype(np.float32)
    whole = norm(values)
    assert whole == pytest.approx(float(np.linalg.norm(values.astype(np.float64))), rel=1e-13)
    monkeypatch.setattr("meerkat.algorithm.robust._CHUNK", 100)
    assert norm(values) == pytest.approx(whole, rel=1e-14)
    assert norm(np.zeros((3, 0))) == 0


def test_the_cap_scales_a_step_down_and_leaves_shorter_ones_alone() -> None:
    total = np.array([[3.0], [4.0]])
    assert capped(total, np.float32(0.5), 2.5) is total
    np.testing.assert_allclose(capped(total, np.float32(0.5), 1.25), total / 2)
    assert capped(total, np.float32(0.5), math.inf) is total


@pytest.mark.parametrize("steps", [1, 3])
def test_a_capped_rounds_step_is_as_long_as_the_cap_in_theta_space(steps: int) -> None:
    width, limit = 20_000, 0.01
    plan = RoundPlan(0, 0.5, 1e-3, 2, {0: steps, 1: steps})
    replies = [Scalars(k, np.full((steps, 2), 40.0, np.float32)) for k in range(2)]
    settings = config(local_steps=steps, clients=2, examples={0: 1, 1: 1}, step_limit=limit)
    theta = torch.zeros(width)
    moved, record = close_round(ServerState(Replica(0, theta)), plan, replies, settings, Directions(KEY, width))
    assert moved.theta.norm().item() / math.sqrt(width) == pytest.approx(limit, rel=0.03)
    assert np.ptp(record.aggregate) == 0
    free, _ = close_round(
        ServerState(Replica(0, theta)), plan, replies, replace(settings, step_limit=99.0), Directions(KEY, width)
    )
    assert free.theta.norm() > 100 * moved.theta.norm()


def test_every_optimiser_is_given_the_capped_step() -> None:
    limit = 1e-3
    for optimizer in (FedAvg(), FedAvgM(0.5), FedDyn(0.4)):
        lived = live(config(rules=rules_of(optimizer), step_limit=limit, rounds=3))
        for record in lived.rounds:
            rate = float(record.plan.rate)
            assert rate * np.linalg.norm(record.aggregate.astype(float)) == pytest.approx(limit, rel=1e-6)
            assert moved_by(record, len(lived.mask)).norm() > 0


def test_a_rate_that_is_far_too_high_is_told_from_replies_that_are() -> None:
    plan = RoundPlan(0, 0.5, 1e-3, 1, dict.fromkeys(range(5), 1))
    replies = [Scalars(k, np.full((1, 1), g, np.float32)) for k, g in enumerate([1, 2, 3, 1e4, 1e4])]
    check_rate(plan, replies, config(step_limit=1.5))
    check_rate(plan, [], config(step_limit=1.5))
    check_rate(replace(plan, sends="delta"), [Delta(0, np.full(3, 1e9, np.float32), 1)], config(step_limit=0.0))
    check_rate(plan, replies[3:], config(step_limit=1.5))  # two that lie, and nobody else was in time
    with pytest.raises(Diverged, match=r"round 0: most clients' steps are 1\.5 times as long"):
        check_rate(plan, replies, config(step_limit=1.0))


# --- always on: what a reply must be ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "scalars", "said"),
    [
        (5, np.zeros((2, 1), np.float32), "client 5, which was not asked"),
        (1, np.zeros((1, 1), np.float32), "1 steps in 1 directions, where 2 in 1"),
        (1, np.zeros((3, 1), np.float32), "3 steps in 1 directions, where 2 in 1"),
        (1, np.zeros((2, 2), np.float32), "2 steps in 2 directions, where 2 in 1"),
        (1, np.array([[0], [np.nan]], np.float32), "not finite"),
        (1, np.array([[0], [-np.inf]], np.float32), "not finite"),
        (1, np.array([[0], [-50_010]], np.float32), "5e.04: no loss makes one above 5e.04"),
    ],
)
def test_a_reply_that_cannot_be_one_is_refused(client: int, scalars: np.ndarray, said: str) -> None:
    plan = RoundPlan(0, 0.1, 1e-3, 1, {1: 2})
    with pytest.raises(ValueError, match=said):
        check_reply(plan, client, scalars)


def test_the_largest_scalar_that_a_loss_can_make_is_let_through() -> None:
    plan = RoundPlan(0, 0.1, 1e-3, 1, {1: 2})
    check_reply(plan, 1, np.array([[LARGEST_LOSS / 1e-3], [-5e4]], np.float32))
    with pytest.raises(ValueError, match=r"no loss makes one above 5e.03"):
        check_reply(replace(plan, eps=1e-2), 1, np.full((2, 1), 5e4, np.float32))


VPCS = Vpcs(calibration_steps=6, initial_steps=2, later_steps=2)


def logged(settings: ServerConfig) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """The records of a federation over the Bowl, as a log has them, and theta_0."""
    lived = live(settings)
    kinds = {calibration.CalibrationRecord: "calibration"}
    records = [{"kind": kinds.get(type(record), "round"), **record.to_json()} for record in lived.records]
    records.append({"kind": "close", "rounds": settings.rounds, "theta": path.digest(lived.states[-1].theta)})
    return json.loads(json.dumps(records)), bowl_engine()[2].model.read()


def gone_through(records: list[dict[str, Any]], theta: torch.Tensor, settings: ServerConfig) -> Replay:
    members = Members(RunIdentity("", False, "", "", "", "", ""))  # nobody signs
    return Replay(records, theta, settings, Directions(KEY, len(theta)), None, Path("rounds.log"), members).run()


MANY = {"clients": 9, "clients_per_round": 9, "examples": {k: k + 1 for k in range(9)}, "lr": 0.02}


@pytest.mark.parametrize(
    "by",
    [
        *(Aggregation(rule, 2) for rule in RULES),
        *(Aggregation(rule, 2, "nearest-neighbour") for rule in RULES if rule != "mean"),
        Aggregation(clipping="median"),
        Aggregation("krum", 2, clipping="fixed", clip_norm=0.5),
    ],
    ids=str,
)
def test_a_log_is_replayed_by_its_rule_and_by_no_other(by: Aggregation) -> None:
    settings = config(**MANY, aggregation=by)
    records, theta = logged(settings)
    assert gone_through(records, theta, settings).closed
    other = replace(by, rule="median" if by.rule != "median" else "trimmed-mean", byzantine=2, clipping="none")
    with pytest.raises(RunFailed, match="of round 0"):
        gone_through(records, theta, replace(settings, aggregation=other))


@pytest.mark.parametrize("rule", ["median", "multi-krum"])
def test_a_calibrated_federation_under_a_robust_rule_is_replayed(rule: str) -> None:
    settings = config(**MANY, aggregation=Aggregation(rule, 2), early_stop="vp", vpcs=VPCS)
    records, theta = logged(settings)
    assert gone_through(records, theta, settings).state.calibrated == 0


def test_a_log_in_which_the_cap_was_not_kept_is_refused() -> None:
    settings = config(step_limit=1e-3)
    records, theta = logged(settings)
    assert gone_through(records, theta, settings).closed
    with pytest.raises(RunFailed, match="the aggregate of round 0"):
        gone_through(records, theta, replace(settings, step_limit=1e-4))


@pytest.mark.parametrize("kind", ["round", "calibration"])
def test_a_log_with_a_reply_that_cannot_be_one_is_refused(kind: str) -> None:
    settings = config(early_stop="vp", vpcs=VPCS)
    records, theta = logged(settings)
    damaged = next(record for record in records if record["kind"] == kind)
    scalars = unpack(damaged["scalars"]).copy()
    scalars[1] = 6e4
    damaged["scalars"] = pack(scalars)
    with pytest.raises(RunFailed, match=r"client 0 in .*no loss makes one above 5e.04; restore a copy"):
        gone_through(records, theta, settings)


def test_a_round_in_which_fewer_answered_is_replayed() -> None:
    settings = config(**MANY, aggregation=Aggregation("krum", 3))
    _, _, engine = bowl_engine()
    state = ServerState(Replica(0, engine.model.read()))
    plan = open_round(state, settings)
    replies = engine.run(state, plan)[:4]
    moved, record = close_round(state, plan, replies, settings, engine.directions)
    expected = np.median([reply.scalars.astype(float) for reply in replies], axis=0).astype(np.float32)
    np.testing.assert_array_equal(record.aggregate, expected)
    records = [record.to_json()]
    assert gone_through(records, state.theta, settings).state.round == moved.round == 1


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"aggregation": "krum", "byzantine": 4}, "byzantine 4: aggregation krum needs 11 clients .* there are 10"),
        ({"aggregation": "multi-krum", "byzantine": 4}, "needs 11 clients"),
        ({"aggregation": "trimmed-mean", "byzantine": 5}, "aggregation trimmed-mean needs 11 clients"),
        ({"aggregation": "krum", "byzantine": 2, "clients_per_round": 6}, "needs 7 clients_per_round .* there are 6"),
        ({"aggregation": "median", "mixing": "nearest-neighbour", "byzantine": 5}, "needs 11 clients"),
        ({"aggregation": "trimmed-mean"}, "byzantine 0: aggregation trimmed-mean needs to know"),
        ({"aggregation": "median", "mixing": "nearest-neighbour"}, "byzantine 0: mixing nearest-neighbour needs"),
        ({"mixing": "nearest-neighbour", "byzantine": 1}, "comes before a robust rule, and aggregation is mean"),
        ({"clipping": "fixed"}, "clip_norm 0: clipping fixed needs a norm above 0"),
        ({"aggregation": "median", "method": "feddyn"}, "aggregation median: cannot be with method feddyn"),
        ({"aggregation": "median", "method": "fo-fedavg"}, "method fo-fedavg: it sends no scalars; use mean"),
        ({"clipping": "median", "method": "fo-fedavg"}, "clipping median: .* use none"),
        ({"aggregation": "mode"}, "--aggregation mode: must be 'mean', 'median'"),
        ({"max_step_norm": 0}, "--max-step-norm 0: must be greater than 0"),
    ],
)
def test_settings_that_cannot_hold_what_they_promise_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(MeerkatError, match=said) as told:
        make_config(given)
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    "given",
    [
        {"aggregation": "krum", "byzantine": 3, "clients": 9},
        {"aggregation": "trimmed-mean", "byzantine": 4},
        {"aggregation": "median", "byzantine": 9},  # says nothing to the median
        {"aggregation": "median", "mixing": "nearest-neighbour", "byzantine": 4},
        {"byzantine": 2, "clipping": "fixed", "clip_norm": 0.5},
        {"aggregation": "median", "update_rule": "adam"},
    ],
)
def test_settings_at_their_bounds_are_taken(given: dict[str, Any]) -> None:
    assert isinstance(make_config(given), RunConfig)


def test_a_robust_run_is_resumed_to_the_same_bits_and_verified(
    simulate_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--clients", "5", "--aggregation", "krum", "--byzantine", "1", "--rounds", "3", "--eval-every", "0"]
    assert main([*simulate_arguments, *options, "--out", str(tmp_path / "whole")]) == 0
    append = run_log.RunLog.append

    def stop_in_round_two(log: run_log.RunLog, record: Any) -> None:
        if record.get("round") == 2:
            raise KeyboardInterrupt
        append(log, record)

    with monkeypatch.context() as patch:
        patch.setattr(run_log.RunLog, "append", stop_in_round_two)
        main([*simulate_arguments, *options, "--out", str(tmp_path / "cut")])
    assert main(["resume", str(tmp_path / "cut")]) == 0
    assert main(["verify", str(tmp_path / "cut")]) == 0
    logs = [(tmp_path / name / "rounds.log").read_bytes() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert json.loads(logs[0].splitlines()[0][65:])["rule"] == "krum"


def test_a_loss_beyond_all_measure_ends_a_simulation_with_one_line(
    simulate_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("meerkat.algorithm.replies.LARGEST_LOSS", 1e-12)
    assert main([*simulate_arguments, "--rounds", "1", "--out", str(tmp_path / "run")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "round 0: client 0: a reply with a scalar of" in last
    assert "lower --lr" in last
