"""Who sent which scalars: Ed25519 signatures (RFC 8032) of a site's joining and of each of its replies.

Each signed message has a fixed layout and begins with its own tag: see docs/formats.md. A reply names its joining, and
that the run, so neither is valid in another run, for another client or under another key. A reply on the wire is the
signature and the scalars: both sides know the rest. Keys are OpenSSH's. The package `cryptography` is loaded on use.
"""

import base64
import hashlib
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meerkat.algorithm.directions import PHASES
from meerkat.algorithm.rounds import RoundPlan
from meerkat.errors import MeerkatError, RunFailed

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY, SIGNATURE = 32, 64
"""Bytes of a public key, and of a signature."""

_IDENTITY = struct.Struct("<16s8s?16s32s32s32s32s")
_JOINING = struct.Struct("<16s32sIQ32s")
_HANDOVER = b"meerkat handing1"
_REPLY = struct.Struct("<16s32sBI32sddQIH")
_KIND = b"ssh-ed25519"
_PACKAGE = "need the 'cryptography' package; pip install 'meerkat-fl[flower]'"
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")


class BadSignature(MeerkatError):
    """A signature is missing or wrong, or a key may not sign: whose, and which key."""


@dataclass(frozen=True)
class RunIdentity:
    """What every signature of a run is bound to. Identifiers and digests are hexadecimal, as in the log's opening."""

    run: str
    """The federation's id, 8 bytes."""
    signed: bool
    """Whether every reply must be signed."""
    run_key: str
    """The directions' key, 16 bytes."""
    model: str
    mask: str
    theta: str
    """Digest of theta_0."""
    settings: str
    """Digest of the settings that say what a scalar means: see `opening.meaning`."""

    def digest(self) -> bytes:
        """SHA-256 of all of it. Raises ValueError if an identifier or digest has the wrong length."""
        run, *digests = map(bytes.fromhex, (self.run, self.run_key, self.model, self.mask, self.theta, self.settings))
        if [len(run), *map(len, digests)] != [8, 16, 32, 32, 32, 32]:
            raise ValueError("identifiers of the wrong length")
        return hashlib.sha256(_IDENTITY.pack(b"meerkat charter1", run, self.signed, *digests)).digest()

    def joining(self, client: int, examples: int, node: str, key: bytes) -> bytes:
        """The message that a site signs when it joins."""
        return _JOINING.pack(b"meerkat joining1", self.digest(), client, examples, key) + node.encode()


def handover(joining: bytes) -> bytes:
    """The message that the previous key signs, to hand over to the key in a joining."""
    return _HANDOVER + joining


def reply_message(
    joining_digest: bytes, client: int, plan: RoundPlan, theta: bytes, pointer: int, scalars: np.ndarray
) -> bytes:
    """The message that a site signs for a reply.

    Args:
        joining_digest: SHA-256 of its joining.
        theta: SHA-256 of theta at the start of the round.
        pointer: local steps that the client has made before this round.
        scalars: float32 [steps, directions]
    """
    facts = (PHASES[plan.phase], plan.round, theta, plan.lr, plan.eps, pointer, plan.steps[client], plan.directions)
    if scalars.shape != facts[-2:]:
        raise BadSignature(f"client {client}'s reply has {len(scalars)} steps, where {plan.steps[client]} were asked")
    return _REPLY.pack(b"meerkat replies1", joining_digest, *facts) + scalars.astype("<f4", copy=False).tobytes()


def fingerprint(key: bytes) -> str:
    """A public key's fingerprint, as `ssh-keygen -l` shows it: SHA256:..."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(_openssh(key)).digest()).decode().rstrip("=")


def is_signed(key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether a public key, 32 bytes, signed a message. Raises RunFailed where `cryptography` is not installed."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        raise RunFailed(f"signatures: {_PACKAGE}") from None
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


class SigningKey:
    """A site's private key."""

    def __init__(self, private: "Ed25519PrivateKey") -> None:
        self._private = private
        self.public = private.public_key().public_bytes_raw()
        """32 bytes"""

    @classmethod
    def load(cls, path: str, setting: str = "signing_key") -> "SigningKey":
        """Read an OpenSSH file, as `meerkat keygen` or `ssh-keygen -t ed25519` writes it.

        Raises:
            MeerkatError: no such file, or no Ed25519 key without a password in it; the message names the `setting`.
        """
        try:
            from cryptography.exceptions import UnsupportedAlgorithm
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
            from cryptography.hazmat.primitives.serialization import load_ssh_private_key
        except ImportError:
            raise MeerkatError(f"{setting}: {_PACKAGE}") from None
        problem: str | None = None
        try:
            key: Any = load_ssh_private_key(Path(path).read_bytes(), password=None)
            if not isinstance(key, Ed25519PrivateKey):
                problem = "is not an Ed25519 key"
        except OSError as error:
            problem = error.strerror
        except (ValueError, TypeError, UnsupportedAlgorithm):
            problem = "is not an OpenSSH key without a password"
        if problem is not None:
            raise MeerkatError(f"{setting} '{path}': {problem}; 'meerkat keygen' makes one")
        return cls(key)

    def sign(self, message: bytes) -> bytes:
        """64 bytes, the same for the same message."""
        return self._private.sign(message)


