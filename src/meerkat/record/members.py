"""Who is in a federation and may sign, as its log has it: clients that joined, their keys, revoked keys.

Admission, the coordinator's engine and the replay of a log all apply these rules:

- A key belongs to one client. A client that has signed goes on signing.
- A new key needs the signature of the previous one (a rotation), unless that one was revoked.
- What a revoked key signs from then on is rejected.
- Where keys are listed, only they may sign, and keys that one of them handed over to.
"""

import hashlib
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.server import ServerConfig
from meerkat.record.signatures import (
    KEY,
    SIGNATURE,
    BadSignature,
    RunIdentity,
    fingerprint,
    handover,
    is_fingerprint,
    is_hex,
    is_signed,
    reply_message,
)


@dataclass(frozen=True)
class Member:
    """A site that became a client of a federation, or came back with other data, another key or another node.

    Raises:
        ValueError: a field is malformed.
    """

    round: int
    """The first round that it can take part in."""
    client: int
    examples: int
    """Its rows."""
    node: str
    """The node that the client id belongs to from now on. Another takes its place where the coordinator's settings
    say so."""
    key: str = ""
    """The public key that it signs with, 32 bytes, hexadecimal; empty if it does not sign."""
    signature: str = ""
    """The key's signature of the joining, 64 bytes, hexadecimal: see `signatures`."""
    handover: str = ""
    """The previous key's signature, if this one replaces it; hexadecimal."""

    def __post_init__(self) -> None:
        if type(self.examples) is not int or not 0 < self.examples < 2**40:
            raise ValueError("a site without a number of rows")
        if not (type(self.round) is type(self.client) is int and 0 <= self.client < 2**32 and type(self.node) is str):
            raise ValueError("a site with a malformed round, client or node")
        keyless = (self.key, self.signature, self.handover) == ("", "", "")
        handover_fits = self.handover == "" or is_hex(self.handover, SIGNATURE)
        if not keyless and not (is_hex(self.key, KEY) and is_hex(self.signature, SIGNATURE) and handover_fits):
            raise ValueError(f"client {self.client} with a malformed key or signature")

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Member":
        """The record that `to_json` wrote. Raises TypeError or ValueError if it is malformed."""
        return cls(**{name: value for name, value in record.items() if name != "kind"})

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {"kind": "join", **asdict(self)}

    def added_to(self, settings: ServerConfig) -> ServerConfig:
        """The settings with this client among them."""
        return replace(settings, examples={**settings.examples, self.client: self.examples})


@dataclass(frozen=True)
class KeyRevocation:
    """A key that is rejected from a round on."""

    round: int
    key: str
    """Its fingerprint."""

    def __post_init__(self) -> None:
        if not isinstance(self.round, int) or not is_fingerprint(self.key):
            raise ValueError(f"a revocation of key {self.key!r} before round {self.round!r}")

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "KeyRevocation":
        """The record that `to_json` wrote. Raises TypeError or ValueError if it is malformed."""
        return cls(**{name: value for name, value in record.items() if name != "kind"})

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {"kind": "revoke", **asdict(self)}


