"""What a run costs in privacy: (epsilon, delta) of noisy steps, by dp-accounting's privacy loss distributions.

A charge is a number of steps of one mechanism. Distributions are rounded up, so an epsilon is never too low.
docs/privacy.md says why this library, and compares its numbers with others'.

Whoever chooses a run's numbers must not be able to keep a site busy with them: what would take long counts as without
any bound, and what was spent before is composed once, however many steps are tried after it.
"""

import math
from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import Any, NamedTuple

from meerkat.errors import MeerkatError
from meerkat.privacy.mechanism import WEAK, Relation

LARGEST_NOISE = 1e4
"""The largest noise multiplier that is tried."""
_LEAST_NOISE = 1e-3
"""Less noise than this counts as none."""
LARGEST_EPSILON = WEAK
"""The largest budget that is counted."""
SMALLEST_DELTA = 1e-12
"""The smallest delta that is counted: what is cut off distributions weighs 1e-15."""
LONGEST = 1_000_000
"""The most steps that are accounted for; more of them count as steps without noise."""
_WIDTHS = 1e-4, 1e-3
"""Narrowest and widest bins to which privacy losses are rounded up, at a noise multiplier of 1 or more."""
_HOPELESS = 2 * WEAK
"""The epsilon, by Rényi orders, above which none is computed: distributions grow with it."""
_ORDERS = (2, 3, 4, 6, 8, 16, 32, 64)
_TOLERANCE = 1e-3
"""`noise_for` overestimates by at most this share, and `steps_within` underestimates, beyond a thousand steps."""


class Charge(NamedTuple):
    """Steps of one mechanism."""

    rate: float
    """q: the sampling probability, in (0, 1]."""
    noise_multiplier: float
    """sigma"""
    steps: int


def epsilon(charges: Sequence[Charge], delta: float, relation: Relation) -> float:
    """An upper bound on the epsilon of several charges together, at a delta; infinite with no noise or hardly any.

    Raises:
        MeerkatError: dp-accounting is not installed.
    """
    steps: dict[tuple[float, float], int] = {}
    for charge in charges:
        if charge.steps and charge.rate:  # charged last, put last: what a search varies
            key = charge.rate, charge.noise_multiplier
            steps[key] = steps.pop(key, 0) + charge.steps
    merged = [Charge(*key, count) for key, count in steps.items()]
    return _epsilon((*sorted(merged[:-1]), *merged[-1:]), delta, relation)


@lru_cache(4096)
def _epsilon(charges: tuple[Charge, ...], delta: float, relation: Relation) -> float:
    if not charges:
        return 0.0
    if any(charge.noise_multiplier < _LEAST_NOISE for charge in charges) or sum(c.steps for c in charges) > LONGEST:
        return math.inf
    *earlier, last = charges
    before, coarse = tuple(earlier), _by_renyi((last,), delta)
    if coarse + (_by_renyi(before, delta) if before else 0.0) > _HOPELESS:
        return math.inf
    width = min(_width(charge) for charge in charges)
    losses = _losses(last, width, relation)
    if before:
        losses = _composed(before, width, relation).compose(losses)
    return float(losses.get_epsilon_for_delta(delta))


@lru_cache(64)
def _by_renyi(charges: tuple[Charge, ...], delta: float) -> float:
    """A coarse epsilon of some charges, for adding or removing one: replacing one costs more still."""
    dp, _, rdp = _library()
    accountant = rdp.RdpAccountant(_ORDERS)
    for charge in charges:
        step = dp.PoissonSampledDpEvent(charge.rate, dp.GaussianDpEvent(charge.noise_multiplier))
        accountant.compose(dp.SelfComposedDpEvent(step, charge.steps))
    return float(accountant.get_epsilon(delta))


def _losses(charge: Charge, width: float, relation: Relation) -> Any:
    """The distribution of a charge's privacy loss, in bins of a width."""
    return _step_losses(charge.rate, charge.noise_multiplier, width, relation).self_compose(charge.steps)


