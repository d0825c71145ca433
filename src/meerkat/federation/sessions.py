"""The coordinator's sessions with sites: who is present, which theta each has, and frames that bring it up to date."""

from dataclasses import dataclass

from meerkat.algorithm.directions import Phase
from meerkat.algorithm.replica import Rules
from meerkat.algorithm.server import ServerState
from meerkat.federation import frames
from meerkat.federation.admission import Admission, AdmittedSite
from meerkat.federation.catch_up import RecentRounds
from meerkat.federation.frames import Frame, Kind, Work
from meerkat.federation.link import Link

NO_WORK = Work()


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
        """Begin a site's session, in place of an earlier one, whose failures are not forgotten."""
        known, earlier = self.recent.recognises(site.round, site.digest), self.by_client.get(site.client)
        failures = earlier.failures if earlier else 0
        self.by_client[site.client] = Session(site, site.round if known else None, failures=failures)

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
