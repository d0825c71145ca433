"""Backpropagation on the moving entries, against autograd on dense weights and the literal federation."""

import json
import math

import numpy as np
import pytest
import reference
import torch
from bowl import Bowl, Literal, live, same_bits
from test_server import bowl_engine, config
from tiny import tiny_model
from torch import Tensor, nn

from meerkat.algorithm import client_rules
from meerkat.algorithm.client_sampling import seeded_sample
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.first_order import gradient_steps, masked_gradient
from meerkat.algorithm.replica import Replica, Rules
from meerkat.algorithm.rounds import RoundPlan, RoundRecord
from meerkat.algorithm.server import ServerState, client_weights, replay
from meerkat.algorithm.update_rules import FedAdam, FedAvg, UpdateRule
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.errors import Diverged
from meerkat.masks.baselines import full_mask, random_mask
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.causal_lm import language_modelling_loss

FIRST_ORDER = {"rules": Rules(client=client_rules.FIRST_ORDER), "lr": 0.3}


def dense_gradient(twin: Literal, w: Tensor, client: int, step: int) -> Tensor:
    v = w.clone().requires_grad_(True)
    twin.loss(v, client, step).backward()
    assert v.grad is not None
    return v.grad


@pytest.mark.parametrize("client", [0, 2])
def test_the_gradient_is_autograds_at_the_moving_entries(client: int) -> None:
    twin, (model, mask, engine) = Literal(config()), bowl_engine()
    theta = torch.randn(len(mask), generator=torch.Generator().manual_seed(1))
    gradient, level = masked_gradient(engine.model, theta, lambda: model.loss(client, 3))
    w = torch.where(twin.moving, twin.spread(theta), twin.w0)
    torch.testing.assert_close(gradient.double(), dense_gradient(twin, w, client, 3)[twin.moving], rtol=0, atol=1e-6)
    assert gradient.dtype == torch.float32
    assert level == pytest.approx(twin.loss(w, client, 3).item(), rel=1e-6)


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_it_is_the_gradient_of_a_language_model(architecture: str, random_sequences: list[Tensor]) -> None:
    model, twin = tiny_model(architecture), tiny_model(architecture)
    mask = random_mask(model, 0.05)
    masked, loss = MaskedModel(model, mask), language_modelling_loss(model)
    gradient, _ = masked_gradient(masked, masked.read(), lambda: loss(random_sequences[1]))
    expected = reference.pretraining_gradient(twin, random_sequences[1:2])
    moving = torch.cat(
        [
            torch.isin(torch.arange(p.numel()), mask.entries.get(name, torch.zeros(0).long()))
            for name, p in twin.named_parameters()
        ]
    )
    torch.testing.assert_close(gradient.double(), expected[moving], rtol=1e-4, atol=1e-6)


def test_a_whole_tensor_that_moves_has_all_its_gradient() -> None:
    model, twin = Bowl(), Literal(config())
    masked = MaskedModel(model, full_mask(model))
    gradient, _ = masked_gradient(masked, masked.read(), lambda: model.loss(1, 0))
    torch.testing.assert_close(gradient.double(), dense_gradient(twin, twin.w0, 1, 0), rtol=0, atol=1e-6)


