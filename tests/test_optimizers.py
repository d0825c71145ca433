"""Server optimisers and FedDyn, against the literal twin in float64 and against themselves to the bit."""

import dataclasses
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import reference
import torch
from bowl import KEY, Literal, live, moved_by, rules_of, same_bits
from test_server import config
from torch import Tensor

from meerkat.algorithm import path, server
from meerkat.algorithm.client import correction, local_steps
from meerkat.algorithm.client_rules import ZEROTH_ORDER, FedDynClient
from meerkat.algorithm.client_sampling import seeded_sample
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import RoundPlan, RoundRecord, Update
from meerkat.algorithm.server import ServerState, client_weights, close_round, open_round, replay
from meerkat.algorithm.update_rules import FedAdam, FedAvg, FedAvgM, FedDyn, Moments, UpdateRule

WIDTH = 60
MOMENTUM = FedAvgM(lr=0.7, beta1=0.8)
ADAM = FedAdam(lr=0.05, beta1=0.9, beta2=0.95, tau=1e-3)
FEDDYN = FedDyn(alpha=0.4)


def records(rounds: int, steps: int = 3, directions: int = 2, share: float = 1.0) -> list[RoundRecord]:
    """Rounds whose scalars are any numbers: the server does not ask where they come from."""
    rng = np.random.default_rng(7)
    made = []
    for r in range(rounds):
        g = rng.normal(size=(steps, directions)).astype(np.float32)
        plan = RoundPlan(r, 0.3 / (r + 1), 1e-3, directions, {0: steps})
        made.append(
            RoundRecord(plan, {0: g}, np.zeros((0, directions)), weights={0: share}, aggregate=g, theta_digest="")
        )
    return made


def after_each(
    optimizer: UpdateRule, rounds: Sequence[RoundRecord], share: float = 1.0, device: str = "cpu"
) -> list[Tensor]:
    theta = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)).to(device)
    moments = optimizer.init(theta)
    thetas = [theta]
    for record in rounds:
        update = Update(record.plan, record.aggregate, share)
        theta, moments = optimizer.apply(theta, moments, update, Directions(KEY, WIDTH, device))
        thetas.append(theta)
    return thetas


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [FedAvg(), MOMENTUM, ADAM, FEDDYN, FedDyn(alpha=1e-3)])
def test_the_bits_are_the_same_on_a_gpu(rule: UpdateRule) -> None:
    pairs = zip(after_each(rule, records(8)), after_each(rule, records(8), device="cuda"), strict=True)
    assert all(torch.equal(ours, theirs.cpu()) for ours, theirs in pairs)


def test_feddyn_divides_and_does_not_multiply_by_a_reciprocal() -> None:
    """As a GPU does where a tensor is divided by a number: in 15 of 1,000 entries that has another last bit."""
    update = Update(records(1)[0].plan, records(1)[0].aggregate, 1.0)
    theta = torch.zeros(1000)
    rule, z = FedDyn(alpha=1e-3), Directions(KEY, 1000)
    moved, (h,) = rule.apply(theta, rule.init(theta), update, z)
    down = path.moved(theta, update, z)
    assert torch.equal(moved, down - torch.from_numpy(h.numpy() / np.float32(1e-3)))
    assert not torch.equal(moved, down - h * float(np.float32(1) / np.float32(1e-3)))


# --- one rule at a time ---


def test_momentum_is_the_literal_one() -> None:
    rounds = records(8)
    start, *ours = after_each(MOMENTUM, rounds)
    theirs = reference.fedavgm(start, [-moved_by(record, WIDTH) for record in rounds], beta=0.8, server_lr=0.7)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=5e-6)


def test_adam_is_the_literal_one() -> None:
    rounds = records(8)
    start, *ours = after_each(ADAM, rounds)
    deltas = [-moved_by(record, WIDTH) for record in rounds]
    rates = [0.05 * record.plan.lr for record in rounds]  # the round's rate reaches Adam's step
    theirs = reference.fedadam(start, deltas, beta1=0.9, beta2=0.95, tau=1e-3, server_lr=rates)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=5e-6)


