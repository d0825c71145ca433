"""From a run's settings to the values that the algorithm is made of: estimator, rules, directions, server."""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from meerkat.algorithm.aggregation import Aggregator, Hidden
from meerkat.algorithm.client_rules import FIRST_ORDER, ZEROTH_ORDER, ClientRule, FedDynClient
from meerkat.algorithm.directions import Directions, run_key
from meerkat.algorithm.estimators import ESTIMATORS, Estimator
from meerkat.algorithm.extreme_clients import Vpcs
from meerkat.algorithm.replica import Rules
from meerkat.algorithm.robust import norm
from meerkat.algorithm.server import ServerConfig
from meerkat.algorithm.update_rules import FedAdam, FedAvg, FedAvgM, FedDyn, UpdateRule
from meerkat.errors import UnknownName
from meerkat.settings import budget
from meerkat.settings.auto import number
from meerkat.settings.config import RunConfig

_T = TypeVar("_T")

UPDATE_RULES: dict[str, Callable[[RunConfig], UpdateRule]] = {
    "sgd": lambda _: FedAvg(),
    "momentum": lambda c: FedAvgM(number(c.server_lr), c.server_beta1),
    "adam": lambda c: FedAdam(number(c.server_lr), c.server_beta1, c.server_beta2, c.server_tau),
    "feddyn": lambda c: FedDyn(c.feddyn_alpha),
}
"""By the name that --update-rule takes. An extension adds to it: see `meerkat.extensions`."""

CLIENT_RULES: dict[str, Callable[[RunConfig], ClientRule]] = {
    "zeroth-order": lambda _: ZEROTH_ORDER,
    "feddyn": lambda c: FedDynClient(c.feddyn_alpha),
    "first-order": lambda _: FIRST_ORDER,
}
"""By what a method's recipe says of its clients."""


def look_up(table: Mapping[str, _T], what: str, name: str) -> _T:
    """The entry of a table that extensions add to. Raises UnknownName: nobody here knows it."""
    if name not in table:
        raise UnknownName(
            f"{what} '{name}': not known here, only {', '.join(table)}; name its extension with --extension"
        )
    return table[name]


def estimator(config: RunConfig) -> Estimator:
    """How slopes are estimated. Raises MeerkatError for an unknown name."""
    return look_up(ESTIMATORS, "estimator", config.estimator)


def directions(config: RunConfig, count: int, device: torch.device | str = "cpu") -> Directions:
    """The run's directions over so many entries."""
    return Directions(run_key(config.seed), count, device, estimator(config).law)


def rules(config: RunConfig) -> Rules:
    """How theta moves. Raises MeerkatError for an unknown update rule."""
    name = config.recipe.update_rule or config.update_rule
    return Rules(look_up(UPDATE_RULES, "update rule", name)(config), CLIENT_RULES[config.recipe.client](config))


def aggregator(config: RunConfig) -> Aggregator:
    """How replies become one."""
    if config.dp == "client" and (mechanism := budget.mechanism(config)) is not None:
        return Hidden(mechanism, config.local_steps, config.directions)
    return config.rule


def server_config(
    config: RunConfig, theta_0: Tensor, examples: Mapping[int, int], allowance: Mapping[int, int]
) -> ServerConfig:
    """What the server opens every round from.

    Args:
        theta_0: float32 [n]. The cap on a round's step is relative to its norm; without one, there is no cap.
        examples: rows of each client, by id.
        allowance: local steps that each client's privacy budget lasts for, by id.
    """
    calibration = {name: getattr(config, name) for name in Vpcs.__dataclass_fields__ if name != "rule"}
    level = norm(theta_0.cpu().numpy()) / math.sqrt(len(theta_0))
    return ServerConfig(
        rounds=config.rounds,
        local_steps=config.local_steps,
        directions=config.directions,
        lr=number(config.lr),
        eps=number(config.eps),
        clients=config.clients,
        clients_per_round=config.clients_per_round,
        examples=examples,
        weights=config.weights,
        lr_schedule=config.lr_schedule,
        rules=rules(config),
        early_stop=config.stopping,
        vpcs=Vpcs(rule=config.vpcs_rule, **calibration),
        aggregation=aggregator(config),
        step_limit=config.max_step_norm * level or math.inf,
        seed=config.seed,
        allowance=allowance,
    )
