"""Rounds by several processes, against the best of one: seconds a round, side by side, in turns.

    python benchmarks/workers.py [--workers 2] [--repeats 3] [--local-steps 1,10] [--json] [-- --SETTING VALUE ...]

What follows -- are settings of the run, as `meerkat simulate` takes them. Each turn makes the same run four ways: one
process on one thread, one on as many as there are workers with and without --batching, and the workers on one thread
each. A round's time is the median of `wall_s` in metrics.jsonl without the first round; mask, loading and evaluations
are not in it. Digests of the first and the last way must be equal.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS = 11


def run(settings: list[str], out: Path) -> tuple[float, str]:
    """Make a run; its median seconds a round after the first, and its digest."""
    command = [sys.executable, "-m", "meerkat", "simulate", *settings, "--out", str(out), "--json"]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        sys.exit(f"workers: {made.stderr.splitlines()[-1]}")
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [metric["wall_s"] for metric in metrics if metric["kind"] == "round"][1:]
    return statistics.median(seconds), json.loads(made.stdout)["theta_digest"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--local-steps", default="1,10")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("settings", nargs="*", help="settings of the run, after --")
    arguments = parser.parse_args()
    n = str(arguments.workers)
    ways = {
        "1 process, 1 thread": ("--threads", "1", "--batching", "off"),
        f"1 process, {n} threads": ("--threads", n, "--batching", "off"),
        f"1 process, {n} threads, batching": ("--threads", n, "--batching", "auto"),
        f"{n} workers, 1 thread each, batching": ("--threads", "1", "--batching", "auto", "--workers", n),
        f"{n} workers, 1 thread each": ("--threads", "1", "--batching", "off", "--workers", n),
    }
    results = []
    for steps in arguments.local_steps.split(","):
        common = [*arguments.settings, "--local-steps", steps, "--rounds", str(arguments.rounds), "--eval-every", "0"]
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        digests: dict[str, set[str]] = {way: set() for way in ways}
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(arguments.repeats):
                for number, (way, flags) in enumerate(ways.items()):
                    took, digest = run([*common, *flags], Path(folder) / f"{turn}-{number}")
                    seconds[way].append(took)
                    digests[way].add(digest)
        first, *_, last = digests.values()
        best = min(statistics.median(times) for way, times in seconds.items() if way.startswith("1 "))
        for way, times in seconds.items():
            ratio = statistics.median(times) / best
            results.append({"local_steps": int(steps), "way": way, "round_s": times, "over_best_of_one": ratio})
            if not arguments.json:
                spread = f"{min(times):.3f} to {max(times):.3f}"
                print(f"T = {steps:>2}  {way:<40} {statistics.median(times):7.3f} s ({spread})  {ratio:.2f}")
        if first != last:
            sys.exit("workers: digests differ")
    if arguments.json:
        print(json.dumps({"workers": arguments.workers, "results": results}))


if __name__ == "__main__":
    main()
