"""Clipping, noise and sampling with the randomness held still: what is released, to the number.

With the noise stubbed to zero, a huge clip and everybody sampled, example-level training is training on means.
"""

import math
import threading
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from bowl import rules_of
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_server import KEY, Bowl, config
from torch import Tensor

from meerkat.algorithm.aggregation import Hidden
from meerkat.algorithm.client import local_steps
from meerkat.algorithm.client_rules import ZEROTH_ORDER, FedDynClient
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.replies import Scalars
from meerkat.algorithm.robust import MEAN
from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.server import ServerConfig, ServerState, close_round, open_round
from meerkat.algorithm.update_rules import FedAvg, FedDyn
from meerkat.algorithm.zeroth_order import Loss, MaskedModel
from meerkat.errors import Diverged
from meerkat.masks.baselines import random_mask
from meerkat.privacy import mechanism as mechanisms
from meerkat.privacy.mechanism import Guarantee, Mechanism, clipped
from meerkat.problems.module import ModuleProblem, Tensors
from meerkat.problems.problem import client_losses
from meerkat.run.local_engine import LocalEngine

ROWS = {0: np.arange(0, 4), 1: np.arange(4, 6), 2: np.arange(6, 13)}
"""The rows of three clients."""
HUGE = 1e12


class Words(Bowl):
    """The Bowl, each row of which has its own minimum."""

    def of_row(self, row: int) -> Tensor:
        return self.loss(row, 0)


def ones(count: int) -> np.ndarray:
    return np.ones(count)


def nothing(count: int) -> np.ndarray:
    return np.zeros(count)


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanisms, "gaussian", nothing)


def engine_of(
    private: Mechanism | None, together: bool = True, batch: Callable[..., np.ndarray] | None = None
) -> LocalEngine:
    """The three clients, who take all their rows at every step or those that `batch` gives."""
    model = Words()
    mask = random_mask(model, 0.5)

    def losses_of(rows: list[np.ndarray]) -> Loss:
        def losses() -> Tensor:
            each = [torch.stack([model.of_row(int(i)) for i in part]) if len(part) else torch.zeros(0) for part in rows]
            return torch.cat([own.double() for own in each]) if private else torch.stack([own.mean() for own in each])

        return losses

    return LocalEngine(
        MaskedModel(model, mask),
        Directions(KEY, len(mask)),
        batch or (lambda client, _: ROWS[client]),
        losses_of,
        together,
        private,
    )


def lived(engine: LocalEngine, settings: ServerConfig) -> list[dict[int, np.ndarray]]:
    """The scalars of each round."""
    state, scalars = ServerState(Replica(0, engine.model.read())), []
    for _ in range(settings.rounds):
        plan = open_round(state, settings)
        state, record = close_round(state, plan, engine.run(state, plan), settings, engine.directions)
        scalars.append(dict(record.scalars))
    return scalars


class Sizes(Mechanism):
    """A mechanism whose fixed denominator is the number of rows at hand, so that a mean comes out."""

    def release(self, vectors: np.ndarray) -> np.ndarray:
        return Mechanism(self.clip, self.noise_multiplier, float(len(vectors))).release(vectors)


# --- example level, against training without ---


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize(("steps", "directions"), [(1, 1), (1, 3), (3, 1), (2, 2)])
@pytest.mark.usefixtures("no_noise")
def test_without_noise_and_clip_it_is_training_on_the_mean(
    steps: int, directions: int, alpha: float, together: bool
) -> None:
    rules = rules_of(FedDyn(alpha) if alpha else FedAvg())
    settings = config(rounds=3, local_steps=steps, directions=directions, rules=rules, lr=0.02)
    plain = lived(engine_of(None, together), settings)
    private = lived(engine_of(Sizes(HUGE, 0.0, 1.0), together), settings)
    for ours, theirs in zip(private, plain, strict=True):
        assert ours.keys() == theirs.keys()
        for client, scalars in ours.items():
            np.testing.assert_allclose(scalars, theirs[client], rtol=1e-4, atol=1e-5)


