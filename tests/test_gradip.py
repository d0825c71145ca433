"""GradIP from scalars and shared inner products, against vectors rebuilt one by one."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meerkat.algorithm.directions import Directions
from meerkat.algorithm.gradip import gradip, inner_products, magnitude
from meerkat.algorithm.rounds import RoundPlan

KEY = 12345
WIDTH = 37


def vectors(plan: RoundPlan) -> list[list[Tensor]]:
    """z of each step and direction of a plan, asked for from scratch."""
    z = Directions(KEY, WIDTH)
    return [[z(plan.place(t, p)).clone() for p in range(plan.directions)] for t in range(max(plan.steps.values()))]


def gradient(seed: int = 0) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


finite = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_clients_gradip_is_the_literal_one(data: st.DataObject) -> None:
    steps = {k: data.draw(st.integers(1, 4)) for k in range(data.draw(st.integers(1, 4)))}
    width = data.draw(st.integers(1, 3))
    phase = data.draw(st.sampled_from(["training", "calibration"]))
    plan = RoundPlan(data.draw(st.integers(0, 9)), 0.1, 1e-3, width, steps, phase)
    grad_p = gradient(data.draw(st.integers(0, 99)))
    inner = inner_products(grad_p, plan, Directions(KEY, WIDTH))
    assert inner.shape == (max(steps.values()), width)
    assert inner.dtype == np.float64
    for made in steps.values():
        drawn = data.draw(st.lists(finite, min_size=made * width, max_size=made * width))
        g = np.array(drawn, np.float32).reshape(made, width)
        expected = reference.gradip_directions(grad_p, torch.from_numpy(g), vectors(plan)[:made])
        np.testing.assert_allclose(gradip(g, inner), expected.numpy(), rtol=1e-9, atol=1e-9)


def test_with_one_direction_it_is_the_papers_formula() -> None:
    plan = RoundPlan(3, 0.1, 1e-3, 1, {0: 6})
    g = np.random.default_rng(0).normal(size=(6, 1)).astype(np.float32)
    signal = gradip(g, inner_products(gradient(), plan, Directions(KEY, WIDTH)))
    expected = reference.gradip(gradient(), torch.from_numpy(g), vectors(plan))
    np.testing.assert_allclose(signal, expected.numpy(), rtol=1e-12)


def test_many_clients_at_once_are_the_clients_one_by_one() -> None:
    plan = RoundPlan(0, 0.1, 1e-3, 2, {0: 3, 1: 3})
    inner = inner_products(gradient(), plan, Directions(KEY, WIDTH))
    g = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    assert np.array_equal(gradip(g, inner), np.stack([gradip(one, inner) for one in g]))
    assert np.array_equal(magnitude(g), np.stack([magnitude(one) for one in g]))


def test_the_signal_without_c_is_the_mean_size_of_g() -> None:
    g = np.array([[3, -1], [-2, -2], [0, 1]], np.float32)
    assert magnitude(g).tolist() == [2.0, 2.0, 0.5]
    assert magnitude(g).dtype == np.float64


def test_a_mask_without_a_gradient_has_no_gradip_but_a_magnitude() -> None:
    plan = RoundPlan(0, 0.1, 1e-3, 2, {0: 3})
    inner = inner_products(None, plan, Directions(KEY, WIDTH))
    assert inner.shape == (0, 2)
    g = np.ones((4, 3, 2), np.float32)
    assert gradip(g, inner).shape == (4, 3)
    assert np.isnan(gradip(g, inner)).all()


def test_a_first_order_round_has_no_inner_products() -> None:
    plan = RoundPlan(0, 0.1, 1e-3, 2, {0: 3}, sends="delta")
    assert inner_products(gradient(), plan, Directions(KEY, WIDTH)).shape == (0, 2)


def test_phases_rounds_and_steps_have_products_of_their_own() -> None:
    z = Directions(KEY, WIDTH)
    plans = [RoundPlan(r, 0.1, 1e-3, 2, {0: 3}, phase) for r in (0, 1) for phase in ("training", "calibration")]
    products = np.concatenate([inner_products(gradient(), plan, z).ravel() for plan in plans])
    assert len(np.unique(products)) == 4 * 3 * 2


@pytest.mark.parametrize("steps", [{0: 1, 1: 4}, {0: 4}, {0: 4, 1: 4, 2: 1}])
def test_products_depend_on_the_longest_client_alone(steps: dict[int, int]) -> None:
    whole = inner_products(gradient(), RoundPlan(2, 0.1, 1e-3, 2, {9: 4}), Directions(KEY, WIDTH))
    assert np.array_equal(inner_products(gradient(), RoundPlan(2, 0.5, 1e-2, 2, steps), Directions(KEY, WIDTH)), whole)


def test_they_are_summed_in_double_precision() -> None:
    plan, grad_p = RoundPlan(0, 0.1, 1e-3, 1, {0: 1}), torch.full((100_000,), 1e4)
    grad_p[::2] *= -1
    z = Directions(KEY, 100_000)
    exact = np.sum(grad_p.numpy().astype(np.longdouble) * z(plan.place(0, 0)).numpy().astype(np.longdouble))
    assert inner_products(grad_p, plan, z)[0, 0] == pytest.approx(float(exact), abs=1e-5)
