"""Calibrations: what they leave alone, what they count, whom they stop, and what of them is kept."""

import dataclasses
import json

import numpy as np
import pytest
import reference
import torch
from bowl import KEY, Literal, flat_for, live, rules_of, same_bits
from test_server import bowl_engine, config

from meerkat.algorithm import calibration, path
from meerkat.algorithm.calibration import CalibrationRecord, close_calibration, decide, due, open_calibration
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.extreme_clients import EarlyStop, Vpcs, select
from meerkat.algorithm.gradip import gradip, inner_products, magnitude
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.replies import Scalars
from meerkat.algorithm.server import ServerConfig, ServerState, close_round, open_round
from meerkat.algorithm.update_rules import FedDyn
from meerkat.problems.partition import ClientRows

VPCS = Vpcs(calibration_steps=24, initial_steps=8, later_steps=8)
QUIET = {2}


def federation(**changes: object) -> ServerConfig:
    """Five clients on slow rates, so that only the flat ones are quiet."""
    settings = config(
        early_stop="vp",
        vpcs=VPCS,
        clients=5,
        clients_per_round=5,
        examples=dict.fromkeys(range(5), 10),
        lr=1e-3,
        rounds=5,
    )
    return dataclasses.replace(settings, **changes)


def state_at(round: int, calibrated: int | None, early_stopped: frozenset[int] = frozenset()) -> ServerState:
    return ServerState(Replica(round, torch.zeros(4)), early_stopped=early_stopped, calibrated=calibrated)


# --- what a calibration does and leaves alone ---


