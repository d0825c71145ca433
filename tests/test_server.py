"""Client, server and paths together, on a loss whose minimum is known, against the literal twin."""

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meerkat.algorithm import path
from meerkat.algorithm.client import local_steps
from meerkat.algorithm.client_sampling import seeded_sample
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.replies import Scalars
from meerkat.algorithm.rounds import RoundPlan, RoundRecord, Update
from meerkat.algorithm.server import (
    ServerConfig,
    ServerState,
    aggregate,
    client_weights,
    close_round,
    open_round,
    replay,
)
from meerkat.algorithm.zeroth_order import Loss, MaskedModel
from meerkat.masks.baselines import random_mask
from meerkat.masks.sparse_mask import SparseMask
from meerkat.run.local_engine import LocalEngine

KEY = 12345
NO_INNER = np.zeros((0, 1))


class Bowl(nn.Module):
    """A smooth loss over two tensors: a client and a step each have their own minimum."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(5, 4, generator=generator))
        self.b = nn.Parameter(torch.randn(7, generator=generator))

    def loss(self, client: int, step: int) -> Tensor:
        """float64, so that g is exact enough to compare with the twin's."""
        w = torch.cat([self.a.flatten(), self.b]).double()
        target = torch.sin(torch.arange(len(w)) * (1.0 + client) + step)
        return ((w - target) ** 2).mean() + (w**4).mean() / 10


def config(**changes: object) -> ServerConfig:
    made = ServerConfig(
        rounds=4,
        local_steps=3,
        directions=2,
        lr=0.1,
        eps=1e-3,
        clients=3,
        clients_per_round=3,
        examples={0: 10, 1: 30, 2: 5},
    )
    return dataclasses.replace(made, **changes)


def bowl_engine(together: bool = True) -> tuple[Bowl, SparseMask, LocalEngine]:
    model = Bowl()
    mask = random_mask(model, 0.5)
    masked, z = MaskedModel(model, mask), Directions(KEY, len(mask))

    def losses_of(rows: list[np.ndarray]) -> Loss:
        return lambda: torch.stack([model.loss(*row.tolist()) for row in rows])

    engine = LocalEngine(
        masked,
        z,
        batch_of=lambda client, step: np.array([client, step]),
        losses_of=losses_of,
        together=together,
    )
    return model, mask, engine


def run(settings: ServerConfig, together: bool = True) -> tuple[list[Tensor], list[RoundRecord]]:
    """theta after each round, and the records."""
    _, _, engine = bowl_engine(together)
    state, thetas, records = ServerState(Replica(0, engine.model.read())), [], []
    for _ in range(settings.rounds):
        plan = open_round(state, settings)
        replies = engine.run(state, plan)
        state, record = close_round(state, plan, replies, settings, engine.directions)
        thetas.append(state.theta)
        records.append(record)
    return thetas, records


def literal(settings: ServerConfig) -> list[Tensor]:
    """The same federation by tests/reference.py: dense weights, averaged."""
    model, mask, engine = bowl_engine()
    moving = torch.cat(
        [
            torch.isin(torch.arange(p.numel()), mask.entries.get(name, torch.zeros(0).long()))
            for name, p in model.named_parameters()
        ]
    )

    def loss(w: Tensor, client: int, round: int, step: int) -> float:
        reference.set_flat_parameters(model, w)
        return model.loss(client, round * settings.local_steps + step).item()

    def dense(round: int, step: int, p: int) -> Tensor:
        whole = torch.zeros(len(moving))
        whole[moving] = engine.directions(RoundPlan(round, 0, 0, settings.directions, {}).place(step, p))
        return whole

    ends = reference.meerkat(
        loss,
        reference.flat_parameters(model),
        moving,
        dense,
        settings.rounds,
        settings.local_steps,
        settings.directions,
        list(client_weights(settings, list(range(settings.clients))).values()),
        settings.lr,
        settings.eps,
    )
    return [end[moving] for end in ends]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("steps", "directions"), [(1, 1), (1, 3), (4, 1), (3, 2)])
def test_a_run_is_the_literal_algorithm(steps: int, directions: int, together: bool) -> None:
    settings = config(local_steps=steps, directions=directions)
    for ours, theirs in zip(run(settings, together)[0], literal(settings), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-4)  # g carries float32 weights' rounding


