"""How far clients' local models drift apart in a round, rebuilt from a run's log.

    python benchmarks/drift.py [--json] RUN ...

RUN is a run folder whose clients send scalars of the plain estimator. Its figure is the root of
sum_k p_k |x_k - m|^2 over |m - x|^2, each summed over rounds: x is the model that a round begins with, x_k that of
client k at its end, and m = sum_k p_k x_k, which plain averaging makes the next model. 0 means that all clients go the
same way, 1 that they end as far from their mean as it has moved.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from meerkat.algorithm.directions import Directions
from meerkat.algorithm.rounds import RoundRecord
from meerkat.errors import MeerkatError
from meerkat.masks.sparse_mask import SparseMask
from meerkat.record.run_log import LogReader


def drift(run: Path) -> tuple[float, int]:
    """The figure of one run, and its longest round's number of local steps.

    Raises:
        MeerkatError: it is no such run folder.
    """
    records = iter(LogReader(run / "rounds.log"))
    if (opening := next(records, None)) is None:
        raise MeerkatError(f"'{run}': is no run folder; give folders with a rounds.log, as meerkat simulate makes them")
    if opening["estimator"] != "plain":
        raise MeerkatError(f"'{run}': has the estimator {opening['estimator']}; drift can be rebuilt for plain alone")
    directions = Directions(int(opening["run_key"], 16), len(SparseMask.load(run / "mask.safetensors")))
    apart, moved, longest = 0.0, 0.0, 0
    for values in records:
        if values["kind"] == "round":
            record = RoundRecord.from_json(values)
            if record.unkept:
                raise MeerkatError(
                    f"'{run}': its log has no client's scalars; give a run whose clients send them openly"
                )
            weights = torch.tensor(list(record.weights.values()), dtype=torch.float64)
            offsets = local_offsets(record, directions)
            mean = weights @ offsets
            apart += float(weights @ (offsets - mean).square().sum(1))
            moved += float(mean.square().sum())
            longest = max(longest, record.plan.longest)
    return float(np.sqrt(apart / moved)), longest


def local_offsets(record: RoundRecord, directions: Directions) -> torch.Tensor:
    """x_k - x of every client that replied, in the order of its weights: float64 [clients, n]."""
    offsets = torch.zeros(len(record.weights), directions.count, dtype=torch.float64)
    for step in range(record.plan.longest):
        for p, z in enumerate(record.plan.along(step, directions)):
            scalars = [float(g[step, p]) if step < len(g) else 0.0 for g in record.scalars.values()]
            offsets -= float(record.plan.rate) * torch.outer(torch.tensor(scalars, dtype=torch.float64), z.double())
    return offsets


def main() -> None:
    """Print every run's figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        figures = {run.name: drift(run) for run in arguments.runs}
    except MeerkatError as error:
        parser.exit(2, f"drift: {error}\n")
    if arguments.json:
        ratios = [ratio for ratio, _ in figures.values()]
        headline = {"name": "drift", "ratio": ratios[0], "spread": [min(ratios), max(ratios)]}
        print(json.dumps({**headline, "runs": figures, "measured_on": f"{len(figures)} runs"}))
        return
    for name, (ratio, longest) in figures.items():
        print(f"{name}: {ratio:.2f} over rounds of {longest} local steps")


if __name__ == "__main__":
    main()
