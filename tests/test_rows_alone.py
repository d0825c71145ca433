"""The rounding attack: under privacy, what a row (or a client) contributes must not depend on what else is asked.

A slope divides a loss' rounding by 2 eps. If that rounding depends on the rows that share a forward pass, one row moves
the contributions of all others, and no clip bounds that.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Setting, frame, write_rows
from problems import shapes

pytest.importorskip("dp_accounting")

from meerkat.algorithm.replica import Replica
from meerkat.algorithm.replies import Scalars
from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.server import ServerState
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.cli import main
from meerkat.federation.frames import Kind, Work
from meerkat.masks.sparse_mask import SparseMask, fingerprint
from meerkat.privacy import mechanism as mechanisms
from meerkat.privacy.mechanism import Mechanism, clipped
from meerkat.problems.problem import Problem, client_losses
from meerkat.run.local_engine import LocalEngine
from meerkat.run.setup import open_problem, resolve
from meerkat.settings.config import EMBEDDED, make_config

ROWS, EPS, CLIP = 32, 1e-6, 1e-4
QUIET: dict[str, Any] = {"eps": EPS, "dp": "example", "dp_clip": CLIP, "dp_noise_multiplier": 4.0}
"""What the audit's attacker chose: a small eps, a small clip, and entries that hardly move a loss."""


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The vectors of every noisy sum that is released: rows' slopes along a step's directions, float64 [rows, P]."""
    seen: list[np.ndarray] = []
    release = Mechanism.release

    def noting(mechanism: Mechanism, vectors: np.ndarray) -> np.ndarray:
        seen.append(vectors.copy())
        return release(mechanism, vectors)

    monkeypatch.setattr(Mechanism, "release", noting)
    return seen


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """The attacker's run on the embedded model: 100 entries of an attention's queries may move."""
    config = resolve(
        make_config(
            {"task": "topics", "partition": "sites", "clients": 1, "rounds": 1, "batch_size": ROWS, "lr": 0.1}
            | {"dtype": "float32", "eps": 1e-3, "threads": 1, "device": "cpu", **QUIET}
        )
    )
    model = open_problem(config).model
    name = "model.layers.1.self_attn.q_proj.weight"
    shape = tuple(dict(model.named_parameters())[name].shape)
    total = sum(p.numel() for p in model.parameters())
    mask = SparseMask({name: torch.arange(100)}, {name: shape}, fingerprint(model), total)
    return Setting(Path(), tmp_path_factory.mktemp("quiet"), config, mask, [ROWS])


def rows_of_all_lengths() -> list[dict[str, Any]]:
    """Rows of a few words to many, made of the topics task's own."""
    rows = open_problem(resolve(make_config({"task": "topics", "threads": 1, "device": "cpu"}))).rows("train")
    words = " ".join(row["text"] for row in rows[:400]).split()
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, len(words) - 130, ROWS), 3 + rng.integers(1, 110, ROWS)
    made = [
        {"text": " ".join(words[at : at + length]), "label": int(rng.integers(0, 4))}
        for at, length in zip(starts, lengths, strict=True)
    ]
    return sorted(made, key=lambda row: len(row["text"]))


def answered_by_a_site(
    setting: Setting, rows: Sequence[dict[str, Any]], to: Path, released: list[np.ndarray]
) -> np.ndarray:
    """The slopes behind the reply of a site that has these rows, float64 [rows, P]."""
    write_rows(to / "rows", rows)
    own = {"data": str(to / "rows"), "model": EMBEDDED, "ledger": str(to / "ledger")}
    site = setting.site(0, **own, accepts={"epsilon": 1.0, "eps_minimum": EPS, "dp_clip_minimum": CLIP})
    try:
        asked = Work(lr=0.0, steps=1, pointer=0).encode()
        answer = site.answer(frame(Kind.WORK, 0, ServerState(Replica(0, setting.theta_0)), asked))
    finally:
        site.close()
    assert answer is not None
    return released.pop()


