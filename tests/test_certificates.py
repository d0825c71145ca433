"""Certificates and node keys: judged by real TLS handshakes, and by what a second authority makes of them."""

import errno
import os
import socket
import ssl
import stat
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import full_disk
from test_cli import fails

pytest.importorskip("cryptography")

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from meerkat.cli import main
from meerkat.errors import MeerkatError
from meerkat.federation.certificates import (
    Pair,
    certify,
    issue_server_certificate,
    make_authority,
    make_node_key,
    make_signing_key,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("certificates") / "pki"
    return certify(folder, ["coordinator.example.org", "127.0.0.1", "localhost"], nodes=2)


def shake_hands(server: Pair, trusted: Path, name: str) -> str:
    """What a client that trusts one authority reads from a server, over a socket on this machine."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(server.public, server.private)
    asking = ssl.create_default_context(cafile=trusted)
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                try:
                    with serving.wrap_socket(connection, server_side=True) as secure:
                        secure.sendall(b"burrow")
                except OSError:
                    pass  # the client has refused

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=10) as connection,
                asking.wrap_socket(connection, server_hostname=name) as secure,
            ):
                return secure.recv(6).decode()
        finally:
            thread.join(10)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "coordinator.example.org"])
def test_a_client_that_trusts_the_authority_accepts_the_server(made: dict[str, Path], name: str) -> None:
    assert shake_hands(Pair(made["server"], made["server key"]), made["authority"], name) == "burrow"


def test_a_client_that_trusts_another_authority_refuses_it(made: dict[str, Path], tmp_path: Path) -> None:
    other = make_authority(tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        shake_hands(Pair(made["server"], made["server key"]), other.public, "localhost")


def test_a_client_refuses_the_server_under_a_name_it_was_not_issued_for(made: dict[str, Path]) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(Pair(made["server"], made["server key"]), made["authority"], "elsewhere.example.org")


def test_private_keys_are_for_their_owner_alone(made: dict[str, Path]) -> None:
    keys = [path for name, path in made.items() if name.endswith("key")]
    assert len(keys) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}


def test_a_node_key_is_an_openssh_key_on_p384(made: dict[str, Path]) -> None:
    private = load_ssh_private_key(made["site 0 key"].read_bytes(), password=None)
    public = load_ssh_public_key(made["site 0"].read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(private.curve, ec.SECP384R1)
    assert private.public_key() == public
    assert made["site 0"].read_text().startswith("ecdsa-sha2-nistp384 ")
    assert made["site 1"].read_bytes() != made["site 0"].read_bytes()


def test_the_server_s_certificate_does_not_outlive_its_authority(tmp_path: Path) -> None:
    authority = x509.load_pem_x509_certificate(make_authority(tmp_path, days=3).public.read_bytes())
    server = x509.load_pem_x509_certificate(
        issue_server_certificate(tmp_path, ["localhost"], days=9).public.read_bytes()
    )
    assert server.not_valid_after_utc == authority.not_valid_after_utc
    lasts = authority.not_valid_after_utc - authority.not_valid_before_utc
    assert timedelta(days=3) <= lasts <= timedelta(days=3, minutes=6)


@pytest.mark.parametrize("host", ["", "https://coordinator.example.org", "coordinator:9000", "co ordinator", "a..b"])
def test_what_is_no_host_is_refused_before_anything_is_written(tmp_path: Path, host: str) -> None:
    with pytest.raises(MeerkatError, match="must be a name or an address"):
        certify(tmp_path / "pki", [host], nodes=1)
    assert not (tmp_path / "pki").exists()


def test_no_key_is_overwritten_and_no_certificate_made_without_authority(tmp_path: Path) -> None:
    with pytest.raises(MeerkatError, match=r"ca\.crt.*No such file"):
        issue_server_certificate(tmp_path, ["localhost"])
    before = make_node_key(tmp_path / "node").private.read_bytes()
    with pytest.raises(MeerkatError, match="already exists"):
        make_node_key(tmp_path / "node")
    assert (tmp_path / "node").read_bytes() == before
    with pytest.raises(MeerkatError, match="not an empty folder"):
        certify(tmp_path, ["localhost"], nodes=0)
    with pytest.raises(MeerkatError, match="0 days"):
        make_authority(tmp_path / "new", days=0)


def test_days_beyond_a_date_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MeerkatError, match="10000000 days: must be 1 to 36,500"):
        certify(tmp_path / "keys", ["localhost"], nodes=0, days=10_000_000)


def test_of_a_pair_of_which_one_is_there_neither_is_written(tmp_path: Path) -> None:
    (tmp_path / "site.pub").write_text("another's")
    with pytest.raises(MeerkatError, match=r"site\.pub': already exists"):
        make_signing_key(tmp_path / "site.key")
    assert not (tmp_path / "site.key").exists()
    (tmp_path / "site.pub").unlink()
    assert make_signing_key(tmp_path / "site.key").public.exists()


@pytest.mark.parametrize("there", [False, True])
def test_what_a_full_disk_cut_short_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    def full(_: Path) -> Pair:
        assert (out / "server.key").exists()
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "a" / "pki"
    if there:
        out.mkdir(parents=True)
    arguments = ["certify", "--host", "localhost", "--nodes", "1", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr("meerkat.federation.certificates.make_node_key", full)
        fails(arguments, capsys, f"{out}: No space left on device; make room, or give another --out", status=1)
    assert [*tmp_path.rglob("*")] == ([tmp_path / "a", out] if there else [])
    assert main(arguments) == 0


def test_a_folder_that_cannot_be_made_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    fails(
        ["certify", "--host", "a", "--out", str(tmp_path / "file" / "x")], capsys, "cannot be written to; give another"
    )
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    fails(["certify", "--host", "a", "--out", str(tmp_path / "x")], capsys, f"'{tmp_path}' cannot be written to")


def test_of_a_pair_that_the_disk_refuses_nothing_is_left(tmp_path: Path) -> None:
    with full_disk() as fill:
        fill(10)
        with pytest.raises(OSError, match="File too large"):
            make_signing_key(tmp_path / "one.key")
    assert not [*tmp_path.iterdir()]
