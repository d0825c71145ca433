"""A real federation without a network: sites, admission, a remote engine, and a wire between them that may misbehave.

Time is the wire's own: nothing sleeps.
"""

import heapq
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from meerkat.algorithm import calibration, path, server
from meerkat.algorithm.directions import Directions, run_key
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import RoundRecord
from meerkat.algorithm.server import ServerConfig, ServerState
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.federation import remote_engine
from meerkat.federation.admission import Admission, Binding
from meerkat.federation.coordinator_settings import FederationConfig
from meerkat.federation.frames import BadFrame, Frame, Kind
from meerkat.federation.link import Event
from meerkat.federation.offer import Offer
from meerkat.federation.remote_engine import RemoteEngine
from meerkat.federation.site import Site
from meerkat.federation.site_settings import Refused, SiteConfig
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.classification import Classification
from meerkat.problems.data import load_rows
from meerkat.problems.partition import ClientRows, partition
from meerkat.problems.problem import client_losses
from meerkat.record.members import Member, Members
from meerkat.record.opening import Opening, gradient_digest
from meerkat.record.replay import Replay
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import LogReader
from meerkat.run.local_engine import LocalEngine
from meerkat.run.loop import run_rounds
from meerkat.run.mask import make_mask, store_mask
from meerkat.run.metrics import EvaluationMetric
from meerkat.run.precision import runnable_model
from meerkat.run.run import carry_on
from meerkat.run.setup import open_problem, resolve
from meerkat.settings.config import SITES, RunConfig, make_config

RUN = "0123456789abcdef"
_NUMBER = count()
Meddle = Callable[[int, bytes, bool], Sequence[tuple[float, bytes]] | None]
"""(client, frame, whether it goes up) -> what arrives after how many seconds; None breaks the stream."""


def faithful(_: int, data: bytes, __: bool) -> Sequence[tuple[float, bytes]]:
    """Everything arrives, at once."""
    return [(0.0, data)]


