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
from torch import Tensor

from meerkat.algorithm.aggregation import Aggregator
from meerkat.algorithm.client_sampling import seeded_sample
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.extreme_clients import EarlyStop, Vpcs
from meerkat.algorithm.gradip import inner_products
from meerkat.algorithm.replica import PAPER, Replica, Rules, carried
from meerkat.algorithm.replies import Delta, Reply, Scalars
from meerkat.algorithm.robust import MEAN, capped, norm
from meerkat.algorithm.rounds import RoundPlan, RoundRecord, Update
from meerkat.algorithm.schedules import SCHEDULES, Schedule
from meerkat.errors import Diverged


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
    """Rows of each client, by id: p_k in proportion to them, or equal. In a federation, of those that joined so far."""
    weights: Literal["examples", "equal"] = "examples"
    lr_schedule: Schedule = "constant"
    rules: Rules = PAPER
    early_stop: EarlyStop = "none"
    vpcs: Vpcs = field(default_factory=Vpcs)
    aggregation: Aggregator = MEAN
    step_limit: float = math.inf
    """Root mean square of a round's step over the n entries, at most: see `robust.capped`."""
    seed: int = 0
    allowance: Mapping[int, int] = field(default_factory=dict)
    """Local steps that a client's privacy budget lasts for, by id. A client that is not in it has no limit."""


@dataclass(frozen=True)
class ServerState:
    """All there is between rounds, and all of it follows from the log."""

    replica: Replica
    steps_made: Mapping[int, int] = field(default_factory=dict)
    """Local steps that each client has made, by id: its data pointer. In a federation those that did not count, too."""
    carried: Mapping[int, Tensor] = field(default_factory=dict)
    """h_k by client id, float32 [n], where the client rule carries one."""
    early_stopped: frozenset[int] = frozenset()
    """Clients that make one local step a round."""
    calibrated: int | None = None
    """The round that the last calibration stood before."""

    @property
    def round(self) -> int:
        """Rounds closed so far: the number of the next one."""
        return self.replica.round

    @property
    def theta(self) -> Tensor:
        """float32 [n]"""
        return self.replica.theta

    def replica_of(self, client: int) -> Replica:
        """The replica that a client has, or is to have."""
        return replace(self.replica, h=self.carried.get(client))


def open_round(state: ServerState, config: ServerConfig, available: Collection[int] | None = None) -> RoundPlan:
    """Whom of those `available` (None: of all) the next round asks, for how many steps each, and at what rate."""
    share = SCHEDULES[config.lr_schedule](state.round / config.rounds)
    among = range(config.clients) if available is None else available
    # hidden clients were drawn before, and all of them are asked
    count = config.clients_per_round if config.aggregation.keeps_replies else len(among)
    wanted = {client: 1 if client in state.early_stopped else config.local_steps for client in among}
    lasting = within_allowance(state, config, wanted)
    return RoundPlan(
        round=state.round,
        lr=config.lr * share,
        eps=config.eps,
        directions=config.directions,
        steps={client: lasting[client] for client in seeded_sample(lasting, count, config.seed, state.round)},
        sends=config.rules.client.sends,
    )


def within_allowance(state: ServerState, config: ServerConfig, steps: Mapping[int, int]) -> dict[int, int]:
    """The steps of those clients whose privacy budget lasts for them: the others have left."""
    made, allowance = state.steps_made, config.allowance
    return {k: more for k, more in steps.items() if k not in allowance or made.get(k, 0) + more <= allowance[k]}


def client_weights(config: ServerConfig, clients: Sequence[int]) -> dict[int, float]:
    """p_k of the clients whose replies count: in proportion to their rows, or equal; sums to one.

    Equal under every aggregation but the mean.
    """
    by_rows = config.weights == "examples" and config.aggregation.weighs
    shares = {k: float(config.examples[k]) if by_rows else 1.0 for k in clients}
    total = math.fsum(shares.values())
    return {k: share / total for k, share in shares.items()}


def share_of(config: ServerConfig, clients: Iterable[int]) -> float:
    """The weight of some clients over that of all, in [0, 1]; 1 where clients are hidden."""
    if not config.aggregation.keeps_replies:
        return 1.0
    of_all = client_weights(config, [*config.examples])
    return math.fsum(of_all[k] for k in clients)


