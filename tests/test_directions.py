import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from meerkat.algorithm import directions
from meerkat.algorithm.directions import NORMAL, RADEMACHER, Directions, Law, Place, direction, run_key

KEY = run_key(0)
TABLE = np.load(Path(directions.__file__).parent / "normal_quantiles.npy")


def training(round: int = 0, step: int = 0, p: int = 0) -> Place:
    return Place("training", round, step, p)


def test_golden_vectors() -> None:
    assert run_key(0) == 0x3CB0DE1AEA9E8D47400E90B7BA49759
    assert direction(KEY, training(), 4).tolist() == [
        1.7791961431503296,
        -0.042066629976034164,
        -0.4377857744693756,
        -0.7962558269500732,
    ]
    everything = b"".join(
        direction(KEY, place, 1000).tobytes()
        for place in (training(), training(7, 3, 2), Place("calibration", 2**40, 2**31, 5))
    )
    assert hashlib.sha256(everything).hexdigest() == "f80481b4ccd09c8725b671332c33deffadf28470c80ba83fd8c165e9f360d6f0"


@given(
    st.integers(0, 2**128 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["training", "calibration"]),
)
def test_is_the_published_philox_through_the_table(key: int, round: int, step: int, p: int, phase: str) -> None:
    place = Place(phase, round, step, p)
    counter = (0, step + (p << 32), round, directions.PHASES[phase])
    assert np.array_equal(direction(key, place, 40), reference.philox_normals(key, counter, 40, TABLE))


@given(st.integers(0, 5000), st.integers(0, 300))
def test_any_slice_is_the_same_as_in_the_whole(start: int, count: int) -> None:
    whole = direction(KEY, training(3, 1), 5300)
    assert np.array_equal(direction(KEY, training(3, 1), count, start), whole[start : start + count])


def test_the_table_is_the_normal_quantiles() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    from make_normal_table import normal_table

    np.testing.assert_array_max_ulp(TABLE, normal_table(), maxulp=1)
    assert np.array_equal(TABLE, -TABLE[::-1])


def test_a_damaged_table_is_refused() -> None:
    code = "import numpy; whole = numpy.load; numpy.load = lambda f: whole(f) + 1\nimport meerkat.algorithm.directions"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode != 0
    assert "reinstall" in ran.stderr


def test_moments_are_the_standard_normal_s() -> None:
    n = 2_000_000
    z = direction(KEY, training(11), n).astype(np.float64)
    # five standard errors of each moment of n normal values
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)


PLACES = [
    training(),
    training(step=1),
    training(round=1),
    training(p=1),
    training(step=2),
    training(round=2),
    training(1, 1, 1),
    Place("calibration", 0, 0, 0),
]


def test_steps_rounds_directions_and_phases_are_independent() -> None:
    n = 200_000
    z = np.stack([direction(KEY, place, n) for place in PLACES] + [direction(run_key(1), training(), n)]).astype(float)
    squares = z**2 - 1
    off_diagonal = ~np.eye(len(z), dtype=bool)
    assert np.abs((z @ z.T / n)[off_diagonal]).max() < 5 / math.sqrt(n)
    assert np.abs((squares @ squares.T / n)[off_diagonal]).max() < 5 * 2 / math.sqrt(n)
    for lag in (1, 4, 16, 64):  # within one direction: neighbours in a word, a block, and further
        assert abs((z[:, lag:] * z[:, :-lag]).mean()) < 5 / math.sqrt(n)


def test_no_two_places_share_a_counter() -> None:
    seen = {direction(KEY, training(r, t, p), 8).tobytes() for r in range(12) for t in range(12) for p in range(12)}
    assert len(seen) == 12**3


@pytest.mark.parametrize("prepared", [training(5), training(6)])
def test_what_a_thread_made_ahead_is_the_same(prepared: Place) -> None:
    ahead = Directions(KEY, 1000)
    ahead(training(4))
    ahead.prepare(prepared)
    expected = torch.from_numpy(direction(KEY, training(5), 1000))
    assert torch.equal(ahead(training(5)), expected)
    assert torch.equal(ahead(training(5)), expected)


@pytest.mark.gpu
def test_the_bits_are_the_same_on_a_gpu() -> None:
    on_gpu = Directions(KEY, 100_000, "cuda")(training(9)).cpu()
    assert torch.equal(on_gpu, Directions(KEY, 100_000)(training(9)))


@given(st.integers(0, 3000), st.integers(1, 300))
def test_a_law_says_what_each_sixteen_bits_stand_for(start: int, count: int) -> None:
    """Both laws read the same bits, so that a Rademacher entry is the sign of the normal one."""
    scale = np.linspace(0.5, 2.0, 3300, dtype=np.float32)
    signs = direction(KEY, training(3, 1), count, start, RADEMACHER)
    assert set(np.unique(signs)) <= {-1.0, 1.0}
    assert np.array_equal(signs, np.sign(direction(KEY, training(3, 1), count, start)))
    scaled = direction(KEY, training(3, 1), count, start, Law("scaled", NORMAL.table, scale))
    expected = direction(KEY, training(3, 1), count, start) * scale[start : start + count]
    assert np.array_equal(scaled, expected)


def test_directions_of_a_law_and_their_slices_agree() -> None:
    z = Directions(KEY, 1000, law=RADEMACHER)
    assert torch.equal(z(training(5)), torch.from_numpy(direction(KEY, training(5), 1000, law=RADEMACHER)))
    assert np.array_equal(z.slice(training(5), 100, 50), z(training(5))[100:150].numpy())
    assert abs(z(training(6)).mean()) < 5 / math.sqrt(1000)
