"""TLS certificates and keys for a federation, made without any outside authority.

ca.key, ca.crt              the authority, which signs certificates; its key stays with whoever runs the federation
server.key, server.crt      the coordinator's; every site checks the certificate against ca.crt
site-0.key, site-0.pub ...  a site's identity as a node; the coordinator registers the .pub

Each site makes its own signing key: anyone else who has held that key could sign replies for the site.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meerkat.errors import MeerkatError
from meerkat.record.files import filling
from meerkat.settings.validation import check_new_folder

_T = TypeVar("_T")

DAYS = 365
"""Default validity of certificates."""
_MOST_DAYS = 36_500
_CLOCK_SKEW = timedelta(minutes=5)


class Pair(NamedTuple):
    """Two files that belong together."""

    public: Path
    """A certificate (PEM), or a node's public key (one line, OpenSSH)."""
    private: Path
    """Its private key, readable by its owner only (mode 0600)."""


def certify(folder: Path, hosts: Sequence[str], nodes: int, days: int = DAYS) -> dict[str, Path]:
    """Make everything that a federation's TLS and node authentication need.

    Args:
        folder: new or empty; created if it does not exist.
        hosts: names and addresses that sites use for the coordinator.
        nodes: number of sites; their keys are numbered from 0.
        days: validity of the authority's and the server's certificate.

    Returns:
        The file of each part: authority, authority key, server, server key, site 0, site 0 key, ...

    Raises:
        MeerkatError: the folder is not empty, or a host or a number is malformed.
        RunFailed: the disk refused it; nothing is left there.
    """
    check_new_folder(folder)
    if nodes < 0:
        raise MeerkatError(f"{nodes} nodes: must be 0 or more")
    _names(hosts)  # before anything is written
    with filling(folder, "make room, or give another --out"):
        pairs = {"authority": make_authority(folder, days), "server": issue_server_certificate(folder, hosts, days)}
        pairs |= {f"site {site}": make_node_key(folder / f"site-{site}.key") for site in range(nodes)}
    files: dict[str, Path] = {}
    for name, pair in pairs.items():
        files |= {name: pair.public, f"{name} key": pair.private}
    return files


def make_authority(folder: Path, days: int = DAYS) -> Pair:
    """Make a certificate authority: ca.crt, which sites trust, and ca.key, which signs.

    Args:
        folder: created if it does not exist.
        days: validity, which begins five minutes ago.

    Raises:
        MeerkatError: the folder already has an authority.
    """
    key, name = ec.generate_private_key(ec.SECP384R1()), _name("authority")
    builder = _certificate(name, name, key.public_key(), _until(days), authority=True)
    return _write_certificate(folder / "ca", key, builder.sign(key, hashes.SHA384()))


