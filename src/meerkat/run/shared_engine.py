"""A round's clients shared among ranks: each makes its clients' steps, and rank 0 has all replies, to the bit."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from meerkat.algorithm.replies import Delta, Reply, Scalars
from meerkat.algorithm.rounds import RoundPlan, pack, unpack
from meerkat.algorithm.server import ServerState
from meerkat.run.local_engine import LocalEngine
from meerkat.run.ranks import Ranks


@dataclass(frozen=True)
class SharedEngine:
    """Runs the participants of a round on all ranks, as rank 0. See `loop.Engine`."""

    engine: LocalEngine
    ranks: Ranks

    def run(self, state: ServerState, plan: RoundPlan) -> list[Reply]:
        """The replies to a plan, by ascending client id."""
        self.ranks.tell({"plan": asdict(plan) | {"steps": [*plan.steps.items()]}}, asks=True)
        replies = self.engine.run(state, share(plan, 0, self.ranks.size))
        for answer in self.ranks.answers():
            replies += [_reply(plan, *each) for each in answer]
        return sorted(replies, key=lambda reply: reply.client)


def answer(asked: Mapping[str, Any], engine: LocalEngine, state: ServerState, ranks: Ranks) -> list[list[Any]]:
    """Another rank's replies to the plan that `SharedEngine` told it, as JSON values."""
    plan = RoundPlan(**{**asked, "steps": dict(asked["steps"])})
    replies = engine.run(state, share(plan, ranks.rank, ranks.size))
    return [
        [one.client, one.steps, one.loss, pack(one.scalars if isinstance(one, Scalars) else one.delta)]
        for one in replies
    ]


def share(plan: RoundPlan, rank: int, ranks: int) -> RoundPlan:
    """The part of a plan that one of so many ranks makes: the next longest client goes to whoever has least to do."""
    steps: dict[int, int] = {}
    loads = [0] * ranks
    for client, count in sorted(plan.steps.items(), key=lambda each: (-each[1], each[0])):
        idlest = loads.index(min(loads))
        loads[idlest] += count
        if idlest == rank:
            steps[client] = count
    return replace(plan, steps=dict(sorted(steps.items())))


def _reply(plan: RoundPlan, client: int, steps: int, loss: float, values: str) -> Reply:
    array = unpack(values)
    if plan.sends == "delta":
        return Delta(client, array, steps, loss)
    return Scalars(client, array.reshape(steps, plan.directions), loss)