def test_momentum_without_memory_at_rate_one_is_the_plain_step() -> None:
    plain = after_each(FedAvg(), records(4))
    for a, b in zip(after_each(FedAvgM(lr=1.0, beta1=0.0), records(4)), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_plain_step_is_the_path_to_the_bit() -> None:
    theta, z = torch.randn(WIDTH), Directions(KEY, WIDTH)
    (record,) = records(1)
    update = Update(record.plan, record.aggregate, 0.5)
    moved, moments = FedAvg().apply(theta, (), update, z)
    assert same_bits(moved, path.moved(theta, update, z))
    assert moments == ()


def test_adams_first_step_has_the_same_length_everywhere() -> None:
    start, first = after_each(dataclasses.replace(ADAM, tau=1e-9), records(1))
    expected = 0.05 * 0.3 * (1 - 0.9) / math.sqrt(1 - 0.95)
    torch.testing.assert_close((first - start).abs(), torch.full((WIDTH,), expected), rtol=1e-4, atol=0)


def test_adam_leaves_what_never_moved_where_it_is() -> None:
    (record,) = records(1)
    still = dataclasses.replace(record, aggregate=np.zeros_like(record.aggregate))
    start, after = after_each(ADAM, [still])
    assert same_bits(start, after)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_feddyns_server_step_is_its_formula(share: float) -> None:
    rounds = records(6)
    start, *ours = after_each(FEDDYN, rounds, share)
    theta, h = start.double(), torch.zeros(WIDTH, dtype=torch.float64)
    for ours_after, record in zip(ours, rounds, strict=True):
        moved = moved_by(record, WIDTH)
        h = h - 0.4 * share * moved
        theta = theta + moved - h / 0.4
        torch.testing.assert_close(ours_after.double(), theta, rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", [FedAvg(), MOMENTUM, ADAM, FEDDYN])
def test_nothing_that_was_there_is_written_into(optimizer: UpdateRule) -> None:
    theta, z, rounds = torch.randn(WIDTH), Directions(KEY, WIDTH), records(3)
    moments: Moments = optimizer.init(theta)
    for record in rounds:
        before = [theta.clone(), *(m.clone() for m in moments)]
        moved, next_moments = optimizer.apply(theta, moments, Update(record.plan, record.aggregate), z)
        assert all(same_bits(a, b) for a, b in zip([theta, *moments], before, strict=True))
        assert not same_bits(moved, theta)
        theta, moments = moved, next_moments


@pytest.mark.parametrize("optimizer", [FedAvg(), MOMENTUM, ADAM, FEDDYN])
def test_a_first_order_rounds_delta_counts_like_scalars(optimizer: UpdateRule) -> None:
    rounds = records(5)
    first_order = [
        dataclasses.replace(
            record,
            plan=dataclasses.replace(record.plan, sends="delta"),
            scalars={},
            aggregate=moved_by(record, WIDTH).float().numpy(),
        )
        for record in rounds
    ]
    for a, b in zip(after_each(optimizer, rounds), after_each(optimizer, first_order), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 if optimizer is ADAM else 5e-6)


# --- whole federations ---


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM, FEDDYN])
@pytest.mark.parametrize("per_round", [3, 2])
def test_replaying_the_records_gives_the_same_bits(optimizer: UpdateRule, per_round: int) -> None:
    settings = config(rules=rules_of(optimizer), clients_per_round=per_round, rounds=6, lr=0.02)
    lived = live(settings)
    state = ServerState(Replica(0, live(dataclasses.replace(settings, rounds=0)).engine.model.read()))
    for record, then in zip(lived.rounds, lived.states, strict=True):
        reread = RoundRecord.from_json(json.loads(json.dumps(record.to_json())))
        assert reread.plan == record.plan
        state = replay(state, reread, settings, Directions(KEY, len(lived.mask)))
        assert path.digest(state.theta) == record.theta_digest
        moments, expected = state.replica.moments, then.replica.moments
        assert len(moments) == len(expected) > 0
        assert all(same_bits(a, b) for a, b in zip(moments, expected, strict=True))
        assert state.carried.keys() == then.carried.keys()
        assert all(same_bits(state.carried[k], h) for k, h in then.carried.items())
    assert bool(state.carried) == (optimizer is FEDDYN)


