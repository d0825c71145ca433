"""What settings ask of each other: which of them cannot be together, and which do nothing beside the others."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from meerkat.settings.auto import AUTO
from meerkat.settings.groups import CalibrationSettings

if TYPE_CHECKING:
    from meerkat.settings.config import RunConfig

SITES = "sites"
"""The partition of a real federation, where every site has rows of its own."""


def check(config: "RunConfig") -> None:
    """Raise ValueError for settings that cannot be together: the first of them, in one line."""
    for conflicts in (_in_method, _in_privacy, _in_aggregation, _in_attack, _in_calibration):
        for message in conflicts(config):
            raise ValueError(message)


# Each line begins with the setting to change.


def _in_method(config: "RunConfig") -> Iterator[str]:
    recipe, rule = config.recipe, config.update_rule
    if config.clients_per_round > config.clients:
        yield f"clients_per_round {config.clients_per_round}: must be at most clients, {config.clients}; 0 takes all"
    if config.mask and recipe.moves == "task":
        yield f"method {config.method}: makes its mask from the run's own rows, so --mask cannot be given with it"
    if not recipe.sends_scalars and config.early_stop in ("vp", "random"):
        yield f"early_stop {config.early_stop}: needs scalars, and {config.method} sends none; use none"
    if recipe.moves == "full" and config.quantize != "none":
        yield f"quantize {config.quantize}: freezes weights, and method {config.method} moves them all; use none"
    if recipe.client == "feddyn" and rule != "sgd":
        yield f"update_rule {rule}: feddyn has its own server step; use sgd"
    if recipe.client != "feddyn" and rule == "feddyn":
        yield "update_rule feddyn: needs clients that correct their steps; use method feddyn"
    if rule == "sgd" and config.server_lr not in (AUTO, 1):
        yield f"server_lr {config.server_lr:g}: sgd has none; use lr, or update_rule momentum or adam"


def _in_privacy(config: "RunConfig") -> Iterator[str]:
    """What noise covers, and what would leave beside it."""
    dp, recipe, by = config.dp, config.recipe, config.rule
    if dp == "none":
        for name, unset in (("dp_epsilon", 0), ("dp_noise_multiplier", AUTO)):
            if (value := getattr(config, name)) != unset:
                yield f"{name} {value:g}: does nothing with dp none; use dp example or client"
        return
    if not config.dp_epsilon and config.dp_noise_multiplier == AUTO:
        yield f"dp {dp}: needs a budget, dp_epsilon, or a noise, dp_noise_multiplier"
    if not recipe.sends_scalars or recipe.moves == "task":
        what = "sends gradients" if not recipe.sends_scalars else "makes its mask from clients' rows"
        yield f"dp {dp}: method {config.method} {what}, which no noise covers; use another method"
    if dp == "example":
        return
    kept = "clients' scalars, which dp client does not keep"
    if config.weights != "equal":
        yield f"weights {config.weights}: dp client sums clients' replies as they are; use weights equal"
    if by.rule != "mean":
        yield f"aggregation {by.rule}: dp client adds noise to a sum of clipped replies; use mean"
    if by.clipping != "none":
        yield f"clipping {by.clipping}: dp client clips replies to dp_clip itself; use none"
    if config.stopping != "none":
        yield f"early_stop {config.stopping}: needs {kept}; use none"
    if recipe.client == "feddyn":
        yield f"method feddyn: needs {kept}; use another method"


def _in_aggregation(config: "RunConfig") -> Iterator[str]:
    """Which methods a rule goes with, and how many replies it needs."""
    by, client = config.rule, config.recipe.client
    if client != "zeroth-order":
        why = "its correction rests on the mean" if client == "feddyn" else "it sends no scalars"
        for name, value, allowed in (("aggregation", by.rule, "mean"), ("clipping", by.clipping, "none")):
            if value != allowed:
                yield f"{name} {value}: cannot be with method {config.method}: {why}; use {allowed}"
    if by.mixing != "none" and by.rule == "mean":
        robust = "use median, trimmed-mean, krum or multi-krum"
        yield f"mixing {by.mixing}: comes before a robust rule, and aggregation is mean; {robust}"
    if by.needs_f and not by.byzantine:
        what = f"aggregation {by.rule}" if by.rule != "median" else f"mixing {by.mixing}"
        yield f"byzantine 0: {what} needs to know how many replies may be anything, at least 1"
    if (asked := config.clients_per_round or config.clients) < by.least:
        needed = f"{by.least} {'clients_per_round' if config.clients_per_round else 'clients'} to withstand so many"
        cure = "use a smaller byzantine or more clients"
        yield f"byzantine {by.byzantine}: aggregation {by.rule} needs {needed}, and there are {asked}; {cure}"
    if by.clipping == "fixed" and not by.clip_norm:
        yield "clip_norm 0: clipping fixed needs a norm above 0; or use clipping median"


def _in_attack(config: "RunConfig") -> Iterator[str]:
    attack, attackers = config.attack, config.attackers
    if attack == "none":
        return
    if config.partition == SITES:
        yield f"attack {attack}: is for simulations, and this is a federation; use none"
    if not 0 < attackers < config.clients:
        yield f"attackers {attackers}: attack {attack} needs at least 1, and fewer than clients, {config.clients}"
    if not config.recipe.sends_scalars and attack != "label-flip":
        yield f"attack {attack}: changes scalars, and {config.method} sends none; use label-flip, or another method"
    if attack == "gradip-forgery" and config.stopping == "none":
        yield "attack gradip-forgery: forges calibrations, and nobody is calibrated; use method meerkat-vp"


def _in_calibration(config: "RunConfig") -> Iterator[str]:
    steps, compared = config.calibration_steps, config.initial_steps + config.later_steps
    if config.stopping != "none" and compared > steps:
        yield f"calibration_steps {steps}: must be at least initial_steps + later_steps, {compared}"
    if config.stopping != "none" and config.vpcs_rule == "thresholds" and config.gradip == "off":
        yield "gradip off: vpcs_rule thresholds reads GradIP; use on, or vpcs_rule automatic"


_BUILT_IN_RULES = ("sgd", "momentum", "adam")
"""Update rules whose settings are known; an extension's may read any."""


