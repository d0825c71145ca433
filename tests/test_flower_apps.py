"""The two Flower apps against each other, over a grid of the test's own: frames in Flower's messages."""

import json
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tomli_w
import torch

pytest.importorskip("flwr")

import httpx
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from meerkat import demo
from meerkat.errors import MeerkatError, RunFailed
from meerkat.federation.certificates import make_signing_key
from meerkat.federation.coordinator import coordinate
from meerkat.federation.coordinator_settings import read_federation
from meerkat.federation.flower import client_app, messages, server_app
from meerkat.federation.flower.messages import offer_in
from meerkat.federation.ledger import Ledger
from meerkat.federation.site_folders import site_folder, write_sites
from meerkat.record.run_folder import RunFolder
from meerkat.record.signatures import SigningKey, fingerprint, read_keys
from meerkat.record.verification import verify
from meerkat.run import simulation
from meerkat.settings.config import make_config


class Grid:
    """Nodes in this process: a message is answered as it is pushed, each by the app that its type names."""

    def __init__(self, sites: Sequence[Path]) -> None:
        self.contexts = {
            100 + number: Context(1, 100 + number, {"site": str(file)}, RecordDict(), {})
            for number, file in enumerate(sites)
        }
        self.gone: set[int] = set()
        self.pushed: list[str] = []
        self.stopped = False
        self._ids, self._lock = count(), threading.Lock()
        self._answers: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        if self.stopped:
            raise SystemExit(0)
        return [node for node in self.contexts if node not in self.gone]

    def push_messages(self, messages: Sequence[Message]) -> list[str | None]:
        return [self._answer(message) for message in messages]

    def pull_messages(self, ids: Sequence[str]) -> list[Message]:
        with self._lock:
            return [self._answers.pop(each) for each in ids if each in self._answers]

    def _answer(self, message: Message) -> str | None:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        if node in self.gone:
            return None
        message.metadata.__dict__["_message_id"] = made = f"m{next(self._ids)}"
        handler = {"train.session": client_app.session, "train.frames": client_app.frames}[kind]
        with self._lock:
            self.pushed.append(kind)
            self._answers[made] = handler(message, self.contexts[node])
        return made


@pytest.fixture
def _identity() -> Iterator[None]:
    saved = TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    yield
    TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = saved


SETTINGS: dict[str, Any] = {
    "task": "topics",
    "clients": 2,
    "rounds": 2,
    "local_steps": 2,
    "eval_every": 0,
    "text_sequences": 4,
    "threads": 1,
    "batching": "off",
}


