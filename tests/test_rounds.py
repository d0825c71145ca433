import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meerkat.algorithm.rounds import RoundPlan, RoundRecord

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.data())
def test_a_record_survives_json_to_the_bit(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 3))
    steps = data.draw(st.dictionaries(st.integers(0, 10**6), st.integers(1, 4), min_size=1, max_size=4))
    steps = dict(sorted(steps.items()))

    def scalars(rows: int) -> np.ndarray:
        drawn = data.draw(st.lists(numbers, min_size=rows * width, max_size=rows * width))
        return np.array(drawn, dtype=np.float32).reshape(rows, width)

    plan = RoundPlan(
        data.draw(st.integers(0, 2**32 - 1)),
        data.draw(st.floats(0, 1)),
        1e-3,
        width,
        steps,
        "calibration",
    )
    made = {k: data.draw(st.integers(0, t)) for k, t in steps.items()}
    replies = {k: scalars(t) for k, t in made.items() if t}
    weights = {k: data.draw(st.floats(0, 1)) for k in replies}
    inner = np.array(data.draw(st.lists(st.floats(-9, 9), min_size=width, max_size=width))).reshape(1, width)
    record = RoundRecord(
        plan, replies, inner[:0], weights=weights, aggregate=scalars(max(steps.values())), theta_digest="ab"
    )
    record = replace(record, inner=np.repeat(inner, max(steps.values()), 0) if data.draw(st.booleans()) else inner[:0])
    reread = RoundRecord.from_json(json.loads(json.dumps(record.to_json())))
    assert reread.plan == record.plan
    assert reread.weights == record.weights
    assert reread.theta_digest == "ab"
    assert (reread.inner.shape, reread.inner.tobytes()) == (record.inner.shape, record.inner.tobytes())
    assert reread.aggregate.tobytes() == record.aggregate.tobytes()
    assert {k: g.tobytes() for k, g in reread.scalars.items()} == {k: g.tobytes() for k, g in record.scalars.items()}


def test_a_scalar_costs_four_bytes_before_base64() -> None:
    plan = RoundPlan(0, 0.1, 1e-3, 1, {0: 300})
    scalars = np.ones((300, 1), np.float32)
    packed = RoundRecord(
        plan, {0: scalars}, scalars[:0], weights={0: 1.0}, aggregate=scalars, theta_digest=""
    ).to_json()["scalars"]
    assert len(packed) == 300 * 4 * 4 // 3


def test_a_record_whose_scalars_do_not_fit_is_refused() -> None:
    plan = RoundPlan(0, 0.1, 1e-3, 1, {0: 2, 1: 2})
    two = np.ones((2, 1), np.float32)
    fields = RoundRecord(
        plan, {0: two, 1: two}, two[:0], weights={0: 0.5, 1: 0.5}, aggregate=two, theta_digest=""
    ).to_json()
    with pytest.raises(ValueError, match="cannot reshape"):
        RoundRecord.from_json({**fields, "made": [2, 1]})


def test_a_round_of_deltas_is_kept_as_their_mean_to_the_bit() -> None:
    plan = RoundPlan(3, 0.1, 1e-3, 2, {0: 2, 4: 1}, sends="delta")
    delta = np.linspace(-1, 1, 7, dtype=np.float32)
    record = RoundRecord(
        plan, {}, np.zeros((0, 2)), weights={0: 0.75, 4: 0.25}, aggregate=delta, theta_digest="ab", unkept={0: 2, 4: 1}
    )
    again = RoundRecord.from_json(json.loads(json.dumps(record.to_json())))
    assert (again.plan, again.made, again.weights) == (plan, {0: 2, 4: 1}, record.weights)
    assert again.aggregate.tobytes() == delta.tobytes()
    assert (again.scalars, again.inner.shape) == ({}, (0, 2))
