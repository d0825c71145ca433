"""A task's curvature on public data: the subspace of directions that follows from it, and the rate of `--lr auto`."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation, Setting
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from meerkat.algorithm.curvature import RANK, Curvature, curvature
from meerkat.algorithm.directions import NORMAL, Directions, Place, direction
from meerkat.algorithm.live_entries import entries_that_move
from meerkat.cli import main
from meerkat.errors import MeerkatError
from meerkat.federation.site_settings import Refused
from meerkat.masks.sparse_mask import CURVATURE, SparseMask
from meerkat.masks.subspace import GRID, LARGEST_RANK, Subspace
from meerkat.record import verification
from meerkat.record.run_folder import RunFolder
from meerkat.run.curvature import with_curvature
from meerkat.run.setup import open_problem
from meerkat.settings.config import RunConfig

KEY = 2**100 + 7
AT = Place("training", 3, 1, 0)


def random_subspace(rank: int, entries: int, seed: int = 0) -> Subspace:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -3, rank)[:, None]
    return Subspace.of(torch.randn(rank, entries, generator=generator) * scales)


def by_hand(subspace: Subspace, e: np.ndarray) -> list[float]:
    """z in rational numbers, rounded once."""
    steps = [Fraction(round(Fraction(float(value)) / Fraction(GRID))) for value in e]
    unit = Fraction(GRID) * Fraction(2) ** subspace.exponent
    columns = subspace.coefficients.T.tolist()
    return [float(np.float32(float(unit * sum(map(Fraction.__mul__, steps, map(Fraction, c)))))) for c in columns]


# --- directions within a subspace ---


@given(st.integers(1, LARGEST_RANK), st.integers(1, 40), st.integers(0, 2**32))
def test_z_is_the_exact_sum_rounded_once(rank: int, entries: int, seed: int) -> None:
    subspace = random_subspace(rank, entries, seed)
    z = Directions(seed, entries, subspace=subspace)(AT)
    assert z.dtype == torch.float32
    assert z.tolist() == by_hand(subspace, direction(seed, AT, rank))


def test_a_sum_is_exact_where_it_is_longest() -> None:
    largest = torch.full((LARGEST_RANK, 3), 2**15 - 1, dtype=torch.int16)
    e = np.full(LARGEST_RANK, NORMAL.table.max(), np.float32)
    assert Subspace(largest, -9).combine(e, 0, 3).tolist() == by_hand(Subspace(largest, -9), e)


def test_any_part_in_any_order_is_the_same() -> None:
    subspace, e = random_subspace(16, 101), direction(KEY, AT, 16)
    whole = subspace.combine(e, 0, 101)
    parts = [subspace.combine(e, start, min(17, 101 - start)) for start in range(0, 101, 17)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert Subspace(subspace.coefficients[order], subspace.exponent).combine(e[order], 0, 101).tobytes() == (
        whole.tobytes()
    )


def test_calibrations_are_along_plain_directions() -> None:
    z = Directions(KEY, 50, subspace=random_subspace(8, 50))
    plain = AT._replace(phase="calibration")
    assert torch.equal(z(plain), Directions(KEY, 50)(plain))
    assert not torch.equal(z(AT), Directions(KEY, 50)(AT))


def test_a_direction_is_as_long_as_a_plain_one_on_the_average() -> None:
    subspace = random_subspace(16, 300)
    z = Directions(KEY, 300, subspace=subspace)
    squares = [float(z(AT._replace(round=r)).square().sum()) for r in range(3000)]
    assert np.mean(squares) == pytest.approx(300, rel=0.15)
    assert float(subspace.spread().square().sum()) == pytest.approx(300, rel=1e-3)


def test_a_rank_counts_directions_and_not_lengths() -> None:
    assert random_subspace(16, 100).rank() == 16
    twice = random_subspace(8, 100).coefficients
    assert Subspace(torch.cat([twice, -twice]), -12).rank() == 8
    assert Subspace(torch.cat([twice[:1], torch.zeros(3, 100, dtype=torch.int16)]), -12).rank() == 1


# --- in a mask ---


@pytest.fixture
def mask() -> SparseMask:
    entries = {"a": torch.arange(0, 60, 3), "b": None}
    return SparseMask(entries, {"a": (60,), "b": (4, 5)}, "0" * 64, 1000, subspace=random_subspace(9, 40))


def test_a_mask_s_file_has_its_subspace(mask: SparseMask, tmp_path: Path) -> None:
    mask.save(tmp_path / "mask")
    loaded = SparseMask.load(tmp_path / "mask")
    assert loaded.subspace is not None
    assert mask.subspace is not None
    assert torch.equal(loaded.subspace.coefficients, mask.subspace.coefficients)
    assert loaded.subspace.exponent == mask.subspace.exponent
    assert loaded.digest() == mask.digest()


def test_another_subspace_is_another_mask(mask: SparseMask) -> None:
    assert mask.subspace is not None
    changed = mask.subspace.coefficients.clone()
    changed[3, 5] += 1
    others = [None, Subspace(changed, mask.subspace.exponent), replace(mask.subspace, exponent=-3)]
    digests = {replace(mask, subspace=other).digest() for other in others}
    assert len(digests | {mask.digest()}) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"coefficients": torch.zeros(9, 40, dtype=torch.int16)},
        {"coefficients": torch.ones(9, 39, dtype=torch.int16)},
        {"coefficients": torch.ones(65, 40, dtype=torch.int16)},
        {"coefficients": torch.ones(9, 40, dtype=torch.int32)},
        {"coefficients": torch.ones(40, dtype=torch.int16)},
        {"exponent": 65},
        {"exponent": -10_000},
    ],
    ids=str,
)
def test_a_malformed_subspace_is_refused(mask: SparseMask, tmp_path: Path, change: dict[str, Any]) -> None:
    mask.save(tmp_path / "mask")
    with safe_open(tmp_path / "mask", "pt") as file:
        tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["subspace"] = change.get("coefficients", tensors["subspace"])
    save_file(tensors, tmp_path / "mask", {**meta, "subspace_exponent": str(change.get("exponent", -9))})
    with pytest.raises(MeerkatError, match="damaged"):
        SparseMask.load(tmp_path / "mask")


def test_an_entry_that_no_direction_moves_does_not_count_as_moving() -> None:
    subspace = random_subspace(8, 40)
    subspace.coefficients[:, 10:] = 0
    one = SparseMask({"a": torch.arange(40)}, {"a": (60,)}, "0" * 64, 1000, subspace=subspace)
    assert len(entries_that_move(one, torch.ones(40), 1e-3, torch.float32)) == 10


# --- curvature ---


def low_rank(rows: int, entries: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, 20, generator=generator) @ (
        torch.logspace(1, -1, 20)[:, None] * torch.randn(20, entries, generator=generator)
    )


def test_the_first_directions_are_those_of_the_whole_matrix() -> None:
    gradients = low_rank(333, 70)
    known = curvature(iter(gradients), rows=111)
    dense = gradients.double().T @ gradients.double() / 111
    values, vectors = torch.linalg.eigh(dense)
    assert known.trace == pytest.approx(float(dense.trace()), rel=1e-6)
    assert known.eigenvalues[:12].tolist() == pytest.approx(values.flip(0)[:12].tolist(), rel=1e-4)
    overlaps = (known.vectors[:12].double() * vectors.flip(1)[:, :12].T).sum(1).abs()
    assert overlaps.min() > 0.999


def test_the_trace_needs_no_directions() -> None:
    known = curvature(iter(low_rank(10, 30)), rows=5, keep=False)
    assert known.trace == pytest.approx(curvature(iter(low_rank(10, 30)), rows=5).trace)
    assert known.vectors.numel() == 0


def test_steps_along_the_subspace_meet_the_curvature_that_is_told() -> None:
    gradients = low_rank(200, 90)
    known = curvature(iter(gradients), rows=200)
    subspace, z = known.subspace(), Directions(KEY, 90, subspace=known.subspace())
    met = [float((gradients @ z(AT._replace(round=r))).square().mean()) for r in range(4000)]
    assert known.along(subspace) == pytest.approx(np.mean(met), rel=0.1)
    # the stiffest direction has a share of the trace that its eigenvalue alone would not allow
    stiff = (subspace.coefficients.double().square().sum(1) * 4.0**subspace.exponent * known.eigenvalues[:RANK]).numpy()
    assert stiff[0] / stiff.sum() < float(known.eigenvalues[0]) / known.trace


def test_without_damping_no_direction_is_longer_than_another() -> None:
    known = Curvature(3.0, torch.tensor([2.0, 1.0], dtype=torch.float64), torch.eye(2, 5))
    lengths = known.subspace(damping=1e9).coefficients.double().norm(dim=1)
    assert lengths[0] == pytest.approx(float(lengths[1]), rel=1e-3)


# --- runs ---


def dense_curvature(setting: Setting) -> Tensor:
    """H at the mask from each candidate's score, by backpropagation through its row's loss: float64 [n, n]."""
    problem = open_problem(setting.config)
    public = problem.public()
    assert public is not None
    parameters = dict(problem.model.named_parameters())
    moving = [parameters[name].requires_grad_() for name in setting.mask.entries]
    total = torch.zeros(len(setting.mask), len(setting.mask), dtype=torch.float64)
    count = len(problem.labels)
    for row in public.rows:
        each = []
        for label in range(count):
            loss = problem.row_losses(problem.batch(problem.prepare([{**row, "label": label}]), "gradient"))[0]
            parts = zip(torch.autograd.grad(loss, moving), setting.mask.entries.values(), strict=True)
            each.append(torch.cat([g.flatten() if at is None else g.flatten()[at] for g, at in parts]).double())
        scores = torch.stack(each)
        apart = scores - scores.mean(0)
        total += apart.T @ apart / count
    return total / len(public.rows)


@pytest.fixture
def root(federation: Path, tmp_path: Path) -> Path:
    """The tiny federation with text enough for a subspace."""
    shutil.copytree(federation, tmp_path / "root")
    words = ["good", "bad", "film", "plot", "the", "a", "was", "not", "very", "it"]
    texts = [" ".join(words[(i * j) % 10] for j in range(1, 4 + i % 5)) + "." for i in range(1, 25)]
    (tmp_path / "root" / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path / "root"


@pytest.fixture
def setting(root: Path, tmp_path: Path) -> Setting:
    return Setting.make(root, tmp_path / "sites", density=0.02)


def settled(setting: Setting, **changes: Any) -> tuple[RunConfig, SparseMask]:
    config = setting.config.model_copy(update={"lr": "auto", **changes})
    return with_curvature(config, open_problem(config), setting.mask)


def test_the_rate_is_measured_on_public_text(setting: Setting) -> None:
    config, mask = settled(setting)
    trace = float(dense_curvature(setting).trace())
    assert config.lr == float(f"{0.3 / trace:.1e}")
    assert mask.subspace is None
    assert settled(setting, lr=0.25)[0].lr == 0.25


def test_the_rate_in_a_subspace_is_measured_along_it(setting: Setting) -> None:
    config, mask = settled(setting, estimator="subspace")
    assert mask.subspace is not None
    assert mask.digest() != setting.mask.digest()
    rows = mask.subspace.coefficients.double() * 2.0**mask.subspace.exponent
    assert config.lr == pytest.approx(0.3 / float((rows @ dense_curvature(setting) @ rows.T).trace()), rel=0.06)


def test_a_mask_that_has_the_curvature_of_the_same_text_keeps_it(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, mask = settled(setting, estimator="subspace")
    monkeypatch.setattr("meerkat.run.curvature.curvature", None)  # whoever measures again fails
    again = replace(setting, mask=mask)
    assert settled(again, estimator="subspace")[0].lr == config.lr
    assert settled(again, estimator="subspace")[1].digest() == mask.digest()
    with pytest.raises(TypeError):
        settled(again, estimator="subspace", text_sequences=10)


def test_what_was_measured_stands_in_the_mask(setting: Setting) -> None:
    _, mask = settled(setting, estimator="subspace")
    fact = json.loads(mask.facts[CURVATURE])
    assert fact["trace"] * (1 + 1e-6) > sum(fact["eigenvalues"]) > 0
    assert fact["eigenvalues"] == sorted(fact["eigenvalues"], reverse=True)
    assert mask.description_digest() == setting.mask.description_digest()


@pytest.mark.parametrize(
    "changes",
    [{}, {"directions": 2, "local_steps": 3, "rounds": 2}, {"update_rule": "adam", "server_lr": 0.01}],
    ids=str,
)
def test_a_federation_in_a_subspace_is_the_simulation_to_the_bit(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config, mask = settled(setting, estimator="subspace")
    ours = replace(setting, mask=mask, config=config.model_copy(update=changes))
    federation = Federation.of(ours, monkeypatch)
    federation.lived(tmp_path / "run")
    digests = [record["theta"] for record in federation.records if record["kind"] == "round"]
    assert digests == ours.simulated()
    assert digests != setting.but(**changes, lr=config.lr).simulated()


def test_a_site_says_of_how_few_directions_a_subspace_may_be(setting: Setting) -> None:
    config, mask = settled(setting, estimator="subspace")
    assert mask.subspace is not None
    few = replace(mask.subspace, coefficients=mask.subspace.coefficients[:7])
    ours = replace(setting, mask=replace(mask, subspace=few), config=config)
    with pytest.raises(Refused, match=r"subspace_minimum: the run asks for a subspace of rank 7, .* at least 8"):
        ours.site(0)
    ours.site(0, accepts={"subspace_minimum": 7})
    replace(setting, mask=mask, config=config).site(0)


def test_a_run_in_a_subspace_is_resumed_and_verified(simulate_arguments: list[str], root: Path, tmp_path: Path) -> None:
    more = ("--text", str(root / "text.jsonl"), "--estimator", "subspace", "--out", str(tmp_path / "run"))
    assert main([*simulate_arguments, *more]) == 0
    summary = RunFolder(tmp_path / "run").summary()
    assert summary is not None
    assert verification.verify(tmp_path / "run").finished
    assert RunFolder(tmp_path / "run").mask().subspace is not None
    (tmp_path / "cut").mkdir()
    for name in ("config.toml", "mask.safetensors", "rounds.log"):
        (tmp_path / "cut" / name).write_bytes((tmp_path / "run" / name).read_bytes())
    lines = (tmp_path / "cut" / "rounds.log").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut" / "rounds.log").write_bytes(b"".join(lines[:3]))
    assert main(["resume", str(tmp_path / "cut")]) == 0
    resumed = RunFolder(tmp_path / "cut").summary()
    assert resumed is not None
    assert resumed["theta_digest"] == summary["theta_digest"]
    # a run that was killed before its mask was there makes the same one again
    for name in ("mask.safetensors", "rounds.log", "summary.json"):
        (tmp_path / "cut" / name).unlink()
    assert main(["resume", str(tmp_path / "cut")]) == 0
    again = RunFolder(tmp_path / "cut").summary()
    assert again is not None
    assert again["theta_digest"] == summary["theta_digest"]


def test_too_little_text_for_a_subspace_is_said(
    simulate_arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*simulate_arguments, "--estimator", "subspace", "--out", str(tmp_path / "run")]) == 2
    assert "takes 16 directions, and public text gives 4; give more --text" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--method", "full-fedzo"],
            "estimator subspace: is for sparse masks and scalars, and method full-fed",
        ),
        (["--method", "fo-fedavg"], "estimator subspace: is for sparse masks and scalars, and method fo-fed"),
        (
            ["--method", "meerkat-vp", "--local-steps", "2"],
            "estimator subspace: calibrations are along plain",
        ),
        (["--dp", "example", "--dp-epsilon", "8"], "estimator subspace: dp example clips and hides scalars"),
    ],
    ids=str,
)
def test_what_a_subspace_does_not_go_with(
    simulate_arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], told: str
) -> None:
    arguments = [*simulate_arguments, "--estimator", "subspace", *options, "--out", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