@pytest.fixture(scope="module", autouse=True)
def _few_rows(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A site is made anew for every message, and encodes all its rows: a few of the demo's do."""
    data = tmp_path_factory.mktemp("rows")
    for split in ("train", "validation"):
        rows = (demo.TASKS["topics"] / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (data / f"{split}.jsonl").write_text("".join(rows[:40]))
    SETTINGS["data"] = str(data)


def federation_file(root: Path, federation: dict[str, Any] | None = None, **run: Any) -> Path:
    tables = {
        "run": {**SETTINGS, **run},
        "federation": {"clients_minimum": 2, "patience_s": 20.0, **(federation or {})},
    }
    file = root / "federation.toml"
    file.write_text(tomli_w.dumps(tables))
    return file


@pytest.fixture
def sites(tmp_path: Path) -> list[Path]:
    write_sites(make_config(SETTINGS), tmp_path / "data")
    files = [tmp_path / f"site-{client}.toml" for client in range(2)]
    for client, file in enumerate(files):
        settings = {"client": client, "data": str(site_folder(tmp_path / "data", client))}
        file.write_text(tomli_w.dumps({**settings, "accepts": {"mask_minimum": 1}}))  # or the mask is tried for seconds
    return files


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Theta's digest after the same federation without Flower."""

    @cache
    def digest(**extra: Any) -> str:
        config = make_config({**SETTINGS, **extra})
        return str(simulation.simulate(config, tmp_path_factory.mktemp("simulated") / "run")["theta_digest"])

    return digest


def run(file: Path, out: Path, grid: Any) -> dict[str, Any]:
    config, federation = read_federation(file)
    return coordinate(config, federation, out, server_app.FlowerControl(grid, config, federation))


@pytest.mark.usefixtures("_identity")
@pytest.mark.parametrize("extra", [{}, {"update_rule": "adam"}, {"method": "feddyn"}])
def test_frames_in_messages_end_at_the_simulations_bits(
    tmp_path: Path, sites: list[Path], simulated: Callable[..., str], extra: dict[str, Any]
) -> None:
    grid = Grid(sites)
    summary = run(federation_file(tmp_path, **extra), tmp_path / "run", grid)
    assert summary["theta_digest"] == simulated(**extra)
    assert verify(tmp_path / "run").finished
    # one invitation a site, then two rounds, the last theta, and the end
    assert sorted(grid.pushed) == ["train.frames"] * 8 + ["train.session"] * 2


@pytest.mark.usefixtures("_identity")
def test_sites_that_agree_evaluate_on_their_own_rows(tmp_path: Path, sites: list[Path]) -> None:
    for client, file in enumerate(sites):
        data = site_folder(tmp_path / "data", client)
        rows = (data / "train.jsonl").read_text().splitlines(keepends=True)
        (data / "validation.jsonl").write_text("".join(rows[: 5 + client]))
        file.write_text("evaluate = true\n" + file.read_text())
    summary = run(federation_file(tmp_path, {"evaluate": "sites"}, rounds=1), tmp_path / "run", Grid(sites))
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [metric for metric in metrics if metric["kind"] == "evaluation"]
    assert [metric["round"] for metric in evaluations] == [0, 1]
    assert all(metric["rows"] == 11 and metric["loss"] is None for metric in evaluations)
    assert summary["accuracy"] == evaluations[-1]["accuracy"]
    assert (summary["accuracy"] * 11) == pytest.approx(round(summary["accuracy"] * 11))


@pytest.mark.usefixtures("_identity")
def test_a_site_that_does_not_agree_is_not_asked_again(
    tmp_path: Path, sites: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sites[1].write_text(sites[1].read_text() + "rounds = 1\n")
    grid = Grid(sites)
    with pytest.raises(RunFailed, match="1 client here and idle, 2 are needed"):
        run(federation_file(tmp_path, {"patience_s": 2.0, "start_s": 0.0}), tmp_path / "run", grid)
    assert "takes no part: rounds: the run asks for 2, the site accepts at most 1" in capsys.readouterr().err
    assert grid.pushed.count("train.session") == 2
    # the run is none the worse for it
    sites[1].write_text(sites[1].read_text().replace("rounds = 1", "rounds = 2"))
    assert run(federation_file(tmp_path), tmp_path / "run", Grid(sites))["rounds"] == 2


@pytest.mark.usefixtures("_identity")
def test_a_run_that_flower_stops_can_be_gone_on_with(tmp_path: Path, sites: list[Path]) -> None:
    class Stopping(Grid):
        def push_messages(self, messages: Sequence[Message]) -> list[str | None]:
            self.stopped = self.pushed.count("train.frames") >= 2
            return super().push_messages(messages)

    with pytest.raises(RunFailed, match=r"the run was stopped; what was logged is safe"):
        run(federation_file(tmp_path, rounds=200), tmp_path / "run", Stopping(sites))
    reached = verify(tmp_path / "run")
    assert 1 <= reached.rounds < 200
    with pytest.raises(MeerkatError, match="began with rounds 200, not 3"):
        run(federation_file(tmp_path, rounds=3), tmp_path / "run", Grid(sites))
    with pytest.raises(MeerkatError, match="a federation's run: start its coordinator again"):
        simulation.resume(tmp_path / "run")


class Meddling(Grid):
    """Node 101 answers messages of one type with content of the test's own, once."""

    def __init__(self, sites: Sequence[Path], kind: str, content: RecordDict) -> None:
        super().__init__(sites)
        self.kind, self.content = kind, content
        self.meddled = False

    def _answer(self, message: Message) -> str | None:
        made = super()._answer(message)
        if made and (message.metadata.dst_node_id, message.metadata.message_type, self.meddled) == (
            101,
            self.kind,
            False,
        ):
            self.meddled = True
            self._answers[made] = Message(self.content, reply_to=message)
        return made


@pytest.mark.usefixtures("_identity")
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("train.session", {"session": ConfigRecord({})}),
        ("train.session", {"hello": ConfigRecord({"frame": 10**12})}),
        ("train.frames", {"frames": ConfigRecord({"frames": 3})}),
    ],
)
def test_what_a_node_answers_ends_nobody_s_run(
    tmp_path: Path, sites: list[Path], kind: str, content: dict[str, Any]
) -> None:
    grid = Meddling(sites, kind, RecordDict(content))
    waiting = {"clients_minimum": 1, "start_s": 5.0 if kind == "train.frames" else 0.0, "deadline_s": 0.5}
    assert run(federation_file(tmp_path, waiting), tmp_path / "run", grid)["rounds"] == 2
    assert grid.meddled


class Unreadable(Grid):
    """What node 101 answers first is nothing that Flower can read."""

    unreadable: str | None = None

    def _answer(self, message: Message) -> str | None:
        made = super()._answer(message)
        if self.unreadable is None and message.metadata.dst_node_id == 101:
            self.unreadable = made
        return made

    def pull_messages(self, ids: Sequence[str]) -> list[Message]:
        if self.unreadable in ids:
            raise ValueError("Error parsing message")
        return super().pull_messages(ids)


@pytest.mark.usefixtures("_identity")
def test_an_answer_that_flower_cannot_read_ends_its_own_session_alone(tmp_path: Path, sites: list[Path]) -> None:
    grid = Unreadable(sites)
    waiting = {"clients_minimum": 1, "start_s": 0.0, "deadline_s": 0.5}
    assert run(federation_file(tmp_path, waiting), tmp_path / "run", grid)["rounds"] == 2
    assert grid.unreadable is not None


def test_an_answer_is_that_of_the_message_that_was_asked_about() -> None:
    forged: Any = SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id="of-8"))
    grid: Any = SimpleNamespace(pull_messages=lambda ids: [forged] if ids == ["of-7"] else [])
    waiting = {"of-7": 7, "of-8": 8}
    assert [*messages.answered(grid, waiting)] == [(forged, 7)]
    assert waiting == {"of-8": 8}


