"""What one round is: the plan that the server opens it with, and the record that stays."""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from meerkat.algorithm.directions import Directions, Phase, Place

Sends = Literal["scalars", "delta"]
"""What clients reply with: four bytes a local step, or theta's whole change."""


@dataclass(frozen=True)
class RoundPlan:
    """Everything a participant needs to know to make its steps: round r of the method's section 4."""

    round: int
    lr: float
    """eta in this round: the schedule is the server's, and travels here."""
    eps: float
    directions: int
    """P: directions a step"""
    steps: Mapping[int, int]
    """T_k: local steps of each participant, by client id, ascending."""
    phase: Phase = "training"
    sends: Sends = "scalars"

    def place(self, step: int, direction: int) -> Place:
        """Where direction p of local step t stands in the run."""
        return Place(self.phase, self.round, step, direction)

    def place_after(self, step: int, direction: int) -> Place:
        """The direction that is needed after this one; after the last, the first: for another client, or the server."""
        if direction + 1 < self.directions:
            return self.place(step, direction + 1)
        return self.place(step + 1 if step + 1 < self.longest else 0, 0)

    def along(self, step: int, directions: Directions) -> Iterator[Tensor]:
        """The P directions of local step t, float32 [n] each; the next is prepared while one is used."""
        for p in range(self.directions):
            z = directions(self.place(step, p))
            directions.prepare(self.place_after(step, p))
            yield z

    @property
    def longest(self) -> int:
        """T: the most steps that any participant makes; 0 where nobody was asked."""
        return max(self.steps.values(), default=0)

    @property
    def rate(self) -> np.float32:
        """float32(eta / P): what every update is multiplied by."""
        return np.float32(self.lr / self.directions)


@dataclass(frozen=True)
class Update:
    """What everyone needs of a closed round to follow it."""

    plan: RoundPlan
    aggregate: np.ndarray
    """G_r, float32 [T, P]; in a round of deltas their mean, float32 [n], or empty where none came."""
    share: float = 1.0
    """The weight of the clients that replied over that of all clients, in [0, 1]."""


_PLAIN = ("phase", "round", "lr", "eps", "directions", "sends")
"""The fields of a plan that are JSON values."""


