import math

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model
from torch import Tensor, nn

from meerkat.algorithm.zeroth_order import MaskedModel, projected_gradient
from meerkat.errors import RunFailed
from meerkat.masks.baselines import full_mask, magnitude_mask
from meerkat.problems.causal_lm import language_modelling_loss

TOKENS = torch.arange(3, 20)


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, int]:
    return {n: int((p != before[n]).sum()) for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_theta_written_is_theta_read_and_nothing_else_moves(architecture: str) -> None:
    model = tiny_model(architecture)
    before = copy_of(model)
    masked = MaskedModel(model, magnitude_mask(model, 0.01))
    theta = masked.read()
    masked.write_(theta + 1)
    assert torch.equal(masked.read(), theta + 1)
    assert moved(model, before) == dict(masked.mask.counts())
    masked.write_(theta)
    assert moved(model, before) == {}


def test_tied_weights_move_together() -> None:
    model = tiny_model("llama-tied")
    masked = MaskedModel(model, full_mask(model))
    masked.write_(masked.read() + 1)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_theta_keeps_what_half_precision_weights_round_away() -> None:
    model = tiny_model().bfloat16()
    masked = MaskedModel(model, magnitude_mask(model, 0.01))
    theta = masked.read()
    assert theta.dtype == torch.float32
    masked.write_(theta + 1e-6)  # below bfloat16's spacing: the weights stay, theta is the caller's
    assert torch.equal(masked.read(), theta)


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_projected_gradient_is_the_directional_derivative(architecture: str) -> None:
    model = tiny_model(architecture)
    loss = language_modelling_loss(model)
    masked = MaskedModel(model, magnitude_mask(model, 0.05))
    z = torch.randn(len(masked.mask), generator=torch.Generator().manual_seed(0))
    loss(TOKENS).backward()
    grads = dict(model.named_parameters())
    slopes = [grads[name].grad.flatten()[at] for name, at in masked.mask.entries.items()]
    expected = torch.cat(slopes) @ z
    slope, level = projected_gradient(masked, masked.read(), z, 1e-3, lambda: loss(TOKENS))
    assert slope.item() == pytest.approx(expected.item(), rel=0.01)
    assert level.item() == pytest.approx(loss(TOKENS).item(), rel=1e-2)


def test_a_vector_of_losses_gives_a_vector_of_slopes() -> None:
    model = tiny_model()
    loss = language_modelling_loss(model)
    masked = MaskedModel(model, magnitude_mask(model, 0.05))
    z = torch.ones(len(masked.mask))
    batches = [TOKENS, TOKENS.flip(0), TOKENS[:5]]
    together = projected_gradient(masked, masked.read(), z, 1e-3, lambda: torch.stack([loss(b) for b in batches]))
    alone = [projected_gradient(masked, masked.read(), z, 1e-3, lambda b=b: loss(b)) for b in batches]
    assert together.g.tolist() == [one.g.item() for one in alone]


def test_weights_are_restored_exactly_whatever_happens() -> None:
    model = tiny_model()
    before = copy_of(model)
    masked = MaskedModel(model, magnitude_mask(model, 0.05))
    theta, z = masked.read(), torch.ones(len(masked.mask))
    for _ in range(50):
        projected_gradient(masked, theta, z, 1e-3, lambda: torch.tensor(1.0))
    assert moved(model, before) == {}

    def interrupted() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        projected_gradient(masked, theta, z, 1e-3, interrupted)
    assert moved(model, before) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(bad: float) -> None:
    model = tiny_model()
    before = copy_of(model)
    masked = MaskedModel(model, magnitude_mask(model, 0.05))
    with pytest.raises(RunFailed, match="lower --lr"):
        projected_gradient(masked, masked.read(), torch.ones(len(masked.mask)), 1e-3, lambda: torch.tensor([1.0, bad]))
    assert moved(model, before) == {}
