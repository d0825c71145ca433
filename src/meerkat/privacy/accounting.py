"""What a run costs in privacy: (epsilon, delta) of noisy steps, by dp-accounting's privacy loss distributions.

A charge is a number of steps of one mechanism. Distributions are rounded up, so an epsilon is never too low.
docs/privacy.md says why this library, and compares its numbers with others'.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from meerkat.errors import MeerkatError
from meerkat.privacy.mechanism import Relation

LARGEST_NOISE = 1e4
"""The largest noise multiplier that is tried."""
_WIDTHS = ((0.02, 1e-3), (0.0, 1e-4))
"""(least q / sigma, width of the bins to which privacy losses are rounded up): coarse bins are ten times faster. The
width depends on the mechanism alone, so that an epsilon grows with the steps."""
_LONGEST = 1_000_000
"""The most steps that are accounted for; more of them count as steps without noise."""
_HOPELESS = 200.0
"""The epsilon, by Rényi orders, above which none is computed: distributions grow with it, to gigabytes and minutes."""
_ORDERS = (2, 3, 4, 6, 8, 16, 32, 64)
_TOLERANCE = 1e-3
"""`noise_for` overestimates by at most this share."""


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
    counts: Counter[tuple[float, float]] = Counter()
    for charge in charges:
        if charge.steps and charge.rate:
            counts[charge.rate, charge.noise_multiplier] += charge.steps
    return _epsilon(tuple(Charge(*key, steps) for key, steps in sorted(counts.items())), delta, relation)


@lru_cache(4096)
def _epsilon(charges: tuple[Charge, ...], delta: float, relation: Relation) -> float:
    if any(charge.noise_multiplier == 0 for charge in charges) or sum(c.steps for c in charges) > _LONGEST:
        return math.inf
    dp, pld, rdp = _library()
    neighbours, events = dp.NeighboringRelation, []
    for charge in charges:
        step = dp.PoissonSampledDpEvent(charge.rate, dp.GaussianDpEvent(charge.noise_multiplier))
        events.append(dp.SelfComposedDpEvent(step, charge.steps))
    coarse = rdp.RdpAccountant(_ORDERS)  # for adding or removing one; replacing one costs more still
    if charges and coarse.compose(dp.ComposedDpEvent(events)).get_epsilon(delta) > _HOPELESS:
        return math.inf
    accountant = pld.PLDAccountant(
        neighbours.ADD_OR_REMOVE_ONE if relation == "add-or-remove" else neighbours.REPLACE_ONE,
        value_discretization_interval=min((_width(charge) for charge in charges), default=_WIDTHS[0][1]),
    )
    for event in events:
        accountant.compose(event)
    return float(accountant.get_epsilon(delta))


def _width(charge: Charge) -> float:
    return next(width for least, width in _WIDTHS if charge.rate / charge.noise_multiplier >= least)


def noise_for(target: float, delta: float, rate: float, steps: int, relation: Relation) -> float:
    """The smallest noise multiplier, to three digits, whose steps cost at most a target epsilon.

    Raises:
        MeerkatError: none up to LARGEST_NOISE is enough.
    """

    def fits(noise_multiplier: float) -> bool:
        return epsilon([Charge(rate, noise_multiplier, steps)], delta, relation) <= target

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
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def steps_within(
    target: float,
    delta: float,
    rate: float,
    noise_multiplier: float,
    relation: Relation,
    most: int,
    spent: Sequence[Charge] = (),
) -> int:
    """How many more steps, at most `most`, keep the total, with what was `spent`, within a target epsilon."""

    def fits(steps: int) -> bool:
        return epsilon([*spent, Charge(rate, noise_multiplier, steps)], delta, relation) <= target

    if fits(most):
        return most
    low, high = 0, 1  # doubling from below: long compositions are the slow ones
    while high < most and fits(high):
        low, high = high, 2 * high
    high = min(high, most)
    while high - low > 1:
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