@dataclass(repr=False)
class Setting:
    """A federation's run, as all sides know it: made once, and cheap to begin again and again."""

    root: Path
    """A folder with model, data, and text."""
    folder: Path
    """Where the sites' rows go."""
    config: RunConfig
    mask: SparseMask
    sizes: list[int]
    run: str = RUN
    """The federation's id."""
    signed: bool = False
    """Whether every reply must be signed."""

    @classmethod
    def make(cls, root: Path, folder: Path, **changes: Any) -> "Setting":
        """A run on the tiny model, its rows dealt out to `clients` sites."""
        given = {
            "model": str(root / "model"),
            "task": "sst2",
            "data": str(root / "data"),
            "text": str(root / "text.jsonl"),
            "density": 0.01,
            "clients": 3,
            "partition": "iid",
            "rounds": 4,
            "batch_size": 4,
            "lr": 0.01,
            "eps": 1e-3,
            "dtype": "float32",
            "threads": 1,
            "device": "cpu",
            **changes,
        }
        config = resolve(make_config(given))
        mask = make_mask(config, open_problem(config))
        rows = load_rows(config.data, "train")
        dealt = partition(config.partition, rows, config.clients, config.seed).rows
        for client, part in enumerate(dealt):
            write_rows(folder / str(client), [rows[i] for i in part])
        return cls(root, folder, config, mask, [len(part) for part in dealt])

    def but(self, **changes: Any) -> "Setting":
        """The same with other settings, on the same mask and rows."""
        return replace(self, config=self.config.model_copy(update=changes))

    @cached_property
    def theta_0(self) -> Tensor:
        """The moving entries' values."""
        return MaskedModel(open_problem(self.config).model, self.mask).read()

    @cached_property
    def opening(self) -> Opening:
        """The log's first record: nobody has joined."""
        return Opening(
            run_key=f"{run_key(self.config.seed):032x}",
            config="0" * 64,
            model=self.mask.fingerprint,
            mask=self.mask.digest(),
            about_mask=self.mask.description_digest(),
            gradient=gradient_digest(self.mask),
            theta=path.digest(self.theta_0),
            data="",
            examples=[],
            torch=torch.__version__,
            transformers=transformers.__version__,
            federation=self.run,
            signed=self.signed,
        )

    @property
    def settings(self) -> ServerConfig:
        """What the server opens rounds from, before anybody joined."""
        return self.opening.settings(self.config, self.theta_0)

    @property
    def directions(self) -> Directions:
        """The run's directions."""
        return Directions(run_key(self.config.seed), len(self.mask))

    def members(self, listed: Sequence[str] | None = None) -> Members:
        """The members of a run that nobody has joined."""
        return Members(self.opening.identity(self.config), listed)

    def admission(
        self,
        members: Members | None = None,
        clock: Callable[[], float] = time.monotonic,
        bindings: Sequence[Binding] = (),
    ) -> Admission:
        """The run's admission."""
        return Admission(members or self.members(), self.config.clients, bindings, clock=clock)

    def offer(self, token: str = "") -> Offer:
        """The run's offer."""
        made = Offer.of(self.config, self.mask, self.opening, "", 60.0)
        return replace(made, token=token or bytes(32).hex())

    def site(self, client: int, token: str = "", node: str = "", **own: Any) -> Site:
        """A site, as it is after the offer came; `own` of its site.toml."""
        ledger = str(self.folder / f"{client}-{next(_NUMBER)}.ledger")  # of a site that has just been set up
        paths = {"data": str(self.folder / str(client)), "model": str(self.root / "model"), "ledger": ledger}
        given = {"client": client, **paths, **own}
        given["accepts"] = {"mask_minimum": 1, **own.get("accepts", {})}  # few passes to see that an entry is live
        return Site(self.offer(token), SiteConfig(**{"device": "cpu", **given}), node)

    def in_one_process(self) -> LocalEngine:
        """The same clients without sites, one after another."""
        problem = open_problem(self.config)
        model, z = runnable_model(self.config, problem, self.mask), self.directions
        rows = problem.rows("train")
        dealt = partition(self.config.partition, rows, self.config.clients, self.config.seed).rows
        clients = [ClientRows(k, r, self.config.batch_size, self.config.seed) for k, r in enumerate(dealt)]
        losses_of = client_losses(problem, problem.prepare(rows))
        rule = self.settings.rules.client
        return LocalEngine(
            model, z, lambda client, step: clients[client].batch(step), losses_of, together=False, rule=rule
        )

    def simulated(self) -> list[str]:
        """Theta's digest after each round of the same federation in one process."""
        engine, z = self.in_one_process(), self.directions
        settings = replace(self.settings, examples=dict(enumerate(self.sizes)))
        state, gradient, digests = ServerState(Replica(0, self.theta_0)), self.mask.pretraining_gradient, []
        while state.round < settings.rounds:
            if calibration.due(state, settings):
                plan = calibration.open_calibration(state, settings)
                replies = engine.run(state, plan)
                state, _ = calibration.close_calibration(state, plan, replies, settings, z, gradient)
            plan = server.open_round(state, settings)
            state, record = server.close_round(state, plan, engine.run(state, plan), settings, z, gradient)
            digests.append(record.theta_digest)
        return digests


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A site's data: the same rows to train on and to evaluate on."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Wire:
    """A Link in memory, with a clock of its own. A stream keeps its order, each way; streams do not wait for others."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.now = 0.0
        self.bytes_sent = self.bytes_received = 0
        self.sites: dict[int, Site] = {}
        """Whose stream stands."""
        self.up: list[Frame] = []
        """What sites said."""
        self.down: list[tuple[int, Frame]] = []
        """What they were told."""
        self.complaints: list[str] = []
        """What sites found wrong with frames."""
        self.meddle: Meddle = faithful
        self.on_left: Callable[[int, Site], None] = lambda _, __: None
        """Called when a stream is gone; not after the coordinator's last frame."""
        self._queue: list[tuple[float, int, Callable[[], Event | None]]] = []
        self._number = count()
        self._streams: dict[int, int] = {}
        self._busy_until: dict[tuple[int, bool], float] = {}

    def monotonic(self) -> float:
        """The wire stands in for the module `time`."""
        return self.now

    def after(self, seconds: float, action: Callable[[], Event | None]) -> None:
        """Do something later: its event, if it gives one, is told."""
        heapq.heappush(self._queue, (self.now + seconds, next(self._number), action))

    def connect(self, site: Site) -> None:
        """A site's stream, from its hello on. Raises what `Admission.admit` raises."""
        admitted = self.admission.admit(site.hello())
        self._break(admitted.client)
        site.answer(admitted.welcome)
        self.sites[admitted.client] = site
        self._streams[admitted.client] = next(self._number)
        self._tell(Event("arrived", admitted.client, site=admitted))

    def disconnect(self, client: int) -> None:
        """A site's stream breaks: what was on the way, each way, is lost."""
        if site := self._break(client):
            self.on_left(client, site)

    def settle(self) -> None:
        """Let everything that is on the way arrive."""
        while self._queue:
            self.receive(1e6)

    def say(self, client: int, data: bytes) -> None:
        """A frame from a client, whatever it is, at once."""
        self._tell(Event("frame", client, data))

    # the coordinator's side: see link.Link

    def send(self, frames: dict[int, list[bytes]]) -> None:
        for client, outgoing in frames.items():
            for data in outgoing:
                self.down.append((client, Frame.decode(data)))
                self._carry(client, data, up=False)

    def receive(self, timeout_s: float) -> Event | None:
        until = self.now + timeout_s
        while self._queue and self._queue[0][0] <= until:
            at, _, action = heapq.heappop(self._queue)
            self.now = max(self.now, at)
            if (event := action()) is not None:
                return event
        # time goes on even where what is left of a wait is less than the clock's last bit
        self.now = max(until, math.nextafter(self.now, math.inf) if timeout_s else until)
        return None

    def drop(self, client: int, last: bytes) -> None:
        self.down.append((client, Frame.decode(last)))
        self._carry(client, last, up=False)

    def close(self) -> None:
        """Nothing was taken that has to be given back."""

    # what is on the way

    def _tell(self, event: Event) -> None:
        self.after(0.0, lambda: event)

    def _break(self, client: int) -> Site | None:
        site = self.sites.pop(client, None)
        self._streams.pop(client, None)
        for up in (True, False):
            self._busy_until.pop((client, up), None)
        if site is not None:
            self._tell(Event("left", client))
        return site

    def _carry(self, client: int, data: bytes, up: bool) -> None:
        if client not in self.sites:
            return
        arriving = self.meddle(client, data, up)
        if arriving is None:
            self.disconnect(client)
            return
        stream = self._streams[client]
        for delay, arrived in arriving:
            at = max(self._busy_until.get((client, up), 0.0), self.now + delay)
            self._busy_until[client, up] = at
            arrive = self._heard if up else self._at_site
            self.after(at - self.now, lambda arrived=arrived, arrive=arrive: arrive(client, stream, arrived))

    def _heard(self, client: int, stream: int, data: bytes) -> Event | None:
        return Event("frame", client, data) if self._streams.get(client) == stream else None

    def _at_site(self, client: int, stream: int, data: bytes) -> None:
        if self._streams.get(client) != stream:
            return
        site = self.sites[client]
        try:
            answer = site.answer(data)
        except BadFrame as error:
            self.complaints.append(str(error))
            self.disconnect(client)
            return
        except Refused as error:  # as a stream does
            self._carry(client, site.refusal(str(error)), up=True)
            return
        if site.ended:
            self._break(client)
            if site.refused:
                self.on_left(client, site)
        elif answer is not None:
            self.up.append(Frame.decode(answer))
            self._carry(client, answer, up=True)


