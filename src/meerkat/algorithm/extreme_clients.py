"""VPCS, virtual-path client selection: calibration scalars -> the clients whose data is extremely skewed (section 6).

A client with a single label learns it at once: its loss, its gradient and with them its GradIP vanish. Two rules read
this from T_cali calibration steps:

- "thresholds", the paper's: rho_later above one threshold and rho_quie at or above another, on |GradIP|.
- "automatic", ours: no threshold to set. It compares clients with each other on |g|, which is GradIP without the noise
  of <grad_p, z>, and knows how far chance alone drives equals apart.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

Rule = Literal["automatic", "thresholds"]
EarlyStop = Literal["none", "vp", "random"]
"""Who makes one local step a round after a calibration: nobody, the extreme clients, or as many at random."""

_SPREAD = 1.5
"""How many times as far IID clients' log ratios scatter as independent half-normal steps would; measured."""
_FIRST, _LATER = 1.5, 2.5
"""The same of the logs of their first and later means: paths drift apart."""
_BEYOND = 2.5
"""Spreads above the lively clients from which a client's decay, or its first level, is not chance."""
_QUIET = 3.75
"""Spreads under the others' median from which a client's level is not chance, however it got there."""
_LIVELY = 0.2
"""At least this share of the clients is taken to be lively."""
_PRICE_DECAY, _PRICE_LEVELS = 3.5, 5.0
"""What leaving a client out of the lively ones must save, in squared spreads. If those left out may lie anywhere
within w spreads, it is 2 log(w / sqrt(2 pi)); within an area of A squared spreads, 2 log(A / 2 pi). This is w = 14,
about a factor of 60 at 30 and 30 steps, and A = 77."""
_TINY = 1e-30


@dataclass(frozen=True)
class Vpcs:
    """How clients are selected, and how they are calibrated for it."""

    rule: Rule = "automatic"
    calibration_steps: int = 100
    """T_cali"""
    initial_steps: int = 30
    """T_init"""
    later_steps: int = 30
    """T_later"""
    rho_later: float = 2.0
    """Threshold of the paper's rule: a client is extreme above it..."""
    rho_quie: float = 0.5
    """... and at or above this share of quiescent steps."""
    sigma: float = 0.25
    """A step is quiescent under this share of the clients' median initial mean |GradIP|."""
    recalibrate_every: int = 0
    """Rounds between calibrations; 0 for one, before the first round."""


@dataclass(frozen=True)
class Selection:
    """The extreme clients, and the numbers that say so; lists are in order of `clients`."""

    clients: tuple[int, ...]
    extreme: tuple[int, ...]
    rho_later: tuple[float, ...]
    """Initial over later mean: of |GradIP| under the paper's rule, of |g| under the automatic one."""
    rho_quie: tuple[float, ...]
    """Share of the later steps that are quiescent."""
    later: tuple[float, ...]
    """Mean over the later steps: of |GradIP| or of |g|."""
    rho_later_above: float
    """The threshold that rho_later was compared with, given or computed."""
    rho_quie_from: float
    """The threshold that rho_quie was compared with."""
    quiet_below: float
    """Under the paper's rule the level under which a step is quiescent; under the automatic one, that under
    which a client is extreme whatever its rho_later: quiet from the start."""
    loud_above: float
    """Under the automatic rule the initial mean above which a client is extreme whatever its rho_later; else 0."""


