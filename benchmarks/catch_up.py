"""Bringing a client up to date that was away: the rounds it missed, or theta itself.

    python benchmarks/catch_up.py [--json] [--rounds 30]

For masks of 553 (the embedded model), 6,000 and 1,240,000 entries (0.1% of 1.24 billion): the bytes of one missed
round and of the state, and the seconds that following a round takes. From these, how many missed rounds are told
before theta is sent (federation/catch_up.py): as long as they are fewer bytes, fit a frame, and are followed before the
state would have come over a line of 8 Mbit a second. The headline is the bytes of 100 missed rounds over the state's,
at 1,240,000 entries.
"""

import argparse
import json
import time

import numpy as np
import torch

from meerkat.algorithm import path
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.rounds import RoundPlan, Update
from meerkat.federation.catch_up import RecentRounds
from meerkat.federation.frames import Closed

MASKS = (553, 6_000, 1_240_000)


def measured(entries: int, rounds: int) -> dict[str, float]:
    """Bytes and seconds for one mask."""
    z, theta = Directions(1, entries), torch.zeros(entries)
    aggregate = np.ones((1, 1), "f4")
    began = time.perf_counter()
    for number in range(rounds):
        plan = RoundPlan(number, 1e-3, 1e-3, 1, {0: 1})
        theta = path.moved(theta, Update(plan, aggregate), z)
        path.digest(theta)
    each = (time.perf_counter() - began) / rounds
    closed, recent = Closed(1e-3, 1.0, aggregate, True), RecentRounds(4 * entries, 0, bytes(32))
    while recent.shorter_than_state(0) and recent.round < 1_000_000:
        recent.add(closed, frozenset(), bytes(32), each)
    return {
        "entries": entries,
        "round_bytes": len(closed.encode()),
        "state_bytes": 4 * entries,
        "follow_ms": 1e3 * each,
        "told_rounds": recent.round - 1,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    rows = [measured(entries, given.rounds) for entries in MASKS]
    result = {
        "name": "catch_up",
        "ratio": 100 * rows[-1]["round_bytes"] / rows[-1]["state_bytes"],
        "masks": rows,
        "measured_on": f"T = 1, P = 1, FedAvg, {given.rounds} rounds each",
    }
    if given.json:
        print(json.dumps(result))
        return
    for row in rows:
        print(
            f"{row['entries']:>9,} entries: a missed round {row['round_bytes']} bytes and {row['follow_ms']:.2f} ms to "
            f"follow, the state {row['state_bytes']:,} bytes; up to {row['told_rounds']:,} rounds are told"
        )


if __name__ == "__main__":
    main()
