"""What one round is: the plan the server opens it with, a client's reply, the record that stays."""

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from meerkat.algorithm.directions import Phase, Place

LARGEST_LOSS = 50.0
"""Nats: two losses differ by less, so no honest |g| is above this over eps (over 2 eps, and as much again to spare)."""


@dataclass(frozen=True)
class RoundPlan:
    """Everything a participant needs to know to make its steps: round r of the method's section 4."""

    round: int
    lr: float
    """eta in this round: the schedule is the server's, and travels here."""
    eps: float
    directions: int
    """P: directions a step; 0 in a first-order round, whose update travels as a delta."""
    steps: Mapping[int, int]
    """T_k: local steps of each participant, by client id, ascending."""
    phase: Phase = "training"
    alpha: float = 0.0
    """FedDyn's alpha; 0 for no correction."""

    def place(self, step: int, direction: int) -> Place:
        """Where direction p of local step t stands in the run."""
        return Place(self.phase, self.round, step, direction)

    def place_after(self, step: int, direction: int) -> Place:
        """The direction asked for after this one; after the last, the first: another client or the server begins."""
        if direction + 1 < self.directions:
            return self.place(step, direction + 1)
        return self.place(step + 1 if step + 1 < self.longest else 0, 0)

    @property
    def longest(self) -> int:
        """T: the most steps that any participant makes; 0 where a sample of clients came out empty."""
        return max(self.steps.values(), default=0)

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
    delta: np.ndarray | None = None
    """theta_k - theta_r of a first-order round, float32 [n]."""
    signature: bytes = b""
    """The client's own, of its scalars: 64 bytes, or none where it does not sign. See `signatures`."""


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
    inner: np.ndarray
    """c^{t,p} = <grad_p, z^{t,p}>, float64 [T, P]: GradIP is a client's scalars times these. Empty without grad_p."""
    delta: np.ndarray | None = None
    """The mean of a first-order round's deltas, float32 [n]."""
    signatures: Mapping[int, bytes] = field(default_factory=dict)
    """Of the replies, 64 bytes each, by client id; who did not sign is not in it."""
    unkept: Mapping[int, int] = field(default_factory=dict)
    """Steps of the replies whose scalars are not kept, by client id, ascending: all of a run that hides its clients."""

    @property
    def made(self) -> Mapping[int, int]:
        """Steps that each client's reply held, by client id, ascending."""
        return self.unkept or steps_of(self.scalars)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values; arrays as base64 of their little-endian bytes."""
        return {
            **replies_to_json(self.plan, self.made, self.scalars, self.inner, self.signatures),
            "weights": list(self.weights.values()),
            "aggregate": pack(self.aggregate),
            "delta": None if self.delta is None else pack(self.delta),
            "theta": self.theta_digest,
        }

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> "RoundRecord":
        """The record that `to_json` wrote, to the bit.

        Raises:
            KeyError, TypeError, ValueError: it was not written by `to_json`.
        """
        plan, unkept, scalars, inner, signatures = replies_from_json(held)
        aggregate = unpack(held["aggregate"])
        return cls(
            plan=plan,
            weights=dict(zip(unkept or scalars, held["weights"], strict=True)),
            scalars=scalars,
            aggregate=aggregate.reshape(-1 if aggregate.size else plan.longest, plan.directions),
            theta_digest=held["theta"],
            inner=inner,
            delta=None if held["delta"] is None else unpack(held["delta"]),
            signatures=signatures,
            unkept=unkept,
        )


def check_reply(plan: RoundPlan, client: int, scalars: np.ndarray) -> None:
    """What every reply is held to, whoever sent it and wherever it is read: at the wire, in a simulation, in a log.

    Args:
        scalars: g_k, float32.

    Raises:
        ValueError: the client was not asked, the reply is not [T_k, P] as it was asked for, a scalar is not finite, or
            one is larger than any loss makes it.
    """
    if client not in plan.steps:
        raise ValueError(f"a reply of client {client}, who was not asked")
    if scalars.shape != (plan.steps[client], plan.directions):
        raise ValueError(
            f"a reply of {scalars.shape[0]} steps in {scalars.shape[1]} directions, where {plan.steps[client]} "
            f"in {plan.directions} were asked for"
        )
    values = scalars.ravel().tolist()
    if not all(map(math.isfinite, values)):
        raise ValueError("a reply with a scalar that is not finite")
    if (largest := max(map(abs, values), default=0.0)) > (most := LARGEST_LOSS / plan.eps):
        raise ValueError(f"a reply with a scalar of {largest:.3g}: no loss makes one above {most:.3g}")


def steps_of(scalars: Mapping[int, np.ndarray]) -> dict[int, int]:
    """How many steps each client's scalars, float32 [T_k, P], are of."""
    return {client: len(g) for client, g in scalars.items()}


