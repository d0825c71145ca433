"""What settings ask of each other: which of them cannot be together, and which do nothing beside the others.

Each check raises ValueError with the name of the setting to change.
"""

from typing import TYPE_CHECKING

from meerkat.settings.auto import AUTO

if TYPE_CHECKING:
    from meerkat.settings.config import RunConfig

SITES = "sites"
"""The partition of a real federation, where every site holds its own rows."""


def check(config: "RunConfig") -> None:
    """Raise ValueError for settings that cannot be together: the first of them, in one line."""
    _check_method(config)
    _check_privacy(config)
    _check_aggregation(config)
    _check_attack(config)
    _check_calibration(config)


def _check_method(config: "RunConfig") -> None:
    """What moves, who steps how, and how many are asked."""
    recipe, rule = config.recipe, config.update_rule
    if config.clients_per_round > config.clients:
        raise ValueError(
            f"clients_per_round {config.clients_per_round}: must be at most clients, {config.clients}; 0 takes all"
        )
    if config.mask and recipe.moves != "sensitivity":
        raise ValueError(f"method {config.method}: makes its own mask, so --mask cannot be given with it")
    if not recipe.sends_scalars and config.early_stop in ("vp", "random"):
        raise ValueError(f"early_stop {config.early_stop}: needs scalars, and {config.method} sends none; use none")
    if recipe.client == "feddyn" and rule != "sgd":
        raise ValueError(f"update_rule {rule}: feddyn has its own server step; use sgd")
    if recipe.client != "feddyn" and rule == "feddyn":
        raise ValueError("update_rule feddyn: needs clients that correct their steps; use method feddyn")
    if rule == "sgd" and config.server_lr not in (AUTO, 1):
        raise ValueError(f"server_lr {config.server_lr:g}: sgd has none; use lr, or update_rule momentum or adam")


def _check_privacy(config: "RunConfig") -> None:
    """What noise covers, and what would leave beside it."""
    dp, recipe, by = config.dp, config.recipe, config.rule
    if dp == "none":
        for name, value, unset in (
            ("dp_epsilon", config.dp_epsilon, 0),
            ("dp_noise_multiplier", config.dp_noise_multiplier, AUTO),
        ):
            if value != unset:
                raise ValueError(f"{name} {value:g}: does nothing with dp none; use dp example or client")
        return
    if not config.dp_epsilon and config.dp_noise_multiplier == AUTO:
        raise ValueError(f"dp {dp}: needs a budget, dp_epsilon, or a noise, dp_noise_multiplier")
    if not recipe.sends_scalars or recipe.moves == "task":
        what = "sends gradients" if not recipe.sends_scalars else "makes its mask from clients' rows"
        raise ValueError(f"dp {dp}: method {config.method} {what}, which no noise covers; use another method")
    if dp == "example":
        if config.dtype != "float32":
            raise ValueError(
                f"dtype {config.dtype}: dp example bounds what one row does to the others' sum, and in {config.dtype} "
                "a row's loss depends on the rows that go through the model with it; use float32"
            )
        return
    if config.weights != "equal":
        raise ValueError(f"weights {config.weights}: dp client sums clients' replies as they are; use weights equal")
    if by.rule != "mean":
        raise ValueError(f"aggregation {by.rule}: dp client adds noise to a sum of clipped replies; use mean")
    if by.clipping != "none":
        raise ValueError(f"clipping {by.clipping}: dp client clips replies to dp_clip itself; use none")
    if config.stopping != "none":
        raise ValueError(
            f"early_stop {config.stopping}: needs clients' scalars, which dp client does not keep; use none"
        )
    if recipe.client == "feddyn":
        raise ValueError("method feddyn: needs clients' scalars, which dp client does not keep; use another method")


def _check_aggregation(config: "RunConfig") -> None:
    """Which methods a rule goes with, and how many replies it needs."""
    by, client = config.rule, config.recipe.client
    asked = config.clients_per_round or config.clients
    if client != "zeroth-order" and (by.rule, by.clipping) != ("mean", "none"):
        name, value = ("aggregation", by.rule) if by.rule != "mean" else ("clipping", by.clipping)
        why = "its correction rests on the mean" if client == "feddyn" else "it sends no scalars"
        allowed = "mean" if name == "aggregation" else "none"
        raise ValueError(f"{name} {value}: cannot be with method {config.method}: {why}; use {allowed}")
    if by.mixing != "none" and by.rule == "mean":
        raise ValueError(
            f"mixing {by.mixing}: comes before a robust rule, and aggregation is mean; "
            "use median, trimmed-mean, krum or multi-krum"
        )
    if by.needs_f and not by.byzantine:
        what = f"aggregation {by.rule}" if by.rule != "median" else f"mixing {by.mixing}"
        raise ValueError(f"byzantine 0: {what} needs to know how many replies may be anything, at least 1")
    if asked < by.least:
        per_round = "clients_per_round" if config.clients_per_round else "clients"
        raise ValueError(
            f"byzantine {by.byzantine}: aggregation {by.rule} needs {by.least} {per_round} to withstand so many, "
            f"and there are {asked}; use a smaller byzantine or more clients"
        )
    if by.clipping == "fixed" and not by.clip_norm:
        raise ValueError("clip_norm 0: clipping fixed needs a norm above 0; or use clipping median")


def _check_attack(config: "RunConfig") -> None:
    """Whom an attack needs, and what it changes: in simulations alone."""
    attack, attackers = config.attack, config.attackers
    if attack == "none":
        return
    if config.partition == SITES:
        raise ValueError(f"attack {attack}: is for simulations, and this is a federation; use none")
    if not 0 < attackers < config.clients:
        raise ValueError(
            f"attackers {attackers}: attack {attack} needs at least 1, and fewer than clients, {config.clients}"
        )
    if not config.recipe.sends_scalars and attack != "label-flip":
        raise ValueError(
            f"attack {attack}: changes scalars, and {config.method} sends none; use label-flip, or another method"
        )
    if attack == "gradip-forgery" and config.stopping == "none":
        raise ValueError("attack gradip-forgery: forges calibrations, and nobody is calibrated; use method meerkat-vp")


def _check_calibration(config: "RunConfig") -> None:
    compared = config.initial_steps + config.later_steps
    if config.stopping != "none" and compared > config.calibration_steps:
        raise ValueError(
            f"calibration_steps {config.calibration_steps}: must be at least initial_steps + later_steps, {compared}"
        )


def idle(config: "RunConfig") -> dict[str, str]:
    """Settings that are not at their defaults and do nothing beside the others, each with a line that says so."""
    cures: dict[str, str] = {}
    if config.attack == "none":
        cures |= dict.fromkeys(("attackers", "attack_scale"), "attack none; say which attack, or leave it out")
    if config.dp == "none":
        names = ("dp_delta", "dp_clip", "dp_relation")
        cures |= dict.fromkeys(names, "dp none; use dp example or client, or leave it out")
    if not config.rule.needs_f:
        rules = "use trimmed-mean, krum, multi-krum or a mixing"
        cures["byzantine"] = f"aggregation {config.aggregation} and mixing none; {rules}, or leave it out"
    if config.clipping != "fixed":
        cures["clip_norm"] = f"clipping {config.clipping}; use clipping fixed, or leave it out"
    return {
        name: f"{name} {value}: does nothing with {cure}"
        for name, cure in cures.items()
        if (value := getattr(config, name)) != type(config).model_fields[name].default
    }
