"""Meerkat-vp: calibrating clients, and stopping the extreme ones early (method, section 6).

Each client makes one uninterrupted path of T_cali steps from the same theta, along directions of the calibration phase;
theta is put back afterwards. Clients that `selection` calls extreme make one local step a round from then on, with a
data pointer that moves on. A calibration's steps and bytes count like any others.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from meerkat import seeds
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.extreme_clients import Selection, select
from meerkat.algorithm.gradip import gradip, inner_products, magnitude
from meerkat.algorithm.replies import Reply, Scalars
from meerkat.algorithm.rounds import RepliesRecord, RoundPlan, replies_from_json
from meerkat.algorithm.server import ServerConfig, ServerState, counted, pointer_of, within_allowance


@dataclass(frozen=True)
class CalibrationRecord(RepliesRecord):
    """A calibration and what was decided on it: theta does not move."""

    selection: Selection
    early_stopped: tuple[int, ...]
    """Clients that make one step a round from now on: the extreme ones, or as many at random."""

    kind: ClassVar[str] = "calibration"

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {
            **super().to_json(),
            "selection": asdict(self.selection),
            "early_stopped": list(self.early_stopped),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CalibrationRecord":
        """The record that `to_json` wrote. Raises KeyError, TypeError, ValueError: `to_json` did not write it."""
        replies, numbers = replies_from_json(values), values["selection"]
        del replies["unkept"]  # a calibration keeps all
        if numbers.keys() != {each.name for each in fields(Selection)}:
            raise ValueError(f"round {values['round']} has a selection with {', '.join(numbers)}")
        lists_as_tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in numbers.items()}
        selection = Selection(**lists_as_tuples)
        return cls(**replies, selection=selection, early_stopped=tuple(values["early_stopped"]))


def due(state: ServerState, config: ServerConfig) -> bool:
    """Whether a calibration stands before the next round. At T = 1 none does: there is nothing to stop."""
    never = config.early_stop == "none" or config.local_steps == 1
    if never or state.round in (config.rounds, state.calibrated):
        return False
    every = config.vpcs.recalibrate_every
    return state.calibrated is None or bool(every and state.round % every == 0)


def open_calibration(state: ServerState, config: ServerConfig, available: Collection[int] | None = None) -> RoundPlan:
    """T_cali steps for every client that is available (None: for all), at the run's first learning rate."""
    among = sorted(range(config.clients) if available is None else available)
    steps = within_allowance(state, config, dict.fromkeys(among, config.vpcs.calibration_steps))
    return RoundPlan(state.round, config.lr, config.eps, config.directions, steps, "calibration")


def close_calibration(
    state: ServerState,
    plan: RoundPlan,
    replies: Sequence[Reply],
    config: ServerConfig,
    directions: Directions,
    gradient: Tensor | None = None,
) -> tuple[ServerState, CalibrationRecord]:
    """Decide which clients stop early. Those that did not reply in full stay as they are."""
    scalars = (reply for reply in replies if isinstance(reply, Scalars))
    whole = {reply.client: reply for reply in scalars if reply.steps == plan.steps[reply.client]}
    g = {client: whole[client].scalars for client in sorted(whole)}
    record = decide(state, plan, g, inner_products(gradient, plan, directions), config)
    signatures = {k: whole[k].signature for k in g if whole[k].signature}
    record = replace(record, pointers={k: pointer_of(state, whole[k]) for k in g}, signatures=signatures)
    return replay(state, record), record


def decide(
    state: ServerState, plan: RoundPlan, scalars: Mapping[int, np.ndarray], inner: np.ndarray, config: ServerConfig
) -> CalibrationRecord:
    """What follows from a calibration's scalars: which clients are extreme, and which stop early."""
    selection = select(
        {client: magnitude(g) for client, g in scalars.items()},
        {client: gradip(g, inner) for client, g in scalars.items()},
        config.vpcs,
        plan.directions,
    )
    chosen = selection.extreme
    if config.early_stop == "random":
        order = seeds.permutation(len(selection.clients), config.seed, "early stopping", plan.round)
        chosen = tuple(sorted(selection.clients[i] for i in order[: len(selection.extreme)]))
    silent = state.early_stopped - scalars.keys()
    return CalibrationRecord(plan, scalars, inner, selection, tuple(sorted({*chosen, *silent})))


def replay(state: ServerState, record: CalibrationRecord) -> ServerState:
    """The state after a calibration: theta is what it was."""
    return replace(
        state,
        steps_made=counted(state, record.pointers, record.made),
        early_stopped=frozenset(record.early_stopped),
        calibrated=record.plan.round,
    )