class Members:
    """The clients of a federation that sign, with their keys, and the revoked keys."""

    def __init__(self, identity: RunIdentity, listed: Collection[str] | None = None) -> None:
        """Nobody has joined, no key is revoked; `listed`: fingerprints of the only keys that may sign, None for any."""
        self.identity = identity
        self.listed = listed
        self.revoked: dict[str, int] = {}
        """Fingerprint of each revoked key -> the round from which it is."""
        self.keys: dict[int, bytes] = {}
        """The public key of each client that signs."""
        self.nodes: dict[int, str] = {}
        """The node of each client: that of its last joining."""
        self._joining_digests: dict[int, bytes] = {}
        self._owners: dict[bytes, int] = {}
        self._predecessors: dict[str, str] = {}
        """Fingerprint of each key that another handed over to -> the fingerprint of that other."""

    def check(self, member: Member) -> None:
        """Raise BadSignature, with the key and the reason, unless a site may join."""
        client, key, previous = member.client, bytes.fromhex(member.key), self.keys.get(member.client)
        if not key:
            if previous is not None:
                raise BadSignature(f"client {client} has signed with key {fingerprint(previous)}, and now has none")
            if self.identity.signed or self.listed is not None:
                why = "" if self.identity.signed else ", and the run took unsigned replies: there is nothing to check"
                raise BadSignature(f"client {client} has no key, where every reply must be signed{why}")
            return
        name = fingerprint(key)
        self._check_revoked(key, f"client {client}'s joining")
        if self._owners.get(key, client) != client:
            raise BadSignature(f"key {name} of client {client} is client {self._owners[key]}'s")
        joining = self._joining(member)
        if not is_signed(key, bytes.fromhex(member.signature), joining):
            raise BadSignature(f"client {client} has not signed its joining with key {name}")
        if previous is not None and self.needs_handover(member):
            former = fingerprint(previous)
            if not member.handover:
                raise BadSignature(f"client {client} signed with key {former}, and nothing hands over to {name}")
            if not is_signed(previous, bytes.fromhex(member.handover), handover(joining)):
                raise BadSignature(f"client {client}: key {former} has not handed over to {name}")
        elif member.handover:
            if previous is not None:
                self._check_revoked(previous, f"client {client}'s handover to key {name}")
            raise BadSignature(f"key {name} of client {client} comes with a handover, and there was no key before it")
        elif previous != key and self.listed is not None and name not in self.listed:
            raise BadSignature(f"key {name} of client {client} is not among the listed ones")

    def needs_handover(self, member: Member) -> bool:
        """Whether a joining's key replaces another, which can hand over."""
        previous = self.keys.get(member.client)
        return previous is not None and previous.hex() != member.key and fingerprint(previous) not in self.revoked

    def lineage(self, member: Member) -> list[str]:
        """The fingerprints of a member's key and of those that handed over to it, one after the other, newest first."""
        line = [fingerprint(bytes.fromhex(member.key))]
        if self.needs_handover(member):
            line.append(fingerprint(self.keys[member.client]))
        known = {*line}
        while (before := self._predecessors.get(line[-1])) is not None and before not in known:
            line.append(before)
            known.add(before)
        return line

    def admit(self, member: Member) -> None:
        """Add a client. Raises BadSignature: see `check`."""
        self.check(member)
        others = {client: node for client, node in self.nodes.items() if node != member.node}
        self.nodes = {**others, member.client: member.node}
        if key := bytes.fromhex(member.key):
            if self.needs_handover(member):
                self._predecessors[fingerprint(key)] = fingerprint(self.keys[member.client])
            self.keys[member.client], self._owners[key] = key, member.client
            self._joining_digests[member.client] = hashlib.sha256(self._joining(member)).digest()

    def _joining(self, member: Member) -> bytes:
        return self.identity.joining(member.client, member.examples, member.node, bytes.fromhex(member.key))

    def revoke(self, revocation: KeyRevocation) -> None:
        """Reject from now on what a key signs."""
        self.revoked.setdefault(revocation.key, revocation.round)

    def check_reply(
        self, client: int, plan: RoundPlan, theta: bytes, pointer: int, scalars: np.ndarray, signature: bytes
    ) -> None:
        """Check that a client signed its reply; arguments as in `signatures.reply_message`.

        Raises:
            BadSignature: it did not, or the reply is signed although the client joined without a key.
        """
        key = self.keys.get(client)
        if key is None:
            if signature:
                raise BadSignature(f"client {client}'s reply is signed, but it joined without a key")
            return
        name = fingerprint(key)
        if not signature:
            raise BadSignature(f"client {client}'s reply is not signed; its key is {name}")
        self._check_revoked(key, f"client {client}'s reply")
        message = reply_message(self._joining_digests[client], client, plan, theta, pointer, scalars)
        if not is_signed(key, signature, message):
            raise BadSignature(f"client {client}'s reply is not what its key {name} signed")

    def _check_revoked(self, key: bytes, what: str) -> None:
        if (since := self.revoked.get(name := fingerprint(key))) is not None:
            raise BadSignature(f"{what} is signed with key {name}, which is revoked from round {since} on")