def test_weights_are_thetas_afterwards_and_the_rest_is_untouched() -> None:
    model, _, engine = bowl_engine()
    before = [p.detach().clone() for p in model.parameters()]
    start = engine.model.read()
    plan = RoundPlan(0, 0.3, 1e-3, 1, {1: 4}, sends="delta")
    reply, end = gradient_steps(engine.model, start, plan, 1, lambda t: lambda: model.loss(1, t))
    assert (end - start).abs().min() > 0
    engine.model.write_(start)
    assert all(same_bits(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert same_bits(torch.from_numpy(reply.delta), end - start)
    assert reply.steps == 4


def test_the_loss_is_taken_at_the_theta_that_was_given() -> None:
    model, _, engine = bowl_engine()
    theta = engine.model.read() + 1
    masked_gradient(engine.model, theta, lambda: model.loss(0, 0))
    assert same_bits(engine.model.read(), theta)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_it_with_theta_in_place(bad: float) -> None:
    model, _, engine = bowl_engine()
    theta = engine.model.read()
    with pytest.raises(Diverged, match=f"the loss is {bad}"):
        masked_gradient(engine.model, theta, lambda: model.loss(0, 0) * bad)
    assert same_bits(engine.model.read(), theta)
    assert not any(p.requires_grad for p in engine.model.parameters())


def test_a_gradient_that_is_not_finite_ends_it_too() -> None:
    model, _, engine = bowl_engine()
    with pytest.raises(Diverged, match="gradient"):
        masked_gradient(engine.model, engine.model.read(), lambda: ((model.a - model.a) ** 2).sum().sqrt())


def test_an_error_in_the_loss_leaves_no_parameter_asking_for_gradients() -> None:
    _, _, engine = bowl_engine()
    for p in engine.model.parameters():
        p.requires_grad_(False)

    def failing() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        masked_gradient(engine.model, engine.model.read(), failing)
    assert not any(p.requires_grad for p in engine.model.parameters())


class Idle(nn.Module):
    """The second parameter has no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.idle = nn.Parameter(torch.tensor([3.0, 4.0, 5.0]))


def test_a_parameter_without_a_part_in_the_loss_has_a_gradient_of_zero() -> None:
    model = Idle()
    whole = full_mask(model)
    entries = {"used": torch.tensor([1]), "idle": torch.tensor([0, 2])}
    for mask in (whole, SparseMask(entries, whole.shapes, whole.fingerprint, whole.total)):
        masked = MaskedModel(model, mask)
        gradient, _ = masked_gradient(masked, masked.read(), lambda: (model.used**2).sum())
        assert gradient.tolist() == ([2, 4, 0, 0, 0] if mask is whole else [4, 0, 0])


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_federation_is_the_literal_one(steps: int, together: bool) -> None:
    settings = config(**FIRST_ORDER, local_steps=steps, rounds=6)
    lived, twin = live(settings, together), Literal(settings)
    ends = reference.fo_fedavg(
        lambda w, k, r, t: dense_gradient(twin, w, k, r * steps + t),
        twin.w0,
        twin.moving,
        settings.rounds,
        steps,
        list(client_weights(settings, range(3)).values()),
        settings.lr,
    )
    for ours, theirs in zip(lived.thetas, ends, strict=True):
        torch.testing.assert_close(ours.double(), theirs[twin.moving], rtol=0, atol=2e-6)
    assert (lived.thetas[-1] - lived.thetas[0]).abs().max() > 0.02


def test_a_clients_data_pointer_moves_on() -> None:
    settings = config(**FIRST_ORDER, clients_per_round=2)
    lived = live(settings)
    asked = [k for r in range(settings.rounds) for k in seeded_sample(range(settings.clients), 2, settings.seed, r)]
    assert lived.states[-1].steps_made == {k: 3 * asked.count(k) for k in set(asked)}


@pytest.mark.parametrize("optimizer", [FedAvg(), FedAdam(lr=0.05, tau=1e-3)])
def test_replaying_the_records_gives_the_same_bits(optimizer: UpdateRule) -> None:
    settings = config(rules=Rules(optimizer, client_rules.FIRST_ORDER), lr=0.3, clients_per_round=2)
    lived = live(settings, gradient=torch.ones(len(bowl_engine()[1])))
    _, mask, engine = bowl_engine()
    state = ServerState(Replica(0, engine.model.read()))
    for record, theta in zip(lived.rounds, lived.thetas, strict=True):
        reread = RoundRecord.from_json(json.loads(json.dumps(record.to_json())))
        assert reread.plan == record.plan
        assert reread.made == record.made == dict.fromkeys(record.plan.steps, 3)
        assert reread.scalars == {}
        assert reread.inner.shape == record.inner.shape == (0, 2)
        state = replay(state, reread, settings, Directions(1, len(mask)))  # no direction is asked for
        assert same_bits(state.theta, theta)


def test_deltas_are_weighted_by_rows() -> None:
    lived = live(config(**FIRST_ORDER, rounds=1, examples={0: 10**9, 1: 1, 2: 1}))
    model, _, engine = bowl_engine()
    plan = lived.rounds[0].plan
    reply, _ = gradient_steps(engine.model, engine.model.read(), plan, 0, lambda t: lambda: model.loss(0, t))
    np.testing.assert_allclose(lived.rounds[0].aggregate, reply.delta, rtol=0, atol=1e-6)