def test_theta_and_weights_are_put_back_to_the_bit() -> None:
    model, _, engine = bowl_engine()
    before = [p.detach().clone() for p in model.parameters()]
    start, settings = ServerState(Replica(0, engine.model.read())), federation(lr=0.05)
    theta = start.theta.clone()
    plan = open_calibration(start, settings)
    replies = engine.run(start, plan)
    after, _ = close_calibration(start, plan, replies, settings, engine.directions)
    assert same_bits(after.theta, theta)
    engine.model.write_(after.theta)
    assert all(same_bits(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("directions", [1, 2])
def test_each_client_makes_one_uninterrupted_path_in_directions_of_its_own_phase(directions: int) -> None:
    settings = federation(lr=0.05, directions=directions)
    (record,) = live(dataclasses.replace(settings, rounds=1)).calibrations
    twin, z = Literal(settings), Directions(KEY, len(bowl_engine()[1]))
    assert record.plan.phase == "calibration"
    zs = [[twin.spread(z(record.plan.place(t, p))) for p in range(directions)] for t in range(VPCS.calibration_steps)]
    for client, g in record.scalars.items():
        expected, _ = reference.client_steps(
            lambda w, t, k=client: twin.loss(w, k, t).item(), twin.w0, twin.moving, zs, settings.lr, settings.eps
        )
        np.testing.assert_allclose(g, expected.numpy(), rtol=0, atol=2e-3)
    first = dataclasses.replace(record.plan, phase="training").place(0, 0)
    assert not same_bits(z(first), z(record.plan.place(0, 0)))


def test_a_path_starts_where_the_run_stands_and_later_ones_have_directions_of_their_own() -> None:
    lived = live(federation(vpcs=dataclasses.replace(VPCS, recalibrate_every=2)))
    assert [r.plan.round for r in lived.calibrations] == [0, 2, 4]
    z = Directions(KEY, len(lived.mask))
    firsts = [z(r.plan.place(0, 0)).clone() for r in lived.calibrations]
    assert not same_bits(firsts[0], firsts[1])
    assert all(r.plan.lr == 1e-3 for r in lived.calibrations)


def test_every_client_is_calibrated_whoever_takes_part_in_rounds() -> None:
    settings = federation(clients_per_round=2)
    assert list(open_calibration(state_at(0, None), settings).steps) == list(range(5))


def test_data_pointers_move_on_and_rounds_begin_after_them() -> None:
    _, _, engine = bowl_engine()
    asked: list[tuple[int, int]] = []
    rows_of = engine.batch_of

    def noted(client: int, step: int) -> np.ndarray:
        asked.append((client, step))
        return rows_of(client, step)

    engine = dataclasses.replace(engine, batch_of=noted)
    settings, state = federation(), ServerState(Replica(0, engine.model.read()))
    plan = open_calibration(state, settings)
    state, _ = close_calibration(state, plan, engine.run(state, plan), settings, engine.directions)
    assert state.steps_made == dict.fromkeys(range(5), VPCS.calibration_steps)
    assert state.round == 0
    plan = open_round(state, settings)
    state, _ = close_round(state, plan, engine.run(state, plan), settings, engine.directions)
    for client in range(5):
        steps = [step for k, step in asked if k == client]
        assert steps == list(range(VPCS.calibration_steps + plan.steps[client]))


def test_optimisers_moments_and_corrections_stay_as_they_are() -> None:
    vpcs = dataclasses.replace(VPCS, recalibrate_every=2)
    lived = live(federation(rules=rules_of(FedDyn(0.4)), vpcs=vpcs))
    pairs = list(zip(lived.states, lived.states[1:], lived.records[1:], strict=False))
    calibrated = [(a, b, r) for a, b, r in pairs if isinstance(r, CalibrationRecord)]
    assert len(calibrated) == 2
    for before, after, _ in calibrated:
        assert before.replica.moments
        assert after.replica is before.replica
        assert after.carried is before.carried


# --- when ---


def test_one_calibration_stands_before_the_first_round() -> None:
    settings = federation()
    assert due(state_at(0, None), settings)
    assert not due(state_at(0, 0), settings)
    assert not any(due(state_at(r, 0), settings) for r in range(1, 6))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_recalibration_comes_every_so_many_rounds(every: int) -> None:
    settings = federation(vpcs=dataclasses.replace(VPCS, recalibrate_every=every), rounds=7)
    lived = live(settings)
    kinds = ["c" if isinstance(record, CalibrationRecord) else "r" for record in lived.records]
    expected = "".join("cr" if r % every == 0 else "r" for r in range(7))
    assert "".join(kinds) == expected
    assert not due(lived.states[-1], settings)


def test_none_is_due_where_nobody_stops_early_or_no_round_is_left() -> None:
    assert not due(state_at(0, None), federation(early_stop="none"))
    every = federation(vpcs=dataclasses.replace(VPCS, recalibrate_every=1))
    assert due(state_at(4, 3), every)
    assert not due(state_at(5, 4), every)


# --- who stops ---


def test_a_flagged_client_makes_exactly_one_step_a_round_from_then_on() -> None:
    lived = live(federation(), quiet=QUIET)
    (record,) = lived.calibrations
    assert record.early_stopped == record.selection.extreme == (2,)
    for closed in lived.rounds:
        assert {k: len(g) for k, g in closed.scalars.items()} == {0: 3, 1: 3, 2: 1, 3: 3, 4: 3}
    assert lived.states[-1].steps_made[2] == VPCS.calibration_steps + 5
    assert lived.states[-1].steps_made[0] == VPCS.calibration_steps + 3 * 5


def test_a_flagged_client_uses_all_its_rows_in_the_end() -> None:
    _, _, engine = bowl_engine()
    rows = {k: ClientRows(k, np.arange(100 * k, 100 * k + 23), 4, 0) for k in range(5)}
    used: list[np.ndarray] = []

    def batch_of(client: int, step: int) -> np.ndarray:
        if client in QUIET:
            used.append(rows[client].batch(step))
        return np.array([client, step])

    engine = dataclasses.replace(flat_for(engine, QUIET), batch_of=batch_of)
    settings = federation(rounds=12, vpcs=Vpcs(calibration_steps=5, initial_steps=2, later_steps=2))
    state = ServerState(Replica(0, engine.model.read()), early_stopped=frozenset(QUIET), calibrated=0)
    for _ in range(settings.rounds):
        plan = open_round(state, settings)
        state, _ = close_round(state, plan, engine.run(state, plan), settings, engine.directions)
    assert len(used) == 12
    first_epoch = np.concatenate(used)[:23]
    assert sorted(first_epoch) == list(range(200, 223))


def test_where_everyone_asked_stops_early_a_round_is_one_step() -> None:
    state = state_at(1, 0, frozenset(range(5)))
    assert set(open_round(state, federation()).steps.values()) == {1}


def test_at_one_local_step_nobody_is_calibrated() -> None:
    assert due(state_at(0, None), federation(local_steps=2))
    assert not due(state_at(0, None), federation(local_steps=1))


def scalars(quiet: set[int], clients: int = 20, seed: int = 0) -> dict[int, np.ndarray]:
    """Calibration scalars of lively clients, and of quiet ones."""
    g = np.random.default_rng(seed).normal(size=(clients, 24, 1)).astype(np.float32)
    return {k: g[k] * np.float32(0.001 if k in quiet else 1) for k in range(clients)}


def decided(
    early_stop: EarlyStop,
    seed: int = 0,
    round: int = 0,
    stopped: frozenset[int] = frozenset(),
    but: set[int] = frozenset(),
) -> CalibrationRecord:
    settings = federation(clients=20, directions=1, early_stop=early_stop, seed=seed)
    state = state_at(round, None, stopped)
    plan = open_calibration(state, settings)
    answered = {k: g for k, g in scalars({3, 7, 11}).items() if k not in but}
    return decide(state, plan, answered, np.zeros((0, 1)), settings)


def test_random_early_stopping_stops_as_many_whoever_they_are() -> None:
    assert decided("vp").early_stopped == (3, 7, 11)
    drawn = [decided("random", seed) for seed in range(100)]
    assert {d.selection.extreme for d in drawn} == {(3, 7, 11)}
    assert all(len(set(d.early_stopped)) == 3 and d.early_stopped == tuple(sorted(d.early_stopped)) for d in drawn)
    counts = np.bincount(np.concatenate([d.early_stopped for d in drawn]), minlength=20)
    assert counts.min() > 3  # mean 15, standard deviation 3.6
    assert counts.max() < 30
    assert decided("random", 5).early_stopped == drawn[5].early_stopped
    assert len({decided("random", 0, r).early_stopped for r in range(5)}) > 1


def test_who_did_not_answer_stays_as_it_was() -> None:
    silent = {7, 8}
    record = decided("vp", stopped=frozenset({7, 12}), but=silent)
    assert 7 not in record.selection.clients
    assert record.early_stopped == (3, 7, 11)  # 7 stays stopped, 8 stays free, 12 answered and is free again
    random = decided("random", stopped=frozenset({7, 12}), but=silent)
    assert 7 in random.early_stopped
    assert 8 not in random.early_stopped
    assert len(random.early_stopped) == 3


def test_an_answer_in_part_is_none() -> None:
    _, _, engine = bowl_engine()
    settings, state = federation(), ServerState(Replica(0, engine.model.read()), {1: 9})
    plan = open_calibration(state, settings)
    replies = [
        Scalars(r.client, r.scalars[:7] if r.client == 1 else r.scalars, r.loss)
        for r in engine.run(state, plan)
        if r.client != 4
    ]
    after, record = close_calibration(state, plan, replies[::-1], settings, engine.directions)
    assert list(record.scalars) == list(record.selection.clients) == [0, 2, 3]
    assert after.steps_made == {0: 24, 1: 9, 2: 24, 3: 24}
    reread = CalibrationRecord.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False)))
    assert list(reread.scalars) == [0, 2, 3]


