"""Time of a round of trivial work between processes over TLS, with the run log, beside a gRPC echo and Flower messages.

    python benchmarks/round_latency.py [--json] [--rounds 1000] [--nodes 4] [--message-rounds 5] [--folder DIR]

A round goes the whole way: loop.run_rounds, RemoteEngine, session streams to every node, and its record on the
disk. Apart are told: the log's fsync, and the metrics, which are noted once a second and so in no median. Rounds and
echoes take turns, a fifth of them each; an echo sends as many bytes as a round's frame to every node and waits for
all, with nothing of Meerkat's in between. Bytes are TCP payload a client and round in the larger direction, counted
in a proxy. Spreads are 10th and 90th percentile. Last, examples/federation/run sends the frames of a few rounds of the
embedded task in plain Flower messages (--message-rounds 0: not): their seconds are Flower's, the work is some 20 ms.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # stub and proxy are the tests' own
from proxy import Proxy
from stub import SCORES, Coordinator, StubSite

from meerkat.algorithm.rounds import RoundRecord
from meerkat.algorithm.server import ServerState
from meerkat.federation.certificates import certify
from meerkat.federation.coordinator_settings import FederationConfig
from meerkat.federation.flower.stream import attend
from meerkat.federation.remote_engine import RemoteEngine
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import RunLog
from meerkat.run.loop import run_rounds
from meerkat.run.metrics import EvaluationMetric
from meerkat.run.run import Run

METHOD, FRAME_BYTES = "/echo.Echo/Frames", 102
"""A frame that closes one round of T = 1 and asks for the next has so many bytes."""
TURNS = 5


def _as_is(data: bytes) -> bytes:
    return data


def node(client: int, token: str, port: int, echo_port: int, authority: bytes) -> None:
    """A node's process: attends, and echoes beside it."""
    threading.Thread(target=echo_back, args=(echo_port, authority), daemon=True).start()
    attend(StubSite(client, token), f"127.0.0.1:{port}", authority, patience_s=20.0)


def echo_back(port: int, authority: bytes) -> None:
    outgoing: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with grpc.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(authority)) as channel:
        for data in channel.stream_stream(METHOD, _as_is, _as_is)(iter(outgoing.get, None), wait_for_ready=True):
            outgoing.put(data)


def echo(control: Connection, nodes: int, certificate: bytes, key: bytes) -> None:
    """The echo's own process: says its port, then answers each number of echoes with the seconds of each."""
    asyncio.run(_echo(control, nodes, certificate, key))


async def _echo(control: Connection, nodes: int, certificate: bytes, key: bytes) -> None:
    loop = asyncio.get_running_loop()
    contexts: list[Any] = []
    over, all_here = asyncio.Event(), asyncio.Event()

    async def stream(_: Any, context: Any) -> None:
        contexts.append(context)
        if len(contexts) == nodes:
            all_here.set()
        await over.wait()

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(stream, _as_is, _as_is)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", {"Frames": handler}),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    await server.start()
    control.send(port)
    while count := await loop.run_in_executor(None, control.recv):
        await all_here.wait()
        times = []
        for _ in range(count):
            began = time.perf_counter()
            await asyncio.gather(*(context.write(bytes(FRAME_BYTES)) for context in contexts))
            await asyncio.gather(*(context.read() for context in contexts))
            times.append(time.perf_counter() - began)
        control.send(times)
    over.set()
    await server.stop(1)


class Clock:
    """Seconds of each round from the end of the last one, those that the run log spends in fsync apart."""

    def __init__(self) -> None:
        self.rounds: list[float] = []
        self.syncs: list[float] = []
        self.noting = 0.0
        """Seconds for all rounds' metrics."""
        self._synced = 0.0
        self._began: tuple[float, float] | None = None
        self._fsync = os.fsync

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Within, seconds in fsync are the log's."""
        os.fsync = self._timed
        try:
            yield
        finally:
            os.fsync = self._fsync

    def _timed(self, file: Any) -> None:
        began = time.perf_counter()
        self._fsync(file)
        self._synced += time.perf_counter() - began

    def pause(self) -> None:
        """What comes now is no round."""
        self._began = None

    def lap(self) -> None:
        """A round has ended."""
        now, synced = time.perf_counter(), self._synced
        if self._began is not None:
            self.syncs.append(synced - self._began[1])
            self.rounds.append(now - self._began[0] - self.syncs[-1])
        self._began = now, synced


class Log(RunLog):
    """Tells a clock when it writes."""

    clock: Clock

    def append(self, record: Mapping[str, Any], sync: bool = True) -> None:
        with self.clock.logging():
            super().append(record, sync)


class Engine(RemoteEngine):
    """Tells a clock when a round is on the disk."""

    clock: Clock

    def closed(self, state: ServerState, record: RoundRecord) -> None:
        super().closed(state, record)
        self.clock.lap()

    def run_deferred(self) -> None:
        began = time.perf_counter()
        super().run_deferred()
        self.clock.noting += time.perf_counter() - began


