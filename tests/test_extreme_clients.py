"""Who is called extreme: the paper's rule against the literal one, the automatic one against synthetic federations."""

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat.algorithm import extreme_clients
from meerkat.algorithm.extreme_clients import Selection, Vpcs, select

PAPERS = Vpcs(rule="thresholds", calibration_steps=8, initial_steps=3, later_steps=2)
AUTOMATIC = Vpcs()


def by_thresholds(gradips: Sequence[Sequence[float]], vpcs: Vpcs = PAPERS) -> Selection:
    traces = {k: np.array(a, dtype=np.float64) for k, a in enumerate(gradips)}
    return select({k: np.full(len(a), 7.0) for k, a in traces.items()}, traces, vpcs)


def automatic(magnitudes: np.ndarray, ids: Sequence[int] | None = None, vpcs: Vpcs = AUTOMATIC) -> Selection:
    """|g|: [K, T]; GradIP is noise that the rule must not look at."""
    ids = range(len(magnitudes)) if ids is None else ids
    noise = np.full(magnitudes.shape[1], np.nan)
    return select(dict(zip(ids, magnitudes, strict=True)), dict.fromkeys(ids, noise), vpcs)


def federation(seed: int, levels: Sequence[float], falls: Sequence[float], steps: int = 100) -> np.ndarray:
    """|g| of clients whose gradient norms begin at `levels` and fall by the factors `falls` over the path: [K, T]."""
    z = np.random.default_rng(seed).normal(size=(len(levels), steps))
    norms = np.array(levels)[:, None] * np.array(falls)[:, None] ** (-np.arange(steps) / (steps - 1))
    return np.abs(z) * norms


def share_flagged(levels: Sequence[float], falls: Sequence[float], federations: int = 200) -> np.ndarray:
    """How often each client is called extreme: [K]."""
    counts = np.zeros(len(levels))
    for seed in range(federations):
        counts[list(automatic(federation(seed, levels, falls)).extreme)] += 1
    return counts / federations


# --- the paper's rule ---

level = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.0, -1.0, -4.0]) | st.floats(1e-9, 10)
paths = st.lists(st.lists(level, min_size=8, max_size=8), min_size=1, max_size=6)
rules = st.builds(
    lambda initial, later, above, share, sigma: dataclasses.replace(
        PAPERS, initial_steps=initial, later_steps=later, rho_later=above, rho_quie=share, sigma=sigma
    ),
    *(st.integers(1, 4), st.integers(1, 4)),
    *(st.sampled_from([1.0, 2.0, 3.0]), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.25, 0.5, 1.0])),
)


@settings(max_examples=300, deadline=None)
@given(paths, rules)
def test_the_papers_rule_is_the_literal_one(gradips: list[list[float]], vpcs: Vpcs) -> None:
    selection = by_thresholds(gradips, vpcs)
    traces = [torch.tensor(a, dtype=torch.float64) for a in gradips]
    sigma = vpcs.sigma * float(np.median([a.abs()[: vpcs.initial_steps].mean().item() for a in traces]))
    expected = reference.vpcs_extreme(
        traces, vpcs.initial_steps, vpcs.later_steps, sigma, vpcs.rho_later, vpcs.rho_quie
    )
    for k, a in enumerate(traces):
        rho = reference.rho_later(a, vpcs.initial_steps, vpcs.later_steps)
        assert selection.rho_quie[k] == reference.rho_quie(a, vpcs.later_steps, selection.quiet_below)
        if math.isfinite(rho):
            assert selection.rho_later[k] == pytest.approx(rho, rel=1e-12)
        assert math.isfinite(selection.rho_later[k])
        if rho == pytest.approx(vpcs.rho_later, rel=1e-12):
            expected -= {k}  # sums in another order may fall on either side of an exact tie
    tied = {k for k in selection.extreme if selection.rho_later[k] == pytest.approx(vpcs.rho_later, rel=1e-12)}
    assert set(selection.extreme) - tied == expected
    assert selection.quiet_below == pytest.approx(sigma, rel=1e-12)