def aggregate(
    replies: Sequence[Scalars],
    weights: Mapping[int, float],
    plan: RoundPlan,
    by: Aggregator = MEAN,
    limit: float = math.inf,
) -> np.ndarray:
    """G: float32 [T, P] of a plan. `by` says what a client counts in steps that it did not make.

    In float64 in order of client id and rounded once (numeric contract 2).

    Args:
        by: how replies become one; of the robust rules, `robust` says what missing steps are.
        limit: the root mean square of the step's entries, at most.
    """
    scalars = {reply.client: reply.scalars for reply in replies}
    total = by.combine(scalars, weights, (plan.longest, plan.directions))
    return capped(total, plan.rate, limit).astype(np.float32)


def mean_delta(replies: Sequence[Delta], weights: Mapping[int, float]) -> np.ndarray:
    """The mean of deltas, float32 [n], summed and rounded as `aggregate` does; empty where none came."""
    total = sum(weights[reply.client] * reply.delta.astype(np.float64) for reply in replies)
    return np.asarray(total if replies else [], np.float32)


def check_rate(plan: RoundPlan, replies: Sequence[Reply], config: ServerConfig) -> None:
    """Tell a rate that is far too high from a few replies that are: the cap on a round's step is for the latter.

    Not checked where attackers may be most of so few replies, nor of hidden clients.

    Raises:
        Diverged: most clients' own scalars make a step that is longer than the cap.
    """
    if math.isinf(limit := config.step_limit) or not config.aggregation.keeps_replies:
        return
    scalars = [reply.scalars for reply in replies if isinstance(reply, Scalars)]
    lengths = [float(plan.rate) * norm(g) for g in scalars if g.size]
    enough = len(lengths) > 2 * max(config.aggregation.byzantine, 1) or len(lengths) == config.clients
    if lengths and enough and (length := statistics.median_low(lengths)) > limit:
        raise Diverged(
            f"round {plan.round}: most clients' steps are {length / limit:.3g} times as long as max_step_norm allows; "
            "start a new run with a lower --lr"
        )


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
    replies = sorted((reply for reply in replies if reply.steps), key=lambda reply: reply.client)
    weights = client_weights(config, [reply.client for reply in replies])
    scalars = [reply for reply in replies if isinstance(reply, Scalars)]
    kept = scalars if config.aggregation.keeps_replies else []
    if plan.sends == "delta":
        aggregated = mean_delta([reply for reply in replies if isinstance(reply, Delta)], weights)
    else:
        aggregated = aggregate(scalars, weights, plan, config.aggregation, config.step_limit)
    draft = RoundRecord(
        plan=plan,
        weights=weights,
        scalars={reply.client: reply.scalars for reply in kept},
        unkept={} if kept else {reply.client: reply.steps for reply in replies},
        aggregate=aggregated,
        theta_digest="",
        inner=inner_products(gradient if config.aggregation.keeps_replies else None, plan, directions),
        pointers={reply.client: pointer_of(state, reply) for reply in replies},
        signatures={reply.client: reply.signature for reply in kept if reply.signature},
    )
    moved = replay(state, draft, config, directions)
    return moved, replace(draft, theta_digest=moved.replica.digest)


def replay(state: ServerState, record: RoundRecord, config: ServerConfig, directions: Directions) -> ServerState:
    """The state after a closed round: what closing it, resuming, auditing and joining late all do."""
    update = Update(record.plan, record.aggregate, share_of(config, record.made))
    client, replied = config.rules.client, record.scalars if config.rules.client.carries else {}
    after = {k: carried(client, state.carried.get(k), record.plan, g, directions) for k, g in replied.items()}
    return replace(
        state,
        replica=state.replica.follow(update, config.rules, directions),
        steps_made=counted(state, record.pointers, record.made),
        carried={**state.carried, **after},
    )


def pointer_of(state: ServerState, reply: Reply) -> int:
    """Local steps that a client had made before its reply."""
    return state.steps_made.get(reply.client, 0) if reply.pointer is None else reply.pointer


def counted(state: ServerState, pointers: Mapping[int, int], made: Mapping[int, int]) -> dict[int, int]:
    """The data pointers after replies: each client's is where it was, and the steps that it made."""
    return {**state.steps_made, **{k: pointers[k] + steps for k, steps in made.items()}}
