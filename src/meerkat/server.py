"""The server: opens a round, aggregates scalars, moves theta (method, sections 4 and 5).

    G_r^{t,p} = sum_k p_k g_k^{r,t,p} [t <= T_k]        theta_{r+1} = theta_r - (eta / P) sum_{t,p} G z

It never sees data, and sees the model only as theta.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from torch import Tensor

from meerkat import path, seeds
from meerkat.directions import Directions
from meerkat.rounds import Reply, RoundPlan, RoundRecord

Schedule = Literal["constant", "linear", "cosine"]

SCHEDULES: dict[Schedule, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2,
}
"""Share of the rounds done, in [0, 1) -> share of the learning rate."""


@dataclass(frozen=True)
class ServerConfig:
    """What does not change from round to round."""

    rounds: int
    local_steps: int
    """T"""
    directions: int
    """P"""
    lr: float
    eps: float
    clients: int
    clients_per_round: int
    examples: Mapping[int, int]
    """Rows of each client, by id: p_k in proportion to them, or equal."""
    weights: Literal["examples", "equal"] = "examples"
    lr_schedule: Schedule = "constant"
    seed: int = 0


@dataclass(frozen=True)
class ServerState:
    """All there is between rounds, and all of it follows from the log."""

    round: int
    """Rounds closed so far: the number of the next one."""
    theta: Tensor
    """float32 [n]"""
    steps_made: Mapping[int, int] = field(default_factory=dict)
    """Local steps each client has made, by id: its data pointer."""


def participants(config: ServerConfig, round: int) -> list[int]:
    """The clients asked in a round, ascending: a fresh sample each time, a function of (seed, round)."""
    if config.clients_per_round == config.clients:
        return list(range(config.clients))
    order = seeds.permutation(config.clients, config.seed, "participants", round)
    return sorted(order[: config.clients_per_round].tolist())


def open_round(state: ServerState, config: ServerConfig) -> RoundPlan:
    """Who takes part in the next round, how many steps each makes, and at what rate."""
    share = SCHEDULES[config.lr_schedule](state.round / config.rounds)
    return RoundPlan(
        round=state.round,
        lr=config.lr * share,
        eps=config.eps,
        directions=config.directions,
        steps=dict.fromkeys(participants(config, state.round), config.local_steps),
    )


def client_weights(config: ServerConfig, clients: Sequence[int]) -> dict[int, float]:
    """p_k of the clients whose replies count: in proportion to their rows, or equal; sums to one."""
    shares = {k: float(config.examples[k]) if config.weights == "examples" else 1.0 for k in clients}
    total = math.fsum(shares.values())
    return {k: share / total for k, share in shares.items()}


def aggregate(replies: Sequence[Reply], weights: Mapping[int, float], plan: RoundPlan) -> np.ndarray:
    """G: float32 [T, P] of a plan. A client that made fewer steps counts as zero for the missing ones.

    Summed in float64 in order of client id and rounded once (numeric contract 2).
    """
    total = np.zeros((max(plan.steps.values()), plan.directions), dtype=np.float64)
    for reply in sorted(replies, key=lambda reply: reply.client):
        total[: len(reply.scalars)] += weights[reply.client] * reply.scalars.astype(np.float64)
    return total.astype(np.float32)


def close_round(
    state: ServerState, plan: RoundPlan, replies: Sequence[Reply], config: ServerConfig, directions: Directions
) -> tuple[ServerState, RoundRecord]:
    """Aggregate the replies, of all participants or of some, and move everyone to the new theta."""
    replies = sorted((reply for reply in replies if len(reply.scalars)), key=lambda reply: reply.client)
    weights = client_weights(config, [reply.client for reply in replies])
    scalars = {reply.client: reply.scalars for reply in replies}
    draft = RoundRecord(plan, weights, scalars, aggregate(replies, weights, plan), theta_digest="")
    moved = replay(state, draft, directions)
    return moved, replace(draft, theta_digest=path.digest(moved.theta))


def replay(state: ServerState, record: RoundRecord, directions: Directions) -> ServerState:
    """The state after a round that was closed before: what resuming, auditing and joining late all do."""
    made = dict(state.steps_made)
    for client, scalars in record.scalars.items():
        made[client] = made.get(client, 0) + len(scalars)
    return ServerState(record.plan.round + 1, path.advance(state.theta, record, directions), made)