def replies_to_json(
    plan: RoundPlan,
    made: Mapping[int, int],
    scalars: Mapping[int, np.ndarray],
    inner: np.ndarray,
    signatures: Mapping[int, bytes],
) -> dict[str, Any]:
    """What was asked and what came, as JSON values.

    `made` are the steps that each participant's reply holds: none where it did not answer. `scalars` is null where
    replies came and are not kept.
    `signatures` are of those who answered, base64, empty where one does not sign; an empty list where nobody does.
    """
    none = np.zeros((0, plan.directions), np.float32)
    replies = [none, *(scalars.get(client, none) for client in plan.steps)]
    return {
        "phase": plan.phase,
        "round": plan.round,
        "lr": plan.lr,
        "eps": plan.eps,
        "directions": plan.directions,
        "alpha": plan.alpha,
        "clients": list(plan.steps),
        "steps": list(plan.steps.values()),
        "made": [made.get(client, 0) for client in plan.steps],
        "scalars": None if made and not scalars else pack(np.concatenate(replies)),
        "inner": pack(inner, "<f8"),
        "signatures": [base64.b64encode(signatures.get(client, b"")).decode() for client in scalars if signatures],
    }


def replies_from_json(
    held: Mapping[str, Any],
) -> tuple[RoundPlan, dict[int, int], dict[int, np.ndarray], np.ndarray, dict[int, bytes]]:
    """Plan, steps whose scalars are not kept, scalars, inner products and signatures, as `replies_to_json` had them.

    Raises:
        KeyError, TypeError, ValueError: it was not written by `replies_to_json`.
    """
    directions = held["directions"]
    whole = (held["round"], directions, *held["clients"], *held["steps"], *held["made"])
    if not all(type(number) is int and number < 2**32 for number in whole):
        raise TypeError(f"round {held['round']!r} counts in what are no whole numbers of 32 bits")
    steps = dict(zip(held["clients"], held["steps"], strict=True))
    made = dict(zip(held["clients"], held["made"], strict=True))
    if (least := min(made.values(), default=0)) < 0:
        raise ValueError(f"round {held['round']} has a reply of {least} steps")
    made = {client: count for client, count in made.items() if count}
    scalars: dict[int, np.ndarray] = {}
    if held["scalars"] is not None:
        ends = np.cumsum([0, *made.values()])
        together = unpack(held["scalars"]).reshape(int(ends[-1]), directions)
        spans = zip(made, ends[:-1], ends[1:], strict=True)
        made, scalars = {}, {client: together[first:last] for client, first, last in spans}
    plan = RoundPlan(held["round"], held["lr"], held["eps"], directions, steps, held["phase"], held["alpha"])
    inner = unpack(held["inner"], "<f8")
    inner = inner.reshape(plan.longest if inner.size else 0, directions)
    signed = held["signatures"] or [""] * len(scalars)
    signatures = {k: base64.b64decode(text) for k, text in zip(scalars, signed, strict=True) if text}
    return plan, made, scalars, inner, signatures


def pack(values: np.ndarray, kind: str = "<f4") -> str:
    """An array's little-endian bytes as base64."""
    return base64.b64encode(values.astype(kind, copy=False).tobytes()).decode()


def unpack(text: str, kind: str = "<f4") -> np.ndarray:
    """The flat array that `pack` was given, in this machine's byte order."""
    return np.frombuffer(base64.b64decode(text), dtype=kind).astype(kind[1:])
