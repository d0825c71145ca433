"""The type of a model's weights. theta stays float32, whatever it is.

A mask, its fingerprint and theta_0 are of the weights as their checkpoint has them. These are cast afterwards, so that
one mask serves every type.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""By the name that --dtype takes."""

_NATIVE_ON_CPU = ("amx_bf16", "avx512_bf16", "bf16", "sme")
"""What torch calls the instructions of x86 and Arm processors that multiply bfloat16."""


def cast_(model: nn.Module, dtype: torch.dtype, keep: Collection[str] = ()) -> None:
    """Give a model's weights a type, in place.

    Buffers keep theirs: among them are the frequencies of rotary positions, which half precision would spoil.

    Args:
        keep: names of parameters that stay as they are.
    """
    for name, parameter in model.named_parameters():
        if name not in keep:
            parameter.data = parameter.data.to(dtype)


@contextmanager
def weights_as(model: nn.Module, dtype: torch.dtype, keep: Collection[str] = ()) -> Iterator[None]:
    """A model that is cast for as long as the context lasts; afterwards its weights are what they were, bit for bit.

    Weights of another type are in memory twice meanwhile.
    """
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        cast_(model, dtype, keep)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions of its own to multiply bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version of torch
    return any(capabilities.get(name) for name in _NATIVE_ON_CPU)
