"""A site's session: frames in, frames out, and the steps of one client in between.

It knows no network. What the site agrees to stands in `site_settings`, what it computes in `site_client`.
"""

import hashlib
import struct
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
import transformers

from meerkat import __version__
from meerkat.algorithm import path
from meerkat.algorithm.directions import PHASES, Phase, Place
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import RoundPlan, Update
from meerkat.errors import Diverged, RunFailed, in_short
from meerkat.federation import frames
from meerkat.federation.frames import Answer, BadFrame, Closed, Frame, Kind, StateParts, Work
from meerkat.federation.offer import Offer
from meerkat.federation.run_ledger import EVALUATION, RunLedger
from meerkat.federation.site_client import SiteClient
from meerkat.federation.site_settings import Refused, SiteConfig, details_in_own_log
from meerkat.progress import one_line, say
from meerkat.record.opening import meaning
from meerkat.record.signatures import RunIdentity, Signer
from meerkat.settings import auto

_QUESTION = struct.Struct("<32s32s32s32sBIId")
"""All that a reply follows from: charter, rows, theta, what the client carries; phase, round, steps, rate."""

_NO_MEMORY = "DefaultCPUAllocator: "
"""How a RuntimeError of torch's reads where the CPU's memory is full."""


class Site:
    """One client of one run, and theta as far as it has followed the run."""

    def __init__(self, offer: Offer, settings: SiteConfig, node: str = "", goes_on: bool = False) -> None:
        """Load everything that the run needs.

        Args:
            node: what the control plane calls this node; the site signs as it.
            goes_on: whether another process of this site took the same offer, and did not refuse its mask.

        Raises:
            Refused: the site has not agreed to what is offered, or has no key to sign with where it must.
            MeerkatError: model, data or key cannot be read, or are not the run's.
        """
        with details_in_own_log("the site's signing key cannot be used"):
            key, former_key = settings.signing_keys()
        if offer.sign and key is None:
            raise Refused(
                "signing_key: the run takes only signed replies; make a key with 'meerkat keygen', name it in site.toml"
            )
        self._client = client = SiteClient(offer, settings, goes_on)
        self.client = settings.client
        self.mask = client.mask
        self.ended = ""
        """Why the session is over; empty while it is not."""
        self.refused = False
        """Whether the coordinator refuses the site: there is no coming back."""
        self.welcomed = False
        """Whether the coordinator admitted the site."""
        self._run = bytes.fromhex(offer.run)
        self._secret = bytes.fromhex(offer.token)
        self._replica = Replica(0, client.theta_0)
        self._theta_0 = self._digest
        self._behind = False
        """Whether its last frame said that its theta is not the coordinator's."""
        self._h_lost = False
        """Whether a round counted scalars of this site that its ledger does not have."""
        self._parts = StateParts(client.rules.vectors * len(client.mask))
        self._signer: Signer | None = None
        rows, run_key, mask = len(client.rows.rows), f"{client.directions.key:032x}", client.mask
        identity = RunIdentity(
            offer.run, offer.sign, run_key, mask.fingerprint, mask.digest(), offer.theta, meaning(client.config)
        )
        self._charter = identity.digest()
        if key is not None:
            self._signer = Signer(identity, self.client, rows, node, key, former_key)
        self._ledger = RunLedger.open(client.config, settings, self._run.hex(), self._charter.hex(), rows)

    def close(self) -> None:
        """Release what the site holds open."""
        self._ledger.close()

    def hello(self) -> bytes:
        """The first frame of a stream: who this is, with the token or, later, the session's secret."""
        values = {
            "examples": len(self._client.rows.rows),
            "model": self.mask.fingerprint,
            "mask": self.mask.digest(),
            "evaluates": self._client.evaluates,
            **({} if self._signer is None else self._signer.credentials),
            "versions": {"meerkat": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        }
        return self._frame(Kind.HELLO, frames.encode_json(values, self._secret))

    def snapshot(self) -> dict[str, int | bytes]:
        """All that changes in a session, for another process to `restore`."""
        return {
            "round": self.round,
            "values": self._replica.pack(self._client.rules).astype("<f4", copy=False).tobytes(),
            "h_lost": int(self._h_lost),
            "behind": int(self._behind),
            "joined": self.joined,
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot."""
        values, rules = np.frombuffer(snapshot["values"], dtype="<f4").astype("f4"), self._client.rules
        self._replica = Replica.unpack(values, int(snapshot["round"]), rules, self._replica.theta.device)
        self._h_lost, self._behind = bool(snapshot["h_lost"]), bool(snapshot["behind"])

    @property
    def round(self) -> int:
        """Rounds that the site's theta has followed."""
        return self._replica.round

    @property
    def _digest(self) -> bytes:
        """SHA-256 of the site's theta."""
        return bytes.fromhex(self._replica.digest)

    @property
    def joined(self) -> bytes:
        """SHA-256 of what the site joined with: its rows, and the joining that it signed."""
        return hashlib.sha256(
            self._client.rows_digest + (self._signer.joining_digest if self._signer else b"")
        ).digest()

    def answer(self, data: bytes) -> bytes | None:
        """The frame that answers one of the coordinator's, or None where none is due.

        A question that comes again gets the same bytes again; another one in its place is refused.

        Raises:
            BadFrame: it is none of this session.
        """
        frame = Frame.decode(data)
        if frame.kind is Kind.REFUSAL and frame.run != self._run:
            raise RunFailed("another run has taken the coordinator's place; its own invitation will come")
        # a coordinator that turns a site away may not know which client it is
        if frame.run != self._run or (frame.client != self.client and frame.kind is not Kind.REFUSAL):
            raise BadFrame("a frame of another run, or for another client")
        if frame.round > (rounds := self._client.config.rounds):
            raise BadFrame(f"a frame of round {frame.round} of a run of {rounds} rounds: not as agreed")
        match frame.kind:
            case Kind.WELCOME:
                self._secret, _ = frames.decode_json(frame.body, 32)
                self.welcomed = True
            case Kind.STATE:
                if self._lacks(frame) and (values := self._parts.add(frame.body)) is not None:
                    self._replace_replica(values, frame)
            case Kind.WORK | Kind.CLOSED | Kind.EVALUATE:
                return self._follow_and_do(frame, Work.decode(frame.body))
            case Kind.END | Kind.REFUSAL:
                self.ended = one_line(frames.decode_json(frame.body)[1].get("why", "")) or "no reason given"
                self.refused = frame.kind is Kind.REFUSAL
            case _:
                raise BadFrame(f"a frame of kind {frame.kind.name.lower()}, which a coordinator does not send")
        return None

    def prepare_next(self) -> None:
        """Prepare what the next round needs, while the answer travels."""
        self._client.directions.prepare(Place("training", self.round + 1, 0, 0))

    def refusal(self, why: str) -> bytes:
        """The frame that says that the site takes no further part, and why."""
        return self._frame(Kind.REFUSAL, frames.encode_json({"why": one_line(why)}))

    def _follow_and_do(self, frame: Frame, work: Work) -> bytes | None:
        """Catch up with the rounds closed since, then do what is asked, if theta is the one that is meant."""
        for number, closed in enumerate(work.closed, frame.round - len(work.closed)):
            if number == self.round:
                self._follow(closed)
        known = (self.round, self._digest) == (frame.round, frame.digest)
        self._behind = not known or (self._h_lost and frame.kind is Kind.WORK)
        if self._behind:
            return self._frame(Kind.BEHIND)
        try:
            if frame.kind is Kind.WORK:
                return self._work(work)
            return self._evaluate() if frame.kind is Kind.EVALUATE else None
        except Diverged:
            failure = "diverged"
        except (MemoryError, RuntimeError) as error:  # torch's own; its CPU allocator has no kind for itself
            memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY in str(error)
            failure = "out of memory" if memory else "error"
            say(f"client {self.client}: cannot make its steps ({in_short(error)})")
        return self._frame(Kind.FAILED, frames.encode_json({"why": failure}))

    def _plan(self, lr: float, steps: int, phase: Phase = "training") -> RoundPlan:
        config = self._client.config
        return RoundPlan(self.round, lr, auto.number(config.eps), config.directions, {self.client: steps}, phase)

    def _follow(self, closed: Closed) -> None:
        """Move as the server did when it closed the round that this site's replica stands at."""
        (steps, directions), config = closed.aggregate.shape, self._client.config
        if directions != config.directions or steps > config.local_steps:
            raise BadFrame(
                f"a round of {steps} steps of {directions} directions, in a run of {config.local_steps} steps of "
                f"{config.directions} directions"
            )
        if not (np.isfinite([closed.lr, closed.share]).all() and np.isfinite(closed.aggregate).all()):
            raise BadFrame("a closed round with a number that is not finite")
        update = Update(self._plan(closed.lr, steps), closed.aggregate, closed.share)
        counted = None
        if closed.counted and self._client.rules.client.carries:
            entry = self._ledger.entry("training", self.round)
            if entry is not None and entry.reply is not None:
                counted = Answer.decode(entry.reply).scalars
            else:
                self._h_lost = True
        self._replica = self._replica.follow(update, self._client.rules, self._client.directions, counted)

    def _lacks(self, frame: Frame) -> bool:
        """Whether a whole theta is one that the site lacks: of a later round than its own, or after it was behind.

        Raises:
            BadFrame: it is another theta of the site's round, or of an earlier one, or not the offered theta_0.
        """
        if frame.round == 0 and frame.digest != self._theta_0:
            raise BadFrame("a theta to begin with that is not the offered one: not as agreed")
        if frame.round > self.round or (frame.round == self.round and self._behind):
            return True
        if (frame.round, frame.digest) != (self.round, self._digest):
            raise BadFrame(f"a theta of round {frame.round} that nobody asked for, in round {self.round}")
        return False

    def _replace_replica(self, values: np.ndarray, frame: Frame) -> None:
        """Take over a whole theta, if it is the one that was announced."""
        if not np.isfinite(values).all():
            raise BadFrame("a theta that is not finite: not as agreed")
        replica = Replica.unpack(values, frame.round, self._client.rules, self._replica.theta.device)
        if replica.digest == frame.digest.hex():
            self._replica, self._behind, self._h_lost = replica, False, False

    def _work(self, work: Work) -> bytes:
        self._check_asked(work)
        plan = self._plan(work.lr, work.steps, work.phase)
        self._ledger.begin_at(work.pointer)

        def compute(pointer: int) -> bytes:
            scalars = self._client.steps(self._replica, plan, pointer, self._ledger.mechanism)
            return Answer(work.phase, pointer, scalars).encode()

        reply = self._reply(work.phase, compute, work.steps, work.lr)
        if self._signer is None:
            return self._frame(Kind.REPLY, reply)
        _, pointer, scalars = Answer.decode(reply)
        return self._frame(Kind.SIGNED, self._signer.sign(plan, self._digest, pointer, scalars) + reply)

    def _reply(
        self, phase: Phase | Literal["evaluation"], compute: Callable[[int], bytes], steps: int = 0, lr: float = 0.0
    ) -> bytes:
        """The reply to a question, which is known by the SHA-256 of all that its reply follows from."""
        h = self._replica.h
        carried = bytes(32) if h is None or not h.any() else bytes.fromhex(path.digest(h))
        number = 255 if phase == EVALUATION else PHASES[phase]  # an evaluation has no directions
        facts = (self._charter, self._client.rows_digest, self._digest, carried, number, self.round, steps, lr)
        question, files = hashlib.sha256(_QUESTION.pack(*facts)).hexdigest(), self._client.files_digest
        return self._ledger.answer(phase, self.round, question, self._replica.digest, steps, compute, files)

    def _check_asked(self, work: Work) -> None:
        """Raise BadFrame unless so many steps were agreed to."""
        config = self._client.config
        most = config.local_steps
        if work.phase == "calibration":
            every = config.recalibrate_every
            due = self.round == 0 or (every and self.round % every == 0)
            most = config.calibration_steps if config.stopping != "none" and due else 0
        if not 0 < work.steps <= most or self.round >= config.rounds:
            raise BadFrame(f"{work.steps} steps of {work.phase} asked for in round {self.round}: not as agreed")

    def _evaluate(self) -> bytes:
        if not self._client.evaluates:
            raise BadFrame("asked to evaluate, which this site has not agreed to (its site.toml, evaluate)")

        def compute(_: int) -> bytes:
            return frames.encode_score(*self._client.evaluate(self._replica))

        return self._frame(Kind.SCORE, self._reply(EVALUATION, compute))

    def _frame(self, kind: Kind, body: bytes = b"") -> bytes:
        return Frame(kind, self._run, self.client, self.round, self._digest, body).encode()
