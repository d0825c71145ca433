"""Many sites on one coordinator: rounds a second, and whether its memory stays flat.

    python benchmarks/streams.py [--json] [--rounds 1000] [--sites 64]

Stub sites in a few processes attend over TLS; RemoteEngine runs the rounds, without a run log. Memory is what the
coordinator's process has resident after every tenth of the rounds; `growth_mb` is the last over the second of them.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the stub is the tests' own
from stub import LENGTH, Attending, Coordinator, StubSite

from meerkat.algorithm.directions import Directions
from meerkat.federation.certificates import certify
from meerkat.federation.link import WaitingRules

PROCESSES = 4


def sites(tokens: Sequence[tuple[int, str]], port: int, authority: bytes) -> None:
    """A process of sites, each in a thread; they share what they make of the run's key."""
    z = Directions(1, LENGTH)
    attending = [Attending(StubSite(client, token, z), port, authority) for client, token in tokens]
    for each in attending:
        each.end(timeout_s=3600.0)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--sites", type=int, default=64)
    arguments = parser.parse_args()
    count, tenth = arguments.sites, arguments.rounds // 10
    memory, replies = [], 0
    with tempfile.TemporaryDirectory() as folder:
        keys = certify(Path(folder) / "keys", ["127.0.0.1"], nodes=0)
        held = Coordinator(keys, count, WaitingRules(count, count, start_s=300.0, deadline_s=300.0))
        tokens = [(client, held.admission.token(f"node {client}")) for client in range(count)]
        spawn = multiprocessing.get_context("spawn")
        for first in range(PROCESSES):
            own = (tokens[first::PROCESSES], held.port, held.authority)
            spawn.Process(target=sites, args=own, daemon=True).start()
        list(held.rounds(1))
        began = time.perf_counter()
        for _ in range(10):
            replies += sum(len(record.scalars) for record in held.rounds(tenth))
            memory.append(resident_mb())
        seconds = time.perf_counter() - began
        held.close()
        for process in multiprocessing.active_children():
            process.join()
    result = {
        "name": "streams",
        "rounds_per_s": round(10 * tenth / seconds, 1),
        "replies_share": replies / (10 * tenth * count),
        "resident_mb": memory,
        "growth_mb": round(memory[-1] - memory[1], 2),
        "measured_on": f"{count} sites in {PROCESSES} processes on this machine, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}, {10 * tenth} rounds of T = 1",
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{result['rounds_per_s']} rounds a second, {result['replies_share']:.1%} of the replies in time")
        print(f"resident after each tenth, MiB: {memory}; growth {result['growth_mb']}")
        print(result["measured_on"])


if __name__ == "__main__":
    main()
