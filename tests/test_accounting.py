"""Epsilons against closed forms, a literal convolution, another library's accountant, and what papers published.

The golden noise multipliers are Opacus 1.6's PRV accountant's (Gopi et al. 2021; eps_error 1e-3), computed once:

    get_noise_multiplier(target_epsilon=..., target_delta=..., sample_rate=..., steps=..., accountant="prv",
                         epsilon_tolerance=1e-3, eps_error=1e-3)
"""

import math
import sys
import time
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat.errors import MeerkatError
from meerkat.privacy import accounting
from meerkat.privacy.accounting import Charge, epsilon, noise_for, steps_within
from meerkat.privacy.mechanism import Relation

DELTA = 1e-5
BOTH: list[Relation] = ["add-or-remove", "replace"]


# --- references ---


def epsilon_where(delta_at: Callable[[float], float], delta: float) -> float:
    """The epsilon at which a falling delta(epsilon) is `delta`, by bisection."""
    low, high = 0.0, 1.0
    while delta_at(high) > delta:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Balle & Wang 2018, theorem 8: one Gaussian whose mean moves by mu standard deviations."""
    phi = NormalDist().cdf
    return epsilon_where(lambda e: phi(mu / 2 - e / mu) - math.exp(e) * phi(-mu / 2 - e / mu), delta)


def log_density(x: np.ndarray, q: float, moved: float, sigma: float) -> np.ndarray:
    """log((1 - q) N(0, sigma^2) + q N(moved, sigma^2)), without the constant."""
    at_0, at_moved = -(x**2) / (2 * sigma**2), -((x - moved) ** 2) / (2 * sigma**2)
    return np.logaddexp(math.log1p(-q) + at_0, math.log(q) + at_moved)


def literal_epsilon(q: float, sigma: float, steps: int, delta: float, relation: Relation) -> float:
    """Steps of the sampled Gaussian from its privacy loss, laid out in bins and convolved with itself, the slow way."""
    x = np.linspace(-1 - 12 * sigma, 1 + 12 * sigma, 400_001)
    plain = -(x**2) / (2 * sigma**2)
    with_one = log_density(x, q, 1.0, sigma)
    pairs = [(with_one, plain), (plain, with_one)]
    if relation == "replace":
        pairs = [(with_one, log_density(x, q, -1.0, sigma))]
    width, worst = 2e-3, 0.0
    for first, second in pairs:
        weights = np.exp(first)
        weights /= weights.sum()
        kept = weights > 1e-18
        at = (first - second)[kept] / width
        start = math.floor(at.min())
        share = at - np.floor(at)
        bins, once = (np.floor(at) - start).astype(int), weights[kept]
        loss = np.zeros(bins.max() + 2)
        np.add.at(loss, bins, once * (1 - share))
        np.add.at(loss, bins + 1, once * share)
        total = loss
        for _ in range(steps - 1):
            total = np.convolve(total, loss)
        levels = (np.arange(len(total)) + start * steps) * width

        def delta_at(e: float, total: np.ndarray = total, levels: np.ndarray = levels) -> float:
            above = levels > e
            return float((total[above] * -np.expm1(e - levels[above])).sum())

        worst = max(worst, epsilon_where(delta_at, delta))
    return worst


# --- numbers ---


@pytest.mark.parametrize("relation", BOTH)
@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (2.0, 1), (3.0, 2), (5.0, 20), (40.0, 900)])
def test_at_q_1_it_is_the_closed_form(sigma: float, steps: int, relation: Relation) -> None:
    """T Gaussians of sigma are one of mu = sqrt(T) / sigma; another example in place of one moves the sum twice."""
    moved = 2 if relation == "replace" else 1
    exact = gaussian_epsilon(moved * math.sqrt(steps) / sigma, DELTA)
    cost = epsilon([Charge(1.0, sigma, steps)], DELTA, relation)
    assert exact <= cost * (1 + 1e-12)
    assert cost == pytest.approx(exact, rel=3e-4)


@pytest.mark.parametrize("relation", BOTH)
@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.1, 1.0, 1), (0.3, 0.8, 2), (0.05, 0.7, 4), (0.5, 2.0, 6)])
def test_with_sampling_it_is_the_literal_convolution(q: float, sigma: float, steps: int, relation: Relation) -> None:
    cost = epsilon([Charge(q, sigma, steps)], DELTA, relation)
    assert cost == pytest.approx(literal_epsilon(q, sigma, steps, DELTA, relation), rel=2e-3)


def test_the_literal_convolution_is_the_closed_form_where_both_are() -> None:
    assert literal_epsilon(1 - 1e-15, 1.5, 3, DELTA, "add-or-remove") == pytest.approx(
        gaussian_epsilon(math.sqrt(3) / 1.5, DELTA), rel=1e-3
    )


GOLDEN = [
    # q, steps, epsilon, delta, sigma
    (0.001, 20_000, 1.0, 1e-5, 0.83221),
    (1.0, 1, 1.0, 1e-5, 3.7353),
    (0.01, 10_000, 1.0, 1e-5, 3.8184),
    (256 / 60_000, 14_062, 3.0, 1e-5, 0.96863),
    (0.16, 200, 4.0, 1e-5, 2.6251),
    (0.2, 200, 8.0, 1e-5, 1.8851),
    (0.04, 200, 2.0, 1e-5, 1.4221),
    (0.5, 50, 1.0, 1e-6, 15.107),
]


@pytest.mark.parametrize(("q", "steps", "target", "delta", "sigma"), GOLDEN)
def test_noise_is_another_library_s(q: float, steps: int, target: float, delta: float, sigma: float) -> None:
    assert epsilon([Charge(q, sigma, steps)], delta, "add-or-remove") == pytest.approx(target, rel=5e-3)
    if steps <= 1000:  # longer ones take seconds to search
        assert noise_for(target, delta, q, steps, "add-or-remove") == pytest.approx(sigma, rel=3e-3)
    # so is theirs ours to two digits: an epsilon that far apart has the target between
    less, more = (epsilon([Charge(q, share * sigma, steps)], delta, "add-or-remove") for share in (0.99, 1.01))
    assert more < target < less


PUBLISHED = [
    # q, sigma, steps, the epsilon published, by the moments accountant or Renyi orders: bounds that are less tight
    (0.01, 4.0, 10_000, 1.26),  # Abadi et al. 2016, section 3.2
    (256 / 60_000, 1.12, 60 * 60_000 // 256, 2.92),  # TensorFlow Privacy's tutorial on MNIST
    (256 / 60_000, 0.6, 30 * 60_000 // 256, 9.74),
    (256 / 60_000, 1.2, 10 * 60_000 // 256, 1.20),
]


@pytest.mark.parametrize(("q", "sigma", "steps", "published"), PUBLISHED)
def test_it_is_below_published_bounds_and_not_far(q: float, sigma: float, steps: int, published: float) -> None:
    assert 0.6 * published < epsilon([Charge(q, sigma, steps)], DELTA, "add-or-remove") < published


# --- properties ---

rates = st.floats(0.01, 1.0)
noises = st.floats(1.0, 20.0)
few = settings(max_examples=4, deadline=None)


@few
@given(rates, noises, st.integers(1, 300), st.sampled_from(BOTH))
def test_more_steps_more_often_or_less_noise_cost_more(q: float, sigma: float, steps: int, relation: Relation) -> None:
    cost = epsilon([Charge(q, sigma, steps)], DELTA, relation)
    slack = 1e-6
    assert epsilon([Charge(q, sigma, steps + 1)], DELTA, relation) >= cost - slack
    assert epsilon([Charge(min(1.0, 1.1 * q), sigma, steps)], DELTA, relation) >= cost - slack
    assert epsilon([Charge(q, 1.1 * sigma, steps)], DELTA, relation) <= cost + slack
    assert epsilon([Charge(q, sigma, steps)], 10 * DELTA, relation) <= cost + slack
    assert epsilon([Charge(q, sigma, steps)], DELTA, "replace") >= cost - slack


@few
@given(rates, st.integers(1, 400), st.floats(0.5, 4.0), st.sampled_from(BOTH))
def test_the_noise_found_is_enough_and_hardly_more(q: float, steps: int, target: float, relation: Relation) -> None:
    noise = noise_for(target, DELTA, q, steps, relation)
    assert epsilon([Charge(q, noise, steps)], DELTA, relation) <= target
    assert epsilon([Charge(q, noise * (1 - 2 * accounting._TOLERANCE), steps)], DELTA, relation) > target


@few
@given(rates, st.floats(2.0, 8.0), st.floats(0.5, 4.0), st.integers(0, 20))
def test_steps_found_fit_and_one_more_does_not(q: float, sigma: float, target: float, before: int) -> None:
    most = 100
    spent = [Charge(0.2, 4.0, before)]
    steps = steps_within(target, DELTA, q, sigma, "add-or-remove", most, spent)
    assert 0 <= steps <= most
    if steps or epsilon(spent, DELTA, "add-or-remove") <= target:
        assert epsilon([*spent, Charge(q, sigma, steps)], DELTA, "add-or-remove") <= target
    if steps < most:
        assert epsilon([*spent, Charge(q, sigma, steps + 1)], DELTA, "add-or-remove") > target


def test_steps_of_the_noise_that_was_found_are_those_it_was_found_for() -> None:
    sigma = noise_for(3.0, DELTA, 0.1, 200, "add-or-remove")
    assert 200 <= steps_within(3.0, DELTA, 0.1, sigma, "add-or-remove", 1000) <= 202
    assert steps_within(3.0, DELTA, 0.1, sigma, "add-or-remove", 150) == 150


def test_charges_add_up_in_any_order_and_of_any_sizes() -> None:
    one, other = Charge(0.1, 1.0, 30), Charge(0.5, 3.0, 7)
    whole = epsilon([one, other], DELTA, "add-or-remove")
    pieces = [Charge(0.5, 3.0, 7), *[Charge(0.1, 1.0, 1)] * 30, Charge(0.3, 1.0, 0)]
    assert epsilon(pieces, DELTA, "add-or-remove") == pytest.approx(whole, rel=1e-12)
    assert max(epsilon([each], DELTA, "add-or-remove") for each in (one, other)) < whole


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon([], DELTA, "add-or-remove") == epsilon([Charge(0.1, 0.0, 0)], DELTA, "replace") == 0
    assert epsilon([Charge(0.1, 1.0, 5), Charge(0.1, 0.0, 1)], DELTA, "add-or-remove") == math.inf
    assert steps_within(8.0, DELTA, 0.5, 0.0, "add-or-remove", 100) == 0


@pytest.mark.parametrize(
    "charge", [Charge(1.0, 1e-9, 1), Charge(0.1, 1e-200, 1), Charge(0.5, 0.01, 1000), Charge(1.0, 0.3, 10**6)]
)
def test_hardly_any_noise_is_found_hopeless_at_once(charge: Charge) -> None:
    """Whoever chooses a run's noise must not be able to fill a site's memory with it."""
    began = time.process_time()
    assert epsilon([charge], DELTA, "add-or-remove") == math.inf
    assert time.process_time() - began < 5


def test_a_budget_that_no_noise_keeps_is_told() -> None:
    with pytest.raises(MeerkatError, match=r"dp_epsilon 1e-06: no noise multiplier up to 10000 keeps 100 steps within"):
        noise_for(1e-6, 1e-9, 1.0, 100, "add-or-remove")


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MeerkatError, match=r"needs dp-accounting: pip install 'meerkat-fl\[privacy\]'"):
        epsilon([Charge(0.123, 1.0, 1)], DELTA, "add-or-remove")
    assert epsilon([Charge(0.123, 0.0, 1)], DELTA, "add-or-remove") == math.inf


def test_an_epsilon_grows_with_the_steps_and_a_count_goes_on_where_it_stopped() -> None:
    costs = [epsilon([Charge(0.001, 5.0, steps)], 1e-5, "add-or-remove") for steps in (100, 800, 1_000, 1_001, 4_000)]
    assert costs == sorted(costs)
    most = steps_within(0.02, 1e-5, 0.001, 5.0, "add-or-remove", 1_001)
    spent = [Charge(0.001, 5.0, 400)]
    assert steps_within(0.02, 1e-5, 0.001, 5.0, "add-or-remove", 601, spent) == most - 400


def test_more_steps_than_are_counted_count_as_without_noise() -> None:
    assert epsilon([Charge(1.0, 5_000.0, 10_000_000)], 1e-5, "add-or-remove") == math.inf


# --- what a coordinator's numbers can keep a site busy with ---


@pytest.fixture
def bins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bins each composition of a mechanism with itself has, which is what its time and memory follow."""
    common = pytest.importorskip("dp_accounting.pld.common")
    seen: list[int] = []
    convolve = common.self_convolve

    def counting(probabilities: np.ndarray, times: int, *rest: float) -> tuple[int, np.ndarray]:
        start, composed = convolve(probabilities, times, *rest)
        seen.append(len(probabilities) + len(composed))
        return start, composed

    monkeypatch.setattr(common, "self_convolve", counting)
    accounting._epsilon.cache_clear()
    return seen