WAITING: dict[str, Any] = {"clients_wanted": 1, "deadline_s": 10.0, "start_s": 5.0, "patience_s": 30.0}
"""How a federation waits for its clients."""


@dataclass
class Federation:
    """A coordinator and its wire."""

    setting: Setting
    waiting: FederationConfig = field(default_factory=lambda: FederationConfig(**WAITING))
    state: ServerState | None = None
    settings: ServerConfig | None = None
    members: Members | None = None
    bindings: Sequence[Binding] = ()

    def __post_init__(self) -> None:
        self.admission = self.setting.admission(self.members, lambda: self.wire.now, self.bindings)
        self.wire = Wire(self.admission)
        self.z = self.setting.directions
        self.settings = self.settings or self.setting.settings
        self.state = self.state or ServerState(Replica(0, self.setting.theta_0))
        self.engine = RemoteEngine(
            self.wire,
            self.admission,
            self.settings,
            self.waiting,
            self.state,
            self.z,
            Classification.scores,
        )
        self._number = next(_NUMBER)
        self.records: list[dict[str, Any]] = []
        self.ever: dict[int, Site] = {}
        """The last site of each client, here or not."""

    @classmethod
    def of(
        cls, setting: Setting, monkeypatch: pytest.MonkeyPatch, join: int | None = None, **waiting: Any
    ) -> "Federation":
        """A federation whose clock the engine looks at, with all clients there, or the first few."""
        made = cls(setting, FederationConfig(**WAITING | waiting))
        monkeypatch.setattr(remote_engine, "time", made.wire)
        for client in range(setting.config.clients if join is None else join):
            made.enter(client)
        return made

    def enter(self, client: int, node: str = "", **own: Any) -> Site:
        """A fresh site comes in by a token."""
        node = node or f"node {client}"
        if node == f"node {client}":
            own = {"ledger": str(self.setting.folder / f"{client} of {self._number}.ledger"), **own}
            if client in self.ever:
                self.ever[client].close()
        site = self.setting.site(client, self.admission.token(node), node, **own)
        self.wire.connect(site)
        self.ever[client] = site
        return site

    def lead_astray(self, client: int) -> None:
        """Give a site another theta than everyone's."""
        site = self.ever[client]
        site._replica = replace(site._replica, theta=torch.zeros_like(site._replica.theta))

    def gather(self) -> list[Member]:
        """The clients that join before the next round."""
        joined = self.engine.arrivals(self.state.round)
        for join in joined:
            self.records.append(join.to_json())
            self.settings = join.added_to(self.settings)
        return joined

    def round(self) -> RoundRecord:
        """One round from arrivals to its closing, a calibration before it where one is due."""
        gradient = self.setting.mask.pretraining_gradient
        self.gather()
        if calibration.due(self.state, self.settings):
            plan = calibration.open_calibration(self.state, self.settings, self.engine.available())
            while not (replies := self.engine.run(self.state, plan)):
                self.gather()
                plan = calibration.open_calibration(self.state, self.settings, self.engine.available())
            self.state, calibrated = calibration.close_calibration(
                self.state, plan, replies, self.settings, self.z, gradient
            )
            self.records.append(calibrated.to_json())
            self.gather()
        plan = server.open_round(self.state, self.settings, self.engine.available())
        while not (replies := self.engine.run(self.state, plan)):
            self.gather()
            plan = server.open_round(self.state, self.settings, self.engine.available())
        self.state, record = server.close_round(self.state, plan, replies, self.settings, self.z, gradient)
        self.records.append(record.to_json())
        self.engine.closed(self.state, record)
        return record

    def replayed(self) -> Replay:
        """What the records so far say, gone through from theta_0."""
        return replay(self.setting, self.records)

    def end(self) -> None:
        """End the run, and let everything arrive."""
        self.engine.end("the run is over")
        self.wire.settle()

    def lived(self, folder: Path) -> ServerState:
        """The whole run by loop.run_rounds, with a log on the disk."""
        opening, problem = self.setting.opening, open_problem(self.setting.config)
        made = RunFolder.create(folder, self.setting.config.model_copy(update={"partition": SITES}))
        store_mask(made, self.setting.mask, problem)
        with carry_on(made, problem, federation=opening.federation, signed=opening.signed) as run:
            run_rounds(run, self.engine, evaluated_nothing, attendance=self.engine)
        _, *self.records = LogReader(made.log_path)
        return run.state


