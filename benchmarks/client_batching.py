"""Time of a T = 1 round of ten clients over that of their 20 separate padded forward passes in float32.

    python benchmarks/client_batching.py [--json] [--model DIR] [--data DIR] [--dtype bfloat16] [--one-by-one]

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
from meerkat.algorithm.precision import DTYPES, cast_
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.server import ServerState
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.masks.baselines import random_mask
from meerkat.problems.causal_lm import TOKENS_PER_PASS, collate, row_losses
from meerkat.problems.classification import Classification
from meerkat.problems.data import load_rows
from meerkat.problems.models import load_model
from meerkat.problems.packing import packs
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
    parser.add_argument("--tokens", type=int, default=TOKENS_PER_PASS["cpu"], help="tokens in one pass of the round")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the round's weights")
    parser.add_argument("--padded", action="store_true", help="pad the round's rows in place of packing them")
    parser.add_argument("--one-by-one", action="store_true", help="one client after another in the round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    plain, tokenizer = load_model(arguments.model)
    model, _ = load_model(arguments.model)
    cast_(model, DTYPES[arguments.dtype])
    packed = packs(model) and not arguments.padded
    rows = load_rows(arguments.data, "train")
    examples = encode(load_task(arguments.task), rows, tokenizer, 512)
    dealt = partition("dirichlet:0.5", rows, CLIENTS, seed=1).rows
    clients = [ClientRows(k, of_client, ROWS, seed=0) for k, of_client in enumerate(dealt)]

    masked = MaskedModel(model, random_mask(model, 1e-3))
    engine = LocalEngine(
        masked,
        Directions(1, len(masked.mask)),
        batch_of=lambda client, step: clients[client].batch(step),
        losses_of=client_losses(
            Classification(model, packed=packed, tokens_per_pass=0 if arguments.one_by_one else arguments.tokens),
            examples,
        ),
        together=not arguments.one_by_one,
    )
    theta = masked.read()
    ratios, speeds = [], []
    for number in range(arguments.repeats + 1):
        separate = [collate([examples[r] for r in c.batch(number)], sort=False) for c in clients]
        began = time.perf_counter()
        for batch in (*separate, *separate):
            row_losses(plain, batch)
        middle = time.perf_counter()
        plan = RoundPlan(number, 1e-3, 1e-3, 1, dict.fromkeys(range(CLIENTS), 1))
        engine.run(ServerState(Replica(number, theta), dict.fromkeys(range(CLIENTS), number)), plan)
        taken = time.perf_counter() - middle
        ratios.append(taken / (middle - began))
        tokens = sum(len(sequence) for c in clients for r in c.batch(number) for sequence in examples[r].sequences)
        speeds.append(2 * tokens / taken)
    ratios, speeds = ratios[1:], speeds[1:]  # the first one warms up
    result = {
        "name": "client_batching",
        "ratio": round(statistics.median(ratios), 4),
        "spread": [round(min(ratios), 4), round(max(ratios), 4)],
        "tokens_per_second": round(statistics.median(speeds)),
        "measured_on": f"{Path(arguments.model).name}, {CLIENTS} clients x {ROWS} rows of {Path(arguments.data).name}, "
        f"{arguments.dtype}, {'packed' if packed else 'padded'}, "
        f"{'one by one' if arguments.one_by_one else f'{arguments.tokens} tokens a pass'}, "
        f"{arguments.threads} threads, {arguments.repeats} repeats",
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"a round takes {result['ratio']} times its 20 separate forward passes (spread {result['spread']}),")
        print(f"{result['tokens_per_second']} tokens a second, both passes counted and padding not")
        print(result["measured_on"])


if __name__ == "__main__":
    main()