HARDEST = [
    # target, delta, q, sigma, relation
    (190.0, 1e-5, 0.5, 30.0, "add-or-remove"),  # once 130,440,935 bins in all
    (50.0, 1e-5, 0.01, 0.6, "add-or-remove"),
    (50.0, 1e-5, 1e-4, 0.25, "add-or-remove"),
    # the hardest of random searches over everything that an offer can hold
    pytest.param(20.0, 1.6e-11, 0.195, 61.6, "add-or-remove", marks=pytest.mark.slow),
    (32.6, 7e-11, 0.0104, 5.32, "replace"),
    (6.94, 5.8e-11, 0.352, 143.6, "replace"),
    (8.9, 2.8e-9, 6.6e-6, 0.124, "add-or-remove"),
]


@pytest.mark.parametrize(("target", "delta", "q", "sigma", "relation"), HARDEST)
def test_counting_how_long_a_budget_lasts_is_bounded_work(
    bins: list[int], target: float, delta: float, q: float, sigma: float, relation: Relation
) -> None:
    steps_within(target, delta, q, sigma, relation, 1_000_000)
    print(f"{len(bins)} compositions, {max(bins, default=0):,} bins in the largest, {sum(bins):,} in all")
    assert len(bins) <= 70
    assert max(bins, default=0) <= 2_500_000
    assert sum(bins) <= 20_000_000


def test_what_was_spent_on_many_mechanisms_is_composed_once(bins: list[int]) -> None:
    spent = [Charge(0.1, 20 + n / 10, 1) for n in range(30)]
    assert 100 < steps_within(2.0, DELTA, 0.1, 5.0, "add-or-remove", 100_000, spent) < 100_000
    print(f"{len(bins)} compositions of 30 mechanisms and one more")
    assert len(bins) <= 2 * (30 + 40)