@pytest.mark.parametrize(("optimizer", "lr"), [(MOMENTUM, 0.02), (ADAM, 1.0)])
def test_a_federation_under_a_server_optimiser_descends(optimizer: UpdateRule, lr: float) -> None:
    lived = live(config(rules=rules_of(optimizer), rounds=80, local_steps=1, directions=4, lr=lr))

    def mean_loss(theta: Tensor) -> float:
        lived.engine.model.write_(theta)
        return sum(lived.engine.losses_of([np.array([k, 0])])().item() for k in range(3)) / 3

    assert mean_loss(lived.thetas[-1]) < 0.75 * mean_loss(lived.thetas[0])


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("per_round", [4, 2])
def test_a_feddyn_federation_is_the_literal_one(steps: int, per_round: int, together: bool) -> None:
    settings = config(
        rules=rules_of(FEDDYN),
        rounds=7,
        local_steps=steps,
        directions=1,
        lr=0.05,
        clients=4,
        clients_per_round=per_round,
        examples={0: 10, 1: 30, 2: 5, 3: 19},
    )
    lived, twin = live(settings, together), Literal(settings)

    def asked(round: int) -> list[int]:
        return seeded_sample(range(settings.clients), per_round, settings.seed, round)

    made = twin.pointer(asked)
    ends, corrected = reference.feddyn(
        lambda w, k, r, t: twin.loss(w, k, made(k, r, t)).item(),
        twin.w0,
        twin.moving,
        twin.direction,
        settings.rounds,
        steps,
        list(client_weights(settings, range(4)).values()),
        settings.lr,
        settings.eps,
        FEDDYN.alpha,
        asked,
    )
    for record, ours, theirs, g in zip(lived.rounds, lived.thetas, ends, corrected, strict=True):
        assert list(record.scalars) == list(g) == asked(record.plan.round)
        # g carries float32 weights' rounding over 2 eps
        torch.testing.assert_close(ours.double(), theirs[twin.moving], rtol=0, atol=1e-3)
        for k, scalars in record.scalars.items():
            np.testing.assert_allclose(scalars[:, 0], g[k].numpy(), rtol=0, atol=4e-3)
    plain = live(dataclasses.replace(settings, rules=rules_of(FedAvg())), together)
    assert (plain.thetas[-1] - lived.thetas[-1]).abs().max() > 0.02  # or the comparison above says nothing


def test_feddyn_clients_together_and_one_by_one_are_equal_to_the_bit_here() -> None:
    settings = config(rules=rules_of(FEDDYN), local_steps=1, rounds=6, clients_per_round=2)
    assert [path.digest(t) for t in live(settings, True).thetas] == [
        path.digest(t) for t in live(settings, False).thetas
    ]


def test_a_feddyn_clients_virtual_path_is_what_it_had() -> None:
    settings = config(rules=rules_of(FEDDYN), rounds=3)
    lived = live(settings)
    state, plan = lived.states[-2], open_round(lived.states[-2], settings)
    masked, z = lived.engine.model, lived.engine.directions
    ran = {
        k: local_steps(
            masked,
            state.theta,
            plan,
            k,
            lambda t, k=k: lambda: masked.model.loss(k, state.steps_made[k] + t),
            z,
            rule=settings.rules.client,
            h=state.carried[k],
        )
        for k in plan.steps
    }
    _, record = close_round(state, plan, [reply for reply, _ in ran.values()], settings, z)
    assert record.theta_digest == lived.rounds[-1].theta_digest
    for k, (_, end) in ran.items():
        *_, rebuilt = path.walk(state.theta, plan, record.scalars[k], Directions(KEY, len(lived.mask)))
        assert same_bits(rebuilt, end)


def test_feddyns_correction_is_its_formula() -> None:
    ones, rule = torch.ones(3), FedDynClient(0.5)
    assert ZEROTH_ORDER.correction(ones, ones, ones) == 0
    assert rule.correction(None, None, ones) == 0
    assert rule.correction(None, ones, 2 * ones) == 3
    assert rule.correction(ones, None, 2 * ones) == -6
    assert rule.correction(ones, ones, 2 * ones) == -3


def test_who_did_not_take_part_keeps_its_correction() -> None:
    settings = config(rules=rules_of(FEDDYN), rounds=6, clients_per_round=1)
    lived = live(settings)
    for record, before, after in zip(lived.rounds[1:], lived.states, lived.states[1:], strict=False):
        (asked,) = record.scalars
        for k, h in before.carried.items():
            assert same_bits(after.carried[k], h) == (k != asked)


def test_calibrations_add_no_correction() -> None:
    ones = torch.ones(3)
    plan = RoundPlan(0, 0.1, 1e-3, 1, {0: 1})
    assert correction(plan, FedDynClient(0.5), ones, ones, ones) == -1.5
    assert correction(dataclasses.replace(plan, phase="calibration"), FedDynClient(0.5), ones, ones, ones) == 0


def test_a_round_of_many_clients_weighs_them_once_not_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    many = 50
    settings = config(clients=many, clients_per_round=many, examples=dict.fromkeys(range(many), 3))
    scalars = {k: np.ones((3, 2), np.float32) for k in range(many)}
    plan = RoundPlan(0, 0.1, 1e-3, 2, dict.fromkeys(range(many), 3))
    weights, pointers = dict.fromkeys(range(many), 1 / many), dict.fromkeys(range(many), 0)
    record = RoundRecord(
        plan, scalars, np.zeros((0, 2)), weights=weights, aggregate=scalars[0], theta_digest="", pointers=pointers
    )
    calls = 0

    def counted(*arguments: object) -> dict[int, float]:
        nonlocal calls
        calls += 1
        return client_weights(*arguments)

    monkeypatch.setattr(server, "client_weights", counted)
    replay(ServerState(Replica(0, torch.zeros(9))), record, settings, Directions(KEY, 9))
    assert calls <= 2
