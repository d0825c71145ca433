"""Where the session stream listens: nowhere that another run listens already."""

from pathlib import Path

import pytest

pytest.importorskip("grpc")
pytest.importorskip("cryptography")

from meerkat.errors import MeerkatError
from meerkat.federation.address import host_and_port
from meerkat.federation.admission import Admission
from meerkat.federation.certificates import certify
from meerkat.federation.flower.stream import StreamLink
from meerkat.record.members import Members
from meerkat.record.signatures import RunIdentity


def test_two_runs_do_not_share_a_port(tmp_path: Path) -> None:
    keys = certify(tmp_path / "pki", ["127.0.0.1"], nodes=0)
    pair = keys["server"], keys["server key"]
    admission = Admission(Members(RunIdentity("00" * 8, False, *["00" * 32] * 5)), 1)
    first = StreamLink(admission, "127.0.0.1:0", *pair)
    try:
        with pytest.raises(MeerkatError, match="cannot listen there"):
            StreamLink(admission, f"127.0.0.1:{first.port}", *pair)
    finally:
        first.close()
    StreamLink(admission, f"127.0.0.1:{first.port}", *pair).close()  # free again at once


@pytest.mark.parametrize(
    "text",
    [
        *("", "coordinator", ":9094", "a:b", "a:0", "a:65536", "https://a:9094", "a:9094/", "a:" + "9" * 2000),
        *("unix:/run/x:1", "unix-abstract:x:1", "dns:a:1", "dns:///a:1", "ipv4:127.0.0.1:1", "vsock:2:1"),
        *("::1:9094", "[::1:9094", "[a]:9094", "a b:1", "a\n:1", "-a:1", "a:1\n"),
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(MeerkatError, match=r"stream .*must be host:port"):
        host_and_port(text, "stream")


def test_an_address_is_taken_apart() -> None:
    assert host_and_port("coordinator.example.org:9094", "stream") == ("coordinator.example.org", 9094)
    assert host_and_port("[::1]:9094", "stream") == ("::1", 9094)
