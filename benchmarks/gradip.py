"""GradIP of every client from one dot product a step: what more clients cost.

    python benchmarks/gradip.py [--json] [--plot FILE.png]

A hundred steps of a mask of 1,240,000 entries (0.1% of 1.24 billion), directions made anew. The headline is
the whole work for 100,000 clients over that for 10. Beside it the literal way, which rebuilds each client's
gradient vector g z and takes its inner product: n multiplications a client a step.
"""

import argparse
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch

from meerkat.algorithm.directions import Directions
from meerkat.algorithm.gradip import gradip, inner_products
from meerkat.algorithm.rounds import RoundPlan

ENTRIES, STEPS = 1_240_000, 100
CLIENTS = (10, 1_000, 100_000)


def measured(clients: int, gradient: torch.Tensor, directions: Directions) -> dict[str, float]:
    """Seconds and bytes for the scalars of so many clients."""
    plan = RoundPlan(0, 1e-3, 1e-3, 1, {0: STEPS}, "calibration")
    scalars = np.random.default_rng(clients).normal(size=(clients, STEPS, 1)).astype(np.float32)
    began = time.perf_counter()
    inner = inner_products(gradient, plan, directions)
    once = time.perf_counter() - began
    tracemalloc.start()
    began = time.perf_counter()
    traces = gradip(scalars, inner)
    each = time.perf_counter() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    z = directions(plan.place(STEPS - 1, 0))
    assert np.isclose(traces[0, -1], (gradient.double() * (scalars[0, -1, 0] * z.double())).sum().item())
    return {"clients": clients, "once_s": once, "each_ns": each / clients / STEPS * 1e9, "all_s": each, "peak": peak}


def literal(gradient: torch.Tensor, directions: Directions) -> float:
    """Nanoseconds a client a step when the gradient vector is rebuilt, with z at hand."""
    z, repeats = directions(RoundPlan(0, 1e-3, 1e-3, 1, {0: 1}).place(0, 0)), 20
    began = time.perf_counter()
    for g in range(repeats):
        (gradient * (z * float(g))).sum().item()
    return (time.perf_counter() - began) / repeats * 1e9


def plot(rows: list[dict[str, float]], literal_ns: float, to: Path) -> None:
    """Time against clients, both ways."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    clients = [row["clients"] for row in rows]
    axis.loglog(clients, [row["once_s"] + row["all_s"] for row in rows], "o-", label="one dot product a step, then g c")
    axis.loglog(clients, [row["all_s"] for row in rows], "o--", label="of that: all clients' products g c")
    rebuilt = [rows[0]["once_s"] + literal_ns * 1e-9 * STEPS * k for k in clients]
    axis.loglog(clients, rebuilt, ":", color="grey", label="rebuilding every gradient (extrapolated)")
    axis.set(xlabel="clients", ylabel="seconds", title=f"GradIP of {STEPS} steps, n = {ENTRIES:,}")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(to, dpi=150)


def main() -> None:
    """Measure, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    directions = Directions(1, ENTRIES)
    gradient = torch.from_numpy(np.random.default_rng(0).normal(size=ENTRIES).astype(np.float32))
    turns = [[measured(k, gradient, directions) for k in CLIENTS] for _ in range(arguments.repeats)]
    ratios = [(turn[-1]["once_s"] + turn[-1]["all_s"]) / (turn[0]["once_s"] + turn[0]["all_s"]) for turn in turns]
    rows = [
        {name: float(np.median([row[name] for row in same])) for name in same[0]} for same in zip(*turns, strict=True)
    ]
    rebuilt = literal(gradient, directions)
    result = {
        "name": "gradip",
        "ratio": round(float(np.median(ratios)), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "literal_over_ours_per_client": round(rebuilt / rows[-1]["each_ns"]),
        "rows": rows,
        "measured_on": f"n = {ENTRIES:,}, {STEPS} steps, {torch.get_num_threads()} threads, "
        f"{arguments.repeats} repeats",
    }
    if arguments.plot:
        plot(rows, rebuilt, arguments.plot)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"100,000 clients cost {result['ratio']} times what 10 do (spread {result['spread']})")
    for row in rows:
        print(
            f"  {row['clients']:>9,.0f} clients: {row['once_s']:.2f} s for the dot products, then "
            f"{row['each_ns']:.1f} ns a client and step, {row['peak'] / 2**20:.1f} MiB"
        )
    times = result["literal_over_ours_per_client"]
    print(f"  rebuilding a client's gradient: {rebuilt:,.0f} ns a step, {times:,} times as much")
    print(result["measured_on"])


if __name__ == "__main__":
    main()