def test_a_calibration_that_nobody_answers_leaves_everyone_as_it_was() -> None:
    settings, state = federation(), state_at(0, None, frozenset({1}))
    plan = open_calibration(state, settings)
    after, record = close_calibration(state, plan, [], settings, Directions(KEY, 4), torch.ones(4))
    assert after.early_stopped == {1}
    assert not due(after, settings)
    reread = CalibrationRecord.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False)))
    assert reread.selection == record.selection


def test_the_decision_is_that_of_selection_on_these_signals() -> None:
    gradient = torch.randn(14, generator=torch.Generator().manual_seed(3))
    for rule in ("automatic", "thresholds"):
        vpcs = dataclasses.replace(VPCS, rule=rule, rho_later=0.8, rho_quie=0.1)
        lived = live(federation(vpcs=vpcs, rounds=1), gradient=gradient[: len(bowl_engine()[1])], quiet=QUIET)
        (record,) = lived.calibrations
        inner = inner_products(gradient[: len(lived.mask)], record.plan, Directions(KEY, len(lived.mask)))
        assert np.array_equal(record.inner, inner)
        again = select(
            {k: magnitude(g) for k, g in record.scalars.items()},
            {k: gradip(g, inner) for k, g in record.scalars.items()},
            vpcs,
            record.plan.directions,
        )
        assert record.selection == again
        assert lived.states[0].early_stopped == set(again.extreme)


