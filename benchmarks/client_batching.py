"""Time of a T = 1 round of ten clients over that of their 20 separate padded forward passes.

    python benchmarks/client_batching.py [--json] [--model DIR] [--data DIR]

The round is the engine's, whole: batches laid out, weights written, two passes, scalars. The separate
passes are timed alone, on batches laid out before. Both in turn, the same rows, in this process.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from meerkat.algorithm.directions import Directions
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.server import ServerState
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.masks.baselines import random_mask
from meerkat.problems.causal_lm import TOKENS_PER_PASS, collate, row_losses
from meerkat.problems.classification import Classification
from meerkat.problems.data import load_rows
from meerkat.problems.models import load_model
from meerkat.problems.partition import ClientRows, partition
from meerkat.problems.problem import client_losses
from meerkat.problems.tasks import encode, load_task
from meerkat.run.local_engine import LocalEngine

SHARED = Path(__file__).parents[2] / "shared"
CLIENTS, ROWS = 10, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model", default=str(SHARED / "models" / "imdb-6m"))
    parser.add_argument("--data", default=str(SHARED / "data" / "sst2_original"))
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=TOKENS_PER_PASS["cpu"], help="padded tokens in one pass")
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model)
    rows = load_rows(arguments.data, "train")
    examples = encode(load_task(arguments.task), rows, tokenizer, 512)
    held = partition("dirichlet:0.5", rows, CLIENTS, seed=1).rows
    clients = [ClientRows(k, of_client, ROWS, seed=0) for k, of_client in enumerate(held)]

    masked = MaskedModel(model, random_mask(model, 1e-3))
    engine = LocalEngine(
        masked,
        Directions(1, len(masked.mask)),
        batch_of=lambda client, step: clients[client].batch(step),
        losses_of=client_losses(Classification(model, tokens_per_pass=arguments.tokens), examples),
    )
    theta = masked.read()
    ratios = []
    for number in range(arguments.repeats + 1):
        separate = [collate([examples[r] for r in c.batch(number)], sort=False) for c in clients]
        began = time.perf_counter()
        for batch in (*separate, *separate):
            row_losses(model, batch)
        middle = time.perf_counter()
        plan = RoundPlan(number, 1e-3, 1e-3, 1, dict.fromkeys(range(CLIENTS), 1))
        engine.run(ServerState(Replica(number, theta), dict.fromkeys(range(CLIENTS), number)), plan)
        ratios.append((time.perf_counter() - middle) / (middle - began))
    ratios = ratios[1:]  # the first one warms up
    result = {
        "name": "client_batching",
        "ratio": round(statistics.median(ratios), 4),
        "spread": [round(min(ratios), 4), round(max(ratios), 4)],
        "measured_on": f"{Path(arguments.model).name}, {CLIENTS} clients x {ROWS} rows of {Path(arguments.data).name}, "
        f"{arguments.tokens} tokens a pass, {torch.get_num_threads()} threads, {arguments.repeats} repeats",
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"a round takes {result['ratio']} times its 20 separate forward passes (spread {result['spread']})")
        print(result["measured_on"])


if __name__ == "__main__":
    main()
