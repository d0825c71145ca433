"""Who is in a federation, as its log has it: clients that joined, the keys they sign with, keys that are revoked.

The door, the coordinator's engine and the replay of a log hold everyone to the same rules, which stand here:

- A key is one client's. A client that has signed goes on signing.
- Another key comes in with the signature of the one before, which is a rotation, or after that one was revoked.
- What a revoked key signs from then on is not taken.
- Where keys are listed, only they may sign, and those that one of them handed over to.
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
    """A site that became a client of a federation, or came back with other data or another key: from the next round."""

    round: int
    client: int
    examples: int
    """Its rows."""
    node: str
    """The node that the client id belongs to from now on: no other may take its place."""
    key: str = ""
    """The public key that it signs with, 32 bytes, hexadecimal; empty where it does not sign."""
    signature: str = ""
    """Its own, of its joining: 64 bytes, hexadecimal. See `signatures`."""
    handover: str = ""
    """The key before's, where this one took its place; hexadecimal."""

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> "Member":
        """The record that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it was not written by `to_json`.
        """
        join = cls(**{name: value for name, value in held.items() if name != "kind"})
        whole = all(isinstance(n, int) for n in (join.round, join.client, join.examples))
        if not (whole and isinstance(join.node, str) and 0 <= join.client < 2**32 and 0 < join.examples < 2**40):
            raise ValueError(f"a join of client {join.client!r} with {join.examples!r} rows")
        if not are_credentials(join.key, join.signature, join.handover):
            raise ValueError(f"a join of client {join.client} with a key or signature that is none")
        return join

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {"kind": "join", **asdict(self)}

    def added_to(self, settings: ServerConfig) -> ServerConfig:
        """The settings with this client among them."""
        return replace(settings, examples={**settings.examples, self.client: self.examples})


def are_credentials(key: object, signature: object, handed: object) -> bool:
    """Whether these are a key with its signature and perhaps a handover, hexadecimal; or nothing at all."""
    return (key, signature, handed) == ("", "", "") or (
        is_hex(key, KEY) and is_hex(signature, SIGNATURE) and (handed == "" or is_hex(handed, SIGNATURE))
    )


@dataclass(frozen=True)
class KeyRevocation:
    """A key that is not taken any more, from a round on."""

    round: int
    key: str
    """Its fingerprint."""

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> "KeyRevocation":
        """The record that `to_json` wrote.

        Raises:
            TypeError, ValueError: it was not written by `to_json`.
        """
        made = cls(**{name: value for name, value in held.items() if name != "kind"})
        if not isinstance(made.round, int) or not is_fingerprint(made.key):
            raise ValueError(f"a revocation of key {made.key!r} before round {made.round!r}")
        return made

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {"kind": "revoke", **asdict(self)}


class Members:
    """The clients of a run that sign, and the revoked keys."""

    def __init__(self, charter: RunIdentity, listed: Collection[str] | None = None) -> None:
        """Nobody has joined, and nothing is revoked.

        Args:
            listed: fingerprints of the only keys that may sign; None to hold keys against no list.
        """
        self.charter = charter
        self.listed = listed
        self.revoked: dict[str, int] = {}
        """The keys that are revoked by now, by fingerprint, and from which round on."""
        self.keys: dict[int, bytes] = {}
        """The public key of each client that signs."""
        self._joined: dict[int, bytes] = {}
        self._owners: dict[bytes, int] = {}

    def check(self, join: Member) -> None:
        """Whether a site may join so.

        Raises:
            BadSignature: it may not; whose key it is and why.
        """
        client, key, before = join.client, bytes.fromhex(join.key), self.keys.get(join.client)
        if not key:
            if before is not None:
                raise BadSignature(f"client {client} has signed with key {fingerprint(before)}, and now has none")
            if self.charter.signed or self.listed is not None:
                none = "" if self.charter.signed else ", and the run took replies without: there is nothing to check"
                raise BadSignature(f"client {client} has no key, where every reply must be signed{none}")
            return
        name = fingerprint(key)
        self._check_revoked(key, f"client {client}'s joining")
        if self._owners.get(key, client) != client:
            raise BadSignature(f"key {name} of client {client} is client {self._owners[key]}'s")
        joining = self.charter.joining(client, join.examples, join.node, key)
        if not is_signed(key, bytes.fromhex(join.signature), joining):
            raise BadSignature(f"client {client} has not signed its joining with key {name}")
        if before is not None and self.needs_handover(join):
            if not join.handover:
                was = fingerprint(before)
                raise BadSignature(f"client {client} signed with key {was}, and nothing hands over to {name}")
            if not is_signed(before, bytes.fromhex(join.handover), handover(joining)):
                raise BadSignature(f"client {client}: key {fingerprint(before)} has not handed over to {name}")
            return
        if join.handover:
            if before is not None:
                self._check_revoked(before, f"client {client}'s handover to key {name}")
            raise BadSignature(f"key {name} of client {client} was handed over, and there was none before it")
        if before != key and self.listed is not None and name not in self.listed:
            raise BadSignature(f"key {name} of client {client} is not among the listed ones")

    def needs_handover(self, join: Member) -> bool:
        """Whether the key of a joining takes the place of another, which can hand over."""
        before = self.keys.get(join.client)
        return before is not None and before.hex() != join.key and fingerprint(before) not in self.revoked

    def join(self, join: Member) -> None:
        """Take up a client that joins from now on.

        Raises:
            BadSignature: see `check`.
        """
        self.check(join)
        if key := bytes.fromhex(join.key):
            joining = self.charter.joining(join.client, join.examples, join.node, key)
            self.keys[join.client], self._owners[key] = key, join.client
            self._joined[join.client] = hashlib.sha256(joining).digest()

    def revoke(self, revocation: KeyRevocation) -> None:
        """Take nothing more that a key signs."""
        self.revoked.setdefault(revocation.key, revocation.round)

    def check_reply(
        self, client: int, plan: RoundPlan, theta: bytes, pointer: int, scalars: np.ndarray, signature: bytes
    ) -> None:
        """Whether a reply is what its client signed; arguments as in `signatures.reply_message`.

        Raises:
            BadSignature: it is not, or is signed where nobody could tell by whom.
        """
        key = self.keys.get(client)
        if key is None:
            if signature:
                raise BadSignature(f"client {client}'s reply is signed, and it joined without a key")
            return
        name = fingerprint(key)
        if not signature:
            raise BadSignature(f"client {client}'s reply is not signed; its key is {name}")
        self._check_revoked(key, f"client {client}'s reply")
        if not is_signed(key, signature, reply_message(self._joined[client], client, plan, theta, pointer, scalars)):
            raise BadSignature(f"client {client}'s reply is not what its key {name} signed")

    def _check_revoked(self, key: bytes, what: str) -> None:
        if (since := self.revoked.get(name := fingerprint(key))) is not None:
            raise BadSignature(f"{what} is signed with key {name}, which is revoked from round {since} on")
