"""TLS certificates and keys for a federation, made without any outside authority.

ca.key, ca.crt              the authority, which signs certificates; its key stays with whoever runs the federation
server.key, server.crt      the coordinator's; every site checks the certificate against ca.crt
site-0.key, site-0.pub ...  a site's identity as a node; the coordinator registers the .pub

Each site makes its own signing key: anyone else who has held that key could sign replies for the site.
"""

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meerkat.errors import MeerkatError

DAYS = 365
"""Default validity of certificates."""
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
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MeerkatError(f"'{folder}': is not an empty folder; give a new or empty one")
    if nodes < 0:
        raise MeerkatError(f"{nodes} nodes: must be 0 or more")
    _names(hosts)  # before anything is written
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
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Meerkat federation authority")])
    certificate = (
        _certificate(name, name, key.public_key(), _until(days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    return _write_pair(folder / "ca", key, certificate)


def issue_server_certificate(folder: Path, hosts: Sequence[str], days: int = DAYS) -> Pair:
    """Issue the coordinator's certificate, server.crt with server.key, signed by the authority in the same folder.

    Args:
        hosts: names and addresses that sites use for the coordinator; clients accept no others.
        days: validity; ends no later than the authority's.

    Raises:
        MeerkatError: the folder has no authority, or already has a server certificate; or a host is malformed.
    """
    names = _names(hosts)
    try:
        authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        signing = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "cannot be read"
        raise MeerkatError(f"'{folder}': no authority that can sign ({reason}); make one first") from None
    if not isinstance(signing, ec.EllipticCurvePrivateKey):
        raise MeerkatError(f"'{folder / 'ca.key'}': not an elliptic-curve key; make the authority anew")
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Meerkat federation coordinator")])
    until = min(_until(days), authority.not_valid_after_utc)
    certificate = (
        _certificate(subject, authority.subject, key.public_key(), until)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
        .sign(signing, hashes.SHA384())
    )
    return _write_pair(folder / "server", key, certificate)


def make_node_key(path: Path) -> Pair:
    """Make a site's node key: ECDSA on P-384 in OpenSSH format, as `ssh-keygen -t ecdsa -b 384` makes it.

    Args:
        path: the private key's file. The public key's is beside it, with suffix .pub in place of .key, if it has that.

    Raises:
        MeerkatError: one of the files already exists.
    """
    return _write_openssh(path, ec.generate_private_key(ec.SECP384R1()))


def make_signing_key(path: Path) -> Pair:
    """Make a key that a site signs its replies with: Ed25519 in OpenSSH format, as `ssh-keygen -t ed25519` makes it.

    Args:
        path: the private key's file. The public key's is beside it, with suffix .pub in place of .key, if it has that.

    Raises:
        MeerkatError: one of the files already exists.
    """
    return _write_openssh(path, ed25519.Ed25519PrivateKey.generate())


def _write_openssh(path: Path, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> Pair:
    public = path.with_suffix(".pub") if path.suffix == ".key" else path.with_name(path.name + ".pub")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), 0o600)
    _write_new(public, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n", 0o644)
    return Pair(public, path)


def read_certificate(path: str) -> x509.Certificate:
    """Read a certificate, PEM.

    Raises:
        MeerkatError: no such file, or it is not a certificate.
    """
    try:
        return x509.load_pem_x509_certificate(Path(path).read_bytes())
    except OSError as error:
        raise MeerkatError(f"'{path}': {error.strerror}; see 'meerkat certify'") from None
    except ValueError:
        raise MeerkatError(f"'{path}': is not a PEM certificate; see 'meerkat certify'") from None


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


def is_pair(certificate: x509.Certificate, private_key: str) -> bool:
    """Whether a private key, a PEM file, belongs to a certificate.

    Raises:
        MeerkatError: no such file, or it is not a key without a password.
    """
    try:
        key = load_pem_private_key(Path(private_key).read_bytes(), password=None)
    except OSError as error:
        raise MeerkatError(f"'{private_key}': {error.strerror}; see 'meerkat certify'") from None
    except (ValueError, TypeError):
        raise MeerkatError(f"'{private_key}': is not a PEM key without a password; see 'meerkat certify'") from None
    return key.public_key() == certificate.public_key()


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether an authority signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


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


def _until(days: int) -> datetime:
    if days < 1:
        raise MeerkatError(f"{days} days: must be 1 or more")
    return datetime.now(UTC) + timedelta(days=days)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _CLOCK_SKEW)
        .not_valid_after(until)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_pair(stem: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> Pair:
    pair = Pair(stem.with_suffix(".crt"), stem.with_suffix(".key"))
    stem.parent.mkdir(parents=True, exist_ok=True)
    _write_new(pair.private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    _write_new(pair.public, certificate.public_bytes(Encoding.PEM), 0o644)
    return pair


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a new file; a private one is never readable by others, not even for a moment."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise MeerkatError(f"'{path}': already exists; keys are not overwritten: remove it first") from None
    with os.fdopen(file, "wb") as stream:
        stream.write(content)