@pytest.mark.parametrize("error", [ConnectionResetError(), httpx.ConnectError("no route"), SystemExit(0)])
def test_a_broken_connection_is_nobody_s_answer(error: BaseException) -> None:
    def fails(_: Sequence[str]) -> list[Message]:
        raise error

    waiting = {"of-7": 7}
    with pytest.raises(type(error)):
        list(messages.answered(cast(Any, SimpleNamespace(pull_messages=fails)), waiting))
    assert waiting == {"of-7": 7}


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"session": ArrayRecord(), "hello": ArrayRecord(), "frames": ArrayRecord()},
        {"session": ConfigRecord({}), "hello": ConfigRecord({}), "frames": ConfigRecord({})},
        {
            "session": ConfigRecord({"why": 3, "again": "yes"}),
            "hello": ConfigRecord({"frame": 10**12}),
            "frames": ConfigRecord({"frames": "text"}),
        },
    ],
)
def test_an_answer_of_any_content_is_read_as_none(content: dict[str, Any]) -> None:
    answer: Any = SimpleNamespace(content=RecordDict(content), has_error=lambda: False)
    assert messages.unpack(answer.content) == [b""]
    assert messages.hello_in(answer) is None
    ended = messages.session_end(answer)
    assert ended is None or not ended[1]


@pytest.mark.usefixtures("_identity")
def test_a_site_that_fails_between_messages_is_invited_again(
    tmp_path: Path, sites: list[Path], simulated: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    lost = RecordDict({"session": ConfigRecord({"why": "the site's state\nis gone", "again": True})})
    grid = Meddling(sites, "train.frames", lost)
    summary = run(federation_file(tmp_path, {"quorum": 2}), tmp_path / "run", grid)
    assert summary["theta_digest"] == simulated()
    assert grid.pushed.count("train.session") == 3
    assert "client 1: the site's state is gone" in capsys.readouterr().err


class Rotating(Grid):
    """Between two messages the operator of site 1 gives it another key."""

    def __init__(self, sites: Sequence[Path], keys: Sequence[str]) -> None:
        super().__init__(sites)
        self.file, self.keys = sites[1], keys

    def _answer(self, message: Message) -> str | None:
        if self.pushed.count("train.frames") == 3 and self.keys:
            own = {**tomllib.loads(self.file.read_text()), "signing_key": self.keys[1]}
            self.file.write_text(tomli_w.dumps({**own, "signing_key_before": self.keys[0]}))
            self.keys = []
        return super()._answer(message)


@pytest.mark.usefixtures("_identity")
def test_sites_sign_over_messages_and_a_key_may_change_between_two(
    tmp_path: Path, sites: list[Path], simulated: Callable[..., str]
) -> None:
    names = ("0", "1", "new")
    keys = [str(make_signing_key(tmp_path / f"{name}.key").private) for name in names]
    (tmp_path / "signers").write_text("".join((tmp_path / f"{name}.pub").read_text() for name in names[:2]))
    for file, key in zip(sites, keys, strict=False):
        file.write_text(f'signing_key = "{key}"\n' + file.read_text())
    grid = Rotating(sites, keys[1:])
    given = {"sign": True, "signers": "signers", "quorum": 2}
    summary = run(federation_file(tmp_path, given), tmp_path / "run", grid)
    assert summary["theta_digest"] == simulated()
    verified = verify(tmp_path / "run", listed=read_keys(str(tmp_path / "signers"), "signers"))
    fingerprints = [fingerprint(SigningKey.load(key).public) for key in keys]
    assert dict(verified.signed) == {(0, fingerprints[0]): 2, (1, fingerprints[1]): 1, (1, fingerprints[2]): 1}
    assert grid.pushed.count("train.session") == 3


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"runs": {}}, r"table \[runs\] is unknown"),
        ({"run": {"rounds": 0}}, r"\[run\] rounds 0: must be"),
        ({"federation": {"quorums": 1}}, r"\[federation\] quorums: unknown; must be one of stream"),
        ({"federation": {"deadline_s": -1}}, r"\[federation\] deadline_s -1: must be greater than 0"),
        ({"run": {"clients": 2}, "federation": {"quorum": 3}}, "quorum 3: must be at most .* 2"),
        ({"run": {"method": "fo-fedavg"}}, "method fo-fedavg: sends 4n bytes"),
        ({"run": {"method": "task-mask"}}, "method task-mask: needs the sites' rows"),
        ({"federation": {"signers": "keys"}}, "signers: has an effect only with sign = true"),
        ({"federation": {"revoked": ["a key"]}}, "revoked 'a key': must be a key's fingerprint"),
        ({"federation": {"stream": "localhost:1"}}, "needs certificate and private_key"),
        ({"run": {"local_steps": 200_000}}, "200,000 scalars a round"),
        ({"run": {"directions": 2000, "local_steps": 2, "method": "meerkat-vp"}}, "200,000 scalars a round"),
        ({"run": {"partition": "iid"}}, r"\[run\] partition 'iid': rows stay at the sites"),
        ({"run": {"held_back": 0.1}}, r"\[run\] held_back 0.1: a federation evaluates on validation rows"),
        ({"run": 5}, r"run 5: must be a table, \[run\]"),
        ({"federation": ["quorum"]}, r"must be a table, \[federation\]"),
        ({"run": {"model": True}}, r"\[run\] model True: must be a valid string"),
        ({"run": {"data": "x" * 5000}, "federation": {"quorum": 0}}, "quorum 0: must be at least 1"),
    ],
)
def test_bad_settings_are_told_in_a_line(tmp_path: Path, tables: dict[str, Any], said: str) -> None:
    file = tmp_path / "federation.toml"
    file.write_text(tomli_w.dumps(tables))
    with pytest.raises(MeerkatError, match=said) as caught:
        read_federation(file)
    assert "\n" not in str(caught.value)