def test_a_row_that_is_left_out_of_a_site_moves_no_other_row_s_slope(
    quiet: Setting, released: list[np.ndarray], tmp_path: Path
) -> None:
    rows = rows_of_all_lengths()
    whole = answered_by_a_site(quiet, rows, tmp_path / "whole", released)
    for left_out in (0, ROWS // 2, ROWS - 1):
        others = [row for row in range(ROWS) if row != left_out]
        without = answered_by_a_site(quiet, [rows[k] for k in others], tmp_path / str(left_out), released)
        moved = (clipped(whole, CLIP).sum(0) - clipped(without, CLIP).sum(0)).item() / CLIP
        moving = np.mean(whole[others] != without)
        print(f"row {left_out} left out: the sum moves by {abs(moved):.2f} C, {moving:.2f} of the other rows move")
        assert np.array_equal(whole[others], without), f"the sum moved by {abs(moved):.2f} C"


def scalars_where_sampled(
    clients: Sequence[int], data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> dict[int, np.ndarray]:
    """What each client sends in the first round of a client-level simulation that samples these."""
    sent: dict[int, np.ndarray] = {}
    run = LocalEngine.run

    def listening(engine: LocalEngine, state: ServerState, plan: RoundPlan) -> Any:
        replies = run(engine, state, plan)
        sent.update({reply.client: reply.scalars for reply in replies if isinstance(reply, Scalars)})
        return replies

    arguments = [
        *("simulate", "--task", "topics", "--data", str(data), "--clients", "4", "--partition", "iid"),
        *("--rounds", "1", "--eval-every", "0", "--threads", "1", "--device", "cpu", "--out", str(out)),
        *("--lr", "0.05", "--eps", "1e-3", "--gradip", "off", "--weights", "equal"),
        *("--dp", "client", "--dp-noise-multiplier", "2", "--method", "random-mask", *options),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "run", listening)
        patch.setattr(Mechanism, "sample", lambda *_: np.array(clients))
        assert main(arguments) == 0
    return sent


@pytest.mark.parametrize("batching", ["auto", "off"])
def test_a_client_s_scalars_depend_on_no_other_client_that_is_sampled(
    few_topics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    every = scalars_where_sampled([0, 1, 2, 3], few_topics, tmp_path / "every", monkeypatch, "--batching", batching)
    alone = scalars_where_sampled([0], few_topics, tmp_path / "alone", monkeypatch, "--batching", batching)
    print(f"client 0 sends {every[0].item():.9g} among four, {alone[0].item():.9g} alone")
    assert np.array_equal(every[0], alone[0])


# --- a row's loss is the row's alone, whatever the problem and the machine's settings ---


def topics(**changes: Any) -> Problem:
    """The embedded model and task."""
    return open_problem(
        resolve(
            make_config({"task": "topics", "dtype": "float32", "eps": 1e-3, "threads": 1, "device": "cpu", **changes})
        )
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "float32": topics,
    "bfloat16": lambda: topics(dtype="bfloat16"),
    "float16": lambda: topics(dtype="float16"),
    "batching off": lambda: topics(batching="off"),
    "micro_batch 1": lambda: topics(micro_batch=1),
    "tokens_per_pass 40": lambda: topics(tokens_per_pass=40),
    "language-modelling": lambda: topics(objective="language-modelling"),
    "an extension's": lambda: shapes(make_config({"device": "cpu"})),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_may_be_private(dtype: str) -> None:
    """What it rounds away is the row's own, and the clip comes last."""
    assert make_config({"dp": "example", "dp_epsilon": 1.0, "dtype": dtype}).dtype == dtype


@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_row_s_loss_is_the_same_bits_among_any_rows_and_at_any_place(kind: str) -> None:
    problem = PROBLEMS[kind]()
    rows = problem.rows("train")[:40] if kind == "an extension's" else rows_of_all_lengths()
    losses_of = client_losses(problem, problem.prepare(rows), "example")
    alone = torch.cat([losses_of([np.array([row])])() for row in range(len(rows))])
    assert len(alone.unique()) > len(rows) / 2
    rng = np.random.default_rng(1)
    for count in (1, 2, 7, len(rows)):
        drawn = rng.permutation(len(rows))[:count]
        clients = np.array_split(drawn, 3)
        assert torch.equal(losses_of(clients)(), alone[torch.from_numpy(drawn)]), (kind, count)


def test_a_simulation_s_rows_have_the_slopes_of_the_site_s(
    quiet: Setting, released: list[np.ndarray], tmp_path: Path
) -> None:
    rows = rows_of_all_lengths()
    of_site = answered_by_a_site(quiet, rows, tmp_path, released)
    problem = topics()
    dealt = [np.arange(3), np.arange(3, ROWS), np.arange(ROWS)]
    plan = RoundPlan(0, 0.1, EPS, 1, dict.fromkeys(range(3), 1))
    for together in (True, False):
        engine = LocalEngine(
            MaskedModel(problem.model, quiet.mask),
            quiet.directions,
            lambda client, _: dealt[client],
            client_losses(problem, problem.prepare(rows), "example"),
            together,
            Mechanism(CLIP, 4.0, ROWS),
        )
        engine.run(ServerState(Replica(0, quiet.theta_0)), plan)
        for client, of_client in enumerate(released[-3:]):
            assert np.array_equal(of_client, of_site[dealt[client]])


# --- the clip and the sum, in exact arithmetic ---


def squared_length(vector: np.ndarray) -> Fraction:
    return sum((Fraction(float(entry)) ** 2 for entry in vector), Fraction(0))


@pytest.mark.parametrize("ways", [1, 3, 100, 5_000])
def test_a_clipped_vector_is_no_longer_than_the_clip_but_for_a_few_last_places(ways: int) -> None:
    rng = np.random.default_rng(ways)
    for clip in (1e-30, 1e-4, 0.3, 1.0, 7.0, 1e30):
        vectors = rng.normal(size=(6, ways)) * 10.0 ** rng.integers(-40, 40, (6, 1))
        vectors[0] *= clip / np.linalg.norm(vectors[0])  # at the clip, but for its last places
        for vector, kept in zip(vectors, clipped(vectors, clip), strict=True):
            assert squared_length(kept) <= (Fraction(clip) * (1 + Fraction(8, 2**53))) ** 2
            assert np.array_equal(kept, clipped(vector[None], clip)[0]), "it depends on the vector alone"


def test_a_sum_is_exact_so_that_no_vector_s_part_in_it_depends_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, clip, noise = np.random.default_rng(0), 1.0, 0.37
    monkeypatch.setattr(mechanisms, "gaussian", lambda count: np.full(count, noise))
    vectors = rng.normal(size=(2_000, 3)) * 10.0 ** rng.integers(-20, 1, (2_000, 1))
    kept = clipped(vectors, clip)
    exact = [sum(map(Fraction, column), Fraction(noise)) for column in kept.T.tolist()]
    rounded = [round(total * 2**24) / 2**24 for total in exact]
    for order in (np.arange(2_000), rng.permutation(2_000)):
        assert Mechanism(clip, 1.0, 1.0).release(vectors[order]).tolist() == rounded


def test_what_is_released_keeps_no_bits_that_the_noise_does_not_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise lies on a grid of 2^-54 or so: a vector's finer bits would show beside it."""
    monkeypatch.setattr(mechanisms, "gaussian", lambda count: np.full(count, 0.375))
    for clip, sigma, expected in ((1.0, 1.0, 1.0), (2.0**-20, 3.0, 16.0), (1e-3, 0.7, 3.0)):
        mechanism = Mechanism(clip, sigma, expected)
        quiet = mechanism.release(np.array([[0.0]]))
        assert mechanism.release(np.array([[clip * sigma * 2.0**-50]])) == quiet
        moved = float((mechanism.release(np.array([[0.25 * clip]])) - quiet)[0]) * expected
        assert moved == pytest.approx(0.25 * clip, abs=2.0**-24 * sigma * clip)


def test_noise_itself_is_released_on_a_grid_of_its_size() -> None:
    released = Mechanism(1.0, 1.5, 1.0).release(np.zeros((0, 200))) * 2.0**24
    assert np.array_equal(released, released.round())
    assert len(set(released)) > 190


def test_without_noise_nothing_is_rounded() -> None:
    vectors = np.array([[1 / 3, 2.0**-60]])
    assert Mechanism(1.0, 0.0, 1.0).release(vectors).tolist() == vectors[0].tolist()
