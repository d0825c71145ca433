"""A frozen base in 8 or 4 bits, and the entries that move beside it in float32.

    y = W x    W = what is unpacked from Q, with theta in place of the entries that move

`bitsandbytes` packs and unpacks, block by block, on CPU and GPU; it is imported on use. W lives for one product, in the
type that this is made in, so that a model takes the memory of Q and of one layer. The unpacked entries are overwritten
and never read: theta is exact, and a layer is restored by writing theta again.

Sources: Dettmers et al., "QLoRA" (arXiv 2305.14314), for nf4.
"""

from collections import Counter
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from meerkat.errors import MeerkatError
from meerkat.masks.sparse_mask import SparseMask
from meerkat.progress import imported_quietly

Bits = Literal["int8", "nf4"]
"""Of a weight: 255 equidistant levels, or the 16 quantiles of a normal distribution."""

BLOCK = 64
"""Weights that share one float32 scale: half a bit for each of them."""

_AT_ONCE = 16_384
"""Blocks that are packed together: on the CPU, packing takes some twenty bytes a weight."""


def packing() -> Any:
    """The library's functions. Raises MeerkatError where it is not installed."""
    try:
        with imported_quietly():
            from bitsandbytes import functional
    except ImportError:
        missing = "--quantize needs the 'bitsandbytes' package"
        raise MeerkatError(f"{missing}; pip install 'meerkat-fl[quantize]', or leave --quantize out") from None
    return functional


class QuantisedLinear(nn.Module):
    """An nn.Linear whose weight is frozen in few bits, but for the entries that move."""

    def __init__(self, linear: nn.Linear, at: Tensor | None, bits: Bits) -> None:
        """Pack a layer's weight; `at` are the flat indices of the entries that move, int64 [k], None for none."""
        super().__init__()
        library, weight = packing(), linear.weight.detach()
        at = torch.empty(0, dtype=torch.int64) if at is None else at
        self._at = at.to(weight.device)
        self.moving = weight.reshape(-1)[self._at].float()
        """The values of the moving entries, float32 [k]: no parameter, as no cast of the model may round them."""
        self.bias = linear.bias
        self._shape = weight.shape
        blocks = weight.reshape(-1, BLOCK)  # on the CPU, 4-bit rows that end within a block are unpacked wrongly
        if bits == "nf4":
            parts = [library.quantize_4bit(p, blocksize=BLOCK, quant_type="nf4") for p in blocks.split(_AT_ONCE)]
            self._packed = torch.cat([packed for packed, _ in parts])
            self._scales = parts[0][1]
            self._scales.absmax = torch.cat([scales.absmax for _, scales in parts])
            self._scales.shape = blocks.shape
            self._unpack = library.dequantize_4bit
        else:
            levels = library.create_linear_map().to(weight.device)
            self._packed, self._scales = library.quantize_blockwise(blocks, levels, blocksize=BLOCK)
            self._unpack = library.dequantize_blockwise

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight at the moving entries' present values: a new tensor, [out, in]."""
        self._scales.dtype = dtype
        weight: Tensor = self._unpack(self._packed, self._scales).view(-1)
        return weight.index_copy_(0, self._at, self.moving.to(dtype)).view(self._shape)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], multiplied in the type of x or, under autocast, in that one."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return nn.functional.linear(x, self.weight(dtype), self.bias)


def quantise_(model: nn.Module, mask: SparseMask, bits: Bits) -> None:
    """Freeze the weights of a model's nn.Linear layers in few bits, in place, one layer after another.

    Embeddings, norms, biases, the output head and tied weights stay as they are, and so does a layer that moves as a
    whole (LoRA's adapters) or whose weights fill no whole number of blocks. The mask's entries keep their exact values.
    Neither the mask nor the fingerprint of the weights can be checked afterwards.

    Raises:
        MeerkatError: bitsandbytes is missing, or there is no such layer.
    """
    packing()
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    whole = {name for name, at in mask.entries.items() if at is None}
    names = [
        name
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear
        and layer is not head
        and uses[id(layer.weight)] == 1
        and layer.weight.numel() % BLOCK == 0
        and f"{name}.weight" not in whole
    ]
    if not names:
        raise MeerkatError(f"--quantize {bits}: the model has no nn.Linear layer to quantise; use --quantize none")
    for name in names:
        layer = cast(nn.Linear, model.get_submodule(name))
        model.set_submodule(name, QuantisedLinear(layer, mask.entries.get(f"{name}.weight"), bits))


def moving_beside(model: nn.Module) -> dict[str, Tensor]:
    """The moving entries that lie beside a quantised weight, float32 [k], by the weight's name."""
    return {f"{name}.weight": m.moving for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}
