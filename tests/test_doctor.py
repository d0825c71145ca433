"""`meerkat doctor`: every fault that it is for, made on purpose, and found in a line of its own."""

import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")
pytest.importorskip("packaging")

from proxy import free_port

from meerkat import demo
from meerkat.cli import main
from meerkat.errors import MeerkatError
from meerkat.federation import doctor
from meerkat.federation.certificates import Pair, certify, make_signing_key
from meerkat.federation.doctor import examine
from meerkat.federation.ledger import Ledger
from meerkat.problems.tasks import parse_task
from meerkat.record.signatures import SigningKey, fingerprint

ROW = json.dumps({"text": "a goal in the last minute", "label": 0}) + "\n"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return certify(tmp_path_factory.mktemp("doctor") / "pki", ["127.0.0.1"], nodes=0)


@pytest.fixture
def site(tmp_path: Path, keys: dict[str, Path]) -> Path:
    (tmp_path / "train.jsonl").write_text(3 * ROW)
    address = "coordinator.example.org:9001"
    own = {"client": 1, "data": ".", "coordinator": address, "certificate_authority": str(keys["authority"])}
    return write(tmp_path / "site.toml", **own)


@pytest.fixture
def federation(tmp_path: Path, keys: dict[str, Path]) -> Path:
    return coordinator(tmp_path, keys)


def coordinator(folder: Path, keys: dict[str, Path], run: str = "clients = 3\n", **given: Any) -> Path:
    settings = {"stream": f"127.0.0.1:{free_port()}", "certificate": keys["server"], "private_key": keys["server key"]}
    file = write(folder / "federation.toml", **{name: str(value) for name, value in (settings | given).items()})
    file.write_text(f"[run]\n{run}[federation]\n{file.read_text()}")
    return file


def write(file: Path, **settings: object) -> Path:
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    return file


def levels(file: Path, connect: str = "") -> dict[str, str]:
    """The worst level of each check."""
    worst: dict[str, str] = {}
    for finding in examine(file, connect)["checks"]:
        worse = max(worst.get(finding["check"], "ok"), finding["level"], key=["ok", "warn", "FAIL"].index)
        worst[finding["check"]] = worse
    return worst


def said(file: Path, check: str, connect: str = "") -> str:
    return " ".join(f"{f['found']}; {f['cure']}" for f in examine(file, connect)["checks"] if f["check"] == check)


