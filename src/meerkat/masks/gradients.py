"""Gradients one tensor at a time, so that no second copy of the model is held."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def stream_gradients(
    model: nn.Module, names: Collection[str], consume: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While open, a backward pass hands the named parameters' gradients to `consume`, and frees each at once.

    No other parameter gets a gradient. On leaving, the model's gradients and `requires_grad` are what they were.
    """

    def hook_for(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient, parameter.grad = parameter.grad, None
            consume(name, gradient.to_dense() if gradient.is_sparse else gradient)

        return hook

    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    # an embedding's gradient is a few rows: kept sparse, a tied embedding needs one dense gradient, not two
    embeddings = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and not module.sparse and not module.scale_grad_by_freq
    ]
    handles = []
    try:
        for module in embeddings:
            module.sparse = True
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
            parameter.grad = None
            if name in names:
                handles.append(parameter.register_post_accumulate_grad_hook(hook_for(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in embeddings:
            module.sparse = False
        for parameter, (required, gradient) in before.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient
