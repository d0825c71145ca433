"""benchmarks/peers/steps.py: R-AdaZO, FZOO, SubZero+ and HiSo against their papers' formulas, in float64."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest
import torch
from bowl import KEY, moved_by, same_bits
from test_optimizers import WIDTH, after_each, records

from meerkat.algorithm.directions import Directions
from meerkat.errors import MeerkatError
from meerkat.settings.config import make_config

FILE = Path(__file__).parents[1] / "benchmarks" / "peers" / "steps.py"


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("peer_steps", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


steps = _load()


def test_r_adazo_is_adam_whose_second_moment_is_the_firsts() -> None:
    given = {"update_rule": "r-adazo", "server_lr": 5, "server_beta1": 0.8, "server_beta2": 0.95, "server_tau": 1e-3}
    rule = steps.r_adazo(make_config(given))
    rounds = records(8)
    start, *ours = after_each(rule, rounds)
    theta, m, v = start.double(), torch.zeros(WIDTH).double(), torch.zeros(WIDTH).double()
    for after, record in zip(ours, rounds, strict=True):
        m = 0.8 * m - 0.2 * moved_by(record, WIDTH)
        v = 0.95 * v + 0.05 * m**2
        theta = theta - 0.05 * record.plan.lr * m / torch.sqrt(v + 1e-6)
        torch.testing.assert_close(after.double(), theta, rtol=0, atol=5e-6)


def test_fzoos_steps_do_not_depend_on_how_large_the_scalars_are() -> None:
    rule = steps.fzoo(make_config({"server_lr": 0.5, "directions": 4, "update_rule": "fzoo"}))
    (record,) = records(1, steps=3, directions=4)
    start, after = after_each(rule, [record])
    theta, z = start.double(), Directions(KEY, WIDTH)
    for step, row in enumerate(record.aggregate.astype(float).tolist()):
        for p, g in enumerate(row):
            direction = z(record.plan.place(step, p)).double()
            theta = theta - 0.5 * record.plan.lr / 4 * g / stdev(row) * direction
    torch.testing.assert_close(after.double(), theta, rtol=0, atol=5e-6)
    doubled = dataclasses.replace(record, aggregate=record.aggregate * np.float32(2))
    assert same_bits(after_each(rule, [doubled])[1], after)


def _basis(count: int) -> torch.Tensor:
    """U, float64 [count, SPACE], from what unit vectors become inside."""
    inside = torch.stack([steps.inside(one) for one in torch.eye(count)]).double()
    values, vectors = torch.linalg.eigh(inside)
    return vectors[:, values > 0.5]


def test_subzeros_space_is_a_projection_onto_so_many_dimensions() -> None:
    basis = _basis(300)
    assert basis.shape == (300, steps.SPACE)
    vector = torch.linspace(-2, 3, 300)
    within = steps.inside(vector)
    torch.testing.assert_close(within.double(), basis @ (basis.T @ vector.double()), rtol=0, atol=1e-6)
    torch.testing.assert_close(steps.inside(within), within)


def test_subzeros_slopes_are_those_inside_and_its_steps_are_adam_in_few_dimensions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps, "SPACE", 5)
    monkeypatch.setattr(steps, "_groups", steps._groups.__wrapped__)
    count, target = 300, torch.linspace(-1, 1, 300)
    basis, theta, z = _basis(count), torch.full((count,), 0.3), torch.linspace(2, -1, count)
    slopes = steps.two_sided_inside(lambda at: ((at - target) ** 2).sum() / 2, theta, [z], 1e-2)
    exact = (theta - target).double() @ basis @ (basis.T @ z.double())
    assert slopes.g.item() == pytest.approx(exact.item(), rel=1e-3)

    given = {"estimator": "plain", "server_lr": 5, "server_beta1": 0.8, "server_beta2": 0.95, "server_tau": 1e-9}
    config = make_config({**given, "update_rule": "momentum"}).model_copy(update={"estimator": "subzero"})
    rounds = records(5)
    start, *ours = after_each(steps.adam_with_subzero(config), rounds)
    basis, theta64 = _basis(WIDTH), start.double()
    m, v = torch.zeros(WIDTH).double(), torch.zeros(WIDTH).double()
    for after, record in zip(ours, rounds, strict=True):
        down = basis @ (basis.T @ moved_by(record, WIDTH))
        m, v = 0.8 * m + 0.2 * down, 0.95 * v + 0.05 * down**2
        theta64 = theta64 + 0.05 * record.plan.lr * m / (torch.sqrt(v) + 1e-9)
        torch.testing.assert_close(after.double(), theta64, rtol=0, atol=5e-5)
    assert steps.adam_with_subzero(make_config({})) == steps.FedAvg()


def test_hisos_slopes_and_steps_are_along_directions_scaled_by_earlier_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "KEPT", 6)
    config = make_config({"update_rule": "momentum"}).model_copy(update={"estimator": "hiso", "update_rule": "hiso"})
    rounds = records(6)
    start, *ours = after_each(steps.hiso(config), rounds)
    theta, k, target = start.double(), torch.ones(WIDTH).double(), torch.linspace(-1, 1, WIDTH)
    z = torch.linspace(2, -1, WIDTH)
    for before, after, record in zip([start, *ours], ours, rounds, strict=False):
        slopes = steps.two_sided_scaled(lambda at: ((at - target) ** 2).sum() / 2, before, [z], 1e-2)
        assert slopes.g.item() == pytest.approx(((before - target).double() @ (z.double() / k.sqrt())).item(), rel=1e-3)
        step = -moved_by(record, WIDTH) / record.plan.lr / k.sqrt()
        theta, k = theta - record.plan.lr * step, 0.95 * k + 0.05 * step**2
        torch.testing.assert_close(after.double(), theta, rtol=0, atol=5e-6)
    assert steps.hiso(make_config({})) == steps.FedAvg()
    with pytest.raises(MeerkatError, match="give --local-steps 1"):
        steps.hiso(config.model_copy(update={"local_steps": 2}))


def test_fzoo_needs_a_spread() -> None:
    with pytest.raises(MeerkatError, match="give --directions 2 or more"):
        steps.fzoo(make_config({}))
    (record,) = records(1)
    level = dataclasses.replace(record, aggregate=np.full_like(record.aggregate, 0.25))
    start, after = after_each(steps.FZOO(), [level])
    assert same_bits(start, after)
