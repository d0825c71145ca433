"""What a step costs beside other methods' steps, and how fast tokens go through beside other inference engines.

    python benchmarks/peers.py [--json] [--model DIR] [--dtype bfloat16] [--threads N] [--gguf FILE]

One model, one batch of random tokens, one loss: the cross-entropy of two candidate tokens, read where the label stands.
All take turns in this process; a figure is the median of the turns' ratios to the model's own two forward passes.

meerkat          a client's whole step, 0.1% of the parameters moving: z made anew, theta restored, one update
mezo             Malladi et al. 2023, algorithm 1: four passes over all parameters in place, z from its seed in each
dense_z          DeComFL (Li et al. 2025), central differences: one vector z of the model's length, added, taken away
                 and put back, then the update
lora             zeroth order on LoRA's adapters (PEFT, r = 8): the forward passes go through them too
backpropagation  forward, backward and SGD over all parameters

The peers are these formulas alone: no trainer, no optimiser state, no bookkeeping, which theirs would add. They update
the weights themselves, by so little that they stay in working order; losses are not compared. Peak memory is each
case's own process, over inference. Engines (engines.py) read the same tokens' last logits; those that are not
installed are left out.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import engines
from step_cost import EPS, LR, llama, local_step, mezo_step, seconds
from torch import Tensor, nn

from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.masks.lora import add_lora, lora_mask
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.causal_lm import vocabulary
from meerkat.problems.classification import Classification
from meerkat.problems.models import load_model
from meerkat.problems.problem import client_losses
from meerkat.problems.tasks import Candidate, Example

Loss = Callable[[], Tensor]
Step = Callable[[int], object]
"""One step, of the number given."""


def random_rows(words: int, rows: int, length: int) -> np.ndarray:
    """Token ids of a vocabulary of so many words: int64 [rows, length]."""
    return np.random.default_rng(0).integers(words, size=(rows, length))


def batch_loss(model: nn.Module, tokens: np.ndarray) -> Loss:
    """The mean loss of all rows, each with two labels of one token: one client's batch, as the engine lays it out."""
    candidates = tuple(Candidate(0, tokens.shape[1] - 1, np.array([token])) for token in (1, 2))
    examples = [Example((row,), candidates, label=k % 2) for k, row in enumerate(tokens)]
    losses = client_losses(Classification(model), examples)([np.arange(len(examples))])
    return lambda: losses()[0]


# --- the methods: model, loss -> a step -----------------------------------------------------------


def inference(_: nn.Module, loss: Loss) -> Step:
    """The two forward passes alone."""

    def step(_: int) -> None:
        with torch.no_grad():
            loss()
            loss()

    return step


def scattered(model: nn.Module, density: float = 1e-3) -> SparseMask:
    """So many entries of each tensor, drawn at random on its device. For timing alone: it has no fingerprint."""
    entries: dict[str, Tensor | None] = {
        name: torch.randint(p.numel(), (math.ceil(density * p.numel()),), device=p.device).unique()
        for name, p in model.named_parameters()
    }
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return SparseMask(entries, shapes, "", sum(p.numel() for p in model.parameters()), "random", density)


def meerkat(model: nn.Module, loss: Loss) -> Step:
    return local_step(MaskedModel(model, scattered(model)), loss)


def mezo(model: nn.Module, loss: Loss) -> Step:
    return lambda number: mezo_step(model, loss, number)


def dense_z(model: nn.Module, loss: Loss) -> Step:
    """w + mu z, w - mu z, w, w - lr g z, with z: [d] in the weights' type."""
    parameters = list(model.parameters())
    sizes = [parameter.numel() for parameter in parameters]

    def step(number: int) -> None:
        device, dtype = parameters[0].device, parameters[0].dtype
        z = torch.randn(sum(sizes), generator=torch.Generator(device).manual_seed(number), device=device, dtype=dtype)

        def move(scale: float) -> None:
            for parameter, part in zip(parameters, z.split(sizes), strict=True):
                parameter.data.add_(part.view_as(parameter), alpha=scale)

        move(EPS)
        plus = loss()
        move(-2 * EPS)
        minus = loss()
        move(EPS)
        move(-LR * float((plus - minus) / (2 * EPS)))

    return step


def lora(model: nn.Module, loss: Loss) -> Step:
    """Gives the model adapters, in place."""
    add_lora(model, seed=0)
    return local_step(MaskedModel(model, lora_mask(model)), loss)


def backpropagation(model: nn.Module, loss: Loss) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def step(_: int) -> None:
        model.requires_grad_(True)
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.requires_grad_(False)

    return step


METHODS: dict[str, Callable[[nn.Module, Loss], Step]] = {
    "inference": inference,
    "meerkat": meerkat,
    "mezo": mezo,
    "dense_z": dense_z,
    "lora": lora,
    "backpropagation": backpropagation,
}


# --- measuring ------------------------------------------------------------------------------------


