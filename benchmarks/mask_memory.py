"""Memory and time of a sensitivity mask of random Llamas of real shapes, in bf16: sums in files or in memory.

    python benchmarks/mask_memory.py [--json] [--shape llama-3.2-1b|llama-2-7b] [--layers N] [--sequences 2]
                                     [--in-memory] [--exclude [embeddings]]

Peaks are what the process has resident beyond the libraries: the weights, and what inference on a sequence of 256
tokens and the mask need. Fewer layers than the shape's own show what one layer costs, so that all can be reckoned.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from meerkat.masks import sensitivity
from meerkat.masks.sensitivity import sensitivity_mask
from meerkat.problems.causal_lm import language_modelling_loss

SHAPES = {
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "llama-2-7b": LlamaConfig(),  # what the class is named for
}
LENGTH = 256


def random_model(config: LlamaConfig) -> LlamaForCausalLM:
    """A model of this shape, its weights bf16 from the start."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        nn.init.ones_(parameter) if "norm" in name else parameter.normal_(std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were empty
    model.tie_weights()
    return model


def status_mb(field: str) -> float:
    """A line of /proc/self/status, in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """Make the peak what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="in place of the shape's own number")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--in-memory", action="store_true", help="keep the sums in memory, whatever their size")
    parser.add_argument("--exclude", choices=["embeddings"], nargs="*", default=["embeddings"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = SHAPES[arguments.shape]
    config.num_hidden_layers = arguments.layers or config.num_hidden_layers
    if arguments.in_memory:
        sensitivity._IN_MEMORY = 2**60

    libraries = status_mb("VmRSS")
    model = random_model(config)
    loss = language_modelling_loss(model)
    tokens = torch.randint(0, config.vocab_size, (arguments.sequences, LENGTH))
    forget_peak()
    with torch.no_grad():
        began = time.perf_counter()
        loss(tokens[0])
        forward_s = time.perf_counter() - began
    peaks = {"weights": sum(p.numel() for p in model.parameters()) * 2 / 2**20}
    peaks["inference"] = status_mb("VmHWM") - libraries
    forget_peak()
    began = time.perf_counter()
    mask = sensitivity_mask(model, list(tokens), loss, exclude=arguments.exclude)
    peaks["mask"] = status_mb("VmHWM") - libraries
    result = {
        "name": "mask_memory",
        "ratio": round(peaks["mask"] / peaks["inference"], 3),
        "peak_mb": {name: round(peak) for name, peak in peaks.items()},
        "largest_tensor_mb": round(max(p.numel() for p in model.parameters()) * 2 / 2**20),
        "forward_s": round(forward_s, 2),
        "mask_s_a_sequence": round((time.perf_counter() - began) / arguments.sequences, 2),
        "mask": mask.digest()[:12],
        "measured_on": f"{arguments.shape}, {config.num_hidden_layers} layers, {mask.total:,} bf16 parameters, "
        f"{mask.facts['eligible']} eligible, {arguments.sequences} sequences of {LENGTH} tokens, one thread",
    }
    print(json.dumps(result, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
