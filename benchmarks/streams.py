"""Many sites on one coordinator: rounds a second, and whether its memory stays flat.

    python benchmarks/streams.py [--json] [--rounds 1000] [--sites 64] [--processes 1]

Stub sites attend over TLS, each on a connection of its own, all of a process in one event loop: a thread for each would
cost more than what is measured. RemoteEngine runs the rounds, without a run log. Memory is what the coordinator's
process has resident after every tenth of the rounds; `growth_mb` is the last over the second of them. Seconds of CPU
are the coordinator's own, a client and round.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import grpc.aio

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the stub is the tests' own
from stub import LENGTH, Coordinator, StubSite

from meerkat.algorithm.directions import Directions
from meerkat.federation.certificates import certify
from meerkat.federation.coordinator_settings import FederationConfig
from meerkat.federation.flower.stream import _CALLING_OPTIONS, _METHOD, _SERVICE

_OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)
"""Channels of a process would share one, and a coordinator takes one stream of each connection."""


async def attend(site: StubSite, port: int, credentials: grpc.ChannelCredentials) -> None:
    """A site's session, from its call to the run's end; it calls again where the stream breaks."""
    while not site.ended:
        options = (*_CALLING_OPTIONS, _OWN_CONNECTION)
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
            call = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")()
            try:
                await call.write(site.hello())
                while not site.ended and isinstance(data := await call.read(), bytes):
                    if (answer := site.answer(data)) is not None:
                        await call.write(answer)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(1.0)


def sites(tokens: Sequence[tuple[int, str]], port: int, authority: bytes) -> None:
    """A process of sites; they share what they make of the run's key."""
    z, credentials = Directions(1, LENGTH), grpc.ssl_channel_credentials(authority)

    async def all_attend() -> None:
        await asyncio.gather(*(attend(StubSite(client, token, z), port, credentials) for client, token in tokens))

    asyncio.run(all_attend())


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--sites", type=int, default=64)
    parser.add_argument("--processes", type=int, default=1, help="processes of sites")
    arguments = parser.parse_args()
    count, tenth = arguments.sites, arguments.rounds // 10
    memory, replies = [], 0
    with tempfile.TemporaryDirectory() as folder:
        keys = certify(Path(folder) / "keys", ["127.0.0.1"], nodes=0)
        coordinator = Coordinator(
            keys, count, FederationConfig.model_validate({"clients_minimum": count, "deadline_s": 300.0})
        )
        tokens = [(client, coordinator.admission.token(f"node {client}")) for client in range(count)]
        spawn = multiprocessing.get_context("spawn")
        for first in range(arguments.processes):
            own = (tokens[first :: arguments.processes], coordinator.port, coordinator.authority)
            spawn.Process(target=sites, args=own, daemon=True).start()
        list(coordinator.rounds(1))
        began, cpu_began = time.perf_counter(), time.process_time()
        for _ in range(10):
            replies += sum(len(record.scalars) for record in coordinator.rounds(tenth))
            memory.append(resident_mb())
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        files = len(list(Path("/proc/self/fd").iterdir()))
        coordinator.close()
        for process in multiprocessing.active_children():
            process.join()
    result = {
        "name": "streams",
        "rounds_per_s": round(10 * tenth / seconds, 1),
        "replies_share": replies / (10 * tenth * count),
        "coordinator_cpu_us_a_reply": round(1e6 * cpu_s / (10 * tenth * count), 1),
        "open_files": files,
        "resident_mb": memory,
        "growth_mb": round(memory[-1] - memory[1], 2),
        "measured_on": f"{count} sites in {arguments.processes} processes on this machine, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}, {10 * tenth} rounds of T = 1",
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{result['rounds_per_s']} rounds a second, {result['replies_share']:.1%} of the replies in time")
        print(f"{result['coordinator_cpu_us_a_reply']} us of the coordinator's CPU a reply, {files} files open")
        print(f"resident after each tenth, MiB: {memory}; growth {result['growth_mb']}")
        print(result["measured_on"])


if __name__ == "__main__":
    main()
