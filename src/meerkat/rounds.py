"""What one round is: the plan the server opens it with, a client's reply, the record that stays."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from meerkat.directions import Phase, Place


@dataclass(frozen=True)
class RoundPlan:
    """Everything a participant needs to know to make its steps: round r of the method's section 4."""

    round: int
    lr: float
    """eta in this round: the schedule is the server's, and travels here."""
    eps: float
    directions: int
    """P: directions a step."""
    steps: Mapping[int, int]
    """T_k: local steps of each participant, by client id, ascending."""
    phase: Phase = "training"

    def place(self, step: int, direction: int) -> Place:
        """Where direction p of local step t stands in the run."""
        return Place(self.phase, self.round, step, direction)

    def place_after(self, step: int, direction: int) -> Place:
        """The direction asked for after this one; after the last, the first: another client or the server begins."""
        if direction + 1 < self.directions:
            return self.place(step, direction + 1)
        return self.place(step + 1 if step + 1 < max(self.steps.values()) else 0, 0)

    @property
    def rate(self) -> np.float32:
        """float32(eta / P): what every update is multiplied with."""
        return np.float32(self.lr / self.directions)


@dataclass(frozen=True)
class Reply:
    """What client k sends: its projected gradients, four bytes each."""

    client: int
    scalars: np.ndarray
    """g_k^{r,t,p}: float32 [T_k, P]"""
    loss: float = float("nan")
    """Mean training loss, known in a simulation only: it is never sent."""


@dataclass(frozen=True)
class RoundRecord:
    """A closed round: with theta_0 and the run key, enough to rebuild theta and every client's path."""

    plan: RoundPlan
    weights: Mapping[int, float]
    """p_k: renormalised over the clients that answered, by client id, ascending; float64."""
    scalars: Mapping[int, np.ndarray]
    """g_k: float32 [steps made, P] by client id, ascending; who did not answer is not in it."""
    aggregate: np.ndarray
    """G_r: float32 [T, P]"""
    theta_digest: str
    """SHA-256 of theta after the round."""

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values; float32 arrays as base64 of their little-endian bytes.

        `made` are the steps that each participant's reply holds: none where it did not answer.
        """
        plan, none = self.plan, np.zeros((0, self.plan.directions), np.float32)
        replies = [self.scalars.get(client, none) for client in plan.steps]
        return {
            "phase": plan.phase,
            "round": plan.round,
            "lr": plan.lr,
            "eps": plan.eps,
            "directions": plan.directions,
            "clients": list(plan.steps),
            "steps": list(plan.steps.values()),
            "made": [len(g) for g in replies],
            "weights": list(self.weights.values()),
            "scalars": _pack(np.concatenate(replies)),
            "aggregate": _pack(self.aggregate),
            "theta": self.theta_digest,
        }

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> "RoundRecord":
        """The record that `to_json` wrote, to the bit.

        Raises:
            KeyError, TypeError, ValueError: it was not written by `to_json`.
        """
        steps = dict(zip(held["clients"], held["steps"], strict=True))
        made = dict(zip(held["clients"], held["made"], strict=True))
        scalars = _unpack(held["scalars"]).reshape(-1, held["directions"])
        ends = np.cumsum([0, *made.values()])
        if ends[-1] != len(scalars) or min(made.values()) < 0:
            raise ValueError(f"round {held['round']} has scalars of {len(scalars)} steps, not {ends[-1]}")
        spans = zip(made, ends[:-1], ends[1:], strict=True)
        replies = {client: scalars[first:last] for client, first, last in spans if last > first}
        return cls(
            plan=RoundPlan(held["round"], held["lr"], held["eps"], held["directions"], steps, held["phase"]),
            weights=dict(zip(replies, held["weights"], strict=True)),
            scalars=replies,
            aggregate=_unpack(held["aggregate"]).reshape(-1, held["directions"]),
            theta_digest=held["theta"],
        )


def _pack(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4", copy=False).tobytes()).decode()


def _unpack(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)