def opened(arguments: argparse.Namespace) -> nn.Module:
    """A model of its own: the one that was given, or a random Llama of 23M parameters."""
    model = load_model(arguments.model)[0] if arguments.model else llama()
    return model.to(getattr(torch, arguments.dtype))


def peak_mb(arguments: argparse.Namespace) -> float:
    """The most memory that a second step of one method has resident, in MiB: nothing else runs in this process."""
    model = opened(arguments)
    loss = batch_loss(model, random_rows(vocabulary(model), arguments.rows, arguments.length))
    step = METHODS[arguments.case](model, loss)
    step(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of loading the model, is forgotten
    step(1)
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def peaks(names: Sequence[str]) -> dict[str, float]:
    """Each method's peak memory over inference, from a process each that is given this one's arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], "--case"]
    peak_of = {
        name: float(subprocess.run([*command, name], stdout=subprocess.PIPE, text=True, check=True).stdout)
        for name in names
    }
    return {name: round(peak / peak_of["inference"], 3) for name, peak in peak_of.items()}


@torch.no_grad()
def likeness(model: nn.Module, tokens: np.ndarray, logits: np.ndarray) -> float:
    """The correlation of an engine's logits with the model's own: both have done the same work."""
    own = model(input_ids=torch.from_numpy(tokens), use_cache=False, logits_to_keep=1).logits[:, -1].float()
    return round(float(np.corrcoef(own.numpy().ravel(), logits.ravel())[0, 1]), 4)


def in_turns(
    works: dict[str, Callable[[int], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each work, which take turns; the first turn warms up and is not told."""
    turns = [
        {name: seconds(partial(work, number), clock) for name, work in works.items()} for number in range(repeats + 1)
    ]
    return {name: [turn[name] for turn in turns[1:]] for name in works}


def over(times: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """The median of the turns' ratios and its range."""
    ratios = [mine / other for mine, other in zip(times, others, strict=True)]
    return {"ratio": round(statistics.median(ratios), 4), "spread": [round(min(ratios), 4), round(max(ratios), 4)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model", default="", help="folder of a Hugging Face model [default: a random Llama]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--gguf", type=Path, help="the same model as llama.cpp reads it")
    parser.add_argument("--methods", default=",".join(METHODS), help="beside inference and meerkat [default: all]")
    about = "CPU seconds in place of the clock's, where other programs take the CPU as well; with --threads 1"
    parser.add_argument("--cpu-time", action="store_true", help=about)
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--case", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.case:
        print(peak_mb(arguments))
        return

    model = opened(arguments)
    tokens = random_rows(vocabulary(model), arguments.rows, arguments.length)
    chosen = [name for name in METHODS if name in ("inference", "meerkat", *arguments.methods.split(","))]
    works = {}
    for name in chosen:
        mine = opened(arguments) if name == "lora" else model
        works[name] = METHODS[name](mine, batch_loss(mine, tokens))
    others = engines(lambda: opened(arguments), tokens, arguments.threads, arguments.gguf)
    alike = {name: likeness(model, tokens, read()) for name, read in others.items()}
    times = in_turns(
        {**works, **{name: lambda _, read=read: read() for name, read in others.items()}}, arguments.repeats, clock
    )
    methods = {name: over(times[name], times["inference"]) for name in chosen if name != "inference"}
    if not arguments.no_memory:
        for name, peak in peaks(chosen).items():
            methods.get(name, {})["memory"] = peak
    result = {
        "name": "peers",
        **methods["meerkat"],
        "methods": methods,
        "tokens_per_s": round(2 * tokens.size / statistics.median(times["meerkat"])),
        "engines": {
            name: {
                "tokens_per_s": round(tokens.size / statistics.median(times[name])),
                "likeness": alike[name],
                **over(times[name], [step / 2 for step in times["meerkat"]]),
            }
            for name in others
        },
        "measured_on": f"{Path(arguments.model).name or 'random Llama'}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {arguments.dtype}, batch {arguments.rows} x "
        f"{arguments.length}, {arguments.threads} threads, {arguments.repeats} repeats, "
        f"{'CPU' if arguments.cpu_time else 'clock'} seconds",
    }
    if arguments.json:
        print(json.dumps(result))
        return
    for name, figures in methods.items():
        memory = f", memory {figures['memory']} times inference" if "memory" in figures else ""
        print(f"{name:16} {figures['ratio']} times two forward passes (spread {figures['spread']}){memory}")
    print(f"a Meerkat step forwards {result['tokens_per_s']:,} tokens a second, both passes counted")
    for name, figures in result["engines"].items():
        ours = f"ours over it {figures['ratio']} (spread {figures['spread']}), logits alike {figures['likeness']}"
        print(f"{name:16} {figures['tokens_per_s']:,} tokens a second; {ours}")
    print(result["measured_on"])


if __name__ == "__main__":
    main()