def test_it_descends() -> None:
    model, _, engine = bowl_engine()
    thetas, _ = run(config(rounds=100, local_steps=1, directions=4))

    def mean_loss(theta: Tensor) -> float:
        engine.model.write_(theta)
        return sum(model.loss(k, 0).item() for k in range(3)) / 3

    assert mean_loss(thetas[-1]) < 0.7 * mean_loss(thetas[0])


def test_clients_together_and_one_by_one_are_equal_to_the_bit_here() -> None:
    settings = config(local_steps=1)
    assert [path.digest(t) for t in run(settings, True)[0]] == [path.digest(t) for t in run(settings, False)[0]]


def test_a_clients_virtual_path_is_what_it_had() -> None:
    settings = config()
    _, _, engine = bowl_engine()
    start = engine.model.read()
    plan = open_round(ServerState(Replica(0, start)), settings)
    losses: Callable[[int], Callable[[int], Loss]] = lambda k: lambda t: lambda: engine.model.model.loss(k, t)  # noqa: E731
    lived = {k: local_steps(engine.model, start, plan, k, losses(k), engine.directions) for k in range(3)}
    replies = [reply for reply, _ in lived.values()]
    _, record = close_round(ServerState(Replica(0, start)), plan, replies, settings, engine.directions)
    elsewhere = Directions(KEY, engine.directions.count)
    for k, (_, end) in lived.items():
        rebuilt = [theta.clone() for theta in path.walk(start, plan, record.scalars[k], elsewhere)]
        assert len(rebuilt) == settings.local_steps
        assert torch.equal(rebuilt[-1], end)


def test_replaying_the_records_gives_the_same_bits() -> None:
    settings = config()
    thetas, records = run(settings)
    _, mask, engine = bowl_engine()
    state = ServerState(Replica(0, engine.model.read()))
    for theta, record in zip(thetas, records, strict=True):
        reread = RoundRecord.from_json(json.loads(json.dumps(record.to_json())))
        state = replay(state, reread, settings, Directions(KEY, len(mask)))
        assert torch.equal(state.theta, theta)
        assert path.digest(state.theta) == record.theta_digest
    assert state.steps_made == dict.fromkeys(range(3), settings.rounds * settings.local_steps)


def test_the_update_is_the_contract_s_arithmetic() -> None:
    theta = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    plan = RoundPlan(2, lr=0.0123, eps=1e-3, directions=3, steps={0: 2})
    scalars = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    z = Directions(KEY, 1000)
    expected = theta.numpy().copy()
    for t in range(2):
        for p in range(3):
            c = np.float32(np.float32(0.0123 / 3) * scalars[t, p])
            step = (c * z(plan.place(t, p)).numpy()).astype(np.float32)
            expected = (expected - step).astype(np.float32)
    record = RoundRecord(plan, {0: scalars}, NO_INNER, weights={0: 1.0}, aggregate=scalars, theta_digest="")
    assert np.array_equal(path.moved(theta, Update(record.plan, record.aggregate), z).numpy(), expected)


@pytest.mark.gpu
def test_the_update_has_the_same_bits_on_a_gpu() -> None:
    theta = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    plan = RoundPlan(2, lr=0.0123, eps=1e-3, directions=3, steps={0: 2})
    scalars = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    record = RoundRecord(plan, {0: scalars}, NO_INNER, weights={0: 1.0}, aggregate=scalars, theta_digest="")
    on_gpu = path.moved(theta.cuda(), Update(record.plan, record.aggregate), Directions(KEY, 100_000, "cuda"))
    assert torch.equal(on_gpu.cpu(), path.moved(theta, Update(record.plan, record.aggregate), Directions(KEY, 100_000)))


# --- aggregation ---

finite = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)


@settings(max_examples=50)
@given(st.data())
def test_aggregating_scalars_equals_averaging_weights(data: st.DataObject) -> None:
    clients, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    steps = {k: data.draw(st.integers(1, 4)) for k in range(clients)}
    shares = client_weights(
        config(clients=clients, examples={k: data.draw(st.integers(1, 99)) for k in steps}), list(steps)
    )
    g = {
        k: np.array(data.draw(st.lists(finite, min_size=t * width, max_size=t * width)), np.float32).reshape(t, width)
        for k, t in steps.items()
    }
    plan = RoundPlan(0, lr=1e-3, eps=1e-3, directions=width, steps=steps)
    z = Directions(KEY, 20)
    start = torch.zeros(20)
    total = aggregate([Scalars(k, scalars) for k, scalars in g.items()], shares, plan)
    ours = path.moved(start, Update(plan, total), z)
    ends = [list(path.walk(start, plan, scalars, z))[-1] for scalars in g.values()]
    theirs = reference.aggregate_weights(ends, list(shares.values()))
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    literal_total = reference.aggregate_scalars(
        [torch.from_numpy(scalars) for scalars in g.values()], list(shares.values())
    )
    np.testing.assert_array_equal(total, literal_total.numpy().astype(np.float32))


