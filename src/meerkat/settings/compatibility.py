"""What settings of privacy, of aggregation and of attacks ask of others: which of them cannot be together.

Each function takes the settings that it looks at, and raises ValueError with the name of the one to change.
"""

from meerkat.algorithm.robust import Aggregation
from meerkat.algorithm.server import EarlyStop
from meerkat.privacy.mechanism import Level
from meerkat.settings.methods import METHODS, Method


def check_privacy(
    dp: Level,
    dp_epsilon: float,
    dp_noise_multiplier: float,
    *,
    method: Method,
    dtype: str,
    weights: str,
    by: Aggregation,
    stopping: EarlyStop,
) -> None:
    """What noise covers, and what would leave beside it."""
    if dp == "none":
        for name, value in (("dp_epsilon", dp_epsilon), ("dp_noise_multiplier", dp_noise_multiplier)):
            if value:
                raise ValueError(f"{name} {value:g}: does nothing with dp none; use dp example or client")
        return
    if not (dp_epsilon or dp_noise_multiplier):
        raise ValueError(f"dp {dp}: needs a budget, dp_epsilon, or a noise, dp_noise_multiplier")
    recipe = METHODS[method]
    if recipe.update == "first-order" or recipe.moves == "task":
        what = "sends gradients" if recipe.update == "first-order" else "makes its mask from clients' rows"
        raise ValueError(f"dp {dp}: method {method} {what}, which no noise covers; use another method")
    if dp == "example":
        if dtype != "float32":
            raise ValueError(
                f"dtype {dtype}: dp example bounds what one row does to the others' sum, and in {dtype} "
                "a row's loss depends on what goes through the model beside it; use float32"
            )
        return
    if weights != "equal":
        raise ValueError(f"weights {weights}: dp client sums clients' replies as they are; use weights equal")
    if by.rule != "mean":
        raise ValueError(f"aggregation {by.rule}: dp client noises a sum of clipped replies; use mean")
    if by.clipping != "none":
        raise ValueError(
            f"clipping {by.clipping}: dp client noises a sum of clipped replies; use none, which dp_clip does"
        )
    if stopping != "none":
        raise ValueError(f"early_stop {stopping}: needs clients' scalars, which dp client does not keep; use none")
    if recipe.update == "feddyn":
        raise ValueError("method feddyn: needs clients' scalars, which dp client does not keep; use another")


def check_aggregation(by: Aggregation, method: Method, clients: int, clients_per_round: int) -> None:
    """Which methods a rule goes with, and how many replies it needs. `clients_per_round` 0 is all."""
    update, asked = METHODS[method].update, clients_per_round or clients
    if update != "scalars" and (by.rule, by.clipping) != ("mean", "none"):
        name, value = ("aggregation", by.rule) if by.rule != "mean" else ("clipping", by.clipping)
        why = "its correction rests on the mean" if update == "feddyn" else "it sends no scalars"
        allowed = "mean" if name == "aggregation" else "none"
        raise ValueError(f"{name} {value}: cannot be with method {method}: {why}; use {allowed}")
    if by.mixing != "none" and by.rule == "mean":
        raise ValueError(
            f"mixing {by.mixing}: comes before a robust rule, and aggregation is mean; "
            "use median, trimmed-mean, krum or multi-krum"
        )
    if by.needs_f and not by.byzantine:
        what = f"aggregation {by.rule}" if by.rule != "median" else f"mixing {by.mixing}"
        raise ValueError(f"byzantine 0: {what} needs to know how many replies may be anything, at least 1")
    if asked < by.least:
        per_round = "clients_per_round" if clients_per_round else "clients"
        raise ValueError(
            f"byzantine {by.byzantine}: aggregation {by.rule} needs {by.least} {per_round} to withstand so many, "
            f"and there are {asked}; use a smaller byzantine or more clients"
        )
    if by.clipping == "fixed" and not by.clip_norm:
        raise ValueError("clip_norm 0: clipping fixed needs a norm above 0; or use clipping median")


def check_attack(
    attack: str, attackers: int, *, clients: int, simulated: bool, method: Method, stopping: EarlyStop
) -> None:
    """Whom an attack needs, and what it changes: in simulations alone."""
    if attack == "none":
        return
    if not simulated:
        raise ValueError(f"attack {attack}: is for simulations, and this is a federation; use none")
    if not 0 < attackers < clients:
        raise ValueError(f"attackers {attackers}: attack {attack} needs at least 1, and fewer than clients, {clients}")
    if METHODS[method].update == "first-order" and attack != "label-flip":
        raise ValueError(
            f"attack {attack}: changes scalars, and {method} sends none; use label-flip, or another method"
        )
    if attack == "gradip-forgery" and stopping == "none":
        raise ValueError("attack gradip-forgery: forges calibrations, and nobody is calibrated; use method meerkat-vp")
