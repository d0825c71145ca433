"""Clients at the other end of a network: who is there, what each has to be told, whose replies count.

A round asks clients that are here and idle, and closes when all of them have answered, or at its deadline with
a quorum. Who is slower is not asked again before it has answered, and then catches up: with the rounds closed
since, or with theta itself where that is shorter. Frames go through a `Link`: a stream of one's own, or the
control plane's messages.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from meerkat.algorithm.directions import Directions, Phase
from meerkat.algorithm.rounds import Reply, RoundPlan, RoundRecord, Scalars, check_reply
from meerkat.algorithm.server import ServerConfig, ServerState, share_of
from meerkat.errors import RunFailed
from meerkat.federation import frames
from meerkat.federation.admission import Admission, AdmittedSite
from meerkat.federation.catch_up import RecentRounds
from meerkat.federation.frames import BadFrame, Closed, Frame, Kind, Work
from meerkat.federation.link import Event, Link, WaitingRules
from meerkat.problems.problem import Better, primary
from meerkat.progress import number_of, one_line, say
from meerkat.record.members import Member
from meerkat.record.signatures import BadSignature
from meerkat.run.loop import Attendance
from meerkat.run.metrics import EvaluationMetric
from meerkat.run.sentences import clients_in_words

_LOG = logging.getLogger("meerkat.federation")
_WAKE_S = 0.5
"""Seconds that a wait lasts at most before it looks up."""
_LEISURE_S = 1.0
"""Seconds between times at which is done what nobody waits for."""
_PATIENT = 3
"""How often in a row a client may fail, or hold another theta, before it is shown out."""


@dataclass
class _Member:
    guest: AdmittedSite
    round: int | None
    """The round that its theta stands at, as far as is known; None where it needs the whole state."""
    here: bool = True
    busy: tuple[int, Phase] | None = None
    """What it was asked and has not answered."""
    trouble: int = 0
    """How often in a row it failed, or held another theta."""


class RemoteEngine(Attendance):
    """Runs rounds over a link. See `loop.Engine` and `loop.Attendance`."""

    def __init__(
        self,
        link: Link,
        door: Admission,
        settings: ServerConfig,
        terms: WaitingRules,
        run: str,
        state: ServerState,
        directions: Directions,
        better: Mapping[str, Better],
    ) -> None:
        """Take up a run where its log ends.

        Args:
            run: the federation's id, hexadecimal.
            directions: those that its rounds are closed with, to be made ready while clients are at work.
            better: the problem's scores, of which sites tell the first.
        """
        self.counts = dict.fromkeys(("late", "duplicate", "foreign", "malformed", "failed", "behind"), 0)
        """Frames that did not count, by why."""
        self.caught_up = {"rounds": 0, "state": 0}
        """How often a client was caught up by more than one round, or by the whole state."""
        self._link = link
        self._door = door
        self._settings = settings
        self._terms = terms
        self._run = bytes.fromhex(run)
        self._state = state
        self._directions = directions
        state_bytes = 4 * len(state.theta) * settings.rules.vectors
        self._trail = RecentRounds(state_bytes, state.round, bytes.fromhex(state.replica.digest))
        self._answered_at = 0.0
        self._members: dict[int, _Member] = {}
        self._joined: dict[int, AdmittedSite] = {}
        self._begun = False
        self._plan: RoundPlan | None = None
        self._replied: dict[int, Scalars] = {}
        self._failed: dict[int, str] = {}
        self._evaluating: set[int] = set()
        """Whose evaluation is waited for."""
        self._evaluated: dict[int, tuple[float, int]] = {}
        """Each client's score and the rows that it is a mean over."""
        self._better = better
        self._round_s = 0.0
        self._stopped = ""
        self._tasks: deque[Callable[[], None]] = deque()
        self._deferred_done = -math.inf

    def stop(self, why: str) -> None:
        """Let the run end at once, from any thread: whoever waits for clients raises RunFailed."""
        self._stopped = why

    def tell(self, event: str, text: str, **facts: Any) -> None:
        """Say what happened, in a line; `event` and `facts` are the same for a machine."""
        say(text)
        _LOG.debug(event, extra={"facts": facts})

    def arrivals(self, round: int) -> list[Member]:
        """Wait until a round can open; the clients that are to be logged before it.

        Raises:
            RunFailed: too few clients came in time.
        """
        least, began, told = self._terms.clients_minimum, time.monotonic(), False
        full = max(least, min(self._terms.clients_wanted, self._settings.clients))
        while (event := self._link.receive(0)) is not None:
            self._handle(event)
        while True:
            waited, here = time.monotonic() - began, len(self._idle())
            wanted = full if not self._begun and waited < self._terms.start_s else least
            if here >= wanted:
                break
            if here < least and waited > self._terms.patience_s:
                raise RunFailed(
                    f"round {round}: {number_of(here, 'client')} here and idle, {least} are needed, and no more came "
                    f"for {waited:.0f} s; what was logged is safe: start again with the same run folder to go on"
                )
            if not told and waited > 2:
                self.tell(
                    "waiting",
                    f"round {round}: {number_of(here, 'client')} here and idle, waiting for {wanted}",
                    here=here,
                )
                told = True
            self.run_deferred()
            self._wait(_WAKE_S)
        self._begun = True
        arrived, joined = sorted(self._joined.items()), []
        self._joined.clear()
        for client, guest in arrived:
            if self._is_logged(guest):
                continue
            join = replace(guest.member, round=round)
            try:
                self._door.register.admit(join)
            except BadSignature as error:  # another came in between with the same key
                self._show_out(client, str(error))
                continue
            self._settings = join.added_to(self._settings)
            joined.append(join)
        return joined

    def available(self) -> list[int]:
        """The clients that are here and idle, ascending. Those that are not logged yet wait for the next round."""
        return [client for client in self._idle() if self._is_logged(self._members[client].guest)]

    def _is_logged(self, guest: AdmittedSite) -> bool:
        """Whether the log has a client as it is here: with so many rows and that key."""
        key = self._door.register.keys.get(guest.client, b"").hex()
        return (self._settings.examples.get(guest.client), key) == (guest.examples, guest.member.key)

    def _idle(self) -> list[int]:
        return [client for client, member in sorted(self._members.items()) if member.here and member.busy is None]

    def run(self, state: ServerState, plan: RoundPlan) -> list[Reply] | None:
        """Ask a plan's participants: the replies that came in time, by ascending client id.

        None where those who are left are fewer than the quorum: the round is to be opened again, with who is here.
        Under client-level differential privacy a sample is drawn once: the round closes with who answered, if anybody.

        Raises:
            RunFailed: fewer than the quorum answered for too long, or nobody could make a step.
        """
        self._state, self._plan, self._replied, self._failed = state, plan, {}, {}
        began = time.monotonic()
        self._link.send({client: self._asking(client, plan) for client in plan.steps})
        self._directions.prepare(plan.place(0, 0))  # closing the round begins with it
        if self._tasks and time.monotonic() - self._deferred_done >= _LEISURE_S:
            self.run_deferred()
        least = min(self._terms.quorum, len(plan.steps)) if self._settings.aggregation.keeps_replies else 0
        while True:
            waited = time.monotonic() - began
            owing = [k for k in plan.steps if self._members[k].busy == (plan.round, plan.phase)]
            if len(self._replied) >= least and (not owing or waited >= self._terms.deadline_s):
                break
            if plan.steps.keys() == self._failed.keys():
                why = ", ".join(sorted({*self._failed.values()}))
                raise RunFailed(
                    f"round {plan.round}: nobody could make their steps ({why}); "
                    "where losses diverged, start a new run with a lower lr"
                )
            gone = any(not self._members[k].here for k in plan.steps if k not in self._replied)
            if not owing and (not gone or waited >= self._terms.deadline_s):
                here = len(self._replied)
                self.tell(
                    "void", f"round {plan.round}: {here} replies of {least} that it needs: it opens again", here=here
                )
                self._plan = None
                return None
            if waited > self._terms.deadline_s + self._terms.patience_s:
                raise RunFailed(
                    f"round {plan.round}: {len(self._replied)} replies came in {waited:.0f} s, {least} are needed; "
                    "what was logged is safe: start again with the same run folder to go on"
                )
            self._wait(left if (left := self._terms.deadline_s - waited) > 0 else _WAKE_S)
        if owing:
            self.tell(
                "deadline",
                f"round {plan.round}: closed at its deadline without {clients_in_words(owing)}",
                clients=owing,
            )
        self._answered_at = time.monotonic()
        self._round_s, self._plan = self._answered_at - began, None
        return [self._replied[client] for client in sorted(self._replied)]

    def facts(self) -> dict[str, Any]:
        """Of the last round, seconds until it had its replies; who is here; what did not count so far."""
        here = sum(member.here for member in self._members.values())
        dropped = {name: count for name, count in self.counts.items() if count}
        return {"round_s": self._round_s, "here": here, **({"dropped": dropped} if dropped else {})}

    def defer(self, task: Callable[[], None]) -> None:
        """Do something while clients are at work; what came in a second together, which costs much less."""
        self._tasks.append(task)

    def run_deferred(self) -> None:
        """Do it now."""
        while self._tasks:
            self._tasks.popleft()()
        self._deferred_done = time.monotonic()

    def status(self) -> str:
        """How the federation stands, in a line."""
        here = [k for k, member in self._members.items() if member.here]
        late = [k for k in here if self._members[k].busy is not None]
        slow = f", {clients_in_words(late)} late" if late else ""
        sent, received = self._link.bytes_sent, self._link.bytes_received
        return (
            f"round {self._trail.round} of {self._settings.rounds}: {number_of(len(here), 'client')} here{slow}; "
            f"{1e3 * self._round_s:.3g} ms a round, {sent:,} bytes sent, {received:,} received"
        )

    def outcome(self) -> dict[str, Any]:
        """What the summary tells of the network: frames' bytes, both ways, and what did not count."""
        return {
            "frame_bytes_down": self._link.bytes_sent,
            "frame_bytes_up": self._link.bytes_received,
            "dropped": self.counts,
            "caught_up": self.caught_up,
        }

    def closed(self, state: ServerState, record: RoundRecord) -> None:
        """Remember what clients need to follow a round that is on the disk."""
        self._state = state
        share = share_of(self._settings, record.made)
        closed = Closed(record.plan.lr, share, record.aggregate, counted=False)
        made_s = time.monotonic() - self._answered_at
        self._trail.add(closed, frozenset(record.made), bytes.fromhex(record.theta_digest), made_s)

    def evaluate(self, _: Tensor, rounds: int) -> EvaluationMetric:
        """An evaluation on sites' own rows, over the sites that agreed to it and answer before the deadline."""
        self._evaluated = {}
        present = self.available() if rounds == self._trail.round else []  # sites hold no theta of the past
        self._evaluating = {k for k in present if self._members[k].guest.evaluates}
        self._link.send({client: self._telling(client, Kind.EVALUATE) for client in sorted(self._evaluating)})
        end = time.monotonic() + self._terms.deadline_s
        while self._evaluating and (left := end - time.monotonic()) > 0:
            self._wait(left)
            self._evaluating = {client for client in self._evaluating if self._members[client].here}
        self._evaluating = set()
        # by client, whatever order they answered in: the mean has the same bits
        told = [self._evaluated[client] for client in sorted(self._evaluated)]
        return EvaluationMetric.of_sites(told, self._better, rounds)

    def end(self, why: str) -> None:
        """Bring everyone up to date, who is late as well, and say that the run is over."""
        words = frames.encode_words({"why": why})
        while (event := self._link.receive(0)) is not None:
            self._handle(event)  # who came just now is told as well
        for client in [k for k, member in self._members.items() if member.here]:
            told = self._telling(client, Kind.CLOSED)
            last = self._frame(Kind.END, client, words)
            self._link.send({client: told})
            self._link.drop(client, last)
            self._members[client].here = False

    # what is said to clients

    def _frame(self, kind: Kind, client: int, body: bytes) -> bytes:
        return Frame(kind, self._run, client, self._trail.round, self._trail.digest, body).encode()

    def _asking(self, client: int, plan: RoundPlan) -> list[bytes]:
        """The frames that ask for a plan's steps."""
        self._members[client].busy = (plan.round, plan.phase)
        pointer = self._state.steps_made.get(client, 0)
        return self._telling(client, Kind.WORK, plan.phase, plan.lr, plan.steps[client], pointer)

    def _telling(
        self, client: int, kind: Kind, phase: Phase = "training", lr: float = 0.0, steps: int = 0, pointer: int = 0
    ) -> list[bytes]:
        """The frames that bring a client to the present theta, the last of them of a kind, with what it asks for."""
        member, first = self._members[client], []
        closed: list[Closed] = []
        if member.round is None or not self._trail.shorter_than_state(member.round):
            values = self._state.replica_of(client).pack(self._settings.rules)
            first = [self._frame(Kind.STATE, client, part) for part in frames.encode_state(values)]
            self.caught_up["state"] += 1
        else:
            closed = self._trail.missed_since(member.round, client)
            self.caught_up["rounds"] += len(closed) > 1
        member.round = self._trail.round
        return [*first, self._frame(kind, client, Work(phase, lr, steps, pointer, closed).encode())]

    # what clients say

    def _wait(self, at_most_s: float) -> None:
        """Handle the next event, if one comes in time."""
        event = self._link.receive(min(max(at_most_s, 0.0), _WAKE_S))
        if event is not None:
            self._handle(event)
        if self._stopped:
            raise RunFailed(f"{self._stopped}; what was logged is safe: start again with the same run folder to go on")

    def _handle(self, event: Event) -> None:
        if event.what == "arrived" and event.site is not None:
            self._welcome(event.site)
        elif (member := self._members.get(event.client)) is None or not member.here:
            self.counts["foreign"] += event.what == "frame"
        elif event.what == "left":
            member.here, member.busy = False, None
            self.tell("left", f"client {event.client} left", client=event.client)
        else:
            try:
                self._hear(event.client, member, Frame.decode(event.data))
            except BadFrame as error:
                self.counts["malformed"] += 1
                self._show_out(event.client, str(error))

    def _welcome(self, guest: AdmittedSite) -> None:
        client = guest.client
        back = "back" if client in self._members else "here"
        self.tell("arrived", f"client {client} is {back}, with {guest.examples} rows", client=client, node=guest.node)
        at = guest.round if self._trail.recognises(guest.round, guest.digest) else None
        self._members[client] = _Member(guest, at)
        self._joined[client] = guest
        plan = self._plan
        self._failed.pop(client, None)
        if client in self._evaluating and guest.evaluates:
            self._link.send({client: self._telling(client, Kind.EVALUATE)})
        owes = plan is not None and client in plan.steps and client not in self._replied
        if plan is not None and owes and self._is_logged(guest):
            self._link.send({client: self._asking(client, plan)})

    def _hear(self, client: int, member: _Member, frame: Frame) -> None:
        if (frame.run, frame.client) != (self._run, client):
            self.counts["foreign"] += 1
            raise BadFrame("a frame of another run or client")
        match frame.kind:
            case Kind.REPLY | Kind.SIGNED:
                self._take(client, member, frame)
            case Kind.BEHIND:
                self.counts["behind"] += 1
                member.round = None
                self._once_more(client, member, "its theta does not come out as everyone's")
            case Kind.FAILED:
                _, said = frames.decode_words(frame.body)
                if client in self._evaluating:
                    self._evaluating.remove(client)
                elif member.busy is None or member.busy[0] != frame.round:
                    self.counts["duplicate"] += 1
                    return
                self.counts["failed"] += 1
                why = said.get("why") if said.get("why") in frames.FAILURES else "error"
                self.tell("failed", f"client {client} could not make its steps: {why}", client=client, why=why)
                self._failed[client] = str(why)
                member.busy, member.trouble = None, member.trouble + 1
                if member.trouble == _PATIENT:
                    self._show_out(client, f"it could not make its steps {_PATIENT} times in a row ({why})")
            case Kind.SCORE:
                evaluation = frames.decode_score(frame.body, primary(self._better))
                if client not in self._evaluating or frame.digest != self._trail.digest:
                    self.counts["late"] += 1
                    return
                self._evaluating.remove(client)
                self._evaluated[client] = evaluation
            case Kind.REFUSAL:
                _, said = frames.decode_words(frame.body)
                why = one_line(said.get("why"))
                self.tell("declined", f"client {client} takes no part: {why}", client=client, why=why)
                self._show_out(client, "as it wished")
            case _:
                raise BadFrame(f"a frame of kind {frame.kind.name.lower()}, which a site does not send")

    def _take(self, client: int, member: _Member, frame: Frame) -> None:
        phase, scalars, signature = frames.decode_reply(frame)
        if member.busy != (frame.round, phase):
            self.counts["duplicate"] += 1
            return
        member.busy = None
        plan = self._plan
        if plan is None or (plan.round, plan.phase) != (frame.round, phase) or client not in plan.steps:
            self.counts["late"] += 1
            return
        if not signature and frame.digest != self._trail.digest:
            self.counts["behind"] += 1
            member.round = None
            self._once_more(client, member, "it replies from another theta")
            return
        try:
            check_reply(plan, client, scalars)
        except ValueError as error:
            raise BadFrame(str(error)) from None
        pointer = self._state.steps_made.get(client, 0)
        try:
            self._door.register.check_reply(client, plan, self._trail.digest, pointer, scalars, signature)
        except BadSignature as error:
            raise BadFrame(str(error)) from None
        member.trouble = 0
        self._replied[client] = Scalars(client, scalars, signature=signature)

    def _once_more(self, client: int, member: _Member, why: str) -> None:
        """Ask again with the whole state, where the round still waits for it."""
        member.busy, member.trouble = None, member.trouble + 1
        if member.trouble == _PATIENT:
            self._show_out(client, why)
        elif client in self._evaluating:
            self._link.send({client: self._telling(client, Kind.EVALUATE)})
        elif self._plan is not None and client in self._plan.steps and client not in self._replied:
            self._link.send({client: self._asking(client, self._plan)})

    def _show_out(self, client: int, why: str) -> None:
        """End a client's session; the round goes on without it."""
        self.tell("shown out", f"client {client} is shown out: {why}", client=client, why=why)
        member = self._members[client]
        member.here, member.busy = False, None
        self._door.void_session(client)
        self._link.drop(client, self._door.refusal(why, client))
