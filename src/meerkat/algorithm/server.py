"""The server: opens a round, aggregates scalars, moves theta (method, sections 4 and 5).

    G_r^{t,p} = sum_k p_k g_k^{r,t,p} [t <= T_k]        theta_{r+1} = theta_r - (eta / P) sum_{t,p} G z

It never sees data, and sees the model only as theta.
"""

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from meerkat import seeds
from meerkat.algorithm import path, update_rules
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.gradip import inner_products
from meerkat.algorithm.robust import MEAN, Aggregation, capped, combine, norm
from meerkat.algorithm.rounds import Reply, RoundPlan, RoundRecord, steps_of
from meerkat.algorithm.schedules import SCHEDULES, Schedule
from meerkat.algorithm.selection import EarlyStop, Vpcs
from meerkat.algorithm.update_rules import Moments, ServerOptimizer
from meerkat.errors import Diverged
from meerkat.privacy.mechanism import Mechanism


@dataclass(frozen=True)
class ServerConfig:
    """What does not change from round to round."""

    rounds: int
    local_steps: int
    """T"""
    directions: int
    """P; 0 for first-order rounds."""
    lr: float
    eps: float
    clients: int
    clients_per_round: int
    examples: Mapping[int, int]
    """Rows of each client, by id: p_k in proportion to them, or equal. In a federation, of those that joined so far."""
    weights: Literal["examples", "equal"] = "examples"
    lr_schedule: Schedule = "constant"
    optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)
    early_stop: EarlyStop = "none"
    vpcs: Vpcs = field(default_factory=Vpcs)
    aggregation: Aggregation = MEAN
    step_limit: float = math.inf
    """Root mean square of a round's step over the n entries, at most: see `robust.capped`."""
    seed: int = 0
    allowance: Mapping[int, int] = field(default_factory=dict)
    """Local steps that a client's privacy budget lasts for, by id; who is not in it has no limit."""
    hides_clients: Mechanism | None = None
    """Under client-level differential privacy, what makes of the sampled clients' replies one noisy mean."""


@dataclass(frozen=True)
class ServerState:
    """All there is between rounds, and all of it follows from the log."""

    round: int
    """Rounds closed so far: the number of the next one."""
    theta: Tensor
    """float32 [n]"""
    steps_made: Mapping[int, int] = field(default_factory=dict)
    """Local steps each client has made, by id: its data pointer."""
    moments: Moments = ()
    """The server optimizer's."""
    corrections: Mapping[int, Tensor] = field(default_factory=dict)
    """FedDyn's h_k by client id, float32 [n]: what each client knows of itself. Empty for every other method."""
    early_stopped: frozenset[int] = frozenset()
    """Clients that make one local step a round."""
    calibrated: int | None = None
    """The round that the last calibration stood before."""


def participants(config: ServerConfig, round: int, available: Collection[int] | None = None) -> list[int]:
    """The clients asked in a round, ascending: a fresh sample each time, a function of (seed, round, available).

    Under client-level differential privacy the sample was taken before, by `sampled`.

    Args:
        available: the clients to draw from; None for all.
    """
    among = sorted(range(config.clients) if available is None else available)
    if config.clients_per_round >= len(among) or config.hides_clients:
        return among  # or of a sample that nobody can foretell
    order = seeds.permutation(len(among), config.seed, "participants", round)
    return sorted(among[i] for i in order[: config.clients_per_round])


def open_round(state: ServerState, config: ServerConfig, available: Collection[int] | None = None) -> RoundPlan:
    """Who takes part in the next round, how many steps each makes, and at what rate.

    Args:
        available: the clients that can take part; None for all, as in a simulation.
    """
    share = SCHEDULES[config.lr_schedule](state.round / config.rounds)
    among = range(config.clients) if available is None else available
    wanted = {client: 1 if client in state.early_stopped else config.local_steps for client in among}
    lasting = within_allowance(state, config, wanted)
    return RoundPlan(
        round=state.round,
        lr=config.lr * share,
        eps=config.eps,
        directions=config.directions,
        steps={client: lasting[client] for client in participants(config, state.round, lasting)},
        alpha=config.optimizer.alpha,
    )


def sampled(config: ServerConfig, available: Collection[int] | None) -> Collection[int] | None:
    """Whom a round can ask: who is available, or under client-level differential privacy a Poisson sample of them."""
    if config.hides_clients is None:
        return available
    members = config.hides_clients.sample(range(config.clients)).tolist()
    return [k for k in members if available is None or k in available]


def within_allowance(state: ServerState, config: ServerConfig, steps: Mapping[int, int]) -> dict[int, int]:
    """The steps of those clients whose privacy budget lasts for them: the others have left."""
    made, allowance = state.steps_made, config.allowance
    return {k: more for k, more in steps.items() if k not in allowance or made.get(k, 0) + more <= allowance[k]}


def client_weights(config: ServerConfig, clients: Sequence[int]) -> dict[int, float]:
    """p_k of the clients whose replies count: in proportion to their rows, or equal; sums to one.

    Equal under every rule of aggregation but the mean.
    """
    by_rows = config.weights == "examples" and config.aggregation.rule == "mean"
    shares = {k: float(config.examples[k]) if by_rows else 1.0 for k in clients}
    total = math.fsum(shares.values())
    return {k: share / total for k, share in shares.items()}


def share_of(config: ServerConfig, clients: Iterable[int]) -> float:
    """The weight of some clients over that of all, in [0, 1]; 1 where clients are hidden."""
    if config.hides_clients:
        return 1.0
    of_all = client_weights(config, [*config.examples])
    return math.fsum(of_all[k] for k in clients)