# --- what is kept ---


@pytest.mark.parametrize("with_gradient", [True, False])
def test_a_record_is_the_same_after_a_journey_through_json(with_gradient: bool) -> None:
    gradient = torch.ones(len(bowl_engine()[1])) if with_gradient else None
    (record,) = live(federation(directions=2, rounds=1), gradient=gradient, quiet=QUIET).calibrations
    reread = CalibrationRecord.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False)))
    assert reread.plan == record.plan
    assert reread.selection == record.selection
    assert reread.early_stopped == record.early_stopped == (2,)
    assert reread.inner.shape == record.inner.shape == ((24, 2) if with_gradient else (0, 2))
    assert np.array_equal(reread.inner, record.inner)
    assert reread.scalars.keys() == record.scalars.keys()
    assert all(np.array_equal(reread.scalars[k], g) for k, g in record.scalars.items())
    for state in (state_at(0, None), state_at(0, None, frozenset({4}))):
        assert calibration.replay(state, reread) == calibration.replay(state, record)


@pytest.mark.parametrize("damage", [{"clients": []}, {"extra": 1}])
def test_a_selection_of_another_form_is_refused(damage: dict[str, object]) -> None:
    (record,) = live(federation(rounds=1)).calibrations
    fields = record.to_json()
    if "extra" in damage:
        fields["selection"] = fields["selection"] | damage
    else:
        del fields["selection"]["clients"]
    with pytest.raises(ValueError, match="selection"):
        CalibrationRecord.from_json(fields)


@pytest.mark.parametrize("early_stop", ["vp", "random"])
def test_the_same_federation_makes_the_same_decisions_and_bits(early_stop: EarlyStop) -> None:
    settings = federation(early_stop=early_stop, vpcs=dataclasses.replace(VPCS, recalibrate_every=2), directions=1)
    first, again = (live(settings, quiet=QUIET) for _ in range(2))
    assert [json.dumps(r.to_json()) for r in first.records] == [json.dumps(r.to_json()) for r in again.records]
    assert path.digest(first.thetas[-1]) == path.digest(again.thetas[-1])


def test_a_client_that_comes_alive_is_let_go_again() -> None:
    settings = federation(vpcs=dataclasses.replace(VPCS, recalibrate_every=1), rounds=2)
    _, _, engine = bowl_engine()
    state = ServerState(Replica(0, engine.model.read()))
    stopped = []
    for quiet in ({1}, {3}):
        plan = open_calibration(state, settings)
        replies = flat_for(engine, quiet).run(state, plan)
        state, _ = close_calibration(state, plan, replies, settings, engine.directions)
        stopped.append(set(state.early_stopped))
        plan = open_round(state, settings)
        state, _ = close_round(state, plan, engine.run(state, plan), settings, engine.directions)
    assert stopped == [{1}, {3}]
