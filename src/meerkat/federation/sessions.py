"""The coordinator's sessions with sites: who is present, which theta each has, and frames that bring it up to date."""

from dataclasses import dataclass, field, replace

from meerkat.algorithm.directions import Phase
from meerkat.algorithm.replica import Rules
from meerkat.algorithm.server import ServerState
from meerkat.federation import frames
from meerkat.federation.admission import Admission, AdmittedSite
from meerkat.federation.catch_up import RecentRounds
from meerkat.federation.frames import Frame, Kind, Work
from meerkat.federation.link import Link

NO_WORK = Work()
_FORGIVEN = 0.01
"""How much of one lateness an answer in time makes up for."""
_MOST_LATE = 31


@dataclass
class Punctuality:
    """How often a client was late, and how many turns it is spared for that: twice as many each time.

    Whoever is late on purpose so costs a run of R turns about log2(R) deadlines; whoever was late for a while is asked
    again, and from then on in every turn.
    """

    late: float = 0.0
    asked_from: int = 0
    """The first turn that it is asked in."""

    def was_late(self, turn: int) -> None:
        """A turn ended without its answer."""
        self.late = min(self.late + 1, _MOST_LATE)
        self.asked_from = turn + 2 ** int(self.late)

    def was_in_time(self) -> None:
        """It answered."""
        self.late = max(self.late - _FORGIVEN, 0.0)

    def rests(self, turn: int) -> bool:
        """Whether a turn is to go on without it."""
        return turn < self.asked_from


@dataclass
class Session:
    """A site's session."""

    site: AdmittedSite
    round: int | None
    """The round that its theta stands at, as far as is known; None where it needs the whole state."""
    present: bool = True
    asked: tuple[int, Phase] | None = None
    """The round and phase that it was asked for and has not answered."""
    failures: int = 0
    """How often in a row it failed, or had another theta."""
    unasked: int = 0
    """Frames in a row that nobody had asked it for."""
    rounds: Punctuality = field(default_factory=Punctuality)
    """In rounds, whose turns are their numbers."""
    evaluations: Punctuality = field(default_factory=Punctuality)
    """In evaluations, whose turns the engine counts."""


@dataclass(eq=False)
class Sessions:
    """One session a client, and the frames that go to it."""

    link: Link
    admission: Admission
    rules: Rules
    state: ServerState
    """Where the run stands."""

    def __post_init__(self) -> None:
        self.by_client: dict[int, Session] = {}
        self.caught_up = {"rounds": 0, "state": 0}
        """How often a client was caught up by more than one round, or by the whole state."""
        state_bytes = 4 * len(self.state.theta) * self.rules.vectors
        self.recent = RecentRounds(state_bytes, self.state.round, bytes.fromhex(self.state.replica.digest))
        self.run = bytes.fromhex(self.admission.members.identity.run)

    def present(self) -> list[int]:
        """The clients that are present."""
        return [client for client, session in self.by_client.items() if session.present]

    def idle(self) -> list[int]:
        """The clients that are present and owe no answer, ascending."""
        return [client for client in sorted(self.present()) if self.by_client[client].asked is None]

    def begin(self, site: AdmittedSite) -> None:
        """Begin a site's session, in place of an earlier one, whose failures and lateness are not forgotten."""
        stands_at = site.round if self.recent.recognises(site.round, site.digest) else None
        earlier = self.by_client.get(site.client, Session(site, stands_at))
        self.by_client[site.client] = replace(earlier, site=site, round=stands_at, present=True, asked=None)

    def send(self, kind: Kind, work: dict[int, Work]) -> None:
        """Bring clients to the present theta; the last frame to each is of this kind, with its work."""
        self.link.send({client: self._frames(client, kind, each) for client, each in work.items()})

    def _frames(self, client: int, kind: Kind, work: Work) -> list[bytes]:
        session, state = self.by_client[client], []
        if session.round is None or not self.recent.shorter_than_state(session.round):
            values = self.state.replica_of(client).pack(self.rules)
            state = [self._frame(Kind.STATE, client, part) for part in frames.encode_state(values)]
            self.caught_up["state"] += 1
        else:
            work = work._replace(closed=self.recent.missed_since(session.round, client))
            self.caught_up["rounds"] += len(work.closed) > 1
        session.round = self.recent.round
        return [*state, self._frame(kind, client, work.encode())]

    def _frame(self, kind: Kind, client: int, body: bytes) -> bytes:
        return Frame(kind, self.run, client, self.recent.round, self.recent.digest, body).encode()

    def remove(self, client: int, why: str) -> None:
        """End a client's session; it cannot come back with the same secret."""
        session = self.by_client[client]
        session.present, session.asked = False, None
        self.admission.void_session(client)
        self.link.drop(client, self.admission.refusal(why, client))

    def end(self, why: str) -> None:
        """Bring everyone up to date, late clients too, and say that the run is over."""
        for client in self.present():
            self.send(Kind.CLOSED, {client: NO_WORK})
            self.link.drop(client, self._frame(Kind.END, client, frames.encode_json({"why": why})))
            self.by_client[client].present = False
