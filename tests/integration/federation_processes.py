"""A small real federation in processes of its own, to be killed, stopped and cut off: no Flower, but all the rest.

A node is invited as Flower's control invites it: one offer a session, its answer at the session's end, and no second
offer to one that will not come again.
"""

import base64
import contextlib
import itertools
import json
import math
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nursery import Nursery
from proxy import Proxy, free_port

from meerkat.errors import MeerkatError, RunFailed
from meerkat.federation.admission import Admission
from meerkat.federation.coordinator import coordinate
from meerkat.federation.coordinator_settings import FederationConfig
from meerkat.federation.flower.stream import StreamLink, attend
from meerkat.federation.frames import Frame
from meerkat.federation.link import Link
from meerkat.federation.offer import Offer
from meerkat.federation.site import Site
from meerkat.federation.site_settings import SiteConfig
from meerkat.settings.config import EMBEDDED, SITES, RunConfig

LOOPBACK = "127.0.0.1"
NODES = 3
DRAIN_S = 3.0
"""Seconds that nodes have to end their sessions when the run is over."""
AGAIN_S = 5.0
"""Seconds before a node that told how its session ended is invited again, as Flower's control has it."""


# in the coordinator's process


class SocketControl:
    """Gives each node that asks an offer, over a plain loopback socket. See `coordinator.Control`."""

    def __init__(self, port: int, federation: FederationConfig) -> None:
        self._federation = federation
        self._listener = socket.create_server((LOOPBACK, port))
        self._out: set[str] = set()
        """Nodes in a session."""
        self._not_before: dict[str, float] = {}
        """When a node may be invited again; never, if it said so."""
        self._latest: dict[str, int] = {}
        """The last time that a node asked, of all times that any did: a killed one's question may be read last."""
        self._lock = threading.Lock()
        self.stop: Callable[[str], None] = lambda _: None

    def link(self, admission: Admission) -> Link:
        own = self._federation
        return StreamLink(admission, own.listen, Path(own.certificate), Path(own.private_key))

    def open(self, admission: Admission, offer: Offer, stop: Callable[[str], None]) -> None:
        self.stop = stop

        def invite() -> None:
            for time_asked in itertools.count():
                try:
                    asking, _ = self._listener.accept()
                except OSError:
                    return
                threading.Thread(target=self._session, args=(asking, time_asked, admission, offer), daemon=True).start()

        threading.Thread(target=invite, daemon=True).start()

    def _session(self, asking: socket.socket, time_asked: int, admission: Admission, offer: Offer) -> None:
        try:
            with asking, asking.makefile("rwb") as stream:
                node = stream.readline().decode().strip()
                if time.monotonic() < self._not_before.get(node, 0.0):
                    return
                with self._lock:
                    if time_asked < self._latest.get(node, 0):
                        return
                    self._latest[node] = time_asked
                    token = admission.token(node)
                self._out.add(node)
                try:
                    text, mask = offer.encode(token)
                    stream.write(json.dumps([text, base64.b64encode(mask).decode()]).encode() + b"\n")
                    stream.flush()
                    if answer := stream.readline():
                        self._not_before[node] = time.monotonic() + AGAIN_S if json.loads(answer) else math.inf
                finally:
                    self._out.discard(node)
        except OSError:
            pass  # the node is gone

    def stop_inviting(self) -> None:
        if self._listener.fileno() >= 0:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()

    def close(self) -> None:
        self.stop_inviting()
        end = time.monotonic() + DRAIN_S
        while self._out and time.monotonic() < end:
            time.sleep(0.01)


