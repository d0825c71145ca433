"""Rounds over a network: who is asked, whose replies count, when a round closes.

A round asks the clients that are present and idle, and closes when all have answered, or at its deadline with a
quorum. A slower client is not asked again before it has answered, nor in the next rounds, ever more of them; then it
catches up, with the rounds closed since or with theta itself where that is shorter. Frames go through a `Link`: a
stream, or the control plane's messages.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

from torch import Tensor

from meerkat.algorithm.directions import Directions
from meerkat.algorithm.replies import Reply, Scalars, check_reply
from meerkat.algorithm.rounds import RoundPlan, RoundRecord
from meerkat.algorithm.server import ServerConfig, ServerState, share_of
from meerkat.errors import RunFailed
from meerkat.federation import frames
from meerkat.federation.admission import Admission, AdmittedSite
from meerkat.federation.coordinator_settings import FederationConfig
from meerkat.federation.frames import BadFrame, Closed, Frame, Kind, Work
from meerkat.federation.link import Event, Link
from meerkat.federation.sessions import NO_WORK, Session, Sessions
from meerkat.problems.problem import Better, primary
from meerkat.progress import number_of, one_line, say
from meerkat.record.members import Member
from meerkat.record.signatures import BadSignature
from meerkat.run.loop import Attendance
from meerkat.run.metrics import EvaluationMetric
from meerkat.run.sentences import clients_in_words

_WAKE_S = 0.5
"""Longest wait for an event, in seconds."""
_LEISURE_S = 1.0
"""Seconds between runs of deferred tasks."""
_STATUS_S = 10.0
"""Seconds between lines on how the federation stands."""
_PATIENT = 3
"""How often in a row a client may fail, or have another theta, before it is removed."""
_MOST_UNASKED = 16
"""How many frames in a row a client may send that nobody asked for: a broken connection repeats one or two."""
_SAFE = "what was logged is safe: start again with the same run folder to go on"


@dataclass(frozen=True)
class _Round:
    """A round that is open: what was asked, and what came."""

    plan: RoundPlan
    began: float
    """By the monotonic clock, in seconds."""
    replies: dict[int, Scalars] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    failed_late: set[int] = field(default_factory=set)
    """Clients that let more than half of the deadline pass before they failed."""

    def awaits(self, client: int) -> bool:
        return client in self.plan.steps and client not in self.replies and client not in self.failed


@dataclass(eq=False)
class RemoteEngine(Attendance):
    """Runs rounds over a link, from where a run's log ends. See `loop.Engine` and `loop.Attendance`."""

    link: Link
    admission: Admission
    settings: ServerConfig
    """What rounds are opened from, with the clients that joined so far."""
    waiting: FederationConfig
    """How long it waits, and for how many clients."""
    state: InitVar[ServerState]
    directions: Directions
    """Those that rounds are closed with, prepared while clients work."""
    better: Mapping[str, Better]
    """The problem's scores; sites send the first."""
    keep_event: Callable[..., None] = lambda _, **__: None
    """Called with the name of each event, and facts about it."""

    def __post_init__(self, state: ServerState) -> None:
        self.counts = dict.fromkeys(("late", "duplicate", "foreign", "malformed", "failed", "behind"), 0)
        """Frames that did not count, by reason."""
        self.sessions = Sessions(self.link, self.admission, self.settings.rules, state)
        self._members = self.admission.members
        self._arrived: dict[int, AdmittedSite] = {}
        """Sites that came since the last round opened."""
        self._failing: dict[int, str] = {}
        """The clients that could not make the steps that they were last asked for, and why."""
        self._begun = False
        self._round: _Round | None = None
        self._evaluating: set[int] = set()
        """The clients whose evaluation is awaited."""
        self._evaluations: dict[int, tuple[float, int]] = {}
        """Each client's score and the rows that it is a mean over."""
        self._evaluations_made = 0
        self._stopped = ""
        self._tasks: deque[Callable[[], None]] = deque()
        self._round_s, self._answered_at, self._deferred_at, self._status_at = 0.0, 0.0, -math.inf, 0.0

    def stop(self, why: str) -> None:
        """End the run at once, from any thread: waiting for clients then raises RunFailed."""
        self._stopped = why

    @property
    def evaluates(self) -> bool:
        """Whether it is the sites that evaluate."""
        return self.waiting.evaluate == "sites"

    def _report(self, event: str, text: str, **facts: Any) -> None:
        """Show a line; `event` and `facts` are the same for programs."""
        say(text)
        self.keep_event(event, round=self.sessions.recent.round, **facts)

    # rounds

    def arrivals(self, round: int) -> list[Member]:
        """Wait until a round can open; the clients that are to be logged before it.

        Raises:
            RunFailed: too few clients came in time, or every client of the run failed until it was removed.
        """
        rules, began, reported = self.waiting, time.monotonic(), False
        least, everyone = rules.clients_minimum, self.settings.clients
        full = max(least, min(rules.clients_wanted or everyone, everyone))
        self._handle_pending()
        while True:
            waited, idle = time.monotonic() - began, len(self.sessions.idle())
            wanted = least if self._begun or waited >= rules.start_s else full
            if idle >= wanted:
                break
            here = f"round {round}: {number_of(idle, 'client')} here and idle"
            if len(self._failing) == self.settings.clients and not self.sessions.present():
                raise RunFailed(f"round {round}: nobody could make their steps {self._why_failing()}")
            if idle < least and waited > rules.patience_s:
                waiting = f"{here}, {least} are needed, and no more came for {waited:.0f} s"
                if self._failing:
                    who = clients_in_words(sorted(self._failing))
                    waiting += f"; {who} could not make their steps {self._why_failing()}"
                raise RunFailed(f"{waiting}; {_SAFE}")
            if not reported and waited > 2:
                self._report("waiting", f"{here}, waiting for {wanted}", here=idle)
                reported = True
            self.run_deferred()
            self._wait(_WAKE_S)
        self._begun = True
        return self._new_members(round)

    def _why_failing(self) -> str:
        """Why clients could not make their steps, and what may help."""
        why = ", ".join(sorted({*self._failing.values()}))
        return f"({why}); where losses diverged, start a new run with a lower lr"

    def _new_members(self, round: int) -> list[Member]:
        arrived, members = sorted(self._arrived.items()), []
        self._arrived.clear()
        for client, site in arrived:
            member = replace(site.member, round=round)
            if self._is_logged(site):
                continue
            try:
                self._members.admit(member)
            except BadSignature as error:  # another came in between with the same key
                self._remove(client, str(error))
                continue
            self.settings = member.added_to(self.settings)
            members.append(member)
        return members

    def available(self) -> list[int]:
        """The clients that are present and idle, ascending, without those that were late and are to be spared.

        Where too few are left for a round, those that are to be spared are asked as well.
        """
        idle, sessions = self._logged(), self.sessions.by_client
        ready = [client for client in idle if not sessions[client].rounds.rests(self.sessions.recent.round)]
        return ready if len(ready) >= max(self.waiting.clients_minimum, self.waiting.quorum) else idle

    def _logged(self) -> list[int]:
        """The clients that are present and idle, ascending. Those not logged yet wait for the next round."""
        return [client for client in self.sessions.idle() if self._is_logged(self.sessions.by_client[client].site)]

    def _is_logged(self, site: AdmittedSite) -> bool:
        """Whether the log has a client with these rows, on this node, with this key."""
        client, member, members = site.client, site.member, self._members
        logged = (self.settings.examples.get(client), members.nodes.get(client), members.keys.get(client, b"").hex())
        return logged == (member.examples, member.node, member.key)

    def run(self, state: ServerState, plan: RoundPlan) -> list[Reply] | None:
        """Ask a plan's participants: the replies that came in time, by ascending client id.

        None where fewer than the quorum are left: the round is to be opened again, with who is present then.
        Under client-level differential privacy a sample is drawn once: the round closes with whoever answered.

        Raises:
            RunFailed: fewer than the quorum answered for too long.
        """
        self.sessions.state, self._round = state, (current := _Round(plan, time.monotonic()))
        self._ask(plan, plan.steps)
        self.directions.prepare(plan.place(0, 0))  # closing the round begins with it
        if self._tasks and time.monotonic() - self._deferred_at >= _LEISURE_S:
            self.run_deferred()
        try:
            complete = self._collect(current)
        finally:
            self._round = None
        if not complete:
            return None
        self._answered_at = time.monotonic()
        self._round_s = self._answered_at - current.began
        return [current.replies[client] for client in sorted(current.replies)]

    def _ask(self, plan: RoundPlan, clients: Iterable[int]) -> None:
        """Ask clients for a plan's steps."""
        work, pointers = {}, self.sessions.state.steps_made
        for client in clients:
            self.sessions.by_client[client].asked = (plan.round, plan.phase)
            work[client] = Work(plan.phase, plan.lr, plan.steps[client], pointers.get(client, 0))
        self.sessions.send(Kind.WORK, work)

    def _collect(self, current: _Round) -> bool:
        """Wait for replies. Returns whether a round can close; if not, it is to be opened again."""
        plan, replies, rules = current.plan, current.replies, self.waiting
        deadline_s = rules.deadline_s * max(1.0, plan.longest / self.settings.local_steps)  # a calibration has more
        least = min(rules.quorum, len(plan.steps)) if self.settings.aggregation.keeps_replies else 0
        sessions, asked = self.sessions.by_client, (plan.round, plan.phase)
        last_first = [*plan.steps][::-1]  # who was asked last mostly answers last, and is found at once
        while True:
            waited = time.monotonic() - current.began
            overdue = waited >= deadline_s
            if not overdue and any(sessions[client].asked == asked for client in last_first):
                self._wait(deadline_s - waited)
                continue
            owing = [client for client in plan.steps if sessions[client].asked == asked]
            if len(replies) >= least:
                break
            missing = [client for client in plan.steps if current.awaits(client)]
            gone = any(not sessions[client].present for client in missing)
            others = overdue and self._others_can_do(plan)
            if others or (not owing and (overdue or not gone)):
                text = f"round {plan.round}: {len(replies)} replies of {least} that it needs: it opens again"
                self._report("void", text, here=len(replies))
                for client in missing if others else ():
                    self._count_failure(client, sessions[client], f"{_PATIENT} rounds in a row waited for it in vain")
                return False
            if waited > deadline_s + rules.patience_s:
                raise RunFailed(
                    f"round {plan.round}: {len(replies)} replies came in {waited:.0f} s, {least} are needed; {_SAFE}"
                )
            self._wait(_WAKE_S if overdue else deadline_s - waited)
        if owing:
            text = f"round {plan.round}: closed at its deadline without {clients_in_words(owing)}"
            self._report("deadline", text, clients=owing)
        for client in plan.steps:
            if client in replies:
                sessions[client].rounds.was_in_time()
            elif current.awaits(client) or client in current.failed_late:
                sessions[client].rounds.was_late(plan.round)
        return True

    def _others_can_do(self, plan: RoundPlan) -> bool:
        """Whether enough clients are here and idle for a round without those that a plan waits for."""
        idle = self.available()
        return len(idle) >= self.waiting.quorum and not plan.steps.keys() >= {*idle}

    def closed(self, state: ServerState, record: RoundRecord) -> None:
        """Remember what clients need to follow a round that is on the disk, and say how the federation stands."""
        self.sessions.state = state
        closed = Closed(record.plan.lr, share_of(self.settings, record.made), record.aggregate, counted=False)
        now = time.monotonic()
        digest = bytes.fromhex(record.theta_digest)
        self.sessions.recent.add(closed, record.made, digest, now - self._answered_at)
        if now - self._status_at >= _STATUS_S:
            self._status_at = now
            self._say_status()

    def evaluate(self, _: Tensor, rounds: int) -> EvaluationMetric:
        """An evaluation on sites' own rows, over the sites that agreed to it and answer before the deadline."""
        self._evaluations, sessions, turn = {}, self.sessions.by_client, self._evaluations_made
        self._evaluations_made += 1
        asked = self._logged() if rounds == self.sessions.recent.round else []  # sites hold no theta of the past
        asked = [k for k in asked if sessions[k].site.evaluates and not sessions[k].evaluations.rests(turn)]
        self._evaluating = {*asked}
        self.sessions.send(Kind.EVALUATE, dict.fromkeys(sorted(self._evaluating), NO_WORK))
        end = time.monotonic() + self.waiting.deadline_s
        while self._evaluating and (left := end - time.monotonic()) > 0:
            self._wait(left)
            self._evaluating.intersection_update(self.sessions.present())
        self._evaluating = set()
        for client in asked:
            if client in self._evaluations:
                sessions[client].evaluations.was_in_time()
            else:
                sessions[client].evaluations.was_late(turn)
        # by client, whatever order they answered in: the mean has the same bits
        scores = [self._evaluations[client] for client in sorted(self._evaluations)]
        return EvaluationMetric.of_sites(scores, self.better, rounds)

    def end(self, why: str) -> None:
        """Bring everyone up to date, late clients too, and say that the run is over."""
        self._handle_pending()
        self.sessions.end(why)

    # notes

    def defer(self, task: Callable[[], None]) -> None:
        """Do something while clients work, together with other tasks, which costs much less."""
        self._tasks.append(task)

    def run_deferred(self) -> None:
        """Do it now."""
        while self._tasks:
            self._tasks.popleft()()
        self._deferred_at = time.monotonic()

    def facts(self) -> dict[str, Any]:
        """Of the last round, seconds until it had its replies; who is present; what did not count so far."""
        dropped = {name: count for name, count in self.counts.items() if count}
        here = len(self.sessions.present())
        return {"round_s": self._round_s, "here": here, **({"dropped": dropped} if dropped else {})}

    def _say_status(self) -> None:
        present = self.sessions.present()
        late = [client for client in present if self.sessions.by_client[client].asked is not None]
        slow = f", {clients_in_words(late)} late" if late else ""
        sent, received = self.link.bytes_sent, self.link.bytes_received
        took = f"{1e3 * self._round_s:.3g} ms" if self._round_s < 0.999 else f"{self._round_s:,.2f} s"
        say(
            f"round {self.sessions.recent.round} of {self.settings.rounds}: "
            f"{number_of(len(present), 'client')} here{slow}; "
            f"{took} a round, {sent:,} bytes sent, {received:,} received"
        )

    def outcome(self) -> dict[str, Any]:
        """The network's part of the summary: frames' bytes, both ways, and what did not count."""
        return {
            "frame_bytes_down": self.link.bytes_sent,
            "frame_bytes_up": self.link.bytes_received,
            "dropped": self.counts,
            "caught_up": self.sessions.caught_up,
        }

    # what clients send

    def _wait(self, at_most_s: float) -> None:
        """Handle the next event, if one comes in time."""
        event = self.link.receive(min(max(at_most_s, 0.0), _WAKE_S))
        if event is not None:
            self._handle(event)
        if self._stopped:
            raise RunFailed(f"{self._stopped}; {_SAFE}")

    def _handle_pending(self) -> None:
        while (event := self.link.receive(0)) is not None:
            self._handle(event)

    def _handle(self, event: Event) -> None:
        client, session = event.client, self.sessions.by_client.get(event.client)
        if event.what == "arrived" and event.site is not None:
            self._welcome(event.site)
        elif session is None or not session.present:
            self.counts["foreign"] += event.what == "frame"
        elif event.what == "left":
            session.present, session.asked = False, None
            self._report("left", f"client {client} left", client=client)
        else:
            try:
                self._receive(client, session, Frame.decode(event.data))
            except BadFrame as error:
                self.counts["malformed"] += 1
                self._remove(client, str(error))

    def _welcome(self, site: AdmittedSite) -> None:
        client, member = site.client, site.member
        back = "back" if client in self.sessions.by_client else "here"
        text = f"client {client} is {back}, with {member.examples} rows"
        self._report("arrived", text, client=client, node=member.node)
        self.sessions.begin(site)
        self._arrived[client] = site
        if self._round is not None:
            self._round.failed.discard(client)
        if not site.evaluates:
            self._evaluating.discard(client)
        if client in self._evaluating or self._is_logged(site):
            self._send_awaited(client)

    def _send_awaited(self, client: int) -> None:
        """Ask a client for what is still awaited of it, if anything."""
        if client in self._evaluating:
            self.sessions.send(Kind.EVALUATE, {client: NO_WORK})
        elif self._round is not None and self._round.awaits(client):
            self._ask(self._round.plan, [client])

    def _receive(self, client: int, session: Session, frame: Frame) -> None:
        if (frame.run, frame.client) != (self.sessions.run, client):
            self.counts["foreign"] += 1
            raise BadFrame("a frame of another run or client")
        match frame.kind:
            case Kind.REPLY | Kind.SIGNED:
                self._receive_reply(client, session, frame)
            case Kind.BEHIND:
                self._ask_again(client, session, "its theta differs from everyone else's")
            case Kind.FAILED:
                self._receive_failure(client, session, frame)
            case Kind.SCORE:
                most = self.admission.rows_maximum(client)
                evaluation = frames.decode_score(frame.body, primary(self.better), most)
                if client in self._evaluating and frame.digest == self.sessions.recent.digest:
                    session.unasked = 0
                    self._evaluating.remove(client)
                    self._evaluations[client] = evaluation
                else:
                    self._count_unasked(session, "late")
            case Kind.REFUSAL:
                why = one_line(frames.decode_json(frame.body)[1].get("why"))
                self._report("declined", f"client {client} takes no part: {why}", client=client, why=why)
                self._remove(client, "as it wished")
            case _:
                raise BadFrame(f"a frame of kind {frame.kind.name.lower()}, which a site does not send")

    def _receive_reply(self, client: int, session: Session, frame: Frame) -> None:
        (phase, pointer, scalars), signature = frames.decode_reply(frame)
        key, current, theta = (frame.round, phase), self._round, self.sessions.recent.digest
        if session.asked != key:
            self._count_unasked(session, "duplicate")
            return
        session.asked, session.unasked = None, 0
        if current is None or (current.plan.round, current.plan.phase) != key or client not in current.plan.steps:
            self.counts["late"] += 1
            return
        if not signature and frame.digest != theta:
            self._ask_again(client, session, "it replies from another theta")
            return
        try:
            check_reply(current.plan, client, scalars)
            self._members.check_reply(client, current.plan, theta, pointer, scalars, signature)
        except (ValueError, BadSignature) as error:
            raise BadFrame(str(error)) from None
        session.failures = 0
        self._failing.pop(client, None)
        current.replies[client] = Scalars(client, scalars, pointer=pointer, signature=signature)

    def _receive_failure(self, client: int, session: Session, frame: Frame) -> None:
        why = frames.decode_json(frame.body)[1].get("why")
        if client in self._evaluating:
            self._evaluating.remove(client)
        elif session.asked is None or session.asked[0] != frame.round:
            self._count_unasked(session, "duplicate")
            return
        self.counts["failed"] += 1
        why = why if why in frames.FAILURES else "error"
        self._report("failed", f"client {client} could not make its steps: {why}", client=client, why=why)
        if self._round is not None:
            self._round.failed.add(client)
            if time.monotonic() - self._round.began > self.waiting.deadline_s / 2:
                self._round.failed_late.add(client)
        self._failing[client] = why
        self._fail(client, session, f"it could not make its steps {_PATIENT} times in a row ({why})")

    def _count_unasked(self, session: Session, reason: str) -> None:
        """Note a frame that nobody asked for. Raises BadFrame where too many came in a row."""
        self.counts[reason] += 1
        session.unasked += 1
        if session.unasked > _MOST_UNASKED:
            raise BadFrame(f"more than {_MOST_UNASKED} frames in a row that nobody asked for")

    def _ask_again(self, client: int, session: Session, why: str) -> None:
        """Send the whole state to a client with another theta, and ask again for what is awaited of it."""
        self.counts["behind"] += 1
        session.round = None
        self._fail(client, session, why)
        if session.present:
            self._send_awaited(client)

    def _fail(self, client: int, session: Session, why: str) -> None:
        """Note that a client answered without a reply, which counts as a failure."""
        session.asked = None
        self._count_failure(client, session, why)

    def _count_failure(self, client: int, session: Session, why: str) -> None:
        """Count one more failure in a row, and remove a client that has too many."""
        session.failures += 1
        if session.failures >= _PATIENT:
            self._remove(client, why)

    def _remove(self, client: int, why: str) -> None:
        """End a client's session; the round goes on without it."""
        self._report("shown out", f"client {client} is removed: {why}", client=client, why=why)
        self.sessions.remove(client, why)
