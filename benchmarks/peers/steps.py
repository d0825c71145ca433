"""Peers' steps as update rules, to compare with plain ones on the same mask, batches and directions.

    meerkat simulate --extension benchmarks/peers/steps.py --update-rule r-adazo

R-AdaZO ("Refining Adaptive Zeroth-Order Optimization at Ease", ICML 2025) is Adam whose second moment averages the
squares of the first moment, not of the gradient. FZOO ("Fast Zeroth-Order Optimizer", 2025) divides a step by the
standard deviation of the losses along its directions; these are Rademacher's, and share a baseline (the estimator
`one-sided` of examples/extending/estimator.py). SubZero+ (arXiv 2608.15665) perturbs and steps, by Adam, inside one
fixed random space of few dimensions; at T = 1 this is the estimator `subzero` with the update rule
`adam-with-subzero`. Its slopes are not <grad, z>, so `--eps auto` cannot measure them: give a number. HiSo (arXiv
2506.02370) divides directions and steps by the root of a moving average of squared steps: the estimator `hiso` with
the update rule `hiso`, at T = 1, in simulations: a site that takes over a whole state does not know K in its first
round. All are written from their papers. In a federation the losses' differences are G, the aggregate of the clients'
scalars, which everyone has.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from statistics import stdev
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from meerkat import seeds
from meerkat.algorithm import path
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.estimators import Estimator, LossAt, Slopes, two_sided
from meerkat.algorithm.rounds import Update
from meerkat.algorithm.update_rules import FedAdam, FedAvg, Moments, UpdateRule, descent
from meerkat.errors import MeerkatError
from meerkat.settings.auto import number
from meerkat.settings.config import RunConfig


@dataclass(frozen=True)
class RAdaZO(FedAdam):
    """Adam with v from m in place of D. `tau` is zeta, inside the root."""

    def apply(self, theta: Tensor, moments: Moments, update: Update, directions: Directions) -> tuple[Tensor, Moments]:
        """theta - eta_s eta m / sqrt(v + zeta),   m = beta_1 m + (1 - beta_1) D,   v = beta_2 v + (1 - beta_2) m^2"""
        m, v = moments
        m = (m * self.beta1) - (descent(theta, update, directions) * (1 - self.beta1))
        v = (v * self.beta2) + ((m * m) * (1 - self.beta2))
        return theta - (m / (v + self.tau).sqrt()) * (self.lr * update.plan.lr), (m, v)


SPACE = 64
"""Dimensions of SubZero+'s space."""