def evaluated_nothing(_: Tensor, rounds: int) -> EvaluationMetric:
    """An evaluation of a run that nobody evaluates."""
    return EvaluationMetric(rounds, {"accuracy": 0.0, "loss": None}, Classification.scores)


def counted(federation: "Federation") -> tuple[int, int]:
    """Rows right and rows in all, as sites' accuracies on their own rows tell."""
    metric = federation.engine.evaluate(torch.zeros(0), federation.state.round)
    return round((metric.scores["accuracy"] or 0.0) * (metric.rows or 0)), metric.rows or 0


def opened(setting: Setting, records: Sequence[dict[str, Any]]) -> Replay:
    """A federation's records, to be gone through from theta_0."""
    again, gradient = json.loads(json.dumps(list(records))), setting.mask.pretraining_gradient
    members = setting.members()
    return Replay(again, setting.theta_0, setting.settings, setting.directions, gradient, Path("rounds.log"), members)


def replay(setting: Setting, records: Sequence[dict[str, Any]]) -> Replay:
    """A federation's records, gone through from theta_0."""
    return opened(setting, records).run()


def frame(kind: Kind, client: int, state: ServerState, body: bytes = b"", run: str = RUN) -> bytes:
    """A frame about a state."""
    digest = bytes.fromhex(path.digest(state.theta))
    return Frame(kind, bytes.fromhex(run), client, state.round, digest, body).encode()


