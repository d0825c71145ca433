"""Mixed precision: layers multiply in half precision, and all between them is float32, as theta is.

Where a half-precision model rounds between its layers, and in its logits, the losses at theta +- eps z differ by noise
that 1 / (2 eps) magnifies; rounding the operands of a product does much less harm (docs/log.md has the figures).

A mask, its fingerprint and theta_0 are of the weights as their checkpoint has them. These are cast afterwards, so that
one mask serves every type.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""By the name that --dtype takes."""

_NATIVE_ON_CPU = ("amx_bf16", "avx512_bf16", "bf16", "sme")
"""What torch calls the instructions of x86 and Arm processors that multiply bfloat16."""


def cast_(model: nn.Module, dtype: torch.dtype, keep: Collection[str] = ()) -> list[RemovableHandle]:
    """Let a model's layers multiply in a type, in place. Returns the hooks that do it.

    Weights of layers that multiply by a matrix get the type, and passes run under `torch.autocast`. All else becomes
    float32: norms, what layers add to, logits. In half precision the tables of embeddings and of the output layer stay
    as they are stored, and what is read from them is float32. Buffers stay as they are.

    Args:
        keep: names of weights that become float32, whatever the type.
    """
    head, tables = _tables(model)
    names = {p: name for name, p in model.named_parameters()}
    in_tables = {parameter for module in tables for parameter in module.parameters()}
    for module in model.modules():
        weight = module._parameters.get("weight")
        multiplies = weight is not None and weight.dim() == 2 and weight not in in_tables and names[weight] not in keep
        for parameter in module.parameters(recurse=False):
            if dtype == torch.float32 or parameter not in in_tables:
                parameter.data = parameter.data.to(dtype if multiplies else torch.float32)
    if dtype == torch.float32:
        return []
    widened = [hook for module in tables for hook in _widen(module)]
    return [*widened, *_autocast(model, dtype), *(_autocast(head, dtype, enabled=False) if head else ())]


def _tables(model: nn.Module) -> tuple[nn.Module | None, set[nn.Module]]:
    """The output layer, None where there is none, and all tables of embeddings with it."""
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    return head, {module for module in model.modules() if isinstance(module, nn.Embedding) or module is head}


def types_in_passes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The type that each parameter is rounded to in a pass, by name, once `cast_` has cast the model to `dtype`."""
    of_tables = {parameter for table in _tables(model)[1] for parameter in table.parameters()}
    types: dict[nn.Parameter, torch.dtype] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        multiplies = weight is not None and weight.dim() == 2
        for parameter in module.parameters(recurse=False):
            if dtype != torch.float32 and parameter in of_tables:
                types[parameter] = parameter.dtype
            else:
                types.setdefault(parameter, dtype if multiplies else torch.float32)
    return {name: types[parameter] for name, parameter in model.named_parameters()}


def _widen(module: nn.Module) -> list[RemovableHandle]:
    """Read float32 from a table: embeddings are widened, the output layer for as long as its product takes."""
    if isinstance(module, nn.Embedding):
        return [module.register_forward_hook(lambda _, __, output: output.float())]
    narrow: list[dict[str, nn.Parameter | None]] = []

    def widen(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        narrow.append(dict(module._parameters))
        for name, parameter in narrow[-1].items():
            wide: Any = parameter if parameter is None else parameter.float()
            module._parameters[name] = wide  # backpropagation goes through it
        return tuple(x.float() for x in inputs)

    def restore(*_: Any) -> None:
        module._parameters.update(narrow.pop())

    return [module.register_forward_pre_hook(widen), module.register_forward_hook(restore, always_call=True)]


def _autocast(module: nn.Module, dtype: torch.dtype, enabled: bool = True) -> list[RemovableHandle]:
    """Run a module's passes under `torch.autocast`, or not."""
    contexts: list[torch.autocast] = []

    def enter(module: nn.Module, _: Any) -> None:
        device = next(module.parameters()).device.type
        contexts.append(torch.autocast(device, dtype, enabled=enabled, cache_enabled=False))
        contexts[-1].__enter__()

    def leave(*_: Any) -> None:
        contexts.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


@contextmanager
def weights_as(model: nn.Module, dtype: torch.dtype, keep: Collection[str] = ()) -> Iterator[None]:
    """A model that is cast for as long as the context lasts; afterwards its weights are what they were, bit for bit.

    Weights of another type are in memory twice meanwhile.
    """
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    hooks: list[RemovableHandle] = []
    try:
        hooks = cast_(model, dtype, keep)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in before:
            parameter.data = data


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions of its own to multiply bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version of torch
    return any(capabilities.get(name) for name in _NATIVE_ON_CPU)