def literal_steps(
    plan: RoundPlan,
    alpha: float,
    h: Tensor,
    rows_at: Callable[[int], np.ndarray],
    clip: float,
    noise: float,
    expected: float,
) -> np.ndarray:
    """Client 0's scalars, every noise value the same, by loops over rows in float64, from theta_0."""
    model = Words()
    mask = random_mask(model, 0.5)
    masked, z = MaskedModel(model, mask), Directions(KEY, len(mask))
    start = masked.read()
    theta, scalars = start.clone(), np.zeros((plan.steps[0], plan.directions))

    def loss_at(where: Tensor, row: int) -> float:
        with torch.no_grad():
            masked.write_(where)
            return model.of_row(row).item()

    for t in range(plan.steps[0]):
        total = np.zeros(plan.directions)
        ways = [z(plan.place(t, p)) for p in range(plan.directions)]
        for row in rows_at(t):
            slopes = np.array(
                [
                    (loss_at(theta + plan.eps * way, row) - loss_at(theta - plan.eps * way, row)) / (2 * plan.eps)
                    for way in ways
                ]
            )
            total += slopes * min(1.0, clip / math.sqrt((slopes**2).sum()))
        noisy = (total + noise) / expected
        moved = theta.clone()
        for p, way in enumerate(ways):
            drift = alpha * (theta - start).double() - h.double()
            scalars[t, p] = noisy[p] + (float(drift @ way.double()) if alpha else 0.0)
            moved -= plan.lr / plan.directions * scalars[t, p] * way
        theta = moved
    return scalars


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("directions", [1, 3])
def test_clipped_noisy_steps_are_the_literal_ones(
    monkeypatch: pytest.MonkeyPatch, directions: int, alpha: float
) -> None:
    """Also of a step that has no rows at all. The clip bites for some rows and not for others."""
    monkeypatch.setattr(mechanisms, "gaussian", ones)
    batches = [np.array([0, 2, 3]), np.array([], dtype=np.int64), np.array([1])]
    clip, expected = 0.1 * math.sqrt(directions), 2.0
    plan = RoundPlan(0, 0.05, 1e-3, directions, {0: 3})
    engine = engine_of(Mechanism(clip, 0.5, expected), batch=lambda _, step: batches[step])
    start = engine.model.read()
    h = torch.linspace(-1, 1, len(start))
    state = ServerState(Replica(0, start), carried={0: h})
    (reply,) = replace(engine, rule=FedDynClient(alpha) if alpha else ZEROTH_ORDER).run(state, plan)
    assert math.isnan(reply.loss)
    theirs = literal_steps(plan, alpha, h, lambda t: batches[t], clip, 0.5 * clip, expected)
    np.testing.assert_allclose(reply.scalars, theirs, rtol=1e-3, atol=2e-4)
    free = literal_steps(plan, alpha, h, lambda t: batches[t], HUGE, 0.5 * clip, expected)
    assert not np.allclose(free[0], theirs[0], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("directions", [1, 2])
def test_clients_together_and_one_by_one_are_the_same(monkeypatch: pytest.MonkeyPatch, directions: int) -> None:
    """Some have no rows in a round, and one round has nobody's."""
    monkeypatch.setattr(mechanisms, "gaussian", ones)
    settings = config(rounds=4, local_steps=1, directions=directions)

    def some(client: int, step: int) -> np.ndarray:
        return ROWS[client][:: step + 1] if (client + step) % 3 and step < 3 else ROWS[client][:0]

    mechanism = Mechanism(0.5, 0.1, 3.0)
    one_by_one = lived(engine_of(mechanism, False, some), settings)
    together = lived(engine_of(mechanism, True, some), settings)
    for ours, theirs in zip(together, one_by_one, strict=True):
        assert all(np.array_equal(ours[k], theirs[k]) for k in range(3))
    assert together[3][0] == pytest.approx(0.1 * 0.5 / 3)  # nobody's rows: noise alone


def test_a_row_whose_losses_are_not_numbers_counts_as_zero() -> None:
    """The losses of a private run are finite whatever a row does; a run without would say diverged."""
    losses = torch.tensor([1.0, math.nan, math.inf, -math.inf, 2.0])
    model = torch.nn.Linear(1, 1)
    rows = Tensors(torch.ones(5, 1), losses)
    problem = ModuleProblem(model, lambda _, targets: targets, rows, rows)
    losses_of = client_losses(problem, problem.prepare(problem.rows("train")), "example")
    assert losses_of([np.arange(2), np.arange(2, 5)])().tolist() == [1.0, 0.0, 0.0, 0.0, 2.0]
    assert losses_of([np.arange(0), np.arange(0)])().shape == (0,)


# --- the mechanism ---

finite = st.floats(-1e150, 1e150)
anything = st.floats(allow_nan=True, allow_infinity=True)


@given(
    arrays.arrays(np.float64, st.tuples(st.integers(0, 5), st.integers(1, 4)), elements=anything), st.floats(1e-6, 1e6)
)
def test_no_vector_comes_out_longer_than_the_clip(vectors: np.ndarray, clip: float) -> None:
    out = clipped(vectors, clip)
    assert out.shape == vectors.shape
    for before, after in zip(vectors, out, strict=True):
        length = math.hypot(*after)
        assert length <= clip * (1 + 1e-12)
        if not np.isfinite(before).all():
            assert not after.any()
        elif math.hypot(*before) <= clip:
            assert np.array_equal(before, after)
        elif math.hypot(*before) < math.inf:
            assert length == pytest.approx(clip)
            at = int(np.abs(before).argmax())  # it points the same way
            np.testing.assert_allclose(after / after[at], before / before[at], rtol=1e-9, atol=1e-12)


@given(
    arrays.arrays(np.float64, st.tuples(st.integers(1, 6), st.just(3)), elements=anything),
    arrays.arrays(np.float64, (3,), elements=anything),
)
def test_one_vector_moves_the_sum_by_the_clip_at_most(vectors: np.ndarray, another: np.ndarray) -> None:
    clip, expected = 0.7, 4.0
    mechanism = Mechanism(clip, 2.0, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mechanisms, "gaussian", ones)
        whole, without = mechanism.release(vectors), mechanism.release(vectors[1:])
        other = mechanism.release(np.vstack([another, vectors[1:]]))
    slack = clip * 1e-6  # what is released is rounded to 2^-24 of the noise
    assert np.linalg.norm(expected * (whole - without)) <= clip + slack
    assert np.linalg.norm(expected * (whole - other)) <= 2 * clip + slack


def test_the_noise_is_sigma_times_the_clip_over_a_fixed_denominator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanisms, "gaussian", lambda count: np.arange(1.0, count + 1))
    mechanism = Mechanism(clip=2.0, noise_multiplier=3.0, expected=8.0)
    assert mechanism.release(np.zeros((0, 2))).tolist() == [6 / 8, 12 / 8]
    assert mechanism.release(np.array([[1.0, 1.0], [0.5, 0.0]])).tolist() == [7.5 / 8, 13 / 8]
    assert mechanism.release(np.array([[math.nan, 1.0], [0.5, math.inf]])).tolist() == [6 / 8, 12 / 8]