KEPT = ("accuracy", "loss", "accuracy_before", "theta_digest", "rounds", "payload_bytes_up")
"""Of a summary, what follows from the log and the model."""


@pytest.mark.parametrize("offer", [{}, {"offer": "{}", "mask": 10**12}, {"offer": 3, "mask": b""}, {"mask": b"x"}])
def test_a_malformed_offer_takes_no_memory(offer: dict[str, Any]) -> None:
    for content in ({"offer": ConfigRecord(offer)}, {}):
        with pytest.raises(MeerkatError, match="offer is malformed"):
            offer_in(RecordDict(content))


@pytest.mark.usefixtures("_identity")
def test_a_coordinator_that_starts_again_after_the_end_leaves_the_summary_as_it_is(
    tmp_path: Path, sites: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETTINGS, "threads", "auto")
    before, root, grid = torch.get_num_threads(), tmp_path / "run", Grid(sites)
    try:
        torch.set_num_threads(2)
        summary = run(federation_file(tmp_path), root, Grid(sites))
        torch.set_num_threads(1)  # as on another machine
        assert run(federation_file(tmp_path), root, grid) == summary
        assert "the run is finished, after 2 rounds" in capsys.readouterr().err
        assert grid.pushed == []
        for damage in (lambda: (root / "metrics.jsonl").unlink(), lambda: (root / "summary.json").write_text("{}")):
            damage()  # what is lost is made again from the log
            made = run(federation_file(tmp_path), root, grid)
            assert {name: made[name] for name in KEPT} == {name: summary[name] for name in KEPT}
            assert {metric["kind"] for metric in RunFolder(root).metrics()} >= {"round", "evaluation"}
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("_identity")
def test_a_site_whose_disk_is_full_for_a_while_comes_back(
    tmp_path: Path, sites: list[Path], simulated: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    append, full = Ledger.append, [True]

    def appending(ledger: Ledger, run: str, client: int, kind: str, fields: Mapping[str, Any]) -> None:
        if client == 1 and kind == "question" and full:
            full.clear()
            raise RunFailed("the disk is full")
        append(ledger, run, client, kind, fields)

    monkeypatch.setattr(Ledger, "append", appending)
    grid = Grid(sites)
    waiting = {"clients_minimum": 2, "quorum": 2, "patience_s": 60.0}
    assert run(federation_file(tmp_path, waiting), tmp_path / "run", grid)["theta_digest"] == simulated()
    assert grid.pushed.count("train.session") == 3


def test_calibrations_that_are_never_made_limit_nothing(tmp_path: Path) -> None:
    for run in ({"directions": 2000}, {"directions": 2000, "method": "meerkat-vp"}):
        file = tmp_path / "federation.toml"
        file.write_text(tomli_w.dumps({"run": {"task": "topics", **run}}))
        assert read_federation(file)[0].directions == 2000