def measure(keys: dict[str, Path], nodes: int, rounds: int, root: Path) -> tuple[Clock, list[float]]:
    """The times of rounds and of echoes, in seconds."""
    waiting = FederationConfig.model_validate({"clients_minimum": nodes})
    coordinator = Coordinator(keys, nodes, waiting, rounds)
    engine = Engine(
        coordinator.link, coordinator.admission, coordinator.settings, waiting, coordinator.state, coordinator.z, SCORES
    )
    coordinator.engine = engine
    spawn = multiprocessing.get_context("spawn")
    control, end = spawn.Pipe()
    pair = keys["server"].read_bytes(), keys["server key"].read_bytes()
    processes = [spawn.Process(target=echo, args=(end, nodes, *pair), daemon=True)]
    processes[0].start()
    echo_port = control.recv()
    for client in range(nodes):
        token = coordinator.admission.token(f"node {client}")
        arguments = (client, token, coordinator.port, echo_port, coordinator.authority)
        processes.append(spawn.Process(target=node, args=arguments, daemon=True))
        processes[-1].start()
    clock = engine.clock = Clock()
    echoes: list[float] = []

    def evaluate(_: Any, at: int) -> EvaluationMetric:
        if at:  # echoes in place of an evaluation
            control.send(rounds // TURNS)
            echoes.extend(control.recv())
        clock.pause()
        return EvaluationMetric(at, {"accuracy": None}, {"accuracy": "higher"})

    folder = RunFolder(root)
    log = Log(folder.log_path)
    log.clock = clock
    absent: Any = None
    config: Any = SimpleNamespace(rounds=rounds, eval_every=rounds // TURNS, tracker="none")
    model: Any = SimpleNamespace(mask=SimpleNamespace(theta_0=None))
    run = Run(
        folder=folder,
        log=log,
        config=config,
        model=model,
        opening=absent,
        members=absent,
        directions=coordinator.z,
        gradient=None,
        settings=coordinator.settings,
        state=coordinator.state,
        closed=False,
        lost=[],
    )
    run_rounds(run, engine, evaluate, attendance=engine)
    log.close()
    coordinator.close()
    control.send(0)
    for process in processes:
        process.join()
    return clock, echoes


def bytes_a_round(keys: dict[str, Path], rounds: int = 200) -> float:
    """TCP payload of a client and round, TLS and HTTP/2 in it, in the larger direction."""
    coordinator = Coordinator(keys, 1)
    proxy = Proxy(coordinator.port)
    attending = coordinator.attending(0, proxy.port)
    list(coordinator.rounds(20))
    up, down = proxy.up, proxy.down
    list(coordinator.rounds(rounds))
    used = max(proxy.up - up, proxy.down - down) / rounds
    coordinator.close()
    attending.end()
    proxy.close()
    return used


def message_rounds(nodes: int, rounds: int, root: Path) -> list[float]:
    """Seconds of rounds whose frames travel in plain Flower messages, until all have replied."""
    script = Path(__file__).parents[1] / "examples" / "federation" / "run"
    command = [sys.executable, str(script), "--out", str(root / "messages"), "--messages"]
    subprocess.run([*command, "--sites", str(nodes), "--rounds", str(rounds)], check=True, stdout=sys.stderr)
    return [m["round_s"] for m in RunFolder(root / "messages" / "run").metrics() if m["kind"] == "round"]


def milliseconds(times: list[float]) -> float:
    return round(1e3 * statistics.median(times), 3)


def spread(times: list[float]) -> list[float]:
    tenths = statistics.quantiles(times, n=10)
    return [round(1e3 * tenths[0], 3), round(1e3 * tenths[-1], 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--message-rounds", type=int, default=5, help="rounds in plain Flower messages [default: 5]")
    parser.add_argument("--folder", type=Path, help="where the run log is written [default: the system's for such]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        keys = certify(Path(folder) / "keys", ["127.0.0.1"], nodes=0)
        clock, echoes = measure(keys, arguments.nodes, arguments.rounds, Path(folder))
        used = bytes_a_round(keys)
        messages = (
            message_rounds(arguments.nodes, arguments.message_rounds, Path(folder)) if arguments.message_rounds else []
        )
    result = {
        "name": "round_latency",
        "median_ms": milliseconds(clock.rounds),
        "spread": spread(clock.rounds),
        "bytes": round(used, 1),
        "fsync_ms": milliseconds(clock.syncs),
        "fsync_spread": spread(clock.syncs),
        "echo_ms": milliseconds(echoes),
        "echo_spread": spread(echoes),
        "metrics_ms": round(1e3 * clock.noting / arguments.rounds, 3),
        "flower_messages_ms": milliseconds(messages) if messages else None,
        "measured_on": f"{arguments.nodes} node processes on this machine, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}, {arguments.rounds} rounds of T = 1",
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"a round takes       {result['median_ms']} ms without fsync (spread {result['spread']})")
        print(f"its fsyncs take     {result['fsync_ms']} ms (spread {result['fsync_spread']})")
        print(f"its metrics take    {result['metrics_ms']} ms (mean)")
        print(f"a bare gRPC echo    {result['echo_ms']} ms (spread {result['echo_spread']})")
        print(f"in Flower messages  {result['flower_messages_ms']} ms (median of {len(messages)})")
        print(f"on the wire         {result['bytes']} bytes a client and round in the larger direction")
        print(result["measured_on"])


if __name__ == "__main__":
    main()