@lru_cache(4)
def _step_losses(rate: float, noise_multiplier: float, width: float, relation: Relation) -> Any:
    """That of a single step."""
    dp, pld, _ = _library()
    neighbours = dp.NeighboringRelation
    return pld.privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=width,
        sampling_prob=rate,
        neighboring_relation=neighbours.ADD_OR_REMOVE_ONE if relation == "add-or-remove" else neighbours.REPLACE_ONE,
    )


@lru_cache(4)
def _composed(charges: tuple[Charge, ...], width: float, relation: Relation) -> Any:
    """The distribution of several charges' loss together: kept, as a search needs it for every number of steps."""
    return reduce(lambda total, one: total.compose(one), (_losses(charge, width, relation) for charge in charges))


def _width(charge: Charge) -> float:
    """Of the bins for a mechanism: a twentieth of its usual loss, or wider where little noise makes losses huge.

    It depends on the mechanism alone, so that an epsilon grows with the steps.
    """
    narrowest, widest = _WIDTHS
    usual = charge.rate / charge.noise_multiplier
    return max(narrowest / charge.noise_multiplier**2, min(widest, max(narrowest, usual / 20)))


def noise_for(target: float, delta: float, rate: float, steps: int, relation: Relation) -> float:
    """The smallest noise multiplier, to three digits, whose steps cost at most a target epsilon.

    Raises:
        MeerkatError: none up to LARGEST_NOISE is enough.
    """

    def cost(noise_multiplier: float) -> float:
        return epsilon([Charge(rate, noise_multiplier, steps)], delta, relation)

    def fits(noise_multiplier: float) -> bool:
        return cost(noise_multiplier) <= target

    low, high = 0.0, 1.0
    while not fits(high):
        low, high = high, 2 * high
        if high > LARGEST_NOISE:
            raise MeerkatError(
                f"dp_epsilon {target:g}: no noise multiplier up to {LARGEST_NOISE:g} keeps {steps} steps within it at "
                f"delta {delta:g}; allow more, or ask for fewer steps"
            )
    if not low:  # far too little noise makes huge distributions: approach from above
        while high > 1 / 64 and fits(high / 2):
            high /= 2
        low = high / 2
    bisect = False
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2 if bisect else _crossing(low, cost(low), high, cost(high), target)
        before = high - low
        low, high = (low, middle) if fits(middle) else (middle, high)
        bisect = high - low > before / 2
    return high


def _crossing(low: float, too_much: float, high: float, little: float, target: float) -> float:
    """A noise between two, beside where a power law through their costs meets the target: on its farther side.

    One on each side of where the costs do, and as near to it, ends a search.
    """
    if math.isinf(too_much) or little <= 0:
        return (low + high) / 2
    share = math.log(too_much / target) / math.log(too_much / little)
    guess, aside = low * math.pow(high / low, share), 0.4 * _TOLERANCE * high
    aside = aside if high - guess > guess - low else -aside
    return min(max(guess + aside, low + abs(aside)), high - abs(aside))


def steps_within(
    target: float,
    delta: float,
    rate: float,
    noise_multiplier: float,
    relation: Relation,
    most: int,
    spent: Sequence[Charge] = (),
) -> int:
    """How many more steps, at most `most`, keep the total, with what was `spent`, within a target epsilon.

    Of more than a thousand steps, up to a thousandth is given away.
    """

    def fits(steps: int) -> bool:
        return epsilon([*spent, Charge(rate, noise_multiplier, steps)], delta, relation) <= target

    if fits(most):
        return most
    low, high = 0, 1  # doubling from below: long compositions are the slow ones
    while high < most and fits(high):
        low, high = high, 2 * high
    high = min(high, most)
    while high - low > max(1, _TOLERANCE * high):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _library() -> tuple[Any, Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import pld, rdp
    except ImportError:
        raise MeerkatError("differential privacy needs dp-accounting: pip install 'meerkat-fl[privacy]'") from None
    return dp_accounting, pld, rdp
