"""A run from its log: the records after the opening, each checked against what it must be.

Resuming and auditing use the same class, so neither accepts anything that the other would refuse.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import InitVar, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from meerkat.algorithm import calibration
from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.gradip import inner_products
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.replies import Scalars, check_reply
from meerkat.algorithm.robust import norm
from meerkat.algorithm.rounds import RoundPlan, RoundRecord
from meerkat.algorithm.server import ServerConfig, ServerState, aggregate, client_weights, open_round, replay
from meerkat.errors import DAMAGE, RunFailed, in_short
from meerkat.progress import one_line
from meerkat.record.members import KeyRevocation, Member, Members
from meerkat.record.signatures import BadSignature, fingerprint

_NAMED = 3
"""Signers that are named in a message about a whole record."""


@dataclass(eq=False)
class Replay:
    """A log's records after the opening, checked one by one from theta_0 on.

    Every plan is compared with what the settings call for, every signature is checked, and every weight, aggregate,
    inner product, decision and digest of theta is computed anew. Iterating gives each record with the state before it.
    An error names the line and who signed it.
    """

    records: Iterable[dict[str, Any]]
    """The log's from its second line on."""
    theta_0: InitVar[Tensor]
    settings: ServerConfig
    """What rounds are opened from, with the clients that joined so far."""
    directions: Directions
    gradient: Tensor | None
    log: Path
    members: Members
    """Who signs with which key, so far: nobody at first."""
    revoked: Mapping[str, int] | None = None
    """Fingerprint -> the round from which a key is revoked, beside those in the log."""

    def __post_init__(self, theta_0: Tensor) -> None:
        self.state = ServerState(Replica(0, theta_0))
        """After the records checked so far."""
        self.closed = False
        """Whether the closing record was reached."""
        self.replies = 0
        """Replies in all, calibrations' among them."""
        self.signed: Counter[tuple[int, str]] = Counter()
        """Signed replies by (client, fingerprint of its key)."""
        self._joining = not self.settings.examples
        self._line, self._what = 1, "open"

    def run(self) -> "Replay":
        """Check all records. Raises RunFailed if one is not what it must be."""
        for _ in self:
            pass
        return self

    def __iter__(self) -> Iterator[tuple[ServerState, RoundRecord | CalibrationRecord]]:
        for values in self.records:
            before = self.state
            record = self._checked(values)
            if record is not None:
                yield before, record

    def read(self, text: bytes) -> str:
        """What a line that breaks the chain holds, taken as the next record: its kind, its signers, what is wrong."""
        try:
            self._checked(json.loads(text))
        except RunFailed as error:
            return f"{self._what}: {str(error).removeprefix(f'{self._position}: ').partition('; ')[0]}"
        except (AttributeError, ValueError, RecursionError):
            return "nothing that can be read"
        return f"{self._what}: what it says agrees, its hash does not"

    @property
    def _position(self) -> str:
        """Where in the log, what stands there and who signed it: the start of every error."""
        return f"{self.log}, line {self._line} ({self._what})"

    def _agree(self, what: str, recorded: object, expected: object) -> None:
        agree(self._position, what, recorded, expected)

    def _checked(self, values: dict[str, Any]) -> RoundRecord | CalibrationRecord | None:
        self._line += 1
        self._what = _description(values)
        for name, since in (self.revoked or {}).items():
            if since <= self.state.round:
                self.members.revoke(KeyRevocation(since, name))
        try:
            return self._step(values)
        except BadSignature as error:
            raise RunFailed(
                f"{self._position}: {error}; what stands before it is sound, trust nothing after it"
            ) from None
        except DAMAGE as error:
            reason = in_short(error)
            raise RunFailed(f"{self._position}: a record is damaged ({reason}); restore the file from a copy") from None

    def _step(self, values: dict[str, Any]) -> RoundRecord | CalibrationRecord | None:
        state, settings, kind = self.state, self.settings, values.get("kind")
        if self.closed:
            raise RunFailed(f"{self._position}: records follow the closing one; the run is damaged")
        if kind == "close":
            self.closed = True
            for rounds in (values["rounds"], settings.rounds):
                self._agree("the number of rounds", rounds, state.round)
            self._agree("the last theta", values["theta"], state.replica.digest)
            self._check_form(closing_record(state), values)
        elif kind == "join" and self._joining:
            self._join(values)
        elif kind == "revoke" and self._joining:
            revocation = KeyRevocation.from_json(values)
            self._agree("the round that a key is revoked before", revocation.round, state.round)
            self.members.revoke(revocation)
            self._check_form(revocation.to_json(), values)
        elif kind not in ("round", "calibration"):
            raise RunFailed(f"{self._position}: a record of unknown kind {kind!r}; use the version that wrote it")
        elif state.round == settings.rounds:
            raise RunFailed(
                f"{self._position}: holds more rounds than config.toml asks for; restore the folder from a copy"
            )
        else:
            expected = "calibration" if calibration.due(state, settings) else "round"
            self._agree(f"what stands at round {state.round}", kind, expected)
            return self._replies(values)
        return None

    def _join(self, values: dict[str, Any]) -> None:
        member, clients = Member.from_json(values), self.settings.clients
        client = member.client
        if client >= clients:
            raise RunFailed(f"{self._position}: client {client} joined, of {clients} clients; restore a copy")
        self._agree(f"the round that client {client} joined before", member.round, self.state.round)
        self.members.admit(member)
        self._check_form(member.to_json(), values)
        self.settings = member.added_to(self.settings)

    def _replies(self, values: dict[str, Any]) -> RoundRecord | CalibrationRecord:
        """A round or a calibration."""
        record: RoundRecord | CalibrationRecord
        kind, state, settings = values["kind"], self.state, self.settings
        if kind == "round":
            where, record, opened = f"round {state.round}", RoundRecord.from_json(values), open_round
        else:
            where, record = f"the calibration before round {state.round}", CalibrationRecord.from_json(values)
            opened = calibration.open_calibration
        available = self._available(record.plan, where)
        self._agree(f"the plan of {where}", record.plan, opened(state, settings, available))
        self._check_replies(record, where)
        if not self._joining:  # sites count for themselves
            self._agree(
                f"the pointers of {where}", record.pointers, {k: state.steps_made.get(k, 0) for k in record.pointers}
            )
        self._check_inner(record.plan, record.inner, where)
        if isinstance(record, RoundRecord):
            self._agree(f"the weights of {where}", record.weights, client_weights(settings, [*record.made]))
            self._check_aggregate(record, where)
            self.state = replay(state, record, settings, self.directions)
            self._agree(f"theta after {where}", record.theta_digest, self.state.replica.digest)
        else:
            self._check_decision(record, where)
            self.state = calibration.replay(state, record)
        self._check_form(record.to_json(), values)
        return record

    def _available(self, plan: RoundPlan, where: str) -> list[int] | None:
        """The clients that a plan could ask; None for all.

        The plan is the only witness of who was present in a federation, or drawn where clients are hidden.
        """
        if not self._joining and self.settings.aggregation.keeps_replies:
            return None
        if strangers := sorted(plan.steps.keys() - self.settings.examples.keys()):
            raise RunFailed(f"{self._position}: {where} asks client {strangers[0]}, who never joined; restore a copy")
        return list(plan.steps)

    def _check_replies(self, record: RoundRecord | CalibrationRecord, where: str) -> None:
        """Check a record's replies and signatures. From then on errors about the record name who signed it."""
        signed = []
        for client, scalars in record.scalars.items():
            self._check_signature(client, record)
            try:
                check_reply(record.plan, client, scalars)
            except ValueError as error:
                raise RunFailed(f"{self._position}: client {client} in {where}: {error}; restore a copy") from None
            if (key := self.members.keys.get(client)) is not None:
                signed.append((client, fingerprint(key)))
        self.replies += len(record.scalars)
        self.signed.update(signed)
        if signed:
            names = ", ".join(f"client {client} with {name}" for client, name in signed[:_NAMED])
            more = f" and {len(signed) - _NAMED} more" if len(signed) > _NAMED else ""
            self._what += f", signed by {names}{more}"

    def _check_signature(self, client: int, record: RoundRecord | CalibrationRecord) -> None:
        """Raise BadSignature unless a reply is signed as it must be, with the client that did sign it, if any."""
        keys, signature = self.members.keys, record.signatures.get(client, b"")
        theta = bytes.fromhex(self.state.replica.digest)

        def problem(signer: int) -> BadSignature | None:
            pointer, scalars = record.pointers[client], record.scalars[client]
            try:
                self.members.check_reply(signer, record.plan, theta, pointer, scalars, signature)
            except BadSignature as error:
                return error
            return None

        if (error := problem(client)) is not None:
            others = (k for k in record.plan.steps if signature and k != client and k in keys)
            if (other := next((k for k in others if problem(k) is None), None)) is not None:
                raise BadSignature(f"{error}, but what client {other}'s key {fingerprint(keys[other])} did")
            raise error

    def _check_aggregate(self, record: RoundRecord, where: str) -> None:
        """Compute the aggregate anew. Of noise, and of deltas, only the form can be checked."""
        settings, plan = self.settings, record.plan
        kept = "kept" if record.scalars or not record.made else "not kept"
        if plan.sends == "scalars" and settings.aggregation.keeps_replies:
            self._agree(f"the scalars of {where}", kept, "kept")
            # first of all: a record is as large as its aggregate, but a plan may ask for any number of steps
            self._agree(f"the aggregate's form in {where}", record.aggregate.shape, (plan.longest, plan.directions))
            replies = [Scalars(k, g) for k, g in record.scalars.items()]
            again = aggregate(replies, record.weights, plan, settings.aggregation, settings.step_limit)
            self._agree(f"the aggregate of {where}", _hex(record.aggregate), _hex(again))
            return
        if record.made:
            self._agree(f"the scalars of {where}", kept, "not kept")
        asked = {client: plan.steps[client] for client in record.made}
        self._agree(f"the steps made in {where}", dict(record.made), asked)
        deltas = len(self.state.theta) if record.made else 0
        form = (deltas,) if plan.sends == "delta" else (settings.local_steps, settings.directions)
        self._agree(f"the aggregate's form in {where}", record.aggregate.shape, form)
        length = float(plan.rate) * norm(record.aggregate) if plan.sends == "scalars" else 0.0
        if not length <= settings.step_limit * (1 + 1e-6):  # or it is not a number
            raise RunFailed(f"{self._position}: the aggregate of {where} is longer than a step may be; restore a copy")

    def _check_decision(self, record: CalibrationRecord, where: str) -> None:
        again = calibration.decide(self.state, record.plan, record.scalars, record.inner, self.settings)
        self._agree(f"who stops early after {where}", record.early_stopped, again.early_stopped)
        self._agree(f"who is extreme in {where}", record.selection.extreme, again.selection.extreme)
        for part in fields(record.selection):
            then, now = getattr(record.selection, part.name), getattr(again.selection, part.name)
            # logarithms may differ in their last bits between machines, but in neither type nor sign
            same = np.shape(then) == np.shape(now) and _kinds(then) == _kinds(now)
            if not same or not np.allclose(then, now, rtol=1e-9, atol=0):
                self._agree(f"{part.name} of {where}", json.dumps(then), json.dumps(now))

    def _check_inner(self, plan: RoundPlan, inner: np.ndarray, where: str) -> None:
        gradient = self.gradient if self.settings.aggregation.keeps_replies else None
        steps = plan.longest if gradient is not None and plan.sends == "scalars" else 0
        # summed in an order that may depend on the device: equal but for float64's last bits
        scale = 0.0 if gradient is None else 1e-9 * gradient.double().norm().item()
        # as many as the record holds are computed, not as many as it claims
        if len(inner) != steps or not np.allclose(
            inner, inner_products(gradient, plan, self.directions), rtol=0, atol=scale
        ):
            raise RunFailed(f"{self._position}: the inner products of {where} are not its directions'; restore a copy")

    def _check_form(self, expected: dict[str, Any], values: dict[str, Any]) -> None:
        """Raise RunFailed unless a record is written as this version writes it: `LogReader` has compared the bytes."""
        self._agree("the record's form", *map(json.dumps, (values, expected)))