@contextmanager
def serving(pair: Pair) -> Iterator[str]:
    """A TLS server, for as many handshakes as come; its host:port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.public, pair.private)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    plain, _ = listener.accept()
                except OSError:
                    return  # the test is over
                try:
                    context.wrap_socket(plain, server_side=True).close()
                except OSError:
                    plain.close()

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_a_sound_site_has_no_fail(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(site)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("FAIL")]
    assert any(line.startswith("ok    data") and "3 rows with label, text" in line for line in lines)


def test_a_sound_coordinator_has_no_fail(federation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(federation), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["kind"] == "coordinator"
    assert {"settings", "model", "data", "certificate", "private_key", "authority", "stream", "port"} <= {
        finding["check"] for finding in outcome["checks"] if finding["level"] == "ok"
    }


def test_one_fail_does_not_hide_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"client": 0, "data": "nowhere", "model": "./no-model", "certificate_authority": "no-ca.crt"}
    assert main(["doctor", str(write(tmp_path / "site.toml", **settings))]) == 1
    told = capsys.readouterr()
    assert [line.split()[1] for line in told.out.splitlines() if line.startswith("FAIL")] == [
        *("model", "data", "authority")
    ]
    assert "3 of" in told.err
    assert "Traceback" not in told.out + told.err


def test_settings_that_are_wrong_are_a_finding(tmp_path: Path, keys: dict[str, Path]) -> None:
    assert "unknown; must be one of" in said(write(tmp_path / "site.toml", client=0, data=".", burrow=1), "settings")
    assert "quorum 9: must be at most" in said(coordinator(tmp_path, keys, quorum=9), "settings")
    assert "must be host:port" in said(coordinator(tmp_path, keys, stream="127.0.0.1"), "settings")


def test_a_text_without_a_text_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (file := tmp_path / "federation.toml").write_text('[run]\ntask = "topics"\ntext = "empty.txt"\n')
    assert "empty.txt': no text in it" in said(file, "data")


@pytest.mark.parametrize("client", [-1, 2**32])
def test_a_client_number_that_fits_no_frame_is_a_finding(tmp_path: Path, client: int) -> None:
    assert f"client {client}: must be" in said(write(tmp_path / "site.toml", client=client, data="."), "settings")


def test_where_a_site_finds_the_stream_is_a_finding(site: Path) -> None:
    assert said(site, "coordinator") == "the stream is at coordinator.example.org:9001; "
    text = site.read_text()
    site.write_text(text.replace("coordinator.example.org:9001", "unix:/run/burrow.sock"))
    assert "coordinator 'unix:/run/burrow.sock': must be host:port" in said(site, "settings")
    site.write_text("".join(line for line in text.splitlines(True) if not line.startswith("coordinator")))
    assert levels(site)["coordinator"] == "warn"
    assert "can only join runs without a stream" in said(site, "coordinator")


def test_bad_arguments_are_refused(tmp_path: Path, federation: Path, site: Path) -> None:
    other = write(tmp_path / "other.toml", burrow="deep")
    for arguments in ([str(other)], [str(tmp_path / "none.toml")], [str(federation), "--connect", "127.0.0.1:1"]):
        assert main(["doctor", *arguments]) == 2
    with pytest.raises(MeerkatError, match="host:port"):
        examine(site, "coordinator.example.org")


def test_a_pinned_model_must_be_the_one(site: Path) -> None:
    text = site.read_text()
    own = next(word for word in said(site, "model").replace(";", "").split() if len(word) == 64)
    site.write_text(f'{text}[accepts]\nmodel = "{own}"\n')
    assert levels(site)["model"] == "ok"
    site.write_text(f'{text}[accepts]\nmodel = "{"0" * 64}"\n')
    assert levels(site)["model"] == "FAIL"


def test_the_bounds_that_a_site_gives_are_shown(site: Path) -> None:
    assert "a site's: client 1; accepts any run within the defaults" in said(site, "settings")
    site.write_text(f'{site.read_text()}[accepts]\nlocal_steps = 5\ntask = "reviews"\nembeddings = true\n')
    assert 'accepts task = "reviews", embeddings = true, local_steps = 5' in said(site, "settings")


def test_rows_are_read_and_fit_the_pinned_task(site: Path) -> None:
    site.write_text(site.read_text() + 'evaluate = true\n[accepts]\ntask = "topics"\n')
    assert levels(site)["data"] == "FAIL"
    assert "no validation.jsonl" in said(site, "data")
    (site.parent / "validation.jsonl").write_text(ROW)
    assert levels(site)["data"] == "ok"
    (site.parent / "train.jsonl").write_text(ROW.replace("text", "body"))
    assert levels(site)["data"] == "FAIL"


def test_the_ledger_can_be_kept(site: Path, tmp_path: Path) -> None:
    assert "will be made by the first run" in said(site, "ledger")
    with closing(Ledger(site.with_suffix(".ledger"))) as ledger:
        ledger.append("ab" * 8, 0, "run", {"charter": "cd"})
        assert "in use by a session" in said(site, "ledger")
    assert "1 run, 0 scalars sent" in said(site, "ledger")
    site.with_suffix(".ledger").write_text("no ledger\n")
    assert levels(site)["ledger"] == "FAIL"
    elsewhere = write(site, client=1, data=".", ledger=str(tmp_path / "nowhere" / "ledger"))
    assert levels(elsewhere)["ledger"] == "FAIL"
    assert "cannot be written; give 'ledger' in site.toml" in said(elsewhere, "ledger")


def test_the_digest_that_a_site_pins_is_printed_on_both_sides(
    site: Path, tmp_path: Path, keys: dict[str, Path]
) -> None:
    words = 'template = "{text} {label}"\nlabels = ["a", "b"]\n'
    (tmp_path / "own.toml").write_text(words)
    digest = parse_task(words, "own.toml").digest()
    rows = str(demo.TASKS["reviews"])
    assert f"own, SHA-256 {digest}" in said(
        coordinator(tmp_path, keys, f'task = "own.toml"\ndata = "{rows}"\n'), "task"
    )
    text = site.read_text()
    site.write_text(f'{text}[accepts]\ntask = "own.toml"\ntask_digest = "{digest}"\nepsilon = 1.0\n')
    assert f"own, SHA-256 {digest}" in said(site, "task")
    assert levels(site)["task"] == "ok"
    site.write_text(f'{text}[accepts]\ntask = "own.toml"\ntask_digest = "{"0" * 64}"\n')
    assert levels(site)["task"] == "FAIL"
    site.write_text(f"{text}[accepts]\nepsilon = 1.0\n")
    assert "only runs of built-in tasks" in said(site, "task")


def test_rows_that_count_as_nothing_are_told_to_the_operator(site: Path) -> None:
    site.write_text(site.read_text() + '[accepts]\ntask = "topics"\nepsilon = 1.0\n')
    assert levels(site)["data"] == "ok"
    (site.parent / "train.jsonl").write_text(ROW + ROW.replace("0}", "7}") + "{\n")
    assert levels(site)["data"] == "warn"
    assert "train: 3 rows, 1 that fit topics" in (told := said(site, "data"))
    assert "line 2, row 1: label 7 is out of range" in told
    assert "line 3: not JSON" in told


def test_versions_are_held_against_the_package_s_own_metadata(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "1.20.0" if name == "flwr" else version(name)
    )
    assert levels(site)["flwr"] == "FAIL"
    assert levels(site)["torch"] == "ok"


def test_a_model_larger_than_memory_is_not_loaded(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_available", lambda: 1000)
    worst = levels(site)
    assert worst["memory"] == "FAIL"
    assert "model" not in worst


def test_the_hub_is_not_asked(
    site: Path, tmp_path: Path, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    site.write_text(site.read_text() + 'model = "org/no-such-model"\n')
    assert levels(site)["model"] == "warn"
    run = 'model = "org/no-such-model"\ntask = "sst2"\ndata = "org/rows"\ntext = "org/text"\n'
    text = said(coordinator(tmp_path, keys, run), "data")
    assert "hub names were not looked up: org/text, org/rows" in text


def test_certificates_are_told_apart(site: Path, keys: dict[str, Path], tmp_path: Path) -> None:
    site.write_text(site.read_text().replace("ca.crt", "server.crt"))
    assert "give ca.crt" in said(site, "authority")
    other = certify(tmp_path / "other", ["elsewhere.example.org"], nodes=0, days=20)
    worst = levels(coordinator(tmp_path, keys, private_key=other["server key"]))
    assert (worst["private_key"], worst["certificate"]) == ("FAIL", "ok")
    os.chmod(other["server key"], 0o644)
    worst = levels(coordinator(tmp_path, keys, certificate=other["server"], private_key=other["server key"]))
    assert [worst[check] for check in ("certificate", "stream", "private_key", "authority")] == [
        *("warn", "FAIL", "warn", "ok")  # it ends soon, under another name, with a key for all to read
    ]
    (tmp_path / "other" / "ca.crt").write_bytes(keys["authority"].read_bytes())
    mixed = coordinator(tmp_path, keys, certificate=other["server"], private_key=other["server key"])
    assert levels(mixed)["authority"] == "FAIL"


def test_signing_keys_are_read_and_for_their_owner_alone(site: Path, tmp_path: Path) -> None:
    assert "replies are not signed" in said(site, "signing_key")
    key, _ = (make_signing_key(tmp_path / name) for name in ("new.key", "old.key"))
    site.write_text('signing_key = "new.key"\nsigning_key_before = "old.key"\n' + site.read_text())
    name = fingerprint(SigningKey.load(str(key.private)).public)
    assert name in said(site, "signing_key")
    assert levels(site)["signing_key_before"] == "ok"
    key.private.chmod(0o644)
    assert levels(site)["signing_key"] == "warn"
    assert f"chmod 600 {key.private}" in said(site, "signing_key")
    key.private.write_text("no key")
    assert levels(site)["signing_key"] == "FAIL"
    assert "meerkat keygen" in said(site, "signing_key")


def test_a_coordinator_s_signers_are_read(tmp_path: Path, keys: dict[str, Path]) -> None:
    assert "sites without a key do not sign" in said(coordinator(tmp_path, keys), "signers")
    file = coordinator(tmp_path, keys)
    text = file.read_text()
    file.write_text(text + "sign = true\n")
    assert levels(file)["signers"] == "warn"
    pair = make_signing_key(tmp_path / "site.key")
    name = fingerprint(SigningKey.load(str(pair.private)).public)
    file.write_text(text + 'sign = true\nsigners = "site.pub"\n')
    assert "1 key may sign" in said(file, "signers")
    file.write_text(text + f'sign = true\nsigners = "site.pub"\nrevoked = ["{name}"]\n')
    assert "is listed, and revoked" in said(file, "signers")
    file.write_text(text + 'sign = true\nsigners = "site.pub"\nrevoked = ["site.pub"]\n')
    assert f"{name} is listed, and revoked" in said(file, "signers")
    for more, wrong in (
        ('revoked = ["none.pub"]\n', "revoked 'none.pub': must be a key's fingerprint"),
        ('signers = "site.pub"\n', "signers: has an effect only with sign = true"),
        ('revoked = ["SHA256:short"]\n', "revoked 'SHA256:short': must be a key's fingerprint"),
    ):
        file.write_text(text + more)
        assert wrong in said(file, "settings")


def test_which_client_numbers_are_for_anybody_is_told(tmp_path: Path, keys: dict[str, Path]) -> None:
    file = coordinator(tmp_path, keys)
    assert "0 of 3 clients bound to a node or key: the first node that claims another has it" in said(file, "sites")
    with file.open("a") as more:
        more.write('[[federation.sites]]\nclient = 2\nnode = "7"\n')
    assert levels(file)["sites"] == "ok"
    assert "1 of 1 client bound" in said(file, "sites")


def test_a_setting_that_does_nothing_is_told(tmp_path: Path, keys: dict[str, Path]) -> None:
    file = coordinator(tmp_path, keys, run="clients = 3\nbyzantine = 1\n")
    assert levels(file)["settings"] == "warn"
    assert "byzantine 1: does nothing with aggregation mean" in said(file, "settings")


def test_a_port_that_is_taken_or_not_of_this_machine(keys: dict[str, Path], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = coordinator(tmp_path, keys, stream=f"127.0.0.1:{listener.getsockname()[1]}")
        assert "give another port" in said(taken, "port")
    assert 'listen = "0.0.0.0:9094"' in said(coordinator(tmp_path, keys, stream="192.0.2.1:9094"), "port")


def test_a_handshake_with_the_coordinator(site: Path, keys: dict[str, Path]) -> None:
    with serving(Pair(keys["server"], keys["server key"])) as address:
        worst = levels(site, address)
    assert {worst[check] for check in ("name", "port", "handshake", "clock")} == {"ok"}


def test_a_handshake_with_someone_else(site: Path, tmp_path: Path) -> None:
    other = certify(tmp_path / "other", ["127.0.0.1"], nodes=0)
    with serving(Pair(other["server"], other["server key"])) as address:
        assert "another authority signed it" in said(site, "handshake", address)
        assert levels(site, address)["clock"] == "ok"


def test_a_handshake_under_a_name_that_the_certificate_has_not(site: Path, tmp_path: Path) -> None:
    other = certify(tmp_path / "other", ["elsewhere.example.org"], nodes=0)
    site.write_text(site.read_text().replace(site.read_text().split('"')[5], str(other["authority"])))
    with serving(Pair(other["server"], other["server key"])) as address:
        assert "use an address that it has" in said(site, "handshake", address)


def test_a_name_that_is_none_and_a_port_that_is_closed(site: Path) -> None:
    assert levels(site, "no-such-host.invalid:9092")["name"] == "FAIL"
    assert "is the SuperLink up?" in said(site, "port", f"127.0.0.1:{free_port()}")


def test_a_server_without_tls_is_a_finding(site: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(3):
                plain, _ = listener.accept()
                plain.sendall(b"220 burrow\r\n")
                plain.close()

        thread = threading.Thread(target=answer)
        thread.start()
        worst = levels(site, f"127.0.0.1:{listener.getsockname()[1]}")
        thread.join(10)
    assert worst["handshake"] == "FAIL"