class Faults:
    """A seeded schedule of trouble: delays, duplicates, broken streams, restarts and damaged bytes."""

    def __init__(
        self,
        federation: Federation,
        seed: int,
        damage: bool,
        anywhere: bool = False,
        own: Callable[[int], dict[str, Any]] = lambda _: {},
    ) -> None:
        self.federation = federation
        self.anywhere = anywhere
        """Whether also in scalars."""
        self.own = own
        """What a client's site.toml says, when it comes back as a process of its own."""
        self.damage = damage
        """Whether bytes change on the way."""
        self.random = random.Random(seed)
        self.damaged: set[int] = set()
        """Clients that were told something damaged since they came."""
        federation.wire.on_left = self._left

    def __call__(self, client: int, data: bytes, up: bool) -> Sequence[tuple[float, bytes]] | None:
        chance, delay = self.random.random(), self.random.random() * 2
        if chance < 0.05:
            return None
        if chance < 0.10:
            return [(delay + 12.0, data)]
        if chance < 0.16 and up:
            return [(delay, data), (delay * 2, data)]
        if chance < 0.20 and self.damage:
            if not up:
                self.damaged.add(client)
            return [(delay, self._damage(data, up))]
        return [(delay, data)]

    def _damage(self, data: bytes, up: bool) -> bytes:
        if self.random.random() < 0.3:
            return data[: self.random.randrange(len(data))]
        # a scalar that says another number is a lie, not damage that anyone could find
        spared = up and len(data) > 52 + 7 and not self.anywhere
        at = self.random.randrange(52 + 7 if spared else len(data))
        return data[:at] + bytes([data[at] ^ (1 << self.random.randrange(8))]) + data[at + 1 :]

    def _left(self, client: int, site: Site) -> None:
        """Come back in a while, by the secret or as a process of its own."""
        fresh = site.refused or self.random.random() < 0.3
        self.federation.wire.after(self.random.random() * 8, lambda: self._back(client, None if fresh else site))

    def _back(self, client: int, site: Site | None) -> None:
        if client in self.federation.wire.sites:
            return
        self.damaged.discard(client)
        try:
            if site is not None:
                self.federation.wire.connect(site)
                return
        except Refused:  # it was removed, and its stream broke before it could be told
            pass
        self.federation.enter(client, **self.own(client))
