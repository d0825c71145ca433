"""The same model's inference in engines made for CPUs: each a function that reads the last token's logits of all rows.

Neither is a dependency of the project. Where they are installed, they take part:

    pip install openvino            # wheels of 60 MB; converts the model in memory, in float32 and bfloat16
    pip install llama-cpp-python    # a C++ compiler builds it for this machine's CPU, in minutes; needs a GGUF file
"""

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from meerkat.errors import in_short
from meerkat.progress import say

Read = Callable[[], np.ndarray]
"""All rows go through the model once: the last token's logits, float32 [rows, words]."""


def engines(
    model: Callable[[], nn.Module], tokens: np.ndarray, threads: int, gguf: Path | None = None
) -> dict[str, Read]:
    """The engines that are installed, by name.

    Args:
        model: loads the causal language model that an engine's is made from.
        tokens: int64 [rows, length].
        gguf: the same model for llama.cpp; it is read in the precision of the file.
    """
    installed: dict[str, Read] = {}
    if importlib.util.find_spec("openvino"):
        try:
            installed |= openvino(model(), tokens, threads)
        except Exception as error:  # its converter raises many kinds, and takes not every architecture
            say(f"note: OpenVINO is left out: it cannot take this model ({in_short(error)})")
    if gguf and importlib.util.find_spec("llama_cpp"):
        installed[f"llama.cpp {gguf.stem}"] = llama_cpp(gguf, tokens, threads)
    return installed


class _LastLogits(nn.Module):
    """A model as engines are given it: token ids and a mask of ones -> the last token's logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]


def openvino(model: nn.Module, tokens: np.ndarray, threads: int) -> dict[str, Read]:
    """OpenVINO's CPU plugin, at fixed shapes, in each precision that it has on this machine."""
    import openvino as ov

    ids = torch.from_numpy(tokens)
    inputs = (ids, torch.ones_like(ids))
    converted = ov.convert_model(_LastLogits(model.float()), example_input=inputs, input=[list(ids.shape)] * 2)
    core, given = ov.Core(), [each.numpy() for each in inputs]
    known = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    def reader(precision: str) -> Read:
        options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        request = core.compile_model(converted, "CPU", options).create_infer_request()
        return lambda: np.asarray(request.infer(given)[0])

    return {f"OpenVINO {name}": reader(name) for name in ("f32", "bf16") if name in ("f32", *map(str.lower, known))}


def llama_cpp(gguf: Path, tokens: np.ndarray, threads: int) -> Read:
    """llama.cpp through its own Python package: all rows are one batch of sequences."""
    import llama_cpp as lc

    rows, length = tokens.shape
    lc.llama_log_set(lc.llama_log_callback(lambda *_: None), ctypes.c_void_p(0))
    model = lc.llama_model_load_from_file(str(gguf).encode(), lc.llama_model_default_params())
    options = lc.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = tokens.size
    options.n_seq_max, options.kv_unified = rows, True
    options.n_threads = options.n_threads_batch = threads
    context = lc.llama_init_from_model(model, options)
    words = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
    batch: Any = lc.llama_batch_init(tokens.size, 0, 1)
    batch.n_tokens = tokens.size
    for place, token in enumerate(tokens.ravel()):
        row, position = divmod(place, length)
        batch.token[place], batch.pos[place] = int(token), position
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
        batch.logits[place] = position == length - 1

    def read() -> np.ndarray:
        lc.llama_memory_clear(lc.llama_get_memory(context), True)
        if status := lc.llama_decode(context, batch):
            raise RuntimeError(f"llama.cpp: llama_decode gave {status}")
        last = [lc.llama_get_logits_ith(context, (row + 1) * length - 1) for row in range(rows)]
        return np.stack([np.ctypeslib.as_array(each, (words,)) for each in last])

    return read
