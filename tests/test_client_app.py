"""What leaves a site when something breaks there: never the words of the error, which may quote a row.

And where a site connects: to the coordinator of its own settings, whatever an offer names.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import RecordDict
from proxy import free_port
from stub import RUN, StubSite

from meerkat.errors import MeerkatError, RunFailed
from meerkat.federation.certificates import certify
from meerkat.federation.flower import client_app, stream
from meerkat.federation.flower.messages import offer_record
from meerkat.federation.offer import Offer


def answered_outside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower makes messages inside a run alone."""
    monkeypatch.setattr(client_app, "Message", lambda content, reply_to: SimpleNamespace(content=content, to=reply_to))


@pytest.mark.parametrize(
    ("error", "told", "again"),
    [
        (KeyError("diagnosis: positive"), "the site failed (KeyError); its own log says more", True),
        (ValueError("an offer's \x1b[2J\x07"), "the site failed (ValueError); its own log says more", True),
        (MeerkatError("max_length 3: too short"), "max_length 3: too short", False),
        (RunFailed("the stream broke"), "the stream broke", True),
        (SystemExit(3), "the site was interrupted", True),
    ],
)
def test_an_error_is_told_in_words_of_our_own(
    error: BaseException,
    told: str,
    again: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered_outside_a_run(monkeypatch)

    def act() -> RecordDict:
        raise error

    asked: Any = object()
    answer = client_app._answer(asked, act)
    assert dict(answer.content["session"]) == {"why": told, "again": again}
    said = capsys.readouterr().err
    assert all(character.isprintable() for character in said.replace("\n", ""))
    if isinstance(error, KeyError):
        assert "diagnosis: positive" in said


class OfferedSite(StubSite):
    """A site that the ClientApp can make."""

    def __init__(self, offer: Offer, *_: object) -> None:
        super().__init__(0, offer.token)

    def close(self) -> None:
        """Nothing to release."""


@contextmanager
def listening() -> Iterator[tuple[int, list[bytes]]]:
    """A port where something else than a coordinator listens, and what callers have sent to it."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            while True:
                try:
                    caller, _ = listener.accept()
                except OSError:
                    return  # the test is over
                with caller:
                    caller.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                    heard.append(caller.recv(100))

        thread = threading.Thread(target=greet)
        thread.start()
        yield listener.getsockname()[1], heard
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def session(monkeypatch: pytest.MonkeyPatch, folder: Path, offered: str, **own: str) -> dict[str, Any]:
    """What a site with these settings of its own answers to an offer of a stream at an address."""
    answered_outside_a_run(monkeypatch)
    monkeypatch.setattr(client_app, "Site", OfferedSite)
    authority = certify(folder / "keys", ["127.0.0.1"], nodes=0)["authority"]
    settings = {"data": ".", "certificate_authority": str(authority), **own}
    file = folder / "site.toml"
    file.write_text("client = 0\n" + "".join(f'{name} = "{value}"\n' for name, value in settings.items()))
    offer = Offer(RUN, {}, "topics", "", "0" * 64, b"", "", offered, 0.3)
    invitation: Any = SimpleNamespace(content={"offer": offer_record(offer, "00" * 32)})
    context: Any = SimpleNamespace(node_config={"site": str(file)}, node_id=1, state={})
    answer = client_app._answer(invitation, lambda: client_app._take_part(invitation, context))
    return dict(answer.content["session"])


def test_a_site_connects_to_its_own_coordinator_whatever_an_offer_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with listening() as (elsewhere, heard_elsewhere), listening() as (port, heard):
        session(monkeypatch, tmp_path, f"127.0.0.1:{elsewhere}", coordinator=f"127.0.0.1:{port}")
    assert not heard_elsewhere
    assert heard


@pytest.mark.parametrize("name", ["closed port", "no such host", "unix socket", "something else"])
def test_a_coordinator_learns_nothing_of_why_a_connection_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with listening() as (port, _):
        offered = {
            "closed port": f"127.0.0.1:{free_port()}",
            "no such host": "no-such-host.invalid:22",
            "unix socket": "unix:/run/nothing.sock",
            "something else": f"127.0.0.1:{port}",
        }[name]
        # a site whose operator mistyped the address, and one to which an offer names another
        mistyped = offered if name != "unix socket" else "unix:22"
        for own in (mistyped, f"127.0.0.1:{free_port()}"):
            (folder := tmp_path / own.replace(":", "_")).mkdir()
            told = session(monkeypatch, folder, offered, coordinator=own)
            assert told == {"why": stream._UNREACHED, "again": True}
            log = capsys.readouterr().err
            assert f"meerkat: coordinator {own}: no stream for 0.3 s (UNAVAILABLE: " in log
            assert "the site's own log" not in log


def test_a_site_without_a_coordinator_of_its_own_goes_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with listening() as (port, heard):
        told = session(monkeypatch, tmp_path, f"127.0.0.1:{port}")
    assert told["why"] == "site.toml: coordinator: missing; give host:port of the coordinator's stream"
    assert not heard


def test_a_terminal_acts_on_nothing_that_an_offer_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    session(monkeypatch, tmp_path, "\x1b[2J\x1b]0;owned\x07\n\u202e:1", coordinator=address)
    said = capsys.readouterr().err
    assert "owned" in said
    assert all(character.isprintable() for character in said.replace("\n", ""))