def test_a_row_is_sampled_where_its_draw_is_below_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def urandom(count: int) -> bytes:
        asked.append(count)
        return np.array([0, 2**62 - 1, 2**62, 2**63, 2**64 - 1], "<u8").tobytes()[:count]

    monkeypatch.setattr(mechanisms.os, "urandom", urandom)
    rows = np.array([10, 20, 30, 40, 50])
    assert Mechanism(1.0, 1.0, 1.25).sample(rows).tolist() == [10, 20]  # a quarter of 2^64 is 2^62
    assert Mechanism(1.0, 1.0, 2.5).sample(rows).tolist() == [10, 20, 30]
    assert Mechanism(1.0, 1.0, 5.0).sample(rows).tolist() == rows.tolist()  # at q = 1 whatever is drawn
    assert Mechanism(1.0, 1.0, 99.0).sample(rows).tolist() == rows.tolist()
    assert asked == [40] * 4
    nobody = Mechanism(1.0, 1.0, 4.0).sample(rows[:0])
    assert (nobody.dtype, len(nobody)) == (np.int64, 0)


@pytest.mark.parametrize(("count", "rate"), [(1, 1.0), (16, 1.0), (17, 16 / 17), (1600, 0.01)])
def test_the_rate_is_the_share_expected_and_never_above_one(count: int, rate: float) -> None:
    assert Mechanism(1.0, 1.0, 16.0).rate(count) == rate


def test_two_threads_never_share_noise() -> None:
    """`random.gauss` keeps a value back for the next call, and two threads may both take it."""
    drawn: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: drawn.append(mechanisms.gaussian(2000))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    values = np.concatenate(drawn)
    assert len({*values.tolist()}) == len(values) == 8000
    assert mechanisms._SYSTEM.gauss_next is None


# --- client level ---


def invited(settings: ServerConfig, available: list[int] | None) -> Collection[int] | None:
    return settings.aggregation.invited(settings.clients, available)


def hidden(mechanism: Mechanism | None = None, **changes: object) -> ServerConfig:
    mechanism = mechanism or Mechanism(1.0, 0.5, 2.0)
    made = config(clients_per_round=2, weights="equal")
    made = replace(made, **changes)
    return replace(made, aggregation=Hidden(mechanism, made.local_steps, made.directions))