def issue_server_certificate(folder: Path, hosts: Sequence[str], days: int = DAYS) -> Pair:
    """Issue the coordinator's certificate, server.crt with server.key, signed by the authority in the same folder.

    Args:
        hosts: names and addresses that sites use for the coordinator; clients accept no others.
        days: validity; ends no later than the authority's.

    Raises:
        MeerkatError: the folder has no authority, or already has a server certificate; or a host is malformed.
    """
    names, authority, signing = _names(hosts), read_certificate(folder / "ca.crt"), _read_key(folder / "ca.key")
    if not isinstance(signing, ec.EllipticCurvePrivateKey):
        raise MeerkatError(f"'{folder / 'ca.key'}': not an elliptic-curve key; make the authority anew")
    key, until = ec.generate_private_key(ec.SECP384R1()), min(_until(days), authority.not_valid_after_utc)
    certificate = (
        _certificate(_name("coordinator"), authority.subject, key.public_key(), until, authority=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
        .sign(signing, hashes.SHA384())
    )
    return _write_certificate(folder / "server", key, certificate)


def make_node_key(path: Path) -> Pair:
    """Make a site's node key: ECDSA on P-384 in OpenSSH format, as `ssh-keygen -t ecdsa -b 384` makes it.

    Args:
        path: the private key's file. The public key's is beside it, with suffix .pub in place of .key, if it has that.

    Raises:
        MeerkatError: one of the files already exists.
    """
    return _write_openssh(path, ec.generate_private_key(ec.SECP384R1()))


def make_signing_key(path: Path) -> Pair:
    """Make a key that a site signs its replies with: Ed25519, as `ssh-keygen -t ed25519`. As `make_node_key`."""
    return _write_openssh(path, ed25519.Ed25519PrivateKey.generate())


def read_certificate(path: Path) -> x509.Certificate:
    """Read a certificate, PEM. Raises MeerkatError: no such file, or it is not a certificate."""
    return _read(path, x509.load_pem_x509_certificate, "a PEM certificate")


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether a certificate may sign others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def names_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a server's certificate is valid for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def is_pair(certificate: x509.Certificate, private_key: Path) -> bool:
    """Whether a private key, a PEM file, belongs to a certificate.

    Raises:
        MeerkatError: no such file, or it is not a key without a password.
    """
    return _read_key(private_key).public_key() == certificate.public_key()


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether an authority signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _read_key(path: Path) -> PrivateKeyTypes:
    return _read(path, lambda data: load_pem_private_key(data, password=None), "a PEM key without a password")


def _read(path: Path, load: Callable[[bytes], _T], what: str) -> _T:
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise MeerkatError(f"'{path}': {error.strerror}; see 'meerkat certify'") from None
    except (ValueError, TypeError):
        raise MeerkatError(f"'{path}': is not {what}; see 'meerkat certify'") from None


def _names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    if not hosts:
        raise MeerkatError("no host: give at least one name or address that sites use for the coordinator")
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ip_address(host)))
            continue
        except ValueError:
            pass
        if not host or any(not part.replace("-", "").isalnum() or not part.isascii() for part in host.split(".")):
            raise MeerkatError(f"host '{host}': must be a name or an address only, such as coordinator.example.org")
        names.append(x509.DNSName(host))
    return names


def _name(role: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Meerkat federation {role}")])


def _until(days: int) -> datetime:
    if not 1 <= days <= _MOST_DAYS:
        raise MeerkatError(f"{days} days: must be 1 to {_MOST_DAYS:,}")
    return datetime.now(UTC) + timedelta(days=days)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, until: datetime, authority: bool
) -> x509.CertificateBuilder:
    """A certificate to be signed. An authority's signs certificates; another's signs TLS handshakes."""
    unused = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    usage = {**dict.fromkeys((*unused, "encipher_only", "decipher_only"), False), "digital_signature": not authority}
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _CLOCK_SKEW)
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=authority, crl_sign=authority, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _write_certificate(stem: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> Pair:
    pair = Pair(stem.with_suffix(".crt"), stem.with_suffix(".key"))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return _write_pair(pair, certificate.public_bytes(Encoding.PEM), private)


def _write_openssh(path: Path, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> Pair:
    public = path.with_suffix(".pub") if path.suffix == ".key" else path.with_name(path.name + ".pub")
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"
    return _write_pair(Pair(public, path), line, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


def _write_pair(pair: Pair, public: bytes, private: bytes) -> Pair:
    """Write two new files; the private one is never readable by others, not even for a moment."""
    pair.private.parent.mkdir(parents=True, exist_ok=True)
    for path in (pair.private, pair.public):
        if os.path.lexists(path):
            raise MeerkatError(f"'{path}': already exists; keys are not overwritten: remove it first")
    with ExitStack() as undo:
        for path, content, mode in ((pair.private, private, 0o600), (pair.public, public, 0o644)):
            try:
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            except FileExistsError:
                raise MeerkatError(f"'{path}': already exists; keys are not overwritten: remove it first") from None
            undo.callback(path.unlink)
            with os.fdopen(file, "wb") as stream:
                stream.write(content)
        undo.pop_all()
    return pair