def idle(config: "RunConfig") -> dict[str, str]:
    """Settings that are not at their defaults and do nothing beside the others, each with a line that says so."""
    cures: dict[str, str] = {}
    if config.attack == "none":
        cures |= dict.fromkeys(("attackers", "attack_scale"), "attack none; say which attack")
    if config.attack == "label-flip":
        cures["attack_scale"] = "attack label-flip; use another"
    if config.recipe.moves in ("full", "lora"):
        cures |= dict.fromkeys(("exclude", "mask_scope"), f"method {config.method}; use method meerkat")
    if not config.recipe.sends_scalars:
        unused = ("estimator", "directions", "eps", "max_step_norm")
        cures |= dict.fromkeys(unused, f"method {config.method}; use one that sends scalars")
    if config.recipe.client != "feddyn" and config.update_rule in _BUILT_IN_RULES:
        cures["feddyn_alpha"] = f"method {config.method}; use method feddyn"
    if config.update_rule == "momentum":
        cures |= dict.fromkeys(("server_beta2", "server_tau"), "update_rule momentum; use adam")
    if config.update_rule == "sgd":
        cure = "update_rule sgd; use adam" if not config.recipe.update_rule else f"method {config.method}; use another"
        cures |= dict.fromkeys(("server_beta1", "server_beta2", "server_tau"), cure)
    if config.vpcs_rule == "automatic":
        cures |= dict.fromkeys(("rho_later", "rho_quie", "sigma"), "vpcs_rule automatic; use thresholds")
    if config.stopping == "none":
        names = [name for name in CalibrationSettings.model_fields if name not in ("early_stop", "gradip")]
        cure = "early_stop vp" if config.early_stop == "none" else "method meerkat-vp"
        cures |= dict.fromkeys(names, f"early_stop none; use {cure}")
    if config.dp == "none":
        cures |= dict.fromkeys(("dp_delta", "dp_clip", "dp_relation"), "dp none; use dp example or client")
    if not config.rule.needs_f:
        rules = "use trimmed-mean, krum, multi-krum or a mixing"
        cures["byzantine"] = f"aggregation {config.aggregation} and mixing none; {rules}"
    if config.clipping != "fixed":
        cures["clip_norm"] = f"clipping {config.clipping}; use clipping fixed"
    usual = {"eps": config.recipe.eps}  # which config.toml of a run has for auto
    return {
        name: f"{name} {_spelled(value)}: does nothing with {cure}, or leave it out"
        for name, cure in cures.items()
        if (value := getattr(config, name)) not in (type(config).model_fields[name].default, usual.get(name))
    }


def _spelled(value: object) -> object:
    return ",".join(value) or "none" if isinstance(value, tuple) else value
