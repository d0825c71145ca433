"""Rounds shared by several processes, against the best of one: seconds, in turns, on the same plan.

    python benchmarks/workers.py [--workers 2] [--repeats 5] [--json] [-- --SETTING VALUE ...]

What follows -- are settings of a run, as `meerkat simulate` takes them. With --batching off and auto, each turn makes
the clients' steps of the first round three times: by one process on one thread, by one on as many threads as there are
workers, and by the workers on one thread each. With --batching off these must reply as one thread does, bit for bit.
Loading, mask, evaluations and the round's close are not in it. The ratio is the workers' better time over the best of
one process.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from meerkat.algorithm.replies import Scalars
from meerkat.algorithm.rounds import pack
from meerkat.algorithm.server import open_round
from meerkat.cli import build_parser
from meerkat.cli.parser import given_settings
from meerkat.cli.workers import sharing
from meerkat.errors import MeerkatError
from meerkat.problems.problem import client_losses
from meerkat.run.run import begin, carry_on
from meerkat.run.setup import open_problem, resolve
from meerkat.run.shared_engine import SharedEngine
from meerkat.run.simulation import honest_clients
from meerkat.run.split import Split
from meerkat.settings.config import RunConfig, make_config


def measure(config: RunConfig, workers: int, repeats: int, out: Path) -> dict[str, list[float]]:
    """Seconds of each way, turn by turn, after one that warms up."""
    config = resolve(config)
    with sharing(workers) as ranks:
        assert ranks is not None
        problem = open_problem(config)
        split = Split.of(config, problem)
        folder = begin(config, out, problem, split.sizes)
        with carry_on(folder, problem, data=split.digest, examples=split.sizes) as run:
            ranks.tell({"folder": str(out), "records": 1})
            losses_of = client_losses(problem, split.examples, config.dp)
            alone = honest_clients(config, run.model, run.directions, split, losses_of)
            plan = open_round(run.state, run.settings)
            ways: dict[str, tuple[int, Any]] = {
                "1 process, 1 thread": (1, alone),
                f"1 process, {workers} threads": (workers, alone),
                f"{workers} workers, 1 thread each": (1, SharedEngine(alone, ranks)),
            }
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(repeats + 1):
                replies = []
                for way, (threads, engine) in ways.items():
                    torch.set_num_threads(threads)
                    began = time.perf_counter()
                    made = engine.run(run.state, plan)
                    seconds[way].append(time.perf_counter() - began)
                    replies.append([pack(reply.scalars) for reply in made if isinstance(reply, Scalars)])
                if config.batching == "off" and replies[0] != replies[-1]:
                    raise MeerkatError("the workers' replies are not those of one process")
    return {way: times[1:] for way, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("settings", nargs="*", help="settings of the run, after --")
    arguments = parser.parse_args()
    given = given_settings(build_parser().parse_args(["simulate", *arguments.settings])) | {"threads": "1"}
    seconds: dict[str, list[float]] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for batching in ("off", "auto"):
                config = make_config(given | {"batching": batching})
                by_way = measure(config, arguments.workers, arguments.repeats, Path(folder) / batching)
                seconds |= {f"{way}, batching {batching}": times for way, times in by_way.items()}
    except MeerkatError as error:
        sys.exit(f"workers: {error}")
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    best = [min(medians[way] for way in medians if kind in way) for kind in ("process", "workers")]
    result = {
        "name": "workers",
        "ratio": round(best[1] / best[0], 4),
        "seconds": {way: [round(each, 4) for each in times] for way, times in seconds.items()},
        "measured_on": f"{Path(config.model).name}, {config.clients} clients, T = {config.local_steps}, "
        f"{config.batch_size} rows, {arguments.repeats} repeats",
    }
    if arguments.json:
        print(json.dumps(result))
        return
    for way, times in seconds.items():
        print(f"{way:<40} {medians[way]:7.3f} s ({min(times):.3f} to {max(times):.3f})")
    print(f"workers over the best of one process: {result['ratio']}; {result['measured_on']}")


if __name__ == "__main__":
    main()
