"""Estimators: slopes from losses, on losses whose gradient is known, and as clients, engines and privacy use them."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_server import KEY, bowl_engine, config
from torch import Tensor

from meerkat.algorithm import zeroth_order
from meerkat.algorithm.directions import Directions, Law
from meerkat.algorithm.estimators import PLAIN, Estimator, Slopes, stacked
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.server import ServerState, open_round
from meerkat.errors import Diverged, MeerkatError
from meerkat.settings.algorithm import estimator
from meerkat.settings.config import RunConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "extending"))
from estimator import ESTIMATORS as EXAMPLES

ONE_SIDED = EXAMPLES["one-sided"]
WIDTH = 40
START = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
SLOPE = torch.cos(torch.arange(WIDTH, dtype=torch.float64))


def loss_at(theta: Tensor) -> Tensor:
    """<SLOPE, theta> + |theta|^2 / 2 of three rows, each with another slope: float64 [3]."""
    return torch.stack([(k + 1) * (SLOPE * theta).sum() + (theta**2).sum() / 2 for k in range(3)])


def directions(count: int, chosen: Estimator) -> list[Tensor]:
    z, plan = Directions(KEY, WIDTH, law=chosen.law), RoundPlan(2, 0.1, 1e-3, count, {0: 1})
    return [way.double() for way in plan.along(0, z)]


@pytest.mark.parametrize("chosen", [PLAIN, ONE_SIDED], ids=lambda chosen: chosen.name)
@pytest.mark.parametrize("count", [1, 4])
def test_slopes_estimate_the_gradient_along_each_direction(chosen: Estimator, count: int) -> None:
    ways, passes = directions(count, chosen), []

    def counting(theta: Tensor) -> Tensor:
        passes.append(theta)
        return loss_at(theta)

    slopes = chosen.slopes(counting, START, ways, 1e-6)
    exact = torch.stack([torch.stack([((k + 1) * SLOPE + START) @ z for k in range(3)]) for z in ways])
    torch.testing.assert_close(slopes.g, exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(slopes.loss, loss_at(START).expand(count, 3), rtol=0, atol=1e-3)
    assert slopes.g.dtype == slopes.loss.dtype == torch.float64
    assert len(passes) == chosen.passes(count)


def test_two_sided_slopes_are_free_of_curvature_and_one_sided_ones_are_not() -> None:
    (z,) = directions(1, PLAIN)
    exact = (SLOPE + START) @ z
    two, one = (chosen.slopes(loss_at, START, [z], 0.1).g[0, 0] for chosen in (PLAIN, ONE_SIDED))
    assert two.item() == pytest.approx(exact.item(), abs=1e-9)
    assert one.item() == pytest.approx((exact + 0.05 * (z @ z)).item(), abs=1e-9)


def test_a_loss_that_is_not_finite_is_named() -> None:
    with pytest.raises(Diverged, match="the loss is nan near theta"):
        stacked([torch.tensor(1.0), torch.tensor(float("nan"))])


def test_an_unknown_estimator_says_where_it_may_come_from() -> None:
    assert estimator(RunConfig()) is PLAIN
    with pytest.raises(MeerkatError, match=r"estimator 'nowhere': not known here, only plain.*--extension"):
        estimator(RunConfig(estimator="nowhere"))


@pytest.mark.parametrize("chosen", [PLAIN, ONE_SIDED], ids=lambda chosen: chosen.name)
@pytest.mark.parametrize("count", [1, 3])
def test_clients_together_and_one_by_one_have_the_same_scalars(chosen: Estimator, count: int) -> None:
    settings = config(local_steps=1, directions=count)
    replies = []
    for together in (True, False):
        _, mask, engine = bowl_engine(together)
        engine = dataclasses.replace(engine, estimator=chosen, directions=Directions(KEY, len(mask), law=chosen.law))
        state = ServerState(Replica(0, engine.model.read()))
        replies.append([reply.scalars.tobytes() for reply in engine.run(state, open_round(state, settings))])
    assert replies[0] == replies[1]


def test_an_estimator_that_normalises_is_used_as_it_is() -> None:
    """Slopes over their standard deviation along the directions, as FZOO's."""

    def normalised(loss_at: object, theta: Tensor, ways: object, eps: float) -> Slopes:
        plain = PLAIN.slopes(loss_at, theta, ways, eps)
        return Slopes(plain.g / plain.g.std(0, correction=0), plain.loss)

    _, _, engine = bowl_engine()
    engine = dataclasses.replace(engine, estimator=Estimator("normalised", normalised, PLAIN.passes))
    state = ServerState(Replica(0, engine.model.read()))
    settings = config(local_steps=1, directions=4)
    for reply in engine.run(state, open_round(state, settings)):
        assert reply.scalars.std() == pytest.approx(1.0, rel=1e-5)


def test_directions_scaled_by_a_vector_are_probed_and_walked_along() -> None:
    model, mask, engine = bowl_engine()
    scale = np.zeros(len(mask), np.float32)
    scale[3] = 2.0
    z = Directions(KEY, len(mask), law=Law("third alone", PLAIN.law.table, scale))
    plan = RoundPlan(0, 0.1, 1e-3, 1, {0: 1})
    start = engine.model.read()
    slopes = zeroth_order.slopes(engine.model, start, plan.along(0, z), plan.eps, lambda: model.loss(0, 0))
    shifted = start.clone()
    shifted[3] += 1e-3 * z(plan.place(0, 0))[3]
    engine.model.write_(shifted)
    above = model.loss(0, 0).item()
    engine.model.write_(2 * start - shifted)
    below = model.loss(0, 0).item()
    assert slopes.g.item() == pytest.approx((above - below) / 2e-3, rel=1e-6)