def run_coordinator(run: dict[str, Any], federation: dict[str, Any], out: str, control_port: int, room: int) -> int:
    """Coordinate until the end; SIGTERM stops it as Flower's word does. `room`: bytes that a file may have, if any."""
    settings = FederationConfig(**federation)
    control = SocketControl(control_port, settings)
    signal.signal(signal.SIGTERM, lambda *_: control.stop("the run was stopped"))
    if room:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        coordinate(RunConfig(**run), settings, Path(out), control)
    except MeerkatError as error:
        print(f"coordinator: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


# in a node's process


def run_node(site: dict[str, Any], control_port: int, notes: str) -> int:
    """Ask for offers and take part, for ever; each session leaves lines in `notes`."""
    own = SiteConfig(**site)
    authority = Path(own.certificate_authority).read_bytes()

    def note(**said: Any) -> None:
        with Path(notes).open("a") as file:
            file.write(json.dumps({"at": time.monotonic(), **said}) + "\n")

    while True:
        try:
            with socket.create_connection((LOOPBACK, control_port)) as asking, asking.makefile("rwb") as stream:
                stream.write(f"node {own.client}\n".encode())
                stream.flush()
                if line := stream.readline():
                    text, mask = json.loads(line)
                    offer = Offer.decode(text, base64.b64decode(mask))
                    stream.write(json.dumps(take_part(offer, own, authority, note)).encode() + b"\n")
        except OSError:
            pass
        time.sleep(0.05)


def take_part(offer: Offer, own: SiteConfig, authority: bytes, note: Callable[..., None]) -> bool:
    """One session, and whether to invite this node again: what the ClientApp does."""
    note(what="begins")
    stands: dict[str, Any] = {}
    why, again = "", True
    try:
        with contextlib.closing(Site(offer, own)) as site:
            try:
                attend(site, own.coordinator, authority, offer.patience_s)
                why = site.ended
            finally:
                stands = {"round": site.round, "digest": Frame.decode(site.hello()).digest.hex()}
    except RunFailed as error:
        why = f"failed: {error}"
    except MeerkatError as error:
        why, again = f"{type(error).__name__}: {error}", False
    note(what="free", why=why, **stands)
    return again


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong once."""

    what: str
    """kill (SIGKILL), stop (SIGSTOP), end (SIGTERM, the coordinator's alone) or cut."""
    who: int
    """A node; -1 for the coordinator. A cut breaks all connections, and is nobody's: -2."""
    round: int
    """Not before so many rounds are in the log."""
    delay_s: float
    """Then so many seconds more."""
    for_s: float
    """Seconds until who was killed is started again, who was stopped goes on, or connections are taken again."""


@dataclass(frozen=True)
class Schedule:
    """What a federation goes through: a function of its seed."""

    seed: int
    whole: bool
    """Whether a round needs every node, so that nothing that happens changes the model."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the run, where they are not the usual."""
    faults: tuple[Fault, ...] = ()

    @classmethod
    def drawn(cls, seed: int) -> "Schedule":
        rng = random.Random(seed)
        faults = []
        for _ in range(rng.randint(1, 4)):
            what = rng.choices(("kill", "stop", "cut", "end"), (5, 3, 2, 1))[0]
            who = {"cut": -2, "end": -1}.get(what, rng.choice((-1, 0, 1, 2)))
            length = rng.choice((0.02, 0.1, 0.3, 1.0)) if what == "stop" else rng.choice((0.0, 0.0, 0.3))
            faults.append(Fault(what, who, rng.randint(-3, ROUNDS - 1), rng.uniform(0, 0.1), length))
        faults.sort(key=lambda fault: fault.round)
        return cls(seed, rng.random() < 0.5, rng.choice(VARIANTS), tuple(faults))


ROUNDS = 16
DEADLINE_S = 0.4
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"local_steps": 3},
    {"local_steps": 3, "update_rule": "momentum", "directions": 2},
    {"update_rule": "adam"},
    {"local_steps": 3, "method": "feddyn"},
    {
        "local_steps": 3,
        "method": "meerkat-vp",
        "calibration_steps": 6,
        "initial_steps": 2,
        "later_steps": 2,
        "recalibrate_every": 5,
    },
)


