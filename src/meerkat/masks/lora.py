"""LoRA adapters: the one mask whose entries are not part of the pre-trained model (baseline "LoRA-FedZO").

    y = W x + (alpha / r) B A x    A: [r, in], random    B: [out, r], zero at first

All of A and B move, and nothing else. PEFT makes, merges and saves the adapters, and chooses the layers by its default
for the architecture, mostly the attention's queries and values. It is imported on use.
"""

import copy
import math
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from meerkat import seeds
from meerkat.errors import MeerkatError
from meerkat.masks.sparse_mask import SparseMask
from meerkat.progress import imported_quietly

RANK = 8
ALPHA = 16
_NAME = "default"
"""PEFT's name for an adapter that is given none."""


def _peft() -> Any:
    try:
        with imported_quietly():
            import peft
    except ImportError:
        raise MeerkatError("LoRA needs the 'peft' package; pip install 'meerkat-fl[lora]'") from None
    return peft


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by name, in the model's order. A MeerkatError if there is none."""
    lora_layer = _peft().tuners.lora.LoraLayer
    layers = {name: module for name, module in model.named_modules() if isinstance(module, lora_layer)}
    if not layers:
        raise MeerkatError("the model has no LoRA adapters; add them with add_lora first")
    return layers


def _start(shape: tuple[int, int], seed: int, index: int) -> Tensor:
    """A's random start, float32 [r, in]: uniform within 1 / sqrt(in), as PEFT's Kaiming initialisation is.

    Made from the generator's raw words, which NumPy guarantees not to change.
    """
    words = seeds.generator(seed, "lora", index).bit_generator.random_raw(math.prod(shape))
    unit = (words >> np.uint64(11)) * 2.0**-53  # float64 in [0, 1)
    return torch.from_numpy((2 * unit - 1) / math.sqrt(shape[1])).float().view(shape)


def add_lora(model: nn.Module, seed: int) -> None:
    """Give a transformers causal LM LoRA adapters, in place: r = 8, alpha = 16, no dropout.

    The model keeps its class, its forward signature and, since B is zero, its outputs. Adapters are float32
    whatever the weights' type, on their layers' devices. No parameter requires a gradient. A's start depends on the
    seed and the layer's place among the adapted ones alone; no global random state is read or changed.

    Raises:
        MeerkatError: PEFT is missing, it has no default layers for the architecture, or the model already has
            adapters.
    """
    peft = _peft()
    if any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules()):
        raise MeerkatError("the model already has adapters; give the base model, or merge them into it first")
    architecture = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if architecture not in peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        raise MeerkatError(
            f"architecture '{architecture}': PEFT has no default LoRA layers for it; "
            "use one that it has them for, such as llama, qwen2 or gpt2, or another method"
        )
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, inference_mode=True, task_type=peft.TaskType.CAUSAL_LM
    )
    try:
        with warnings.catch_warnings(action="ignore"):
            # low_cpu_mem_usage leaves the adapters without values: drawing them would use torch's global generator
            peft.inject_adapter_in_model(settings, model, adapter_name=_NAME, low_cpu_mem_usage=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise MeerkatError(
            f"architecture '{architecture}': PEFT cannot adapt this model ({reason}); use another model or method"
        ) from None
    for index, layer in enumerate(_lora_layers(model).values()):
        device = layer.get_base_layer().weight.device
        a, b = layer.lora_A[_NAME], layer.lora_B[_NAME]
        a.weight = nn.Parameter(_start(tuple(a.weight.shape), seed, index).to(device), requires_grad=False)
        b.weight = nn.Parameter(torch.zeros(b.weight.shape, device=device), requires_grad=False)
    model.train(model.training)  # PEFT's layers begin in training mode, whatever the model is in


def lora_mask(model: nn.Module) -> SparseMask:
    """The mask that moves all of `add_lora`'s adapters, and nothing else.

    d and the fingerprint include the adapters, so it fits only this model with adapters from the same seed.

    Raises:
        MeerkatError: PEFT is missing, or the model has no adapters.
    """
    layers = _lora_layers(model).values()
    adapters = {id(p) for layer in layers for part in (layer.lora_A, layer.lora_B) for p in part.parameters()}
    moving = {name: p.numel() for name, p in model.named_parameters() if id(p) in adapters}
    total = sum(p.numel() for p in model.parameters())
    return SparseMask.of(
        model, dict.fromkeys(moving), "lora", sum(moving.values()) / total, {"r": str(RANK), "alpha": str(ALPHA)}
    )


def merge_lora_(model: nn.Module) -> nn.Module:
    """Add (alpha / r) B A to the weights and remove the adapters, in place; returns the same model.

    It is an ordinary model again. Half-precision weights round the sum.

    Raises:
        MeerkatError: PEFT is missing, or the model has no adapters.
    """
    for name, layer in _lora_layers(model).items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return model


def save_adapter(model: nn.Module, to: Path, base: str) -> None:
    """Write only the adapters to a folder, as `peft.PeftModel.from_pretrained` reads them.

    Args:
        to: gets adapter_model.safetensors and adapter_config.json; made if missing.
        base: the base model's folder or hub name, for adapter_config.json.

    Raises:
        MeerkatError: PEFT is missing, or the model has no adapters.
    """
    _lora_layers(model)
    peft, adapted = _peft(), cast(Any, model)
    state = peft.get_peft_model_state_dict(adapted, adapter_name=_NAME, save_embedding_layers=False)
    settings = copy.copy(adapted.peft_config[_NAME])
    settings.base_model_name_or_path = base
    settings.save_pretrained(to)
    # a PeftModel wraps the model twice, which shows in its tensors' names
    named = {f"base_model.model.{name}": values.contiguous() for name, values in state.items()}
    save_file(named, to / peft.utils.SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
