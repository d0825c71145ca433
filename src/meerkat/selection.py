"""VPCS, virtual-path client selection: calibration scalars -> which clients' data is extremely skewed (section 6).

A client with a single label learns it at once; its loss, its gradient and with them its GradIP vanish, while
those of other clients go on. Two rules read that from T_cali calibration steps:

- "thresholds", the paper's: rho_later above one threshold and rho_quie at or above another, on |GradIP|.
- "automatic", ours: no threshold to set. It compares clients with each other on |g|, which is GradIP without
  the noise of <grad_p, z>, and knows how far chance alone drives equals apart. See docs/method.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

Rule = Literal["automatic", "thresholds"]

_SPREAD = 1.5
"""IID clients' log ratios scatter so many times as far as independent half-normal steps would; measured."""
_DECAYED = 2.75
"""Spreads above the lively clients from which a client's decay is not chance."""
_QUIET = 3.75
"""Spreads under the others' median from which a client's level is not chance, however it got there."""
_LIVELY = 0.2
"""At least this share of the clients is taken to be lively: those that decayed least are the reference."""
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
    """Who is extreme, and the numbers that say so; lists are in order of `clients`."""

    clients: tuple[int, ...]
    extreme: tuple[int, ...]
    rho_later: tuple[float, ...]
    """Initial over later mean: of |GradIP| under the paper's rule, of |g| under the automatic one."""
    rho_quie: tuple[float, ...]
    """Share of the later steps that are quiescent."""
    later: tuple[float, ...]
    """Mean over the later steps: of |GradIP| or of |g|."""
    rho_later_above: float
    """The threshold that rho_later was held against, given or found."""
    rho_quie_from: float
    """The threshold that rho_quie was held against."""
    quiet_below: float
    """Under the paper's rule the level under which a step is quiescent; under the automatic one, that under
    which a client is extreme whatever its rho_later: quiet from the start."""


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
        return Selection((), (), (), (), (), 0.0, 0.0, 0.0)
    traces = magnitude if vpcs.rule == "automatic" else gradip
    a = np.abs(np.stack([traces[client] for client in clients]))
    initial, late = a[:, : vpcs.initial_steps], a[:, -vpcs.later_steps :]
    early_mean, late_mean = initial.mean(1), late.mean(1)
    rho_later = np.maximum(early_mean, _TINY) / np.maximum(late_mean, _TINY)
    if vpcs.rule == "automatic":
        above, below = _found_thresholds(rho_later, early_mean, late_mean, vpcs, directions)
        rho_quie = (late < below).mean(1)
        extreme = (rho_later > above) | (late_mean < below)
        share = 0.0
    else:
        above, below, share = vpcs.rho_later, vpcs.sigma * float(np.median(early_mean)), vpcs.rho_quie
        rho_quie = (late < below).mean(1)
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
    )


def _found_thresholds(
    rho_later: np.ndarray, early_mean: np.ndarray, late_mean: np.ndarray, vpcs: Vpcs, directions: int
) -> tuple[float, float]:
    """What rho_later must exceed, and what the later level must stay under, to be no work of chance.

    |g| along a direction is half-normal about its client's gradient norm, so the log of a mean over m steps of P
    directions has a standard error of sqrt((pi / 2 - 1) / (m P)), and `spread` follows. The centre of the lively
    clients is read from those that decayed least, raised by where the least of as many equals are to be expected.
    Clients that were quiet at once had nothing to decay from and tell nothing of it.
    """
    per_step = (math.pi / 2 - 1) / directions
    spread = _SPREAD * math.sqrt(per_step / vpcs.initial_steps + per_step / vpcs.later_steps)
    awake = early_mean >= float(np.median(early_mean)) * math.exp(-_QUIET * spread)
    decay = np.sort(np.log(rho_later[awake]))
    least = math.ceil(_LIVELY * len(decay))
    ranks = [NormalDist().inv_cdf((i + 0.625) / (len(decay) + 0.25)) for i in range(least)]
    centre = float(np.mean(decay[:least])) - spread * float(np.mean(ranks))
    above = math.exp(max(centre + _DECAYED * spread, 0.0))  # what has not decayed at all is not extreme by decay
    lively = late_mean[awake & (rho_later <= above)]
    below = float(np.median(lively)) * math.exp(-_QUIET * spread) if len(lively) else 0.0
    return above, below