def run_settings(data: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Of a small run over rows in a folder, as a simulation would make it."""
    usual = {
        "data": str(data),
        "clients": NODES,
        "partition": "iid",
        "rounds": ROUNDS,
        "lr": 0.01,
        "batch_size": 2,
        "eval_every": 0,
        "text_sequences": 2,
        "text_length": 16,
        "threads": 1,
        "device": "cpu",
        "batching": "off",
    }
    return {**usual, **settings}


class Federation:
    """A coordinator and its nodes, as a test handles them."""

    def __init__(
        self,
        nursery: Nursery,
        root: Path,
        sites: Path,
        keys: dict[str, Path],
        settings: dict[str, Any],
        waiting: dict[str, Any],
    ) -> None:
        """Nothing is started yet. `root`: a new folder for all of it; `sites`: data, and each site's rows."""
        self.nursery, self.root = nursery, root
        self.out, self.tmp, self.log = root / "run", root / "tmp", root / "log"
        self.tmp.mkdir(parents=True)
        self.control_port, self.stream_port = free_port(), free_port()
        self.proxy = Proxy(self.stream_port)
        self.settings = {**run_settings(sites / "data", settings), "partition": SITES}
        self.waiting = {
            "stream": f"{LOOPBACK}:{self.proxy.port}",
            "listen": f"{LOOPBACK}:{self.stream_port}",
            "certificate": str(keys["server"]),
            "private_key": str(keys["server key"]),
            "clients_wanted": NODES,
            "start_s": 20.0,
            "deadline_s": DEADLINE_S,
            "patience_s": 60.0,
            "site_patience_s": 4.0,
            **waiting,
        }
        self._sites = [
            {
                "client": k,
                "data": str(sites / f"site-{k}"),
                "model": EMBEDDED,
                "device": "cpu",
                "coordinator": self.waiting["stream"],
                "certificate_authority": str(keys["authority"]),
                "ledger": str(sites / f"site-{k}.ledger"),
            }
            for k in range(NODES)
        ]
        self.pids: dict[int, int] = {}
        """Of those that were started and not waited for; -1 is the coordinator."""

    def start(self, who: int, room: int = 0) -> None:
        """Start the coordinator, -1, or a node."""
        assert who not in self.pids
        if who < 0:
            given = {"run": self.settings, "federation": self.waiting, "out": str(self.out), "room": room}
        else:
            given = {"site": self._sites[who], "notes": str(self.root / f"notes-{who}")}
            with (self.root / f"notes-{who}").open("a") as notes:
                notes.write('{"what": "starts"}\n')
        what = run_node if who >= 0 else run_coordinator
        log = self.root / f"log-{who}" if who >= 0 else self.log
        self.pids[who] = self.nursery.start(what, {**given, "control_port": self.control_port}, log, tmp=self.tmp)

    def start_all(self) -> None:
        for who in range(-1, NODES):
            self.start(who)

    def nodes(self) -> list[int]:
        """Those that are there."""
        return sorted(who for who in self.pids if who >= 0)

    def signal(self, who: int, sign: int) -> None:
        os.kill(self.pids[who], sign)

    def poll(self, who: int, wait: bool = False) -> int | None:
        """An exit status, if there is one."""
        status = self.nursery.poll(self.pids[who], wait)
        if status is not None:
            del self.pids[who]
        return status

    def kill(self, who: int) -> None:
        """Kill with SIGKILL, and wait until it is gone, with all that it started."""
        pid = self.pids[who]
        self.signal(who, signal.SIGKILL)
        self.poll(who, wait=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, 0)
            raise AssertionError(f"something is left of process group {pid}")

    def rounds(self) -> int:
        """Closed rounds in the log; -1 as long as there is none."""
        log = self.out / "rounds.log"
        return log.read_bytes().count(b'{"kind":"round"') if log.exists() else -1

    def calibrates(self) -> bool:
        """Whether a calibration was begun."""
        return self.log.exists() and "calibrating" in self.log.read_text()

    def notes(self, node: int) -> list[dict[str, Any]]:
        """What a node wrote down of its sessions."""
        file = self.root / f"notes-{node}"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def is_free(self, node: int) -> bool:
        return self.notes(node)[-1]["what"] != "begins"

    def wait_for(self, condition: Callable[[], bool], limit_s: float, what: str) -> float:
        """Wait until something is so; the seconds that it took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < limit_s, f"not within {limit_s} s: {what}\n{self.told()}"
            time.sleep(0.005)
        return time.monotonic() - began

    def finish(self, limit_s: float = 60.0) -> None:
        """Wait for the coordinator to end well, then for the nodes to be free."""
        status: list[int | None] = []
        self.wait_for(lambda: bool(status.append(self.poll(-1)) or status[-1] is not None), limit_s, "the run's end")
        assert status[-1] == 0, self.told()
        self.wait_for(lambda: all(map(self.is_free, self.nodes())), 30.0, "the nodes are free")

    def told(self) -> str:
        """The last that everyone said, for a failure's message."""
        logs = [self.log, *(self.root / f"{name}-{k}" for k in range(NODES) for name in ("log", "notes"))]
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs if log.exists())

    def close(self) -> None:
        """End everything that is left, and see that nothing is."""
        for who in [*self.pids]:
            self.kill(who)
        self.proxy.close()
        for port in (self.control_port, self.stream_port, self.proxy.port):
            socket.create_server((LOOPBACK, port)).close()