def closing_record(state: ServerState) -> dict[str, Any]:
    """The record that ends a log, as JSON values."""
    return {"kind": "close", "rounds": state.round, "theta": state.replica.digest}


def _description(values: dict[str, Any]) -> str:
    """A record's kind and number, in few words."""
    kind = values.get("kind")
    if kind != "join":
        return one_line(f"{kind} {values.get('round')}" if kind in ("round", "calibration") else kind)
    key = ""
    with suppress(*DAMAGE):
        key = Member.from_json(values).key
    named = f", key {fingerprint(bytes.fromhex(key))}" if key else ""
    return one_line(f"join of client {values.get('client')}{named}")


def _kinds(value: float | tuple[float, ...]) -> list[tuple[type, bool]]:
    """Of a number, or of each in a tuple: its type, and whether a minus stands before it. 1, 1.0 and true differ."""
    numbers = value if isinstance(value, tuple) else (value,)
    return [(type(number), str(number).startswith("-")) for number in numbers]


def _hex(values: np.ndarray) -> str:
    return values.astype("<f4").tobytes().hex()


def agree(file: Path | str, what: str, recorded: object, expected: object) -> None:
    """Raise RunFailed unless what a file records is what was expected, as text."""
    then, now = str(recorded), str(expected)
    if then != now:
        shorter = min(len(then), len(now))
        at = next((i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), shorter)
        shown = [text[max(0, at - 16) : at + 24] for text in (then, now)]
        raise RunFailed(
            f"{file}: {what}: recorded '{shown[0]}', found '{shown[1]}'; the run is damaged: restore its folder "
            "from a copy"
        )