def aggregate(
    replies: Sequence[Reply],
    weights: Mapping[int, float],
    plan: RoundPlan,
    by: Aggregation = MEAN,
    limit: float = math.inf,
) -> np.ndarray:
    """G: float32 [T, P] of a plan. A client that made fewer steps counts as zero for the missing ones.

    In float64 in order of client id and rounded once (numeric contract 2).

    Args:
        by: the rule; under all but the mean, `robust` says what missing steps are.
        limit: the root mean square of the step's entries, at most.
    """
    scalars = {reply.client: reply.scalars for reply in replies}
    total = combine(scalars, weights, (plan.longest, plan.directions), by)
    return (capped(total, plan.rate, limit) if plan.directions else total).astype(np.float32)


def noisy_mean(replies: Sequence[Reply], plan: RoundPlan, config: ServerConfig, hidden: Mechanism) -> np.ndarray:
    """G: float32 [T, P], of whole rounds of sampled clients: the sum of clipped replies, and noise, over q K."""
    form = config.local_steps, config.directions
    vectors = [reply.scalars.astype(np.float64).reshape(-1) for reply in replies if reply.scalars.shape == form]
    noisy = hidden.release(np.stack(vectors) if vectors else np.zeros((0, math.prod(form)))).reshape(form)
    return capped(noisy, plan.rate, config.step_limit).astype(np.float32)


def check_rate(plan: RoundPlan, replies: Sequence[Reply], config: ServerConfig) -> None:
    """Tell a rate that is far too high from a few replies that are: the cap on a round's step is for the latter.

    Of so few replies that attackers may be most of them nothing is told.

    Raises:
        Diverged: most clients' own scalars make a step that is longer than the cap.
    """
    if math.isinf(limit := config.step_limit):
        return
    lengths = [float(plan.rate) * norm(reply.scalars) for reply in replies if reply.scalars.size]
    f = config.aggregation.byzantine if config.aggregation.needs_f else 0
    enough = len(lengths) > 2 * max(f, 1) or len(lengths) == config.clients
    if lengths and enough and (length := statistics.median_low(lengths)) > limit:
        raise Diverged(
            f"round {plan.round}: most clients' steps are {length / limit:.3g} times as long as max_step_norm allows; "
            "start a new run with a lower --lr"
        )


def mean_delta(replies: Sequence[Reply], weights: Mapping[int, float]) -> np.ndarray | None:
    """The mean of first-order replies' deltas, float32 [n], rounded as `aggregate` is; None without any."""
    deltas = {reply.client: reply.delta for reply in replies if reply.delta is not None}
    if not deltas:
        return None
    total = np.zeros(len(next(iter(deltas.values()))), dtype=np.float64)
    for client in sorted(deltas):
        total += weights[client] * deltas[client].astype(np.float64)
    return total.astype(np.float32)


def close_round(
    state: ServerState,
    plan: RoundPlan,
    replies: Sequence[Reply],
    config: ServerConfig,
    directions: Directions,
    gradient: Tensor | None = None,
) -> tuple[ServerState, RoundRecord]:
    """Aggregate the replies, of all participants or of some, and move everyone to the new theta.

    `gradient` is the pre-training gradient at the moving entries, float32 [n], for GradIP.
    """
    replies = sorted((reply for reply in replies if len(reply.scalars)), key=lambda reply: reply.client)
    weights = client_weights(config, [reply.client for reply in replies])
    scalars = {reply.client: reply.scalars for reply in replies}
    hidden = config.hides_clients
    draft = RoundRecord(
        plan=plan,
        weights=weights,
        scalars={} if hidden else scalars,
        unkept=steps_of(scalars) if hidden else {},
        aggregate=noisy_mean(replies, plan, config, hidden)
        if hidden
        else aggregate(replies, weights, plan, config.aggregation, config.step_limit),
        theta_digest="",
        inner=inner_products(None if hidden else gradient, plan, directions),
        delta=mean_delta(replies, weights),
        signatures={reply.client: reply.signature for reply in replies if reply.signature and not hidden},
    )
    moved = replay(state, draft, config, directions)
    return moved, replace(draft, theta_digest=path.digest(moved.theta))


def replay(state: ServerState, record: RoundRecord, config: ServerConfig, directions: Directions) -> ServerState:
    """The state after a round that was closed before: what resuming, auditing and joining late all do."""
    share = share_of(config, record.made)
    theta, moments = update_rules.advance(config.optimizer, state.theta, state.moments, record, share, directions)
    return replace(
        state,
        round=record.plan.round + 1,
        theta=theta,
        moments=moments,
        steps_made=counted(state, record.made),
        corrections=_corrected(state, record, directions) if record.plan.alpha else state.corrections,
    )


def counted(state: ServerState, made: Mapping[int, int]) -> dict[int, int]:
    """The data pointers after replies: each client's moves on by the steps it made."""
    return {**state.steps_made, **{k: state.steps_made.get(k, 0) + steps for k, steps in made.items()}}


def _corrected(state: ServerState, record: RoundRecord, directions: Directions) -> dict[int, Tensor]:
    """FedDyn's h_k <- h_k - alpha (theta_k - theta_r) of those who took part."""
    none = torch.zeros_like(state.theta)
    held = dict(state.corrections)
    for client, scalars in record.scalars.items():
        *_, moved = path.walk(none, record.plan, scalars, directions)
        held[client] = held.get(client, none) - moved * record.plan.alpha
    return held
