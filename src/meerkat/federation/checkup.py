"""What the doctor finds, and its checks of certificates and network: see doctor.py.

Nothing leaves this machine but the TLS handshake in `connection`.
"""

import errno
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509

from meerkat.federation import certificates
from meerkat.federation.coordinator import FederationConfig, host_and_port
from meerkat.federation.site_settings import SiteConfig
from meerkat.progress import number_of
from meerkat.record.signatures import fingerprint, read_keys

_PATIENCE_S = 5.0
_CURES = {
    9: "it is not valid yet: check the clocks",
    10: "it has expired: make new ones with 'meerkat certify', or check the clock",
    18: "it is signed by itself: is this the coordinator?",
    19: "another authority signed it: get the coordinator's ca.crt",
    20: "another authority signed it: get the coordinator's ca.crt",
    62: "use a name that it has, or one with this name from 'meerkat certify --host'",
    64: "use an address that it has, or one with this address from 'meerkat certify --host'",
}
"""What to do about a certificate, by OpenSSL's number of what is wrong with it."""


@dataclass(frozen=True)
class Finding:
    """One line of the outcome."""

    level: Literal["ok", "warn", "FAIL"]
    check: str
    found: str
    cure: str = ""
    """What to do; empty where nothing is, or where `found` says it."""

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.check:<12}  {self.found}" + (f"; {self.cure}" if self.cure else "")


Findings = Iterator[Finding]


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding("ok", check, found)


def warn(check: str, found: str, cure: str) -> Finding:
    """A run may go wrong, or later will."""
    return Finding("warn", check, found, cure)


def fail(check: str, found: str, cure: str = "") -> Finding:
    """A run would go wrong."""
    return Finding("FAIL", check, found, cure)


def _validity(check: str, certificate: x509.Certificate) -> Finding:
    now, begin, end = datetime.now(UTC), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    found = f"valid from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC; this machine's clock: {now:%Y-%m-%d %H:%M}"
    if not begin <= now <= end:
        return fail(check, found, "set the clock, or make new certificates with 'meerkat certify'")
    if end - now < timedelta(days=30):
        return warn(check, found, "it ends within 30 days: make new certificates with 'meerkat certify'")
    return ok(check, found)


def site_authority(path: str) -> Findings:
    """The federation's CA, as the site has it."""
    if not path:
        yield warn("authority", "no certificate_authority: only runs without a stream can be joined", "give ca.crt")
        return
    held = certificates.read_certificate(path)
    yield _validity("authority", held)
    if not certificates.is_authority(held):
        yield fail("authority", f"'{path}' is not an authority's certificate", "give ca.crt, not server.crt")


def site_keys(own: SiteConfig) -> Findings:
    """The keys that the site signs with, and did before."""
    keys = dict(zip(("signing_key", "signing_key_before"), own.signing_keys(), strict=True))
    for name, key in keys.items():
        if key is None:
            continue
        yield ok(name, f"Ed25519, {fingerprint(key.public)}")
        if Path(path := getattr(own, name)).stat().st_mode & 0o077:
            yield warn(name, f"'{path}' is readable for others", f"chmod 600 {path}")
    if keys["signing_key"] is None:
        yield ok("signing_key", "none: replies are not signed")


def coordinator_signers(federation: FederationConfig) -> Findings:
    """Whose signatures the coordinator takes."""
    if federation.signers:
        listed = read_keys(federation.signers, "signers")
        yield ok("signers", f"{number_of(len(listed), 'key')} may sign")
        if gone := sorted(listed.intersection(federation.revoked)):
            yield warn("signers", f"{gone[0]} is listed, and revoked", "take it from the list")
    elif federation.sign:
        found = "none listed: the key that a client first comes with is its own from then on"
        yield warn("signers", found, "list the sites' .pub files, or compare fingerprints afterwards")
    else:
        yield ok("signers", "sign = false: who has no key does not sign")