class Signer:
    """Signs as one client of one run, on the site's side."""

    def __init__(
        self, identity: RunIdentity, client: int, examples: int, node: str, key: SigningKey, previous: SigningKey | None
    ) -> None:
        """`previous` is the key that this client signed with until now, to hand over to `key`."""
        joining = identity.joining(client, examples, node, key.public)
        self.joining_digest = hashlib.sha256(joining).digest()
        """SHA-256 of the joining, which every reply names."""
        self.credentials = {"key": key.public.hex(), "signature": key.sign(joining).hex()}
        """What its hello says of its key, hexadecimal: see `members.Member`."""
        if previous is not None:
            self.credentials["handover"] = previous.sign(handover(joining)).hex()
        self._client, self._key = client, key

    def sign(self, plan: RoundPlan, theta: bytes, pointer: int, scalars: np.ndarray) -> bytes:
        """The signature of a reply; arguments as in `reply_message`."""
        return self._key.sign(reply_message(self.joining_digest, self._client, plan, theta, pointer, scalars))


def read_keys(path: str, setting: str) -> frozenset[str]:
    """The fingerprints of the keys in a file: an OpenSSH public key or a fingerprint a line, `#` before a comment.

    Raises:
        MeerkatError: no such file, or a line that is neither; the message names the `setting`.
    """
    lines = _lines(path, setting)
    return frozenset(_fingerprint_in(line, f"{setting} '{path}', line {number}") for number, line in lines)


def read_revoked(given: Iterable[str], setting: str) -> dict[str, int]:
    """Fingerprint -> the round from which a key is revoked.

    Args:
        given: each is SHA256:...[@ROUND], or a file with such lines or public keys, `#` before a comment. Without
            @ROUND a key is revoked from the first round on.

    Raises:
        MeerkatError: no such file, or something that is not a key; the message names the `setting`.
    """
    revoked: dict[str, int] = {}
    for value in given:
        from_file = not value.startswith("SHA256:")
        for number, line in _lines(value, setting) if from_file else [(1, value)]:
            name, at, since = line.partition("@") if line.startswith("SHA256:") else (line, "", "")
            if at and not (since.isascii() and since.isdecimal()):
                raise MeerkatError(f"{setting} {line}: '{since}' is not a round; give SHA256:...@ROUND")
            name = _fingerprint_in(name, f"{setting} '{value}', line {number}" if from_file else setting)
            revoked[name] = min(int(since or 0), revoked.get(name, 2**32))
    return revoked


def is_hex(text: object, size: int) -> bool:
    """Whether this is `size` bytes in lower-case hexadecimal."""
    return isinstance(text, str) and len(text) == 2 * size and not text.strip("0123456789abcdef")


def is_fingerprint(name: object) -> bool:
    """Whether this has the form of a key's fingerprint."""
    return isinstance(name, str) and bool(_FINGERPRINT.fullmatch(name))


def check_fingerprint(name: str, setting: str) -> str:
    """The same fingerprint. Raises MeerkatError if it is malformed."""
    if not is_fingerprint(name):
        raise MeerkatError(
            f"{setting} '{name}': must be a key's fingerprint, SHA256:..., as 'ssh-keygen -l' shows it, or a .pub file"
        )
    return name


def _lines(path: str, setting: str) -> list[tuple[int, str]]:
    """The lines of a file that hold anything but a comment, and their numbers."""
    problem, lines = None, []
    try:
        text = Path(path).read_text(encoding="utf-8")
        numbered = enumerate((line.partition("#")[0].strip() for line in text.splitlines()), 1)
        lines = [(number, line) for number, line in numbered if line]
    except OSError as error:
        problem = error.strerror
    except UnicodeDecodeError:
        problem = "is not text"
    if not lines:
        raise MeerkatError(f"{setting} '{path}': {problem or 'has no key in it'}; give a file with a public key a line")
    return lines


def _fingerprint_in(line: str, where: str) -> str:
    """The fingerprint of the key in a line."""
    kind, _, rest = line.partition(" ")
    if kind.encode() != _KIND:
        return check_fingerprint(line, where)
    try:
        blob = base64.b64decode(rest.split(" ")[0], validate=True)
    except ValueError:
        blob = b""
    key = blob[-KEY:]
    if blob != _openssh(key) or len(key) != KEY:
        raise MeerkatError(f"{where}: is not an Ed25519 public key; give the .pub file's line")
    return fingerprint(key)


def _openssh(key: bytes) -> bytes:
    """A public key as OpenSSH encodes it."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in (_KIND, key))