class Course:
    """A schedule as it goes: faults come when their round is there, and are undone when their time is over."""

    def __init__(self, federation: Federation, schedule: Schedule) -> None:
        self._federation = federation
        self._to_come = [*schedule.faults]
        self.whole = schedule.whole
        self._undo: dict[int, tuple[float, str]] = {}
        """Who is to be started again or to go on, when."""
        self._due = 0.0
        self._told_to_end = False
        self.met: list[tuple[Fault, int]] = []
        """The faults that met someone alive, and the rounds that were closed then."""
        self.last_start = -1
        """Rounds in the log when the coordinator was started last."""

    def run(self, limit_s: float) -> None:
        """Go through it until the coordinator ends by itself.

        Raises:
            AssertionError: it ended badly, or not in time.
        """
        federation, end = self._federation, time.monotonic() + limit_s
        federation.start_all()
        while True:
            assert time.monotonic() < end, f"hangs\n{federation.told()}"
            for who, (when, what) in [*self._undo.items()]:
                if time.monotonic() >= when:
                    self._end_fault(who, what)
            if self._to_come:
                self._next()
            if -1 in federation.pids and (status := federation.poll(-1)) is not None:
                if status == 0:
                    break
                assert status == 1, federation.told()
                assert self._told_to_end, federation.told()
                self._start(-1)
            time.sleep(0.002)
        for who, (_, what) in [*self._undo.items()]:
            if what != "kill":
                self._end_fault(who, what)

    def _end_fault(self, who: int, what: str) -> None:
        del self._undo[who]
        if what == "cut":
            self._federation.proxy.mend()
            return
        if what == "stop":
            self._federation.signal(who, signal.SIGCONT)
            return
        self._start(who)

    def _start(self, who: int) -> None:
        if who < 0:
            self.last_start, self._told_to_end = self._federation.rounds(), False
        self._federation.start(who)

    def _next(self) -> None:
        """Let the next fault come, if it is time."""
        fault, now, rounds = self._to_come[0], time.monotonic(), self._federation.rounds()
        if rounds < fault.round:
            return
        self._due = self._due or now + fault.delay_s
        if now < self._due or fault.who in self._undo:
            return
        self._due = 0.0
        self._to_come.pop(0)
        if fault.what == "cut":
            self._federation.proxy.cut()
        elif fault.what == "stop":
            self._federation.signal(fault.who, signal.SIGSTOP)
        elif fault.what == "end":
            self._federation.signal(fault.who, signal.SIGTERM)
            self._told_to_end = True
        else:
            self._federation.kill(fault.who)
        self.met.append((fault, rounds))
        if fault.what == "end":
            return
        self._undo[fault.who] = (now + fault.for_s, fault.what)


def described(schedule: Schedule) -> str:
    """A schedule as one line of JSON."""
    return json.dumps(asdict(schedule))
