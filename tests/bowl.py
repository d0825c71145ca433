"""The federation of test_server's Bowl in any setting, and what the literal twin needs to run the same one."""

import dataclasses
from collections.abc import Callable, Container, Sequence

import numpy as np
import torch
from test_server import KEY, Bowl, bowl_engine
from torch import Tensor

from meerkat.algorithm import calibration, path
from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.client_rules import FedDynClient
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.replica import Replica, Rules
from meerkat.algorithm.rounds import RoundPlan, RoundRecord
from meerkat.algorithm.server import ServerConfig, ServerState, close_round, open_round
from meerkat.algorithm.update_rules import FedDyn, UpdateRule
from meerkat.algorithm.zeroth_order import Loss
from meerkat.masks.sparse_mask import SparseMask
from meerkat.run.local_engine import LocalEngine


@dataclasses.dataclass(frozen=True)
class Lived:
    """A federation that ran: the state after each record, its records, and theta after each round."""

    engine: LocalEngine
    mask: SparseMask
    states: list[ServerState]
    records: list[RoundRecord | CalibrationRecord]

    @property
    def rounds(self) -> list[RoundRecord]:
        return [record for record in self.records if isinstance(record, RoundRecord)]

    @property
    def calibrations(self) -> list[CalibrationRecord]:
        return [record for record in self.records if isinstance(record, CalibrationRecord)]

    @property
    def thetas(self) -> list[Tensor]:
        pairs = zip(self.states, self.records, strict=True)
        return [state.theta for state, record in pairs if isinstance(record, RoundRecord)]


def flat_for(engine: LocalEngine, quiet: Container[int]) -> LocalEngine:
    """The same engine, but that some clients' losses do not depend on theta: their g is zero."""

    def losses_of(rows: Sequence[np.ndarray]) -> Loss:
        losses, share = engine.losses_of(rows), torch.tensor([float(row[0] not in quiet) for row in rows])
        return lambda: losses() * share

    return dataclasses.replace(engine, losses_of=losses_of)


def live(
    settings: ServerConfig, together: bool = True, gradient: Tensor | None = None, quiet: Container[int] = ()
) -> Lived:
    """Run a federation over the Bowl, calibrations included."""
    _, mask, engine = bowl_engine(together)
    engine = dataclasses.replace(flat_for(engine, quiet), rule=settings.rules.client)
    lived = Lived(engine, mask, [], [])
    state = ServerState(Replica(0, engine.model.read()))
    while state.round < settings.rounds:
        assert len(lived.records) < 2 * settings.rounds, "a round is calibrated again and again"
        record: RoundRecord | CalibrationRecord
        if calibration.due(state, settings):
            plan = calibration.open_calibration(state, settings)
            replies = engine.run(state, plan)
            state, record = calibration.close_calibration(state, plan, replies, settings, engine.directions, gradient)
        else:
            plan = open_round(state, settings)
            replies = engine.run(state, plan)
            state, record = close_round(state, plan, replies, settings, engine.directions, gradient)
        lived.states.append(state)
        lived.records.append(record)
    return lived


class Literal:
    """The Bowl as tests/reference.py wants it: dense float64 weights."""

    def __init__(self, settings: ServerConfig) -> None:
        self.model, self.mask, self.engine = bowl_engine()
        self.settings = settings
        self.w0 = torch.cat([p.detach().double().flatten() for p in self.model.parameters()])
        self.moving = torch.cat(
            [
                torch.isin(torch.arange(p.numel()), self.mask.entries.get(name, torch.zeros(0).long()))
                for name, p in self.model.named_parameters()
            ]
        )

    def loss(self, w: Tensor, client: int, step: int) -> Tensor:
        """The Bowl's loss at dense weights, float64 throughout: no float32 weights stand between."""
        target = torch.sin(torch.arange(len(w)) * (1.0 + client) + step)
        return ((w - target) ** 2).mean() + (w**4).mean() / 10

    def direction(self, round: int, step: int, p: int) -> Tensor:
        z = self.engine.directions(RoundPlan(round, 0, 0, self.settings.directions, {}).place(step, p))
        return self.spread(z)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the moving entries, float [n], as a dense vector."""
        whole = torch.zeros(len(self.moving), dtype=torch.float64)
        whole[self.moving] = values.double()
        return whole

    def pointer(self, participants: Callable[[int], Sequence[int]]) -> Callable[[int, int, int], int]:
        """(client, round, step) -> steps that the client had made before."""
        steps = self.settings.local_steps

        def made(client: int, round: int, step: int) -> int:
            return sum(client in participants(r) for r in range(round)) * steps + step

        return made


def moved_by(record: RoundRecord, width: int) -> Tensor:
    """-D of a round in float64, from its aggregate."""
    z, plan = Directions(KEY, width), record.plan
    total = torch.zeros(width, dtype=torch.float64)
    if plan.sends == "delta":
        return total + torch.from_numpy(record.aggregate).double()
    for t, row in enumerate(record.aggregate):
        for p, g in enumerate(row):
            total -= plan.lr / plan.directions * float(g) * z(plan.place(t, p)).double()
    return total


def rules_of(update_rule: UpdateRule) -> Rules:
    """The rules of a federation with this update rule; FedDyn's comes with its clients' half."""
    if isinstance(update_rule, FedDyn):
        return Rules(update_rule, FedDynClient(update_rule.alpha))
    return Rules(update_rule)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return path.digest(a) == path.digest(b)


__all__ = ["KEY", "Bowl", "Literal", "Lived", "live", "moved_by", "rules_of", "same_bits"]
