import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meerkat.rounds import RoundPlan, RoundRecord

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.data())
def test_a_record_survives_json_to_the_bit(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 3))
    steps = data.draw(st.dictionaries(st.integers(0, 10**6), st.integers(1, 4), min_size=1, max_size=4))
    steps = dict(sorted(steps.items()))

    def scalars(rows: int) -> np.ndarray:
        drawn = data.draw(st.lists(numbers, min_size=rows * width, max_size=rows * width))
        return np.array(drawn, dtype=np.float32).reshape(rows, width)

    plan = RoundPlan(data.draw(st.integers(0, 2**40)), data.draw(st.floats(0, 1)), 1e-3, width, steps, "calibration")
    made = {k: data.draw(st.integers(0, t)) for k, t in steps.items()}
    replies = {k: scalars(t) for k, t in made.items() if t}
    weights = {k: data.draw(st.floats(0, 1)) for k in replies}
    record = RoundRecord(plan, weights, replies, scalars(max(steps.values())), "ab")
    held = RoundRecord.from_json(json.loads(json.dumps(record.to_json())))
    assert held.plan == record.plan
    assert held.weights == record.weights
    assert held.theta_digest == "ab"
    assert held.aggregate.tobytes() == record.aggregate.tobytes()
    assert {k: g.tobytes() for k, g in held.scalars.items()} == {k: g.tobytes() for k, g in record.scalars.items()}


def test_a_scalar_costs_four_bytes_before_base64() -> None:
    plan = RoundPlan(0, 0.1, 1e-3, 1, {0: 300})
    scalars = np.ones((300, 1), np.float32)
    packed = RoundRecord(plan, {0: 1.0}, {0: scalars}, scalars, "").to_json()["scalars"]
    assert len(packed) == 300 * 4 * 4 // 3


def test_a_record_whose_scalars_do_not_fit_is_refused() -> None:
    plan = RoundPlan(0, 0.1, 1e-3, 1, {0: 2, 1: 2})
    two = np.ones((2, 1), np.float32)
    held = RoundRecord(plan, {0: 0.5, 1: 0.5}, {0: two, 1: two}, two, "").to_json()
    with pytest.raises(ValueError, match="scalars of 4 steps, not 3"):
        RoundRecord.from_json({**held, "made": [2, 1]})