def select(
    magnitude: Mapping[int, np.ndarray], gradip: Mapping[int, np.ndarray], vpcs: Vpcs, directions: int = 1
) -> Selection:
    """Which clients are extremely skewed, from one uninterrupted path of each.

    Args:
        magnitude: |g| of each client, float64 [T_cali].
        gradip: GradIP of each client, float64 [T_cali]; looked at by the paper's rule only.
        directions: P, over which each |g| is a mean.
    """
    clients = tuple(sorted(magnitude))
    if not clients:
        return Selection((), (), (), (), (), 0.0, 0.0, 0.0, 0.0)
    traces = magnitude if vpcs.rule == "automatic" else gradip
    a = np.abs(np.stack([traces[client] for client in clients]))
    initial, late = a[:, : vpcs.initial_steps], a[:, -vpcs.later_steps :]
    early_mean, late_mean = np.maximum(initial.mean(1), _TINY), np.maximum(late.mean(1), _TINY)
    rho_later = early_mean / late_mean
    if vpcs.rule == "automatic":
        above, below, loud = _automatic_thresholds(rho_later, early_mean, late_mean, vpcs, directions)
        share, rho_quie = 0.0, (late < below).mean(1)
        extreme = (rho_later > above) | (late_mean < below) | (early_mean > loud)
    else:
        above, below, loud = vpcs.rho_later, vpcs.sigma * float(np.median(early_mean)), 0.0
        share, rho_quie = vpcs.rho_quie, (late < below).mean(1)
        extreme = (rho_later > above) & (rho_quie >= share)
    return Selection(
        clients=clients,
        extreme=tuple(client for client, is_extreme in zip(clients, extreme, strict=True) if is_extreme),
        rho_later=tuple(rho_later.tolist()),
        rho_quie=tuple(rho_quie.tolist()),
        later=tuple(late_mean.tolist()),
        rho_later_above=above,
        rho_quie_from=share,
        quiet_below=below,
        loud_above=loud,
    )


def _automatic_thresholds(
    rho_later: np.ndarray, early_mean: np.ndarray, late_mean: np.ndarray, vpcs: Vpcs, directions: int
) -> tuple[float, float, float]:
    """What rho_later must exceed, the later level stay under, or the initial one exceed, so that it is not chance.

    |g| along a direction is half-normal about its client's gradient norm, so the log of a mean over m steps of P
    directions has a standard error of sqrt((pi / 2 - 1) / (m P)), and `spread` follows. Clients are compared with the
    lively ones: of those that were neither quiet throughout (they had nothing to decay from) nor loud, those that
    decayed least. Decays say how many these are for the first threshold, levels for the others.
    """
    first, later = (math.sqrt((math.pi / 2 - 1) / (m * directions)) for m in (vpcs.initial_steps, vpcs.later_steps))
    spread = _SPREAD * math.hypot(first, later)
    quiet, far = math.exp(-_QUIET * spread), math.exp(_BEYOND * spread)
    middle, later_middle = statistics.median_high(early_mean), statistics.median_high(late_mean)  # some client's
    quiet_throughout = (early_mean < middle * quiet) & (late_mean < later_middle)
    loud_throughout = (early_mean > middle * far) & (late_mean > later_middle)
    usual = np.flatnonzero(~quiet_throughout & ~loud_throughout)
    usual = usual[np.argsort(rho_later[usual], kind="stable")]
    decay = np.log(rho_later[usual])
    count = _lively_count(decay[:, None] / spread, _PRICE_DECAY)
    # another client's distance from the mean of so many: both are uncertain
    limit = float(decay[:count].mean()) + _BEYOND * spread * math.sqrt(1 + 1 / count)
    above = math.exp(max(limit, 0.0))  # what has not decayed at all is not extreme by decay
    levels = np.stack([np.log(early_mean[usual]) / (_FIRST * first), np.log(late_mean[usual]) / (_LATER * later)], 1)
    lively = usual[: _lively_count(levels, _PRICE_LEVELS)]
    below = float(np.median(late_mean[lively])) * quiet
    loud = float(np.median(early_mean[lively])) * far
    return above, below, loud


def _lively_count(places: np.ndarray, price: float) -> int:
    """How many of those that decayed least are most likely equals, while the others may be anything.

    Args:
        places: where clients lie, in spreads, least decay first: float64 [K, D].
        price: what one that is left out costs.

    Equals scatter normally, by one spread, about their mean; others lie anywhere. Every number of lively clients is
    equally likely beforehand, so that which ones they are has K over m possibilities.
    """
    clients = len(places)
    least = math.ceil(_LIVELY * clients)
    counts = np.arange(least, clients + 1)
    misfits = [float(np.square(places[:m] - places[:m].mean(0)).sum()) for m in counts]
    # K over m + 1 from K over m: with 10,000 clients, each anew takes seconds
    choices = accumulate(
        range(least, clients), lambda ways, m: ways * (clients - m) // (m + 1), initial=math.comb(clients, least)
    )
    surprise = 2 * np.array([*map(math.log, choices)])
    return int(counts[np.argmin(misfits + price * (clients - counts) + surprise)])
