"""Everything worth knowing of a GPU, in one call of under ten minutes.

    python benchmarks/gpu.py --out gpu.json [--model DIR --data DIR --text FILE] [--minutes 9]
    python benchmarks/gpu.py --out tiny.json --device cpu --shapes tiny       # the same on a CPU, in seconds

bits      z, theta and weights on the device against the CPU's, and a whole run that the CPU then verifies
shapes    random models of well-known shapes, bfloat16, 16 rows of 64 tokens: what peers.py measures of a step, peak
          memory over inference, a round of ten clients over its 20 separate padded passes, and the server's part: a
          client's path rebuilt, and GradIP
accuracy  with a model's folder, a folder that holds sst2 and boolq, and public text: 300 local steps of each client at
          T = 1 and 10, of Meerkat, all parameters, LoRA, the largest weights and random ones; each at its best rate, by
          the comparisons' own search on held-back rows

The most important comes first. Results are in --out as soon as they are there; what the time does not reach is left
out, and the same command again goes on with the accuracy runs, whose folders stand beside --out.
"""

import argparse
import json
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peers import METHODS, batch_loss, in_turns, over, random_rows, scattered
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

from meerkat.algorithm import path
from meerkat.algorithm.directions import Directions, Place
from meerkat.algorithm.gradip import inner_products
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.server import ServerState
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.comparison.cells import cell_name, run_cell
from meerkat.comparison.learning_rates import best_rate, search_rates
from meerkat.comparison.studies import Search
from meerkat.errors import MeerkatError
from meerkat.masks.baselines import random_mask
from meerkat.problems.causal_lm import TOKENS_PER_PASS, collate, row_losses
from meerkat.problems.classification import Classification
from meerkat.problems.problem import client_losses
from meerkat.problems.tasks import Candidate, Example
from meerkat.record.verification import verify
from meerkat.run.local_engine import LocalEngine
from meerkat.run.mask import make_mask
from meerkat.run.setup import open_problem, resolve
from meerkat.run.simulation import simulate
from meerkat.settings.config import RunConfig, make_config

CLIENTS, ROWS, LENGTH, REPEATS = 10, 16, 64, 5

SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "Llama-3.2-1B": (
        LlamaConfig,
        {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    ),
    "Qwen2-1.5B": (
        Qwen2Config,
        {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
        | {"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "Gemma-2-2B": (
        Gemma2Config,
        {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
    ),
    "Llama-2-7B": (
        LlamaConfig,
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False},
    ),
    "tiny": (
        LlamaConfig,
        {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
}

ACCURACY = [
    (task, steps, method)
    for steps in (1, 10)
    for task in ("sst2", "boolq")
    for method in ("meerkat", "full-fedzo", "lora-fedzo", "random-mask", "weight-magnitude")
]
"""The most important first."""
SEARCH = Search.model_validate({"held_back": 0.1, "rounds": 1 / 3, "factor": 3.0, "trials": 4})


# --- bits -----------------------------------------------------------------------------------------


def bits(device: str) -> dict[str, bool]:
    """What is the same to the last bit on the device and on the CPU."""
    plan, n = RoundPlan(3, 1e-2, 1e-3, 2, {0: 50}), 1_000_003
    scalars = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    z, ends, weights = [], [], []
    for where in ("cpu", device):
        directions = Directions(7, n, where)
        z.append(directions(Place("training", 5, 2, 1)).cpu())
        theta = torch.linspace(-1, 1, n).to(where)
        *_, end = path.walk(theta, plan, scalars, directions)
        ends.append(path.digest(end))
        layer = nn.Linear(1003, 997, bias=False, dtype=torch.bfloat16).requires_grad_(False).to(where)
        layer.weight.zero_()
        masked = MaskedModel(layer, random_mask(layer, 1e-3))
        masked.write_(end[: len(masked.mask)])
        weights.append(layer.weight.cpu())
    with tempfile.TemporaryDirectory() as folder:
        config = make_config({"device": device, "rounds": 5, "eval_every": 0, "local_steps": 2, "directions": 2})
        told = simulate(config, Path(folder) / "run")["theta_digest"]
        replayed = path.digest(verify(Path(folder) / "run").theta)
    return {
        "z": torch.equal(*z),
        "theta after 100 updates": ends[0] == ends[1],
        "bfloat16 weights written from theta": torch.equal(*weights),
        "a run's digest, replayed on the CPU": told == replayed,
    }


# --- random models --------------------------------------------------------------------------------


def random_model(name: str, device: str) -> Any:
    """A model of that shape, bfloat16, initialised on the device."""
    kind, sizes = SHAPES[name]
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(kind(**sizes), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def synchronised(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def peak_mb(work: Callable[[], object], device: str) -> float | None:
    """The most memory that the device has given out meanwhile, in MiB; unknown on a CPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def steps(model: Any, device: str) -> dict[str, Any]:
    """Each method's step over the model's two forward passes, in time and in peak memory; none is changed by PEFT."""
    loss, wait = batch_loss(model, random_rows(model.config.vocab_size, ROWS, LENGTH)), synchronised(device)
    works: dict[str, Callable[[int], object]] = {}
    peaks = {}
    for name in METHODS:
        if name == "lora":
            continue
        step = METHODS[name](model, loss)
        try:
            step(0)
            peaks[name] = peak_mb(partial(step, 1), device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        works[name] = lambda number, step=step: (step(number), wait())
    times = in_turns(works, REPEATS)
    return {
        "forward_ms": round(500 * statistics.median(times["inference"]), 2),
        "tokens_per_s": round(2 * ROWS * LENGTH / statistics.median(times["meerkat"])),
        "inference_mb": peaks["inference"] and round(peaks["inference"]),
        **{
            name: {**over(times[name], times["inference"]), "memory": peaks[name] and peaks[name] / peaks["inference"]}
            if name in works
            else None
            for name in METHODS
            if name not in ("inference", "lora")
        },
    }


def round_of_ten(model: Any, device: str) -> dict[str, Any]:
    """A T = 1 round of ten clients, rows of 8 to 64 tokens, over its 20 separate padded passes: see client_batching."""
    rng = np.random.default_rng(0)
    examples = []
    for number, length in enumerate(rng.integers(8, LENGTH + 1, CLIENTS * ROWS)):
        candidates = tuple(Candidate(0, int(length) - 1, np.array([token])) for token in (1, 2))
        examples.append(Example((rng.integers(model.config.vocab_size, size=int(length)),), candidates, number % 2))
    dealt = np.arange(len(examples)).reshape(CLIENTS, ROWS)
    masked = MaskedModel(model, scattered(model))
    tokens = TOKENS_PER_PASS["cpu" if device == "cpu" else "cuda"]
    engine = LocalEngine(
        masked,
        Directions(1, len(masked.mask), device),
        batch_of=lambda client, _: dealt[client],
        losses_of=client_losses(Classification(model, tokens_per_pass=tokens), examples),
    )
    theta, wait = masked.read(), synchronised(device)
    batches = [collate([examples[row] for row in rows], device, sort=False) for rows in dealt]

    def separate(_: int) -> None:
        for batch in (*batches, *batches):
            row_losses(model, batch)
        wait()

    def together(number: int) -> None:
        plan = RoundPlan(number, 1e-6, 1e-3, 1, dict.fromkeys(range(CLIENTS), 1))
        engine.run(ServerState(Replica(number, theta), dict.fromkeys(range(CLIENTS), number)), plan)
        wait()

    times = in_turns({"separate": separate, "together": together}, REPEATS)
    return {"ms": round(1e3 * statistics.median(times["together"]), 2), **over(times["together"], times["separate"])}


def server_work(model: nn.Module, device: str) -> dict[str, Any]:
    """Milliseconds a step, on the device and on the CPU, of rebuilding a client's path and of GradIP's dot product."""
    entries = len(scattered(model))
    return {"entries": entries, **{where: server_work_on(where, entries) for where in dict.fromkeys((device, "cpu"))}}


def server_work_on(device: str, entries: int, count: int = 20) -> dict[str, float]:
    """The same on one device, for so many moving entries and steps."""
    directions, wait = Directions(1, entries, device), synchronised(device)
    theta, gradient = torch.zeros(entries, device=device), torch.ones(entries, device=device)
    scalars = np.ones((count, 1), np.float32)

    def rebuilt(number: int) -> None:
        list(path.walk(theta, RoundPlan(number, 1e-3, 1e-3, 1, {0: count}), scalars, directions))
        wait()

    def dots(number: int) -> None:
        inner_products(gradient, RoundPlan(number, 1e-3, 1e-3, 1, {0: count}), directions)
        wait()

    times = in_turns({"path": rebuilt, "gradip": dots}, 2)
    return {name: round(1e3 * statistics.median(values) / count, 3) for name, values in times.items()}


def shape(name: str, device: str) -> dict[str, Any]:
    model = random_model(name, device)
    figures = {"parameters": sum(p.numel() for p in model.parameters()), **steps(model, device)}
    figures["round"] = round_of_ten(model, device)
    figures["server_ms"] = server_work(model, device)
    return figures


# --- accuracy -------------------------------------------------------------------------------------


def accuracy(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each line of ACCURACY once its runs are made; finished runs are kept, and one that was cut short goes on."""
    root = arguments.out.with_suffix(".runs")
    mask = root / "mask.safetensors"
    root.mkdir(parents=True, exist_ok=True)

    def config(task: str, steps: int, method: str, **given: object) -> RunConfig:
        if steps > arguments.rounds:
            raise MeerkatError(f"--rounds {arguments.rounds}: at least {steps} are needed")
        settings = {"model": arguments.model, "task": task, "data": str(arguments.data / task), "method": method}
        settings |= {"local_steps": steps, "rounds": arguments.rounds // steps, "lr_schedule": "linear"}
        settings |= {"eval_every": 0, "device": arguments.device, "max_length": arguments.max_length}
        settings |= {"text": str(arguments.text), "text_sequences": 64}
        return make_config(settings | given)

    if not mask.exists():
        first = resolve(config("sst2", 1, "meerkat", text_sequences=256))
        make_mask(first, open_problem(first)).save(mask)
    for task, steps, method in ACCURACY:
        if method not in arguments.methods.split(","):
            continue
        began = time.perf_counter()
        line: dict[str, Any] = {"task": task, "local_steps": steps, "method": method}
        run = config(task, steps, method, mask=str(mask) if method == "meerkat" else "")
        try:
            rates = search_rates(run, SEARCH, lambda trial: run_cell(trial, root / "search" / cell_name(trial)))
            run = run.model_copy(update={"lr": best_rate(rates, run)})
            summary = run_cell(run, root / "cells" / cell_name(run)).summary
        except MeerkatError as error:
            yield line | {"missing": str(error)}
            continue
        told = {name: summary[name] for name in ("accuracy_before", "accuracy", "loss")} if summary else {}
        yield line | {"lr": run.lr, "rates": rates, **told, "seconds": round(time.perf_counter() - began, 1)}


# --- all of it ------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, result: dict[str, Any]) -> Iterator[None]:
    """Fill the result, part by part."""
    result["bits"] = bits(arguments.device)
    yield
    for name in arguments.shapes.split(","):
        try:
            result["shapes"][name] = shape(name, arguments.device)
        except torch.OutOfMemoryError as error:
            result["shapes"][name] = {"missing": str(error).split(".")[0]}
        if arguments.device.startswith("cuda"):
            torch.cuda.empty_cache()
        yield
    if arguments.model:
        for line in accuracy(arguments):
            result["accuracy"].append(line)
            yield


def table(result: dict[str, Any]) -> str:
    """All of it in words."""
    lines = [result["measured_on"], ""]
    lines += [f"{'the same bits' if same else 'OTHER BITS'}: {what}" for what, same in result["bits"].items()]
    for name, figures in result["shapes"].items():
        if "missing" in figures:
            lines.append(f"\n{name}: {figures['missing']}")
            continue
        lines.append(f"\n{name}, {figures['parameters']:,} parameters: a forward pass of {ROWS} x {LENGTH} takes ")
        lines[-1] += f"{figures['forward_ms']} ms, inference {figures['inference_mb'] or '?'} MiB"
        for method in METHODS:
            if each := figures.get(method):
                memory = f", memory {each['memory']:.3f}" if each["memory"] else ""
                lines.append(f"  {method:16} {each['ratio']} times two passes (spread {each['spread']}){memory}")
        of_ten, server = figures["round"], figures["server_ms"]
        lines.append(f"  ten clients      {of_ten['ms']} ms a round, {of_ten['ratio']} times 20 separate passes")
        for where in dict.fromkeys((result["device"], "cpu")):
            told = f"{server[where]['path']} ms a step for a client's path, {server[where]['gradip']} for GradIP"
            lines.append(f"  server on {where:6} {told}, n = {server['entries']:,}")
    for line in result["accuracy"]:
        outcome = f"{line['accuracy_before']:.3f} -> {line['accuracy']:.3f}" if "accuracy" in line else "diverged"
        lines.append(f"{line['task']:6} T = {line['local_steps']:2} {line['method']:17} ")
        lines[-1] += line.get("missing") or f"{outcome}, lr {line['lr']:g}, {line['seconds']} s"
    if result.get("cut_short"):
        lines.append("the time was over before all was measured: the same command goes on with the accuracy runs")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument(
        "--out", type=Path, required=True, help="file for the results; runs stand in a folder beside it"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default=",".join(name for name in SHAPES if name != "tiny"))
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it")
    parser.add_argument("--model", default="", help="folder of a Hugging Face model, for the accuracy runs")
    parser.add_argument("--data", type=Path, help="folder that holds sst2 and boolq")
    parser.add_argument("--text", type=Path, help="public text, which Meerkat's mask is made from")
    methods = list(dict.fromkeys(method for _, _, method in ACCURACY))
    parser.add_argument("--methods", default=",".join(methods), help="of the accuracy runs")
    parser.add_argument("--rounds", type=int, default=300, help="of T = 1; at T = 10 a tenth of them")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a prompt, at most")
    arguments = parser.parse_args()
    if arguments.model and not (arguments.data and arguments.text):
        parser.error("--model needs --data and --text")
    unknown = set(arguments.shapes.split(",")) - SHAPES.keys()
    if unknown:
        parser.error(f"--shapes: must be some of {', '.join(SHAPES)}, with commas, not {', '.join(unknown)}")
    card = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    result: dict[str, Any] = {
        "name": "gpu",
        "measured_on": f"{card}, torch {torch.__version__}, transformers {transformers.__version__}",
        "device": arguments.device,
        "bits": {},
        "shapes": {},
        "accuracy": [],
    }
    began = time.perf_counter()
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C does: runs go on where they were cut short
    signal.setitimer(signal.ITIMER_REAL, 60 * arguments.minutes)
    try:
        for _ in measure(arguments, result):
            result["seconds"] = round(time.perf_counter() - began, 1)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        result["cut_short"] = True
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if arguments.json else table(result))


if __name__ == "__main__":
    main()
