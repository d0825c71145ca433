"""A tiny Llama and its tokenizer as a GGUF file, as llama.cpp's converter would write it."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from tiny import CHAT_TEMPLATE


def write_gguf(
    file: Path,
    model: Any,
    tokenizer: Any,
    *,
    architecture: str = "llama",
    kind: Any = gguf.GGMLQuantizationType.F32,
    without: Collection[str] = (),
) -> Path:
    """Write a Llama and a byte-level tokenizer.

    Args:
        kind: how matrices with rows of 32 entries are stored; all else is float32.
        without: of "tokenizer", "chat template" and tensors' names, what is left out.
    """
    config, writer = model.config, gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if "tokenizer" not in without:
        _add_tokenizer(writer, tokenizer)
    if "chat template" not in without:
        writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        stored = names.get_name(name, (".weight",))
        if stored in without:
            continue
        values = parameter.detach().numpy()
        if "attn_q" in stored or "attn_k." in stored:
            heads = config.num_attention_heads if "attn_q" in stored else config.num_key_value_heads
            values = _interleaved(values, heads)
        if values.ndim == 2 and values.shape[1] % 32 == 0 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(stored, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(described["model"]["vocab"], key=described["model"]["vocab"].get)
    special = {token["content"] for token in described["added_tokens"]}
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """A query or key projection in GGUF's order of rows: a rotary pair is two neighbours, not two halves of a head."""
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
