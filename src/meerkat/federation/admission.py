"""Admission to a federation's session: which sites may take part, and as which client.

A node's first frame shows the token that it got over the control plane, which serves once. It gets a secret for this
session, to come back with when its stream breaks. A site that shows neither is refused, and changes nothing.

Bindings say which node and which key is which client. Where there are none, a client number belongs to the first node
that claims it.
"""

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from meerkat.federation import frames
from meerkat.federation.frames import BadFrame, Frame, Kind
from meerkat.federation.site_settings import Refused
from meerkat.federation.token_bucket import TokenBucket
from meerkat.record.members import Member, Members
from meerkat.record.signatures import BadSignature, fingerprint
from meerkat.settings.validation import Settings

_SECRET = 32
_BURST, _EVERY_S = 10, 1.0
"""How often a node may come in quick succession, and seconds after which it may come once more."""
ROWS_MAXIMUM = 1_000_000
"""The most rows that a site may claim where nothing else is said: they are its weight."""


class TooSoon(Refused):
    """A site comes back too often. It is let in if it tries again later."""


class Binding(Settings):
    """Who alone may be a client: an entry of [[federation.sites]] in federation.toml."""

    client: int = Field(ge=0, lt=2**32, description="the client's number")
    node: str = Field("", pattern="^[0-9]*$", description="its node, as 'flwr supernode register' prints it; or any")
    key: str = Field("", description="its public signing key: a fingerprint or a .pub file; empty for any, or none")
    rows_maximum: int = Field(0, ge=0, description="most rows that it may claim; 0 for the federation's rows_maximum")


@dataclass(frozen=True)
class AdmittedSite:
    """A site that was admitted."""

    member: Member
    """To be logged if it is new or has changed. Its round is a placeholder: the coordinator fills it in."""
    evaluates: bool
    round: int
    """The round that its theta stands at."""
    digest: bytes
    """SHA-256 of that theta."""
    welcome: bytes
    """The frame to answer with."""

    @property
    def client(self) -> int:
        """Its client number."""
        return self.member.client