def test_a_client_at_the_first_threshold_is_not_above_it_and_at_the_second_is_extreme() -> None:
    # sigma = .25 of the median initial mean 4 = 1; later means 2 and 1.75, half of the later steps quiet
    tied, above = [4, 4, 4, 9, 9, 9, 0, 4], [4, 4, 4, 9, 9, 9, 0, 3.5]
    selection = by_thresholds([tied, above])
    assert selection.rho_later == (2.0, 4 / 1.75)
    assert selection.rho_quie == (0.5, 0.5)
    assert selection.extreme == (1,)


def test_a_step_at_the_level_of_quiet_is_not_quiet() -> None:
    selection = by_thresholds([[4, 4, 4, 9, 9, 9, 1, 1]])
    assert selection.quiet_below == 1
    assert selection.rho_quie == (0.0,)


def test_the_sign_of_gradip_does_not_matter() -> None:
    gradips = np.random.default_rng(0).normal(size=(5, 8))
    assert by_thresholds(gradips.tolist()) == by_thresholds((-gradips).tolist())


def test_the_papers_rule_misses_who_is_quiet_from_the_start_and_the_automatic_one_does_not() -> None:
    signal = federation(1, [0.05] + [1] * 9, [1] * 10)
    vpcs = Vpcs(rule="thresholds")
    assert select(dict(enumerate(signal)), dict(enumerate(signal)), vpcs).extreme == ()
    selection = automatic(signal)
    assert selection.rho_later[0] < selection.rho_later_above
    assert selection.extreme == (0,)


@pytest.mark.parametrize("rule", ["thresholds", "automatic"])
def test_clients_whose_signal_is_zero_give_no_nan(rule: str) -> None:
    vpcs = Vpcs(rule="thresholds" if rule == "thresholds" else "automatic")
    signal = federation(0, [1] * 5, [1] * 5)
    signal[2] = 0  # always
    signal[3, 50:] = 0  # from the middle on
    selection = select(dict(enumerate(signal)), dict(enumerate(signal)), vpcs)
    numbers = [*selection.rho_later, *selection.rho_quie, *selection.later, selection.rho_later_above]
    assert np.isfinite([*numbers, selection.quiet_below, selection.loud_above]).all()
    assert set(selection.extreme) == ({3} if rule == "thresholds" else {2, 3})


@pytest.mark.parametrize("rule", ["thresholds", "automatic"])
def test_where_all_signals_are_zero_nobody_is_extreme(rule: str) -> None:
    vpcs = Vpcs(rule="thresholds" if rule == "thresholds" else "automatic")
    still = dict.fromkeys(range(4), np.zeros(100))
    selection = select(still, still, vpcs)
    assert selection.extreme == ()
    assert np.isfinite([*selection.rho_later, selection.rho_later_above, selection.quiet_below]).all()


@pytest.mark.parametrize("rule", ["thresholds", "automatic"])
def test_without_any_answer_nobody_is_extreme(rule: str) -> None:
    selection = select({}, {}, Vpcs(rule="thresholds" if rule == "thresholds" else "automatic"))
    assert selection.clients == selection.extreme == selection.rho_later == ()
    assert np.isfinite([selection.rho_later_above, selection.quiet_below]).all()


# --- the automatic rule ---

KINDS = ((1, 0.1), (2, 0.3))
"""Levels and falls of IID clients: their middle, and how far their logs scatter."""

mixtures = st.lists(
    st.tuples(st.sampled_from([0.1, 0.5, 1.0, 2.0]), st.sampled_from([0.5, 1.0, 3.0, 12.0])), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(mixtures, st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_the_unit_of_the_loss_does_not_matter(mixture: list[tuple[float, float]], seed: int, unit: float) -> None:
    signal = federation(seed, *zip(*mixture, strict=True))
    one, other = automatic(signal), automatic(signal * unit)
    assert one.extreme == other.extreme
    assert one.rho_later_above == pytest.approx(other.rho_later_above)
    assert one.quiet_below * unit == pytest.approx(other.quiet_below)
    assert one.loud_above * unit == pytest.approx(other.loud_above)


@settings(max_examples=60, deadline=None)
@given(mixtures, st.integers(0, 10**6), st.data())
def test_the_clients_numbers_do_not_matter(mixture: list[tuple[float, float]], seed: int, data: st.DataObject) -> None:
    signal = federation(seed, *zip(*mixture, strict=True))
    ids = data.draw(st.lists(st.integers(0, 99), min_size=len(signal), max_size=len(signal), unique=True))
    renamed = automatic(signal, ids)
    assert renamed.clients == tuple(sorted(ids))
    assert set(renamed.extreme) == {ids[k] for k in automatic(signal).extreme}
    for k, rho in zip(renamed.clients, renamed.rho_later, strict=True):
        assert rho == automatic(signal).rho_later[ids.index(k)]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 31])
