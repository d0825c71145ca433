"""A site's session: frames in, frames out, and the steps of one client in between.

It knows no network. What the site agrees to stands in `site_settings`, what it computes in `site_client`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from meerkat import __version__
from meerkat.algorithm.directions import Phase, Place
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import RoundPlan, Update
from meerkat.errors import Diverged, RunFailed
from meerkat.federation import frames
from meerkat.federation.frames import BadFrame, Closed, Frame, Kind, StateParts, Work
from meerkat.federation.ledger import RunAccountant
from meerkat.federation.offer import Offer
from meerkat.federation.site_client import SiteClient
from meerkat.federation.site_settings import Refused, SiteConfig, details_in_own_log
from meerkat.progress import one_line
from meerkat.record.opening import meaning
from meerkat.record.signatures import RunIdentity, Signer
from meerkat.settings import auto


class _Answer(NamedTuple):
    """The last reply, to be given again."""

    about: tuple[int, str, bytes]
    """The round, phase and SHA-256 of theta that it was asked for."""
    scalars: np.ndarray
    frame: bytes


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
                "signing_key: the run takes signed replies alone; 'meerkat keygen' makes one, name it in site.toml"
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
        self._h_lost = False
        """Whether a round counted scalars of this site that an earlier process had, and this one does not."""
        self._parts = StateParts(client.rules.vectors * len(client.mask))
        self._answered: dict[str, tuple[int, bytes]] = {}
        """By what was asked: the last round that it was answered in, and theta's digest there."""
        self._last: _Answer | None = None
        self._signer: Signer | None = None
        rows = len(client.rows.rows)
        if key is not None:
            run_key, mask = f"{client.directions.key:032x}", client.mask
            identity = RunIdentity(
                offer.run, offer.sign, run_key, mask.fingerprint, mask.digest(), offer.theta, meaning(client.config)
            )
            self._signer = Signer(identity, self.client, rows, node, key, former_key)
        self._accountant = RunAccountant.open(client.config, settings, self._run.hex(), rows)

    def close(self) -> None:
        """Release what the site holds open."""
        if self._accountant:
            self._accountant.ledger.close()

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
            "last": b"" if self._last is None else self._last.frame,
            "h_lost": int(self._h_lost),
            "joined": self.joined,
            **{f"round_{what}": at for what, (at, _) in self._answered.items()},
            **{f"digest_{what}": digest for what, (_, digest) in self._answered.items()},
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot."""
        self._replace_replica(np.frombuffer(snapshot["values"], dtype="<f4").astype("f4"), int(snapshot["round"]))
        self._h_lost = bool(snapshot["h_lost"])
        asked = [name.removeprefix("round_") for name in snapshot if name.startswith("round_")]
        self._answered = {what: (int(snapshot[f"round_{what}"]), snapshot[f"digest_{what}"]) for what in asked}
        if snapshot["last"] and snapshot["joined"] == self.joined:  # what another key signed is void
            last = Frame.decode(snapshot["last"])
            phase, scalars, _ = frames.decode_reply(last)
            self._last = _Answer((last.round, phase, self._answered[phase][1]), scalars, snapshot["last"])

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
        """SHA-256 of the joining that the site signed, with its rows and key; empty where it does not sign."""
        return b"" if self._signer is None else self._signer.joining_digest

    def answer(self, data: bytes) -> bytes | None:
        """The frame that answers one of the coordinator's, or None where none is due.

        A request that comes again, about the same round and theta, gets the same bytes again.

        Raises:
            BadFrame: it is none of this session.
        """
        frame = Frame.decode(data)
        if frame.kind is Kind.REFUSAL and frame.run != self._run:
            raise RunFailed("another run has taken the coordinator's place; its own invitation will come")
        # a coordinator that turns a site away may not know which client it is
        if frame.run != self._run or (frame.client != self.client and frame.kind is not Kind.REFUSAL):
            raise BadFrame("a frame of another run, or for another client")
        match frame.kind:
            case Kind.WELCOME:
                self._secret, _ = frames.decode_json(frame.body, 32)
                self.welcomed = True
            case Kind.STATE:
                if (values := self._parts.add(frame.body)) is not None:
                    self._replace_replica(values, frame.round)
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
        return self._frame(Kind.REFUSAL, frames.encode_json({"why": why}))

    def _follow_and_do(self, frame: Frame, work: Work) -> bytes | None:
        """Catch up with the rounds closed since, then do what is asked, if theta is the one that is meant."""
        for number, closed in enumerate(work.closed, frame.round - len(work.closed)):
            if number == self.round:
                self._follow(closed)
        if (self.round, self._digest) != (frame.round, frame.digest) or (self._h_lost and frame.kind is Kind.WORK):
            return self._frame(Kind.BEHIND)
        try:
            if frame.kind is Kind.WORK:
                return self._work(work)
            return self._evaluate() if frame.kind is Kind.EVALUATE else None
        except Diverged:
            failure = "diverged"
        except (MemoryError, torch.OutOfMemoryError):
            failure = "out of memory"
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
        update = Update(self._plan(closed.lr, steps), closed.aggregate, closed.share)
        counted = None
        if closed.counted and self._client.rules.client.carries:
            if self._last is not None and self._last.about[:2] == (self.round, "training"):
                counted = self._last.scalars
            else:
                self._h_lost = True
        self._replica = self._replica.follow(update, self._client.rules, self._client.directions, counted)

    def _replace_replica(self, values: np.ndarray, round: int) -> None:
        self._replica = Replica.unpack(values, round, self._client.rules, self._replica.theta.device)
        self._h_lost = False

    def _work(self, work: Work) -> bytes:
        about = (self.round, work.phase, self._digest)
        if self._last is not None and self._last.about == about:
            return self._last.frame
        accountant = self._accountant
        earlier = accountant.earlier_reply(work.phase, self.round, self._digest) if accountant else None
        self._check_asked(work)
        self._answer_once(work.phase)
        plan = self._plan(work.lr, work.steps, work.phase)
        scalars = self._steps(plan, work) if earlier is None else frames.decode_scalars(earlier)[1]
        if len(scalars) != work.steps:
            raise BadFrame(f"{work.steps} steps asked for, where {len(scalars)} were answered before: not as agreed")
        signature = b""
        if self._signer is not None:
            signature = self._signer.sign(plan, self._digest, work.pointer, scalars)
        body = signature + frames.encode_scalars(work.phase, scalars)
        self._last = _Answer(about, scalars, self._frame(Kind.SIGNED if signature else Kind.REPLY, body))
        return self._last.frame

    def _check_asked(self, work: Work) -> None:
        """Raise BadFrame unless so many steps were agreed to."""
        config = self._client.config
        most = config.local_steps
        if work.phase == "calibration":
            most = config.calibration_steps if config.stopping != "none" else 0
        if not 0 < work.steps <= most or self.round >= config.rounds:
            raise BadFrame(f"{work.steps} steps of {work.phase} asked for in round {self.round}: not as agreed")

    def _steps(self, plan: RoundPlan, work: Work) -> np.ndarray:
        """Make the steps that are asked for: scalars, float32 [T_k, P], charged to the ledger where they are noisy."""
        if self._accountant is None:
            return self._client.steps(self._replica, plan, work.pointer, None)
        self._accountant.check_budgets(work.steps)
        scalars = self._client.steps(self._replica, plan, work.pointer, self._accountant.mechanism)
        reply = frames.encode_scalars(work.phase, scalars)
        self._accountant.charge(work.phase, self.round, self._digest, work.steps, reply)
        return scalars

    def _answer_once(self, what: str) -> None:
        """Raise BadFrame beyond the rounds agreed to, or at a second theta of a round: it would reveal more of rows."""
        last, digest = self._answered.get(what, (-1, b""))
        if self.round > self._client.config.rounds or (
            self.round <= last and (self.round, self._digest) != (last, digest)
        ):
            raise BadFrame(
                f"{what} asked for in round {self.round}, after it was answered for another theta: not as agreed"
            )
        self._answered[what] = self.round, self._digest

    def _evaluate(self) -> bytes:
        if not self._client.evaluates:
            raise BadFrame("asked to evaluate, which this site has not agreed to (its site.toml, evaluate)")
        self._answer_once("evaluation")
        return self._frame(Kind.SCORE, frames.encode_score(*self._client.evaluate(self._replica)))

    def _frame(self, kind: Kind, body: bytes = b"") -> bytes:
        return Frame(kind, self._run, self.client, self.round, self._digest, body).encode()
