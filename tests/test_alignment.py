"""Norms and cosines from scalars, against updates rebuilt entry by entry."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meerkat.algorithm import alignment
from meerkat.algorithm.alignment import alignments, direction_products
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.replies import Scalars
from meerkat.algorithm.rounds import RoundPlan, RoundRecord
from meerkat.algorithm.server import aggregate

KEY = 12345


def vectors(plan: RoundPlan, count: int) -> list[list[Tensor]]:
    z = Directions(KEY, count)
    return [[z(plan.place(t, p)).clone() for p in range(plan.directions)] for t in range(max(plan.steps.values()))]


def closed(scalars: Mapping[int, np.ndarray], directions: int, lr: float = 0.3) -> RoundRecord:
    """A round in which every client counts equally."""
    plan = RoundPlan(2, lr, 1e-3, directions, {k: len(g) for k, g in scalars.items()})
    weights = dict.fromkeys(scalars, 1 / len(scalars))
    total = aggregate([Scalars(k, g) for k, g in scalars.items()], weights, plan)
    return RoundRecord(plan, scalars, np.zeros((0, directions)), weights=weights, aggregate=total, theta_digest="")


def literal(record: RoundRecord, count: int) -> dict[int, tuple[float, float]]:
    g = [torch.from_numpy(scalars) for scalars in record.scalars.values()]
    whole = torch.from_numpy(record.aggregate)
    rate = record.plan.lr / record.plan.directions
    geometry = reference.update_geometry(g, whole, vectors(record.plan, count), rate)
    return {k: (norm, cosine) for k, (_, norm, cosine) in zip(record.scalars, geometry, strict=True)}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_norms_and_cosines_are_those_of_the_rebuilt_updates(data: st.DataObject) -> None:
    width, count = data.draw(st.integers(1, 3)), data.draw(st.integers(50, 90))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    made = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))  # early-stopped clients among them
    record = closed({3 * k: rng.normal(size=(t, width)).astype(np.float32) for k, t in enumerate(made)}, width)
    aligned, expected = alignments(record, Directions(KEY, count)), literal(record, count)
    assert list(aligned) == list(expected)
    for k, (norm, cosine) in expected.items():
        assert aligned[k].norm == pytest.approx(norm, rel=1e-6)
        assert aligned[k].cosine == pytest.approx(cosine, abs=1e-6)


def test_a_client_alone_points_where_the_federation_goes() -> None:
    (only,) = alignments(closed({5: np.array([[2.0], [-1.0]], np.float32)}, 1), Directions(KEY, 40)).values()
    assert only.cosine == pytest.approx(1)


def test_opposite_clients_point_opposite_ways() -> None:
    g = np.array([[2.0, 1.0]], np.float32)
    aligned = alignments(closed({0: g, 1: g, 2: -g}, 2), Directions(KEY, 40))
    assert [round(a.cosine, 9) for a in aligned.values()] == [1, 1, -1]
    assert aligned[0].norm == pytest.approx(aligned[2].norm)


def test_a_zero_update_has_no_cosine_but_a_norm_of_zero() -> None:
    aligned = alignments(
        closed({0: np.zeros((2, 1), np.float32), 1: np.ones((2, 1), np.float32)}, 1), Directions(KEY, 9)
    )
    assert aligned[0].norm == 0
    assert math.isnan(aligned[0].cosine)
    assert aligned[1].cosine == pytest.approx(1)


def test_where_the_federation_stands_still_nobody_has_a_cosine() -> None:
    g = np.ones((2, 1), np.float32)
    aligned = alignments(closed({0: g, 1: -g}, 1), Directions(KEY, 9))
    assert all(math.isnan(a.cosine) and a.norm > 0 for a in aligned.values())


def test_a_first_order_round_has_no_alignment() -> None:
    plan = RoundPlan(0, 0.1, 1e-3, 1, {0: 2}, sends="delta")
    record = RoundRecord(
        plan, {}, np.zeros((0, 1)), weights={0: 1.0}, aggregate=np.ones(9, np.float32), theta_digest="", unkept={0: 2}
    )
    assert alignments(record, Directions(KEY, 9)) == {}


@pytest.mark.parametrize("size", [16, 32, 1 << 16])
def test_products_made_in_slices_are_those_of_whole_directions(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = RoundPlan(1, 0.1, 1e-3, 2, {0: 3, 1: 1})
    whole = torch.stack([z for zs in vectors(plan, 101) for z in zs]).double()
    monkeypatch.setattr(alignment, "_SLICE", size)
    np.testing.assert_allclose(direction_products(plan, Directions(KEY, 101)), (whole @ whole.T).numpy(), rtol=1e-12)
