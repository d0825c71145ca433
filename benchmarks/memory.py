"""Peak memory, each case in a process of its own, on a random Llama of 100M+ parameters.

    python benchmarks/memory.py [--json]

inference      scoring one batch                         step       a Meerkat step on the same batch
mask           the sensitivity mask's two passes         K clients  a round of K clients, Meerkat and full-FedZO
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_cost import llama
from torch import Tensor, nn

from meerkat.algorithm.client import local_steps
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.server import ServerConfig, ServerState, close_round, open_round
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.masks.baselines import full_mask, random_mask
from meerkat.masks.sensitivity import sensitivity_mask
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.causal_lm import language_modelling_loss
from meerkat.problems.classification import Classification
from meerkat.problems.partition import ClientRows, partition
from meerkat.problems.problem import client_losses
from meerkat.problems.tasks import Candidate, Example
from meerkat.run.local_engine import LocalEngine

ROWS, LENGTH = 16, 64
SHORT, TOGETHER = 8, 10
"""Tokens a row, and rows in a forward pass, of the many clients' batches: enough to see what a client costs."""
CASES = ["load", "inference", "step", "mask", "meerkat-10", "meerkat-1000", "full-10", "full-1000"]


def row_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """The last token's loss in each row: float32 [rows]."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False, logits_to_keep=1).logits[:, -1]
    return nn.functional.cross_entropy(logits.float(), tokens[:, -1], reduction="none")


def federation(model: Any, mask: SparseMask, clients: int) -> None:
    """One round of the engine, every client a row of its own, with two labels of one token."""
    masked = MaskedModel(model, mask)
    rows = torch.randint(0, model.config.vocab_size, (clients, SHORT)).numpy()
    candidates = tuple(Candidate(0, SHORT - 1, np.array([token])) for token in (5, 6))
    examples = [Example((row,), candidates, label=k % 2) for k, row in enumerate(rows)]
    split = partition("iid", [{"label": example.label} for example in examples], clients, seed=0)
    holders = [ClientRows(k, of_client, 1, seed=0) for k, of_client in enumerate(split.rows)]
    engine = LocalEngine(
        masked,
        Directions(1, len(mask)),
        batch_of=lambda client, step: holders[client].batch(step),
        losses_of=client_losses(Classification(model, sequences_per_pass=TOGETHER), examples),
    )
    settings = ServerConfig(1, 1, 1, 1e-6, 1e-3, clients, clients, dict.fromkeys(range(clients), 1))
    state = ServerState(Replica(0, masked.read()))
    plan = open_round(state, settings)
    close_round(state, plan, engine.run(state, plan), settings, engine.directions)


def work(case: str, model: Any) -> None:
    tokens = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH))
    name, _, clients = case.partition("-")
    if case == "inference":
        with torch.no_grad():
            row_losses(model, tokens)
    elif case == "step":
        masked = MaskedModel(model, random_mask(model, 1e-3))
        plan = RoundPlan(0, 1e-6, 1e-3, 1, {0: 1})

        def loss() -> Tensor:
            return row_losses(model, tokens).mean()

        local_steps(masked, masked.read(), plan, 0, lambda _: loss, Directions(1, len(masked.mask)))
    elif case == "mask":
        sensitivity_mask(model, list(tokens[:4]), language_modelling_loss(model))
    elif clients:
        mask = full_mask(model) if name == "full" else random_mask(model, 1e-3)
        federation(model, mask, int(clients))


def peak_mb(case: str) -> None:
    """Print the most memory that one case has resident after the model stands, in MiB."""
    torch.set_num_threads(1)
    model = llama(hidden=768, layers=12, vocabulary=32000)
    with torch.no_grad():
        row_losses(model, torch.zeros(1, 4, dtype=torch.int64))  # what the libraries need for a first pass
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of building the model, is forgotten
    work(case, model)
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024, sum(p.numel() for p in model.parameters()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        peak_mb(arguments.case)
        return
    peaks: dict[str, float] = {}
    for case in CASES:
        ran = subprocess.run(
            [sys.executable, __file__, "--case", case], capture_output=True, text=True, check=True, env=os.environ
        )
        peak, parameters = ran.stdout.split()
        peaks[case] = round(float(peak), 1)
    weights = int(parameters) * 4 / 2**20
    largest = 768 * 32000 * 4 / 2**20
    result = {
        "name": "memory",
        "ratio": round(peaks["step"] / peaks["inference"], 4),
        "clients_1000_over_10": round(peaks["meerkat-1000"] / peaks["meerkat-10"], 4),
        "clients_1000_over_10_full": round(peaks["full-1000"] / peaks["full-10"], 4),
        "mask_mb_beyond_weights_and_accumulator": round(peaks["mask"] - peaks["load"] - weights, 1),
        "largest_gradient_mb": round(largest, 1),
        "peak_mb": peaks,
        "measured_on": f"random Llama, {int(parameters):,} float32 parameters = {weights:.0f} MiB, one process a case",
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        for case, peak in peaks.items():
            print(f"{peak:9.1f} MiB  {case}")
        print(f"a Meerkat step over inference: {result['ratio']}")
        print(
            f"1,000 clients over 10: {result['clients_1000_over_10']}, full-FedZO {result['clients_1000_over_10_full']}"
        )
        print(
            f"the mask needs the weights, as much again, and {result['mask_mb_beyond_weights_and_accumulator']} MiB; "
            f"the largest tensor's gradient is {largest:.0f} MiB"
        )
        print(result["measured_on"])


if __name__ == "__main__":
    main()