@cache
def _groups(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each of so many entries' group and sign, and each group's size."""
    groups = seeds.permutation(count, 0, "subzero groups") % SPACE
    signs = np.where(seeds.permutation(count, 0, "subzero signs") % 2, 1.0, -1.0)
    return groups, signs, np.maximum(np.bincount(groups, minlength=SPACE), 1)


def inside(vector: Tensor) -> Tensor:
    """Its part inside the space, float32 [n]: what the entries of each group have in common, up to their signs.

    The space has an orthonormal basis with one vector a group, so a normal z is normal inside.
    """
    groups, signs, sizes = _groups(len(vector))
    common = np.bincount(groups, weights=vector.cpu().double().numpy() * signs, minlength=SPACE) / sizes
    return torch.from_numpy((common[groups] * signs).astype(np.float32)).to(vector.device)


def two_sided_inside(loss_at: LossAt, theta: Tensor, directions: Iterable[Tensor], eps: float) -> Slopes:
    """g = (f(theta + eps U U' z) - f(theta - eps U U' z)) / (2 eps), with the basis U"""
    return two_sided(loss_at, theta, map(inside, directions), eps)


@dataclass(frozen=True)
class SubZero(FedAdam):
    """Adam inside the space: the entries of a group move alike, up to their signs."""

    def apply(self, theta: Tensor, moments: Moments, update: Update, directions: Directions) -> tuple[Tensor, Moments]:
        """theta - eta_s eta m / (sqrt(v) + tau),   m = beta_1 m + (1 - beta_1) U U' D,   v of its square by beta_2"""
        m, v = moments
        down = inside(descent(theta, update, directions))
        m = (m * self.beta1) - (down * (1 - self.beta1))
        v = (v * self.beta2) + ((down * down) * (1 - self.beta2))
        return theta - (m / (v.sqrt() + self.tau)) * (self.lr * update.plan.lr), (m, v)


@dataclass(frozen=True)
class FZOO(FedAvg):
    """Each local step over the standard deviation of its P projected gradients."""

    lr: float = 1.0
    """eta_s"""

    def apply(self, theta: Tensor, moments: Moments, update: Update, directions: Directions) -> tuple[Tensor, Moments]:
        """theta - eta_s (eta / P) sum_{t,p} G^{t,p} z^{t,p} / std_p(G^{t,p}); a step of equal G is left out"""
        spreads = [stdev(row.tolist()) for row in update.aggregate]  # exact, and then rounded once: the same everywhere
        over = np.array([[self.lr / spread if spread else 0.0] for spread in spreads], np.float32)
        return path.moved(theta, replace(update, aggregate=update.aggregate * over), directions), moments


SMOOTHING = 0.95
"""How slowly HiSo's K follows, as in its program."""

_ROOTS: dict[str, Tensor] = {}
"""theta's digest -> HiSo's sqrt(K) there, of the last `KEPT` thetas: estimators see theta, not what rules carry."""
KEPT = 4


@dataclass(frozen=True)
class HiSo(UpdateRule):
    """Steps along z / sqrt(K), whose slopes its estimator takes. K follows the squares of unscaled steps, from 1 on."""

    carried: ClassVar[int] = 1

    def init(self, theta: Tensor) -> Moments:
        """K = 1"""
        return (torch.ones_like(theta),)

    def apply(self, theta: Tensor, moments: Moments, update: Update, directions: Directions) -> tuple[Tensor, Moments]:
        """theta - eta s,   s = (1 / P) sum_p G^p z^p / sqrt(K),   K = .95 K + .05 s^2"""
        (k,) = moments
        unscaled = replace(update, plan=replace(update.plan, lr=1.0))
        step = descent(theta, unscaled, directions) / k.sqrt()
        theta = theta + step * update.plan.lr
        k = (k * SMOOTHING) + ((step * step) * (1 - SMOOTHING))
        _ROOTS[path.digest(theta)] = k.sqrt()
        if len(_ROOTS) > KEPT:
            del _ROOTS[next(iter(_ROOTS))]
        return theta, (k,)


def two_sided_scaled(loss_at: LossAt, theta: Tensor, directions: Iterable[Tensor], eps: float) -> Slopes:
    """g = (f(theta + eps z / sqrt(K)) - f(theta - eps z / sqrt(K))) / (2 eps); K = 1 where no HiSo step led to theta"""
    root = _ROOTS.get(path.digest(theta))
    return two_sided(loss_at, theta, directions if root is None else (z / root for z in directions), eps)


def r_adazo(settings: RunConfig) -> RAdaZO:
    """R-AdaZO, with Adam's settings; eta_s is a hundredth of server_lr, and zeta is server_tau squared."""
    return RAdaZO(
        number(settings.server_lr) / 100, settings.server_beta1, settings.server_beta2, settings.server_tau**2
    )


def fzoo(settings: RunConfig) -> FZOO:
    """FZOO. Raises MeerkatError: one direction has no spread."""
    if settings.directions < 2:
        raise MeerkatError("update rule fzoo: needs the spread of several directions; give --directions 2 or more")
    return FZOO(number(settings.server_lr))


def adam_with_subzero(settings: RunConfig) -> FedAvg | SubZero:
    """SubZero+'s steps with its estimator, eta_s a hundredth of server_lr; plain ones with any other."""
    if settings.estimator != "subzero":
        return FedAvg()
    tau = settings.server_tau
    return SubZero(number(settings.server_lr) / 100, settings.server_beta1, settings.server_beta2, tau)


def hiso(settings: RunConfig) -> FedAvg | HiSo:
    """HiSo's steps with its estimator, plain ones with any other. Raises MeerkatError: a second local step is plain."""
    if settings.estimator != "hiso":
        return FedAvg()
    if settings.local_steps != 1:
        raise MeerkatError(f"update rule hiso: local_steps is {settings.local_steps}; give --local-steps 1")
    return HiSo()


UPDATE_RULES = {"r-adazo": r_adazo, "fzoo": fzoo, "adam-with-subzero": adam_with_subzero, "hiso": hiso}
ESTIMATORS = {
    "subzero": Estimator("subzero", two_sided_inside, passes=lambda count: 2 * count),
    "hiso": Estimator("hiso", two_sided_scaled, passes=lambda count: 2 * count),
}