def test_a_noisy_mean_of_clients_is_the_literal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole replies clipped over steps and directions together; what is no whole reply counts as nothing."""
    monkeypatch.setattr(mechanisms, "gaussian", ones)
    settings = hidden(local_steps=2, directions=2)
    engine = engine_of(None)
    state = ServerState(Replica(0, engine.model.read()))
    plan = open_round(state, settings)
    scalars = {
        0: np.array([[3.0, 0.0], [0.0, 4.0]], "f4"),
        1: np.array([[0.1, 0.2], [0.3, 0.4]], "f4"),
        2: np.array([[math.inf, 0.2], [0.3, 0.4]], "f4"),
    }
    replies = [Scalars(client, g) for client, g in scalars.items()]
    after, record = close_round(state, plan, replies, settings, engine.directions)
    by_hand = (np.array([[0.6, 0.0], [0.0, 0.8]]) + scalars[1] + 0.5 * 1.0) / 2.0
    np.testing.assert_allclose(record.aggregate, by_hand, rtol=1e-6)
    assert record.scalars == {}
    assert record.made == {0: 2, 1: 2, 2: 2}
    assert not len(record.inner)
    assert after.steps_made == {0: 2, 1: 2, 2: 2}
    short = [*replies[:2], Scalars(2, np.ones((1, 2), "f4"))]
    _, of_two = close_round(state, plan, short, settings, engine.directions)
    assert np.array_equal(of_two.aggregate, record.aggregate)


@pytest.mark.usefixtures("no_noise")
def test_without_noise_and_clip_everybody_s_mean_is_the_plain_one() -> None:
    settings = hidden(Mechanism(HUGE, 0.0, 3.0), clients_per_round=0)
    engine = engine_of(None)
    state = ServerState(Replica(0, engine.model.read()))
    plan = open_round(state, settings, invited(settings, None))
    assert list(plan.steps) == [0, 1, 2]
    replies = engine.run(state, plan)
    _, ours = close_round(state, plan, replies, settings, engine.directions)
    _, theirs = close_round(state, plan, replies, replace(settings, aggregation=MEAN), engine.directions)
    np.testing.assert_allclose(ours.aggregate, theirs.aggregate, rtol=1e-6)


def test_an_empty_sample_of_clients_moves_theta_by_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanisms, "gaussian", ones)
    settings = hidden(local_steps=2, directions=1)
    engine = engine_of(None)
    state = ServerState(Replica(0, engine.model.read()))
    plan = open_round(state, settings, [])
    assert plan.steps == {}
    after, record = close_round(state, plan, [], settings, engine.directions)
    assert record.aggregate.tolist() == [[0.25], [0.25]]
    moved = sum(0.25 * settings.lr * engine.directions(plan.place(t, 0)) for t in range(2))
    torch.testing.assert_close(after.theta, state.theta - moved)
    assert record.made == {}


def test_clients_are_sampled_from_all_and_then_asked_if_they_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.array([0, 2**64 - 1, 2**40], "<u8").tobytes()
    monkeypatch.setattr(mechanisms.os, "urandom", lambda count: draws[:count])
    settings = hidden(Mechanism(1.0, 1.0, 1.5))
    assert invited(settings, None) == [0, 2]
    assert invited(settings, [1, 2]) == [2]  # the rate stays that of all: who is away is not made up for
    assert invited(settings, []) == []
    assert invited(replace(settings, aggregation=MEAN), [1, 2]) == [1, 2]


@pytest.mark.parametrize(
    ("level", "epsilon", "delta", "among", "said"),
    [
        ("example", 20.0, 1e-5, 99_999, ""),
        ("example", 20.1, 1e-5, 10, "epsilon is above 20"),
        ("client", math.inf, 1e-5, 10, "no bound could be computed"),
        (
            "example",
            1.0,
            1e-3,
            2_000,
            "delta is not below 1 / 2,000, one over the rows, so one of them may be exposed",
        ),
        ("client", 1.0, 0.1, 10, "delta is not below 1 / 10, one over the clients, so one of them may be exposed"),
        ("example", 1.0, 0.5, 0, ""),
    ],
)
def test_numbers_that_protect_nobody_are_said_to(
    level: Literal["example", "client"], epsilon: float, delta: float, among: int, said: str
) -> None:
    told = Guarantee(level, "add-or-remove", epsilon, 2 * epsilon, delta, 1.0, 0.1, among)
    words = told.in_words()
    assert words == told.to_json()["in_words"]
    assert words.partition("; too weak to protect anybody: ")[2] == said
    assert words.startswith(f"epsilon {epsilon:.3g} at delta {delta:g}, one ")


def test_without_a_mechanism_a_loss_that_is_no_number_ends_the_round() -> None:
    engine = engine_of(None)
    engine = replace(engine, losses_of=lambda rows: lambda: torch.full((len(rows),), math.nan))
    with pytest.raises(Diverged):
        local_steps(
            engine.model,
            engine.model.read(),
            RoundPlan(0, 0.1, 1e-3, 1, {0: 1}),
            0,
            lambda _: lambda: torch.tensor(math.nan),
            engine.directions,
        )
