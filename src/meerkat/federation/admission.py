"""Who may come into a federation's session, and as which client.

A node shows the token that it was handed over the control plane: once. It gets a secret for this session, with
which it comes back when its stream breaks. Whoever shows neither stays out, and changes nothing.
"""

import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from meerkat.federation import frames
from meerkat.federation.frames import BadFrame, Frame, Kind
from meerkat.federation.site_settings import Refused
from meerkat.record.members import Member, Members, are_credentials
from meerkat.record.signatures import BadSignature, fingerprint

_SECRET = 32
_HELLO = 4096
"""Bytes of a first frame, at most: it is taken apart before anybody knows who sends it."""


@dataclass(frozen=True)
class Guest:
    """A site that was let in."""

    joining: Member
    """What is to be logged of it, if it is news; the round is the coordinator's to say."""
    evaluates: bool
    round: int
    """The round that its theta stands at."""
    digest: bytes
    """SHA-256 of that theta."""
    welcome: bytes
    """The frame to answer with."""

    @property
    def client(self) -> int:
        """Its number."""
        return self.joining.client

    @property
    def node(self) -> str:
        """The node that its number belongs to."""
        return self.joining.node

    @property
    def examples(self) -> int:
        """Its rows."""
        return self.joining.examples


class Door:
    """Checks first frames. Several threads may ask at once."""

    def __init__(self, register: Members, clients: int, nodes: Mapping[int, str] | None = None) -> None:
        """What a site must match.

        Args:
            register: who signs with which key, as the log has it; its charter names run, model and mask.
            clients: client numbers are below it.
            nodes: the node that a client number belongs to, of those that joined before.
        """
        self.register = register
        """As given: whoever logs a joining writes it there."""
        self._run = bytes.fromhex(register.identity.run)
        self._clients = clients
        self._must = {"model": register.identity.model, "mask": register.identity.mask}
        self._nodes = dict(nodes or {})
        self._tokens: dict[bytes, str] = {}
        self._spent: set[bytes] = set()
        self._secrets: dict[bytes, tuple[int, str]] = {}
        self._lock = threading.Lock()

    def token(self, node: str) -> str:
        """A token for a node's first frame, hexadecimal; those that it was given before are void."""
        made = secrets.token_bytes(_SECRET)
        with self._lock:
            self._spent |= {token for token, owner in self._tokens.items() if owner == node}
            self._tokens = {token: owner for token, owner in self._tokens.items() if owner != node}
            self._tokens[made] = node
        return made.hex()

    def shut_out(self, client: int) -> None:
        """Void a client's session secret: it cannot come back with it."""
        with self._lock:
            self._secrets = {secret: held for secret, held in self._secrets.items() if held[0] != client}

    def admit(self, data: bytes) -> Guest:
        """Let a site in by its first frame.

        Raises:
            Refused: it may not come in; the message says why, and does not repeat what it sent.
            BadFrame: the bytes are no first frame.
        """
        if len(data) > _HELLO:
            raise BadFrame(f"a first frame of {len(data):,} bytes: at most {_HELLO:,} are read of a stranger")
        frame = Frame.decode(data)
        if frame.kind is not Kind.HELLO:
            raise BadFrame("a stream that does not begin with a hello")
        secret, said = frames.decode_words(frame.body, _SECRET)
        with self._lock:
            return self._admit(frame, secret, said)

    def _admit(self, frame: Frame, secret: bytes, said: dict[str, Any]) -> Guest:
        if frame.run != self._run:
            raise Refused("a frame of another run: wait for this run's own message")
        known = self._secrets.get(secret)
        node = known[1] if known else self._tokens.get(secret)
        if node is None:
            used = secret in self._spent
            raise Refused("the token was used before" if used else "no token of this session: join through Flower")
        # a token serves once, whatever comes of it
        if not known:
            del self._tokens[secret]
            self._spent.add(secret)
        client, examples = frame.client, said.get("examples")
        if known and known[0] != client:
            raise Refused(f"the session is client {known[0]}'s")
        if client >= self._clients:
            raise Refused(f"client {client}: must be 0 to {self._clients - 1}; set 'client' in site.toml")
        if self._nodes.get(client, node) != node:
            raise Refused(f"client {client} is another node's; set another 'client' in site.toml")
        if other := [k for k, owner in self._nodes.items() if owner == node and k != client]:
            raise Refused(f"client {client}: this node is client {other[0]} already; set 'client' in site.toml back")
        for name, must in self._must.items():
            if said.get(name) != must:
                raise Refused(f"the {name} is not this run's ({must[:12]}...); use the same {name}")
        if isinstance(examples, bool) or not isinstance(examples, int) or not 0 < examples < 2**40:
            raise Refused("a site without a number of rows")
        joining = self._joining(Member(0, client, examples, node), said)
        self._nodes[client] = node
        if not known:
            secret = secrets.token_bytes(_SECRET)
            self._secrets = {s: held for s, held in self._secrets.items() if held[0] != client}
            self._secrets[secret] = (client, node)
        welcome = Frame(Kind.WELCOME, self._run, client, frame.round, frame.digest, frames.encode_words({}, secret))
        evaluates = said.get("evaluates") is True
        return Guest(joining, evaluates, frame.round, frame.digest, welcome.encode())

    def _joining(self, join: Member, said: dict[str, Any]) -> Member:
        """What a site joins as, if its key is one that may sign for it."""
        key, signature, handover = (said.get(name, "") for name in ("key", "signature", "handover"))
        if not are_credentials(key, signature, handover):
            raise BadFrame("a hello with a key or a signature that is none")
        join = replace(join, key=key, signature=signature)
        before = self.register.keys.get(join.client)
        if before is not None and self.register.needs_handover(join):
            join = replace(join, handover=handover)
        elif before not in (None, bytes.fromhex(key)) and self.register.listed is None:
            raise Refused(
                f"key {fingerprint(before)} was revoked: its successor must be in the coordinator's 'signers'"
            )
        try:
            self.register.check(join)
        except BadSignature as error:
            raise Refused(str(error)) from None
        return join

    def refuse(self, why: str, client: int = 0) -> bytes:
        """The frame that says no."""
        return Frame(Kind.REFUSAL, self._run, client, 0, body=frames.encode_words({"why": why})).encode()
