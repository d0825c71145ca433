"""A site's side of a federation: frames in, frames out, and the steps of one client in between.

It knows no network. Everything that it decides for itself stands in agreement.py; what it computes is what a
client of a simulation does, by the same functions, so that both have the same bits.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from meerkat import __version__
from meerkat.algorithm.client import local_steps
from meerkat.algorithm.directions import Phase, Place
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import RoundPlan, Update
from meerkat.algorithm.zeroth_order import Loss, MaskedModel
from meerkat.errors import Diverged, MeerkatError, RunFailed
from meerkat.extensions import load
from meerkat.federation import frames
from meerkat.federation.frames import BadFrame, Closed, Frame, Kind, StateParts, Work
from meerkat.federation.ledger import RunAccountant
from meerkat.federation.offer import Offer
from meerkat.federation.site_settings import Refused, SiteConfig
from meerkat.problems.data import Row
from meerkat.problems.partition import ClientRows
from meerkat.problems.problem import Problem, Split, client_losses, primary
from meerkat.progress import one_line, say
from meerkat.record.opening import meaning
from meerkat.record.signatures import RunIdentity, Signer, SigningKey
from meerkat.run.setup import open_problem, resolve_machine
from meerkat.settings import auto
from meerkat.settings.algorithm import directions, estimator, rules
from meerkat.settings.config import CLASSIFICATION


class Site:
    """One client of one run: model, mask and rows, loaded once, and theta as far as it has followed the run."""

    def __init__(self, offer: Offer, own: SiteConfig, node: str = "") -> None:
        """Load everything that the run needs.

        Args:
            node: what the control plane calls this node; the site signs as it.

        Raises:
            Refused: the site has not agreed to what is offered, or has no key to sign with where it must.
            MeerkatError: model, data or key cannot be read, or are not the run's.
        """
        load(own.accepts.extensions, installed=False)
        asked = offer.config({"model": own.model, "data": own.data, "device": own.device})
        task = offer.load_task() if asked.problem == CLASSIFICATION else None
        own.check_settings(asked, task.name if task else asked.problem)
        key, before = _keys(own)
        if offer.sign and key is None:
            raise Refused(
                "signing_key: the run takes signed replies alone; 'meerkat keygen' makes one, name it in site.toml"
            )
        self.config = resolve_machine(asked)
        self._problem = open_problem(self.config, task)
        self.mask = offer.load_mask()
        self.mask.check_fits(self._problem.model)
        own.check_mask(self.mask, self._problem.model)
        self._model = MaskedModel(self._problem.model, self.mask)
        self._rules = rules(self.config)
        self._replica = Replica(0, self._model.read())
        if self._replica.digest != offer.theta:
            raise MeerkatError(
                f"model '{own.model}': its values at the mask are not the coordinator's; use the same model"
            )
        rows = _rows(own, self._problem, "train")
        self._rows = ClientRows(own.client, np.arange(len(rows)), self.config.batch_size, self.config.seed)
        examples = self._problem.prepare(rows)
        self._losses_of = client_losses(self._problem, examples, each_row=self.config.dp == "example")
        self._validation: Any = None
        if own.evaluate and self.config.dp == "none":  # a score is exact: no noise covers it
            examples = self._problem.prepare(_rows(own, self._problem, "validation"))
            self._validation = self._problem.batch(examples, "evaluation")
        self.client = own.client
        self.ended = ""
        """Why the session is over, or nothing."""
        self.refused = False
        """Whether the coordinator will not have the site: there is no coming back."""
        self.welcomed = False
        """Whether the coordinator let the site in."""
        self._run = bytes.fromhex(offer.run)
        self._secret = bytes.fromhex(offer.token)
        self._h_lost = False
        """Whether a round counted scalars of this site that it does not have, but a process before it."""
        self._z = directions(self.config, len(self.mask), self._replica.theta.device)
        self._signer: Signer | None = None
        if key is not None:
            identity = RunIdentity(
                run=offer.run,
                signed=offer.sign,
                run_key=f"{self._z.key:032x}",
                model=self.mask.fingerprint,
                mask=self.mask.digest(),
                theta=offer.theta,
                settings=meaning(self.config),
            )
            self._signer = Signer(identity, own.client, len(rows), node, key, before)
        self._parts = StateParts(self._rules.vectors * len(self.mask))
        self._answered: dict[str, tuple[int, bytes]] = {}
        """By what was asked: the last round that it was answered in, and theta's digest there."""
        self._last: tuple[tuple[int, str, bytes], np.ndarray, bytes] | None = None
        self._account = RunAccountant.open(self.config, own, self._run.hex(), len(rows))

    def close(self) -> None:
        """Give back what the site holds open."""
        if self._account:
            self._account.ledger.close()

    def hello(self) -> bytes:
        """The first frame of a stream: who this is, with the token or, later, the session's secret."""
        said = {
            "examples": len(self._rows.rows),
            "model": self.mask.fingerprint,
            "mask": self.mask.digest(),
            "evaluates": self._validation is not None,
            **({} if self._signer is None else self._signer.credentials),
            "versions": {"meerkat": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        }
        return self._frame(Kind.HELLO, frames.encode_json(said, self._secret))

    def keep(self) -> dict[str, int | bytes]:
        """All that changes in a session, for another process to take up: see `take_up`."""
        return {
            "round": self.round,
            "values": self._replica.pack(self._rules).astype("<f4", copy=False).tobytes(),
            "last": b"" if self._last is None else self._last[2],
            "h_lost": int(self._h_lost),
            "joined": self.joined,
            **{f"round_{what}": at for what, (at, _) in self._answered.items()},
            **{f"digest_{what}": digest for what, (_, digest) in self._answered.items()},
        }

    def take_up(self, kept: Mapping[str, Any]) -> None:
        """Go on where a session was kept."""
        self._take_over(np.frombuffer(kept["values"], dtype="<f4").astype("f4"), int(kept["round"]))
        self._h_lost = bool(kept["h_lost"])
        asked = [name.removeprefix("round_") for name in kept if name.startswith("round_")]
        self._answered = {what: (int(kept[f"round_{what}"]), kept[f"digest_{what}"]) for what in asked}
        if kept["last"] and kept["joined"] == self.joined:  # what another key signed does not serve any more
            last = Frame.decode(kept["last"])
            phase, scalars, _ = frames.decode_reply(last)
            self._last = ((last.round, phase, self._answered[phase][1]), scalars, kept["last"])

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
        """SHA-256 of what the site signed when it came in, rows and key among it; nothing where it does not sign."""
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
                    self._take_over(values, frame.round)
            case Kind.WORK | Kind.CLOSED | Kind.EVALUATE:
                return self._follow_and_do(frame, Work.decode(frame.body))
            case Kind.END | Kind.REFUSAL:
                _, said = frames.decode_json(frame.body)
                self.ended = one_line(said.get("why", "")) or "no reason given"
                self.refused = frame.kind is Kind.REFUSAL
            case _:
                raise BadFrame(f"a frame of kind {frame.kind.name.lower()}, which a coordinator does not send")
        return None

    def look_ahead(self) -> None:
        """Make ready what the next round needs, while the answer travels."""
        self._z.prepare(Place("training", self.round + 1, 0, 0))

    def refusal(self, why: str) -> bytes:
        """The frame that says that the site takes no further part, and why."""
        return self._frame(Kind.REFUSAL, frames.encode_json({"why": why}))

    def _follow_and_do(self, frame: Frame, work: Work) -> bytes | None:
        """Catch up with the rounds closed since, then do what is asked, if the theta is the one that is meant."""
        first = frame.round - len(work.closed)
        for number, closed in enumerate(work.closed, first):
            if number == self.round:
                self._follow(closed)
        if (self.round, self._digest) != (frame.round, frame.digest) or (self._h_lost and frame.kind is Kind.WORK):
            return self._frame(Kind.BEHIND)
        try:
            if frame.kind is Kind.WORK:
                return self._work(work)
            return self._judge() if frame.kind is Kind.EVALUATE else None
        except Diverged:
            failure = "diverged"
        except (MemoryError, torch.OutOfMemoryError):
            failure = "out of memory"
        return self._frame(Kind.FAILED, frames.encode_json({"why": failure}))

    def _plan(self, lr: float, steps: int, phase: Phase = "training") -> RoundPlan:
        eps = auto.number(self.config.eps)
        return RoundPlan(self.round, lr, eps, self.config.directions, {self.client: steps}, phase)

    def _follow(self, closed: Closed) -> None:
        """Move as the server did when it closed the round that this site's replica stands at."""
        if closed.aggregate.shape[1] != self.config.directions:
            raise BadFrame(f"a round of {closed.aggregate.shape[1]} directions, in a run of {self.config.directions}")
        if len(closed.aggregate) > self.config.local_steps:
            raise BadFrame(f"a round of {len(closed.aggregate)} steps, in a run of {self.config.local_steps}")
        update = Update(self._plan(closed.lr, len(closed.aggregate)), closed.aggregate, closed.share)
        counted = None
        if closed.counted and self._rules.client.carries:
            if self._last is not None and self._last[0][:2] == (self.round, "training"):
                counted = self._last[1]
            else:
                self._h_lost = True
        self._replica = self._replica.follow(update, self._rules, self._z, counted)

    def _take_over(self, values: np.ndarray, round: int) -> None:
        """Put a whole replica in the place of this one."""
        self._replica = Replica.unpack(values, round, self._rules, self._replica.theta.device)
        self._h_lost = False

    def _work(self, work: Work) -> bytes:
        about = (self.round, work.phase, self._digest)
        if self._last is not None and self._last[0] == about:
            return self._last[2]
        kept = self._account.earlier_reply(work.phase, self.round, self._digest) if self._account else None
        self._check_asked(work)
        self._answer_once(work.phase)
        scalars = self._steps(work) if kept is None else frames.decode_scalars(kept)[1]
        if len(scalars) != work.steps:
            raise BadFrame(f"{work.steps} steps asked for, where {len(scalars)} were answered before: not as agreed")
        body, signature = frames.encode_scalars(work.phase, scalars), b""
        if self._signer is not None:
            plan = self._plan(work.lr, work.steps, work.phase)
            signature = self._signer.sign(plan, self._digest, work.pointer, scalars)
        made = self._frame(Kind.SIGNED if signature else Kind.REPLY, signature + body)
        self._last = (about, scalars, made)
        return made

    def _check_asked(self, work: Work) -> None:
        """Raise BadFrame unless so many steps were agreed to."""
        most = self.config.local_steps
        if work.phase == "calibration":
            most = self.config.calibration_steps if self.config.stopping != "none" else 0
        if not 0 < work.steps <= most or self.round >= self.config.rounds:
            raise BadFrame(f"{work.steps} steps of {work.phase} asked for in round {self.round}: not as agreed")

    def _steps(self, work: Work) -> np.ndarray:
        """Make the steps that are asked for: scalars, float32 [T_k, P], noted in the ledger where they are noisy."""
        if self._account:
            self._account.check_budgets(work.steps)
        plan, losses = self._plan(work.lr, work.steps, work.phase), self._losses_along(work.pointer)
        mechanism = self._account.mechanism if self._account else None
        reply, _ = local_steps(
            self._model,
            self._replica.theta,
            plan,
            self.client,
            losses,
            self._z,
            estimator=estimator(self.config),
            rule=self._rules.client,
            h=self._replica.h,
            private=mechanism,
        )
        if self._account:
            body = frames.encode_scalars(work.phase, reply.scalars)
            self._account.charge(work.phase, self.round, self._digest, work.steps, body)
        return reply.scalars

    def _answer_once(self, what: str) -> None:
        """A number of rounds was agreed to, and one theta a round: answers about others would tell more of the rows."""
        last, digest = self._answered.get(what, (-1, b""))
        if self.round > self.config.rounds or self.round < last or (self.round == last and self._digest != digest):
            raise BadFrame(
                f"{what} asked for in round {self.round}, after it was answered for another theta: not as agreed"
            )
        self._answered[what] = self.round, self._digest

    def _losses_along(self, pointer: int) -> Callable[[int], Loss]:
        def loss_at(step: int) -> Loss:
            if self._account:
                return self._losses_of([self._account.mechanism.sample(self._rows.rows)])
            losses = self._losses_of([self._rows.batch(pointer + step)])
            return lambda: losses()[0]

        return loss_at

    def _judge(self) -> bytes:
        if self._validation is None:
            raise BadFrame("asked to evaluate, which this site has not agreed to (its site.toml, evaluate)")
        self._answer_once("evaluation")
        with torch.no_grad():
            self._model.write_(self._replica.theta)
        found, score = self._problem.evaluate(self._validation), primary(self._problem.scores)
        return self._frame(Kind.SCORE, frames.encode_score(score, found.scores[score], found.rows))

    def _frame(self, kind: Kind, body: bytes = b"") -> bytes:
        return Frame(kind, self._run, self.client, self.round, self._digest, body).encode()


def _keys(own: SiteConfig) -> tuple[SigningKey | None, SigningKey | None]:
    """The site's keys, present and former. What is wrong with them is told here alone: such words name its files."""
    try:
        return own.signing_keys()
    except MeerkatError as error:
        say(f"meerkat: {error}")
        raise MeerkatError("the site's signing key cannot be used; its own log says why") from None


def _rows(own: SiteConfig, problem: Problem, split: Split) -> list[Row]:
    """The site's own rows. What is wrong with them is told here alone: such words may quote a row."""
    try:
        if not (own.data and Path(own.data).is_dir()):
            raise MeerkatError(f"data '{own.data}': no such folder; a site's rows are its own, and not the hub's")
        return problem.rows(split)
    except MeerkatError as error:
        say(f"meerkat: {error}")
        raise MeerkatError(
            f"the site's {split} rows are not fit for task '{problem.name}'; its own log says why"
        ) from None
