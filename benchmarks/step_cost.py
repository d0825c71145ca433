"""Time of a whole Meerkat step over the time of its two forward passes alone; a literal MeZO step beside it.

    python benchmarks/step_cost.py [--json]

All three run in turn on the same batch in this process; a figure is the median of the per-turn ratios.
The step makes its direction anew each time, writes theta +- eps z, restores theta and descends.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from meerkat.algorithm.client import local_steps
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.masks.baselines import random_mask

ROWS, LENGTH, EPS, LR = 16, 64, 1e-3, 1e-6


def llama(hidden: int = 448, layers: int = 8, vocabulary: int = 8192) -> LlamaForCausalLM:
    """A random Llama, of some 23M parameters unless told otherwise."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def batch_loss(model: LlamaForCausalLM) -> Callable[[], Tensor]:
    """The mean loss of one random batch: a forward pass."""
    tokens = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH))
    targets = torch.randint(0, model.config.vocab_size, (ROWS,))

    @torch.no_grad()
    def loss() -> Tensor:
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
        return nn.functional.cross_entropy(logits.float(), targets)

    return loss


def local_step(masked: MaskedModel, loss: Callable[[], Tensor]) -> Callable[[int], None]:
    """A client's whole Meerkat step, of the round of the number given."""
    directions, theta = Directions(1, len(masked.mask), masked.device), masked.read()

    def step(number: int) -> None:
        local_steps(masked, theta, RoundPlan(number, LR, EPS, 1, {0: 1}), 0, lambda _: loss, directions)

    return step


def mezo_step(model: nn.Module, loss: Callable[[], Tensor], seed: int) -> None:
    """MeZO as published (Malladi et al. 2023, algorithm 1): four passes over all parameters, z made anew in each."""

    def perturb(scale: float) -> None:
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        for parameter in model.parameters():
            z = torch.empty_like(parameter).normal_(generator=generator)
            parameter.data.add_(z, alpha=scale)

    perturb(EPS)
    plus = loss()
    perturb(-2 * EPS)
    minus = loss()
    perturb(EPS)
    g = float((plus - minus) / (2 * EPS))
    perturb(-LR * g)


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    work()
    return clock() - began


def asked(doc: str) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repeats", type=int, default=15)
    return parser.parse_args()


def main() -> None:
    arguments = asked(__doc__)
    model = llama()
    loss = batch_loss(model)
    masked = MaskedModel(model, random_mask(model, 1e-3))
    meerkat_step = local_step(masked, loss)

    def passes() -> None:
        loss()
        loss()

    passes()
    meerkat_step(0)
    times = [
        (seconds(passes), seconds(lambda: meerkat_step(n)), seconds(lambda: mezo_step(model, loss, n)))  # noqa: B023
        for n in range(1, arguments.repeats + 1)
    ]
    ratios = [step / alone for alone, step, _ in times]
    mezo = [step / alone for alone, _, step in times]
    parameters = sum(p.numel() for p in model.parameters())
    result = {
        "name": "step_cost",
        "ratio": round(statistics.median(ratios), 4),
        "spread": [round(min(ratios), 4), round(max(ratios), 4)],
        "mezo_ratio": round(statistics.median(mezo), 4),
        "mezo_spread": [round(min(mezo), 4), round(max(mezo), 4)],
        "measured_on": f"random Llama, {parameters:,} parameters, {len(masked.mask):,} moving, "
        f"batch {ROWS} x {LENGTH}, {torch.get_num_threads()} threads, {arguments.repeats} repeats",
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"one Meerkat step takes {result['ratio']} times its two forward passes (spread {result['spread']})")
        print(f"one MeZO step takes    {result['mezo_ratio']} times as much (spread {result['mezo_spread']})")
        print(result["measured_on"])


if __name__ == "__main__":
    main()