def test_replies_may_come_in_any_order() -> None:
    rng = np.random.default_rng(0)
    replies = [Scalars(k, rng.normal(size=(2, 1)).astype(np.float32)) for k in range(9)]
    shares = client_weights(config(examples={k: k + 1 for k in range(9)}), range(9))
    plan = RoundPlan(0, 1e-3, 1e-3, 1, dict.fromkeys(range(9), 2))
    assert np.array_equal(aggregate(replies[::-1], shares, plan), aggregate(replies, shares, plan))


def test_a_client_that_stopped_early_counts_as_zero() -> None:
    replies = [Scalars(0, np.ones((1, 1), np.float32)), Scalars(1, np.ones((3, 1), np.float32))]
    plan = RoundPlan(0, 1e-3, 1e-3, 1, {0: 3, 1: 3})
    assert aggregate(replies, {0: 0.25, 1: 0.75}, plan).ravel().tolist() == [1.0, 0.75, 0.75]


def test_weights_follow_rows_or_are_equal_and_sum_to_one_over_who_replied() -> None:
    assert client_weights(config(), [0, 1]) == {0: 0.25, 1: 0.75}
    assert client_weights(config(weights="equal"), [0, 2]) == {0: 0.5, 2: 0.5}


def test_who_does_not_answer_or_stops_early_is_in_the_record_as_such() -> None:
    _, _, engine = bowl_engine()
    settings = config(directions=1)
    start = ServerState(Replica(0, engine.model.read()), {0: 3, 1: 3, 2: 3})
    plan = open_round(start, settings)
    replies = [Scalars(2, np.full((1, 1), 7, np.float32)), Scalars(0, np.array([[1], [2], [3]], np.float32))]
    state, record = close_round(start, plan, replies, settings, engine.directions)
    reread = RoundRecord.from_json(json.loads(json.dumps(record.to_json())))
    assert reread.plan == plan
    assert reread.weights == {0: 10 / 15, 2: 5 / 15}
    assert {k: g.ravel().tolist() for k, g in reread.scalars.items()} == {0: [1, 2, 3], 2: [7]}
    assert torch.equal(replay(start, reread, settings, engine.directions).theta, state.theta)
    assert state.steps_made == {0: 6, 1: 3, 2: 4}


def test_a_fresh_sample_of_clients_each_round() -> None:
    drawn = [seeded_sample(range(50), 5, 0, r) for r in range(200)]
    assert all(len(set(ids)) == 5 and ids == sorted(ids) for ids in drawn)
    assert drawn == [seeded_sample(range(50), 5, 0, r) for r in range(200)]
    counts = np.bincount(np.concatenate(drawn), minlength=50)
    assert counts.min() > 5  # mean 20, standard deviation 4.2
    assert counts.max() < 40
    assert seeded_sample(range(50), 5, 1, 0) != drawn[0]


def test_only_participants_data_pointers_move() -> None:
    settings = config(clients_per_round=2, rounds=3)
    _, _, engine = bowl_engine()
    state = ServerState(Replica(0, engine.model.read()))
    asked: list[int] = []
    for _ in range(3):
        plan = open_round(state, settings)
        asked += plan.steps
        replies = engine.run(state, plan)
        state, _ = close_round(state, plan, replies, settings, engine.directions)
    assert state.steps_made == {k: asked.count(k) * 3 for k in set(asked)}
    assert sum(state.steps_made.values()) == 3 * 2 * 3


@pytest.mark.parametrize(("schedule", "expected"), [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25])])
def test_schedules(schedule: str, expected: list[float]) -> None:
    settings = config(lr=1.0, lr_schedule=schedule)
    rates = [open_round(ServerState(Replica(r, torch.zeros(1))), settings).lr for r in range(4)]
    assert rates == pytest.approx(expected)


def test_the_cosine_schedule_falls_slowly_then_fast_then_slowly() -> None:
    settings = config(lr=1.0, lr_schedule="cosine", rounds=100)
    rates = [open_round(ServerState(Replica(r, torch.zeros(1))), settings).lr for r in range(100)]
    assert rates[0] == 1
    assert rates[50] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001