class Admission:
    """Checks first frames. Safe to call from several threads."""

    def __init__(
        self,
        members: Members,
        clients: int,
        bindings: Sequence[Binding] = (),
        rows_maximum: int = ROWS_MAXIMUM,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """What a site must match.

        Args:
            members: who joined, from which node and with which key, as logged; its identity names run, model and mask.
            clients: client numbers are below it.
            bindings: the only clients, one each; empty for any. They outweigh what is logged.
            rows_maximum: the most rows that a client may claim whose binding says nothing else.
            clock: the time in seconds.
        """
        self.members = members
        """As given: the coordinator adds each member that it logs."""
        self._run = bytes.fromhex(members.identity.run)
        self.clients = clients
        """Client numbers are below it."""
        self._bindings = {binding.client: binding for binding in bindings}
        self._rows_maximum = rows_maximum
        bound = {binding.client: binding.node for binding in bindings if binding.node}
        self._nodes = {client: node for client, node in members.nodes.items() if node not in bound.values()} | bound
        self._tokens: dict[bytes, str] = {}
        self._spent: set[bytes] = set()
        self._sessions: dict[bytes, tuple[int, str]] = {}
        """Client and node of each session, by its secret."""
        self._clock = clock
        self._paces: dict[str, TokenBucket] = {}
        """How often each node may come still."""
        self._lock = threading.Lock()

    def rows_maximum(self, client: int) -> int:
        """The most rows that a client may claim, of those it trains on and of those it evaluates on."""
        binding = self._bindings.get(client)
        return (binding.rows_maximum if binding else 0) or self._rows_maximum

    def token(self, node: str) -> str:
        """A token for a node's first frame, hexadecimal. Tokens that it got before become void."""
        token = secrets.token_bytes(_SECRET)
        with self._lock:
            self._spent |= {earlier for earlier, owner in self._tokens.items() if owner == node}
            self._tokens = {earlier: owner for earlier, owner in self._tokens.items() if owner != node}
            self._tokens[token] = node
        return token.hex()

    def void_session(self, client: int) -> None:
        """Void a client's session secret: it cannot come back with it."""
        with self._lock:
            self._forget_sessions(client)

    def _forget_sessions(self, client: int) -> None:
        self._sessions = {secret: session for secret, session in self._sessions.items() if session[0] != client}

    def admit(self, data: bytes) -> AdmittedSite:
        """Admit a site by its first frame.

        Raises:
            Refused: it is refused; the message says why, and does not repeat what the site sent.
            TooSoon: it came too often lately; nothing has changed.
            BadFrame: the bytes are not a first frame.
        """
        if len(data) > frames.LONGEST_WORDS:  # it is parsed before its sender is known
            raise BadFrame(f"a first frame of {len(data):,} bytes: at most {frames.LONGEST_WORDS:,} are accepted")
        frame = Frame.decode(data)
        if frame.kind is not Kind.HELLO:
            raise BadFrame("a stream that does not begin with a hello")
        secret, hello = frames.decode_json(frame.body, _SECRET)
        with self._lock:
            return self._admit(frame, secret, hello)

    def _admit(self, frame: Frame, secret: bytes, hello: dict[str, Any]) -> AdmittedSite:
        if frame.run != self._run:
            raise Refused("a frame of another run: wait for this run's own message")
        session, client = self._sessions.get(secret), frame.client
        node = session[1] if session else self._tokens.get(secret)
        if node is None:
            used = secret in self._spent
            raise Refused("the token was used before" if used else "no token of this session: join through Flower")
        if session and session[0] != client:
            raise Refused(f"the session is client {session[0]}'s")
        if not self._paces.setdefault(node, TokenBucket(_BURST, _EVERY_S, self._clock)).take():
            raise TooSoon(f"node {node} comes back too often")
        if not session:  # a token serves once, even if the site is refused
            del self._tokens[secret]
            self._spent.add(secret)
        self._check_place(client, node)
        for name in ("model", "mask"):
            value = getattr(self.members.identity, name)
            if hello.get(name) != value:
                raise Refused(f"the {name} is not this run's ({value[:12]}...); use the same {name}")
        member = self._member(client, node, hello)
        if member.examples > (most := self.rows_maximum(client)):
            raise Refused(f"client {client}: more than {most:,} rows, the coordinator's 'rows_maximum' for it")
        self._nodes[client] = node
        if not session:
            secret = secrets.token_bytes(_SECRET)
            self._forget_sessions(client)
            self._sessions[secret] = (client, node)
        welcome = Frame(Kind.WELCOME, self._run, client, frame.round, frame.digest, frames.encode_json({}, secret))
        return AdmittedSite(member, hello.get("evaluates") is True, frame.round, frame.digest, welcome.encode())

    def _check_place(self, client: int, node: str) -> None:
        """Raise Refused unless a node may be a client."""
        if client >= self.clients:
            raise Refused(f"client {client}: must be 0 to {self.clients - 1}; set 'client' in site.toml")
        if self._bindings and client not in self._bindings:
            raise Refused(f"client {client} is not among the coordinator's sites; set another 'client' in site.toml")
        if self._nodes.get(client, node) != node:
            raise Refused(f"client {client} is another node's; set another 'client' in site.toml")
        if other := [k for k, owner in self._nodes.items() if owner == node and k != client]:
            raise Refused(f"client {client}: this node is client {other[0]} already; set 'client' in site.toml back")

    def _member(self, client: int, node: str, hello: dict[str, Any]) -> Member:
        """The member that a hello describes, if its key may sign for the client."""
        credentials = [hello.get(name, "") for name in ("key", "signature", "handover")]
        bound = self._bindings[client].key if client in self._bindings else ""
        try:
            member = Member(0, client, hello.get("examples", 0), node, *credentials)
            if not self.members.needs_handover(member):
                former = self.members.keys.get(client)
                if former and former.hex() != member.key and self.members.listed is None and not bound:
                    name = fingerprint(former)
                    raise Refused(f"key {name} was revoked: its successor must be in the coordinator's 'signers'")
                member = replace(member, handover="")
            self.members.check(member)
        except (ValueError, BadSignature) as error:
            raise Refused(str(error)) from None
        if bound and not member.key:
            raise Refused(f"client {client} must sign, with key {bound}; set 'signing_key' in site.toml")
        if bound and bound not in (lineage := self.members.lineage(member)):
            held = f"the coordinator holds {bound} for it, which has not handed over"
            raise Refused(f"key {lineage[0]} of client {client}: {held}; use that key, or 'signing_key_before'")
        return member

    def refusal(self, why: str, client: int = 0) -> bytes:
        """The frame that refuses a site."""
        return Frame(Kind.REFUSAL, self._run, client, 0, body=frames.encode_json({"why": why})).encode()
