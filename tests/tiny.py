"""Tiny random models, and the template of their chats."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

CHAT_TEMPLATE = (
    "{{ bos_token }}the plot"
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>yes\n{% endif %}"
)
"""In the manner of the real ones: it trims a message and writes BOS itself."""

VOCABULARY = 384
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, Any] = {
    "llama": LlamaConfig(**_SMALL, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**_SMALL, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    ),
}


def tiny_model(architecture: str = "llama-tied", seed: int = 0, layers: int = 2) -> Any:
    """A random causal LM of some 30,000 parameters, in evaluation mode."""
    config = copy.deepcopy(ARCHITECTURES[architecture])
    config.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # larger than the usual initialisation, so that losses differ visibly
            torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return model.eval()


def federation_model(seed: int = 0) -> Any:
    """The tiny federation's model: one layer, which takes half the time of two."""
    return tiny_model(seed=seed, layers=1)