@dataclass(frozen=True)
class RepliesRecord:
    """What stays of a round and of a calibration alike: what was asked, and the replies that came."""

    plan: RoundPlan
    scalars: Mapping[int, np.ndarray]
    """g_k: float32 [steps made, P] by client id, ascending. Clients that did not reply are not in it."""
    inner: np.ndarray
    """c^{t,p} = <grad_p, z^{t,p}>, float64 [T, P]: GradIP is a client's scalars times these. Empty without grad_p."""
    pointers: Mapping[int, int] = field(default_factory=dict, kw_only=True)
    """Local steps that each client had made before, by its own count, by the id of clients that replied."""
    signatures: Mapping[int, bytes] = field(default_factory=dict, kw_only=True)
    """Of the replies, 64 bytes each, by client id. Clients that do not sign are not in it."""

    kind: ClassVar[str]

    @property
    def made(self) -> Mapping[int, int]:
        """Local steps that each client replied with, by client id, ascending."""
        return {client: len(g) for client, g in self.scalars.items()}

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values, arrays as base64 of their little-endian bytes: see docs/formats.md.

        `made` and `pointers` are 0 where no reply came; `scalars` is null where replies are not kept; `signatures` is
        empty where nobody signs.
        """
        plan, made = self.plan, self.made
        none = np.zeros((0, plan.directions), np.float32)
        replies = [none, *(self.scalars.get(client, none) for client in plan.steps)]
        signatures = [base64.b64encode(self.signatures.get(client, b"")).decode() for client in self.scalars]
        return {
            "kind": self.kind,
            **{name: getattr(plan, name) for name in _PLAIN},
            "clients": list(plan.steps),
            "steps": list(plan.steps.values()),
            "made": [made.get(client, 0) for client in plan.steps],
            "pointers": [self.pointers.get(client, 0) for client in plan.steps],
            "scalars": None if made and not self.scalars else pack(np.concatenate(replies)),
            "inner": pack(self.inner, "<f8"),
            "signatures": signatures if self.signatures else [],
        }


@dataclass(frozen=True, kw_only=True)
class RoundRecord(RepliesRecord):
    """A closed round: with theta_0 and the run key, enough to rebuild theta and every client's path."""

    weights: Mapping[int, float]
    """p_k, renormalised over the clients that replied, by client id, ascending; float64."""
    aggregate: np.ndarray
    """As in `Update`."""
    theta_digest: str
    """SHA-256 of theta after the round."""
    unkept: Mapping[int, int] = field(default_factory=dict)
    """Steps of replies that are not kept themselves, by client id, ascending: deltas, and those of hidden clients."""

    kind: ClassVar[str] = "round"

    @property
    def made(self) -> Mapping[int, int]:
        """Local steps that each client replied with, by client id, ascending."""
        return self.unkept or super().made

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {
            **super().to_json(),
            "weights": list(self.weights.values()),
            "aggregate": pack(self.aggregate),
            "theta": self.theta_digest,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RoundRecord":
        """The record that `to_json` wrote. Raises KeyError, TypeError, ValueError: `to_json` did not write it."""
        replies = replies_from_json(values)
        plan, aggregate = replies["plan"], unpack(values["aggregate"])
        if plan.sends == "scalars":
            aggregate = aggregate.reshape(-1 if aggregate.size else plan.longest, plan.directions)
        weights = dict(zip(replies["unkept"] or replies["scalars"], values["weights"], strict=True))
        return cls(**replies, weights=weights, aggregate=aggregate, theta_digest=values["theta"])


def replies_from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `plan`, `scalars`, `inner`, `pointers`, `signatures` and `unkept`, as `to_json` had them.

    Raises:
        KeyError, TypeError, ValueError: `to_json` did not write it.
    """
    directions = values["directions"]
    counts = (values["round"], directions, *values["clients"], *values["steps"], *values["made"])
    if not all(type(number) is int and number < 2**32 for number in counts):
        raise TypeError(f"round {values['round']!r} has counts that are not whole numbers of 32 bits")
    steps = dict(zip(values["clients"], values["steps"], strict=True))
    made = dict(zip(values["clients"], values["made"], strict=True))
    if (least := min(made.values(), default=0)) < 0:
        raise ValueError(f"round {values['round']} has a reply of {least} steps")
    made = {client: count for client, count in made.items() if count}
    pointers = dict(zip(values["clients"], values["pointers"], strict=True))
    if not all(type(pointer) is int and 0 <= pointer < 2**62 for pointer in pointers.values()):
        raise TypeError(f"round {values['round']} has a pointer that is not a number of steps")
    pointers = {client: pointers[client] for client in made}
    scalars: dict[int, np.ndarray] = {}
    if values["scalars"] is not None:
        ends = np.cumsum([0, *made.values()])
        together = unpack(values["scalars"]).reshape(int(ends[-1]), directions)
        spans = zip(made, ends[:-1], ends[1:], strict=True)
        made, scalars = {}, {client: together[first:last] for client, first, last in spans}
    plan = RoundPlan(**{name: values[name] for name in _PLAIN}, steps=steps)
    inner = unpack(values["inner"], "<f8")
    inner = inner.reshape(plan.longest if inner.size else 0, directions)
    encoded = values["signatures"] or [""] * len(scalars)
    signatures = {k: base64.b64decode(text) for k, text in zip(scalars, encoded, strict=True) if text}
    replied = {"scalars": scalars, "pointers": pointers, "signatures": signatures, "unkept": made}
    return {"plan": plan, "inner": inner, **replied}


def pack(values: np.ndarray, kind: str = "<f4") -> str:
    """An array's little-endian bytes as base64."""
    return base64.b64encode(values.astype(kind, copy=False).tobytes()).decode()


def unpack(text: str, kind: str = "<f4") -> np.ndarray:
    """The flat array that `pack` was given, in this machine's byte order."""
    return np.frombuffer(base64.b64decode(text), dtype=kind).astype(kind[1:])