def coordinator_certificate(federation: FederationConfig) -> Findings:
    """The stream's certificate: its days, key, names and signature."""
    held = certificates.read_certificate(federation.certificate)
    yield _validity("certificate", held)
    host, _ = host_and_port(federation.stream, "stream")
    found = f"{host}; the certificate is for {', '.join(names := certificates.names_of(held))}"
    yield ok("stream", found) if host in names else fail("stream", found, f"meerkat certify --host {host} ...")
    beside = Path(federation.certificate).with_name("ca.crt")
    if not beside.is_file():
        yield warn("authority", f"no {beside}: who signed the certificate was not checked", "sites need it too")
    elif certificates.is_signed_by(held, certificates.read_certificate(str(beside))):
        yield ok("authority", f"{beside} signed the certificate")
    else:
        yield fail("authority", f"{beside} did not sign the certificate", "use files of one 'meerkat certify'")
    key = federation.private_key
    paired = certificates.is_pair(held, key)
    wrong = fail("private_key", f"'{key}' does not belong to the certificate", "give the pair's own")
    yield ok("private_key", "belongs to the certificate") if paired else wrong
    if Path(key).stat().st_mode & 0o077:
        yield warn("private_key", f"'{key}' is readable for others", f"chmod 600 {key}")


def port(federation: FederationConfig) -> Findings:
    """Whether the stream can be listened on."""
    listen = federation.listen or federation.stream
    host, number = host_and_port(listen, "listen" if federation.listen else "stream")
    try:
        with socket.create_server((host, number), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            yield ok("port", f"{listen} is free")
    except OSError as error:
        cure = f'give an address of this machine to listen on, such as listen = "0.0.0.0:{number}"'
        if error.errno == errno.EADDRINUSE:
            cure = "end the run or program that holds it, or give another port"
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        yield fail("port", f"cannot listen on {listen}: {why}", cure)


def connection(address: tuple[str, int], authority: str) -> Findings:
    """A TLS handshake with the coordinator under the site's CA, step by step; nothing else is said to it."""
    host, number = address
    if proxies := sorted(n for n in os.environ if n.lower() in ("https_proxy", "http_proxy", "grpc_proxy")):
        found = f"{', '.join(proxies)} is set: a run may go by that proxy, this check does not"
        yield warn("proxy", found, f"put {host} into no_proxy if the proxy is not for it")
    try:
        yield ok("name", f"{host} is {socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][4][0]}")
    except OSError as error:
        yield fail("name", f"'{host}': {error.strerror}", "check the spelling, and this machine's DNS")
        return
    try:
        socket.create_connection(address, _PATIENCE_S).close()
    except OSError as error:
        cure = "is a firewall between?"
        if isinstance(error, ConnectionRefusedError):
            cure = "is the SuperLink up? The stream's port is open during a run only"
        yield fail("port", f"{number} of {host}: {error.strerror or error}", cure)
        return
    yield ok("port", f"{number} of {host} is open")
    try:
        shown = _shake(address, ssl.create_default_context(cafile=authority or None))
        yield ok("handshake", "the certificate is signed by the site's authority and names this host")
    except OSError as error:
        why = getattr(error, "verify_message", "") or error.strerror or str(error)
        why = why.rstrip(".")
        yield fail("handshake", why, _CURES.get(getattr(error, "verify_code", 0), "is a TLS server there?"))
        blind = ssl.create_default_context()
        blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
        shown = _shake(address, blind)
    yield _validity("clock", x509.load_der_x509_certificate(shown))


def _shake(address: tuple[str, int], context: ssl.SSLContext) -> bytes:
    """The certificate that is shown in a handshake, DER."""
    context.set_alpn_protocols(["h2", "http/1.1"])  # gRPC wants the first
    with (
        socket.create_connection(address, _PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname=address[0]) as secure,
    ):
        return secure.getpeercert(binary_form=True) or b""