@pytest.mark.parametrize("fall", [0.2, 1, 50])
def test_identical_clients_are_all_let_be(count: int, fall: float) -> None:
    one = federation(4, [1], [fall])
    assert automatic(np.repeat(one, count, 0)).extreme == ()


def test_a_client_alone_is_never_extreme() -> None:
    for seed, fall in enumerate([0.1, 1, 10, 1000]):
        assert automatic(federation(seed, [1], [fall])).extreme == ()


def test_of_two_clients_the_one_that_stands_out_is_found() -> None:
    assert share_flagged([1, 1], [1, 1]).max() <= 0.01
    for levels, falls in (([1, 1], [20, 1]), ([0.05, 1], [1, 1])):
        first, second = share_flagged(levels, falls)
        assert first > 0.98
        assert second == 0


@pytest.mark.parametrize("count", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("fall", [1, 3])
def test_at_most_one_in_a_hundred_equals_is_flagged(count: int, fall: float) -> None:
    assert share_flagged([1] * count, [fall] * count, 2000 // count).mean() <= 0.01


@pytest.mark.parametrize("count", [2, 3, 5, 10, 40])
def test_at_most_one_in_a_hundred_is_flagged_where_equals_scatter_by_more_than_their_steps(count: int) -> None:
    """As far as they do in practice: their log rho_later by half as much again, their levels by a tenth."""
    rng = np.random.default_rng(0)
    flagged = [
        len(automatic(federation(seed, *(middle * np.exp(s * rng.normal(size=count)) for middle, s in KINDS))).extreme)
        for seed in range(6000 // count)
    ]
    assert np.mean(flagged) / count <= 0.01


def test_clients_that_decay_are_found_and_the_others_are_not() -> None:
    shares = share_flagged([1] * 10, [10] * 3 + [1] * 7)
    assert shares[:3].min() > 0.98
    assert shares[3:].max() <= 0.01


def test_they_are_found_where_four_in_five_decay() -> None:
    shares = share_flagged([1] * 10, [12] * 8 + [1] * 2)
    assert shares[:8].min() > 0.95
    assert shares[8:].max() <= 0.01


def test_the_slow_are_found_where_four_in_five_decay() -> None:
    """Half of them fall to a third, while lively clients' |g| rises: the middle of all is no guide, nor is a gap."""
    shares = share_flagged([1.5] * 8 + [1] * 2, [3] * 4 + [15] * 4 + [0.6] * 2)
    assert shares[:4].min() > 0.75
    assert shares[4:8].min() > 0.98
    assert shares[8:].max() <= 0.01


def test_the_lively_are_not_taken_for_quiet_where_most_begin_far_above_them() -> None:
    shares = share_flagged([5] * 7 + [1] * 3, [12] * 7 + [1] * 3)
    assert shares[:7].min() > 0.98
    assert shares[7:].max() <= 0.01


def test_who_begins_far_above_the_others_is_found_though_it_does_not_decay() -> None:
    """The gradient of a single label is not cancelled by another's; its client may take longer than a calibration."""
    shares = share_flagged([4] * 3 + [1] * 7, [1] * 10)
    assert shares[:3].min() > 0.98
    assert shares[3:].max() <= 0.01
    one = automatic(federation(0, [4] * 3 + [1] * 7, [1] * 10))
    assert max(one.rho_later[:3]) < one.rho_later_above
    assert one.extreme == (0, 1, 2)


Places = list[list[float]]
"""Where clients lie, in spreads."""


def log_likelihood(lively: Places, others: int, price: float) -> float:
    """Of so many lively clients at these places, and of others anywhere; every number of them as likely."""
    dimensions = len(lively[0])
    within = -others * (price / 2 + dimensions * math.log(math.sqrt(2 * math.pi)))
    for along in zip(*lively, strict=True):
        normal = NormalDist(sum(along) / len(along))
        within += sum(math.log(normal.pdf(at)) for at in along)
    return within - math.log(math.comb(len(lively) + others, others))


@pytest.mark.parametrize("dimensions", [1, 2])
@settings(max_examples=200, deadline=None)
@given(data=st.data(), price=st.sampled_from([3.5, 5.0]))
def test_as_many_are_taken_for_lively_as_is_most_likely(dimensions: int, data: st.DataObject, price: float) -> None:
    place = st.lists(st.floats(-3, 9), min_size=dimensions, max_size=dimensions)
    places = sorted(data.draw(st.lists(place, min_size=1, max_size=12)))
    least = math.ceil(len(places) / 5)
    likely = {m: log_likelihood(places[:m], len(places) - m, price) for m in range(least, len(places) + 1)}
    assert likely[extreme_clients._lively_count(np.array(places), price)] == pytest.approx(max(likely.values()))


def test_they_are_found_where_most_fall_alike_and_far_under_the_others() -> None:
    """Four fall to a fifth and four to a tenth, and end far under the two lively ones, whose fall alone says little."""
    shares = share_flagged([0.5] * 4 + [2] * 4 + [1] * 2, [4] * 4 + [16] * 4 + [1.5] * 2)
    assert shares[:8].min() > 0.95
    assert shares[8:].max() <= 0.01


def test_somebody_is_held_against_however_many_steps_tell_the_levels_apart() -> None:
    """Of so many that each client stands far from the middle of all, some still decayed least."""
    signal = federation(0, [1, 4], [1, 1], 20_000)
    vpcs = Vpcs(calibration_steps=20_000, initial_steps=10_000, later_steps=10_000)
    assert len(select(dict(enumerate(signal)), {}, vpcs).extreme) == 1


def test_who_is_quiet_from_the_start_is_found_though_it_does_not_decay() -> None:
    shares = share_flagged([0.1] * 3 + [1] * 7, [1] * 10)
    assert shares[:3].min() > 0.98
    assert shares[3:].max() <= 0.01


def test_quiet_clients_do_not_make_lively_ones_that_learn_look_decayed() -> None:
    """IID clients' |g| falls too, to less than half over a path; a client that was quiet all along has not fallen."""
    shares = share_flagged([0.07] * 3 + [1] * 7, [1] * 3 + [3.5] * 7)
    assert shares[:3].min() > 0.9
    assert shares[3:].max() <= 0.01


def test_both_kinds_at_once_are_found() -> None:
    shares = share_flagged([0.1] * 3 + [1] * 7, [1] * 3 + [10] * 2 + [1] * 5)
    assert shares[:5].min() > 0.97
    assert shares[5:].max() <= 0.01


def test_fewer_steps_need_a_clearer_difference() -> None:
    short = Vpcs(calibration_steps=20, initial_steps=6, later_steps=6)
    signal = federation(0, [1] * 10, [1] * 10)
    few, many = automatic(signal[:, :20], vpcs=short), automatic(signal)
    assert few.rho_later_above > 1.3 * many.rho_later_above
    flagged = [len(automatic(federation(s, [1] * 10, [1] * 10, 20), vpcs=short).extreme) for s in range(200)]
    assert np.mean(flagged) / 10 <= 0.01


def test_more_directions_make_the_rule_sharper() -> None:
    """|g| as a mean over P directions scatters less: what would be chance at P = 1 is none at P = 16."""
    decayed = np.ones((10, 100))
    decayed[0, -30:] = 0.6
    traces = dict(enumerate(decayed))
    assert select(traces, traces, Vpcs(), directions=1).extreme == ()
    assert select(traces, traces, Vpcs(), directions=16).extreme == (0,)
