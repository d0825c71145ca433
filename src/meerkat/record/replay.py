"""A run as its record tells it: the records after the opening, each checked against what it must be.

Resuming and auditing replay through the same class, so neither goes on from anything that the other
would refuse.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from meerkat.algorithm import calibration
from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.gradip import inner_products
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.robust import norm
from meerkat.algorithm.rounds import RoundPlan, RoundRecord, Scalars, check_reply
from meerkat.algorithm.server import ServerConfig, ServerState, aggregate, client_weights, open_round, replay
from meerkat.errors import DAMAGE, RunFailed, in_short
from meerkat.progress import one_line
from meerkat.record.members import KeyRevocation, Member, Members, are_credentials
from meerkat.record.signatures import BadSignature, fingerprint


class Replay:
    """A log's records after the opening, gone through one by one from theta_0, each checked as it comes.

    Every plan is compared with what the settings call for, every signature is checked, and every weight, aggregate,
    inner product, decision and digest of theta is computed anew. Iterating gives each record with the state before it.
    What is wrong is told with its line, and who signed it.
    """

    def __init__(
        self,
        records: Iterable[dict[str, Any]],
        theta: Tensor,
        settings: ServerConfig,
        directions: Directions,
        gradient: Tensor | None,
        log: Path,
        register: Members,
        revoked: Mapping[str, int] | None = None,
    ) -> None:
        """What to go through.

        Args:
            records: the log's from its second line on.
            register: of a run that nobody has joined.
            revoked: fingerprint -> the round from which a key is revoked, beside those that the log says are.
        """
        self.state = ServerState(Replica(0, theta))
        """After the records gone through so far."""
        self.closed = False
        """Whether the closing record was reached."""
        self.settings = settings
        """What rounds are opened from, with the clients that joined so far."""
        self.nodes: dict[int, str] = {}
        """The node that each client id of a federation belongs to."""
        self.register = register
        """Who signs with which key, so far."""
        self.replies = 0
        """Replies in all, calibrations' among them."""
        self.signed: Counter[tuple[int, str]] = Counter()
        """Signed replies by (client, fingerprint of its key)."""
        self._records = records
        self._revoked = revoked or {}
        self._joining = not settings.examples
        self._directions = directions
        self._gradient = gradient
        self._file = log
        self._line, self._what = 1, "open"

    def run(self) -> "Replay":
        """Go through all records.

        Raises:
            RunFailed: one is not what it must be.
        """
        for _ in self:
            pass
        return self

    def __iter__(self) -> Iterator[tuple[ServerState, RoundRecord | CalibrationRecord]]:
        for held in self._records:
            before = self.state
            record = self._checked(held)
            if record is not None:
                yield before, record

    def read(self, text: bytes) -> str:
        """What a line that breaks the chain tells, taken as the next record: what it is, whose, and what is wrong."""
        try:
            held = json.loads(text)
            if not isinstance(held, dict):
                raise ValueError
            self._checked(held)
        except (ValueError, RecursionError):
            return "nothing that can be read"
        except RunFailed as error:
            return f"{self._what}: {str(error).removeprefix(f'{self._log}: ').partition('; ')[0]}"
        return f"{self._what}: what it says agrees, its hash does not"

    @property
    def _log(self) -> str:
        """Where in the log, what stands there and who signed it: before every complaint."""
        return f"{self._file}, line {self._line} ({self._what})"

    def _checked(self, held: dict[str, Any]) -> RoundRecord | CalibrationRecord | None:
        self._line += 1
        self._what = _in_words(held)
        for name, since in self._revoked.items():
            if since <= self.state.round:
                self.register.revoke(KeyRevocation(since, name))
        try:
            return self._step(held)
        except BadSignature as error:
            raise RunFailed(f"{self._log}: {error}; what stands before it is sound, trust nothing after it") from None
        except DAMAGE as error:
            said = in_short(error)
            raise RunFailed(f"{self._log}: a record is damaged ({said}); restore the file from a copy") from None

    def _step(self, held: dict[str, Any]) -> RoundRecord | CalibrationRecord | None:
        state, settings, log = self.state, self.settings, self._log
        if self.closed:
            raise RunFailed(f"{log}: records follow the closing one; the run is damaged")
        kind = held.get("kind")
        if kind == "close":
            self.closed = True
            agree(log, "the number of rounds", str(held["rounds"]), str(state.round))
            agree(log, "the number of rounds", str(settings.rounds), str(state.round))
            agree(log, "the last theta", held["theta"], state.replica.digest)
            return None
        if kind == "join" and self._joining:
            self._join(held)
            return None
        if kind == "revoke" and self._joining:
            self._revoke(held)
            return None
        if kind not in ("round", "calibration"):
            raise RunFailed(f"{log}: a record of unknown kind {kind!r}; use the version that wrote it")
        if state.round == settings.rounds:
            raise RunFailed(f"{log}: holds more rounds than config.toml asks for; restore the folder from a copy")
        expected = "calibration" if calibration.due(state, settings) else "round"
        agree(log, f"what stands at round {state.round}", kind, expected)
        return self._calibration(held) if kind == "calibration" else self._round(held)

    def _join(self, held: dict[str, Any]) -> None:
        join = Member.from_json(held)
        log, client = self._log, join.client
        if client >= self.settings.clients:
            raise RunFailed(f"{log}: client {client} joined, of {self.settings.clients} clients; restore a copy")
        agree(log, f"the round that client {client} joined before", str(join.round), str(self.state.round))
        agree(log, f"the node of client {client}", join.node, self.nodes.get(client, join.node))
        self.register.admit(join)
        self._check_form(join.to_json(), held)
        self.settings = join.added_to(self.settings)
        self.nodes[join.client] = join.node

    def _revoke(self, held: dict[str, Any]) -> None:
        revocation = KeyRevocation.from_json(held)
        agree(self._log, "the round that a key is revoked before", str(revocation.round), str(self.state.round))
        self.register.revoke(revocation)
        self._check_form(revocation.to_json(), held)

    def _available(self, plan: RoundPlan, where: str) -> list[int] | None:
        """Whom a plan could ask. In a federation that is who was there, and where clients are hidden who was drawn: the
        plan itself is the witness.
        """
        if not self._joining and self.settings.aggregation.keeps_replies:
            return None
        if strangers := sorted(plan.steps.keys() - self.settings.examples.keys()):
            raise RunFailed(f"{self._log}: {where} asks client {strangers[0]}, who never joined; restore a copy")
        return list(plan.steps)

    def _round(self, held: dict[str, Any]) -> RoundRecord:
        state, settings, log = self.state, self.settings, self._log
        where, record = f"round {state.round}", RoundRecord.from_json(held)
        available = self._available(record.plan, where)
        agree(log, f"the plan of {where}", str(record.plan), str(open_round(state, settings, available)))
        log = self._check_replies(record, where)
        agree(log, f"the weights of {where}", str(record.weights), str(client_weights(settings, [*record.made])))
        self._check_aggregate(record, where)
        self._check_inner(record.plan, record.inner, where)
        self.state = replay(state, record, settings, self._directions)
        agree(log, f"theta after {where}", record.theta_digest, self.state.replica.digest)
        self._check_form(record.to_json(), held)
        return record

    def _check_aggregate(self, record: RoundRecord, where: str) -> None:
        """Compute the aggregate anew. Of noise, and of deltas, only the form can be checked."""
        settings, log, plan = self.settings, self._log, record.plan
        kept = "kept" if record.scalars or not record.made else "not kept"
        if plan.sends == "scalars" and settings.aggregation.keeps_replies:
            agree(log, f"the scalars of {where}", kept, "kept")
            replies = [Scalars(k, g) for k, g in record.scalars.items()]
            again = aggregate(replies, record.weights, plan, settings.aggregation, settings.step_limit)
            agree(log, f"the aggregate of {where}", _hex(record.aggregate), _hex(again))
            return
        if record.made:
            agree(log, f"the scalars of {where}", kept, "not kept")
        asked = {client: plan.steps[client] for client in record.made}
        agree(log, f"the steps made in {where}", str(dict(record.made)), str(asked))
        deltas = len(self.state.theta) if record.made else 0
        form = (deltas,) if plan.sends == "delta" else (settings.local_steps, settings.directions)
        agree(log, f"the aggregate's form in {where}", str(record.aggregate.shape), str(form))
        length = float(plan.rate) * norm(record.aggregate) if plan.sends == "scalars" else 0.0
        if not length <= settings.step_limit * (1 + 1e-6):  # or it is not a number
            raise RunFailed(f"{log}: the aggregate of {where} is longer than a step may be; restore a copy")

    def _calibration(self, held: dict[str, Any]) -> CalibrationRecord:
        state, settings, log = self.state, self.settings, self._log
        where, record = f"the calibration before round {state.round}", CalibrationRecord.from_json(held)
        available = self._available(record.plan, where)
        agree(
            log, f"the plan of {where}", str(record.plan), str(calibration.open_calibration(state, settings, available))
        )
        log = self._check_replies(record, where)
        self._check_inner(record.plan, record.inner, where)
        again = calibration.decide(state, record.plan, record.scalars, record.inner, settings)
        agree(log, f"who stops early after {where}", str(record.early_stopped), str(again.early_stopped))
        agree(log, f"who is extreme in {where}", str(record.selection.extreme), str(again.selection.extreme))
        for part in fields(record.selection):
            then, now = getattr(record.selection, part.name), getattr(again.selection, part.name)
            # logarithms may differ in their last bits between machines
            if np.shape(then) != np.shape(now) or not np.allclose(then, now, rtol=1e-9, atol=0):
                agree(log, f"{part.name} of {where}", str(then), str(now))
        self.state = calibration.replay(state, record)
        self._check_form(record.to_json(), held)
        return record

    def _check_replies(self, record: RoundRecord | CalibrationRecord, where: str) -> str:
        """Check a record's replies and signatures; where it stands from now on, with those who signed."""
        signed = []
        for client, scalars in record.scalars.items():
            self._check_reply(client, record)
            try:
                check_reply(record.plan, client, scalars)
            except ValueError as error:
                raise RunFailed(f"{self._log}: client {client} in {where}: {error}; restore a copy") from None
            if (key := self.register.keys.get(client)) is not None:
                signed.append((client, fingerprint(key)))
        self.replies += len(record.scalars)
        self.signed.update(signed)
        if signed:
            names = ", ".join(f"client {client} with {name}" for client, name in signed[:_NAMED])
            more = f" and {len(signed) - _NAMED} more" if len(signed) > _NAMED else ""
            self._what += f", signed by {names}{more}"
        return self._log

    def _check_reply(self, client: int, record: RoundRecord | CalibrationRecord) -> None:
        scalars, signature = record.scalars[client], record.signatures.get(client, b"")

        def check(client: int) -> None:
            pointer = self.state.steps_made.get(client, 0)
            theta = bytes.fromhex(self.state.replica.digest)
            self.register.check_reply(client, record.plan, theta, pointer, scalars, signature)

        try:
            check(client)
        except BadSignature as error:
            for other in (k for k in record.plan.steps if signature and k != client and k in self.register.keys):
                try:
                    check(other)
                except BadSignature:
                    continue
                name = fingerprint(self.register.keys[other])
                raise BadSignature(f"{error}, but what client {other}'s key {name} did") from None
            raise

    def _check_form(self, again: dict[str, Any], held: dict[str, Any]) -> None:
        """Raise RunFailed unless a record is written as this version writes it: nothing more, nothing otherwise."""
        agree(self._log, "the record's form", *(json.dumps(each, sort_keys=True) for each in (held, again)))

    def _check_inner(self, plan: RoundPlan, inner: np.ndarray, where: str) -> None:
        gradient = self._gradient if self.settings.aggregation.keeps_replies else None
        steps = plan.longest if gradient is not None and plan.sends == "scalars" else 0
        # summed in an order that may depend on the device: equal but for float64's last bits
        scale = 0.0 if gradient is None else 1e-9 * gradient.double().norm().item()
        # as many as the record holds are computed, not as many as it claims
        if len(inner) != steps or not np.allclose(
            inner, inner_products(gradient, plan, self._directions), rtol=0, atol=scale
        ):
            raise RunFailed(f"{self._log}: the inner products of {where} are not its directions'; restore a copy")


_NAMED = 3
"""Signers that are named in a complaint about all of a record."""


def _in_words(held: dict[str, Any]) -> str:
    """What a record says it is, in few words."""
    kind, key = held.get("kind"), held.get("key")
    said = f"{kind} {held.get('round')}" if kind in ("round", "calibration") else f"{kind}"
    if kind == "join":
        said = f"join of client {held.get('client')}"
        if are_credentials(key, held.get("signature"), held.get("handover")) and isinstance(key, str) and key:
            said += f", key {fingerprint(bytes.fromhex(key))}"
    return one_line(said)


def _hex(values: np.ndarray) -> str:
    return values.astype("<f4").tobytes().hex()


def agree(file: Path | str, what: str, recorded: str, found: str) -> None:
    """Raise RunFailed unless what a file records is what was found."""
    if recorded != found:
        shorter = min(len(recorded), len(found))
        at = next((i for i, (a, b) in enumerate(zip(recorded, found, strict=False)) if a != b), shorter)
        then, now = (text[max(0, at - 16) : at + 24] for text in (recorded, found))
        raise RunFailed(
            f"{file}: {what}: recorded '{then}', found '{now}'; the run is damaged: restore its folder from a copy"
        )
