"""Attacks through forward passes: a model that draws at random, and a row whose pass fails.

Under privacy a row's slopes must follow from theta and the row alone, and no row may show but through them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Setting, frame, write_rows
from problems import pictures
from torch import Tensor, nn

pytest.importorskip("dp_accounting")

from transformers import ReformerConfig, ReformerModelWithLMHead

from meerkat.algorithm.replica import Replica
from meerkat.algorithm.server import ServerState
from meerkat.federation.frames import Frame, Kind, Work, decode_json
from meerkat.privacy.mechanism import Mechanism
from meerkat.problems.classification import Classification
from meerkat.problems.module import ModuleProblem
from meerkat.problems.problem import Hides, Problem, client_losses
from meerkat.problems.tasks import TASKS

CANARY = "zq"
"""The word of the row whose pass fails, wherever it is asked for."""
NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 GB"
)


# --- a model that draws ---


class Drawing(nn.Module):
    """A linear layer with dropout in evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(nn.functional.dropout(inputs.flatten(1), 0.5, training=True))


def an_extension_s(_: Any) -> Problem:
    data = pictures(1, 8)
    return ModuleProblem(Drawing(), nn.CrossEntropyLoss(reduction="none"), data, data, ("a", "b", "c"))


def reformer(tokenizer: Any) -> Problem:
    """A causal LM whose attention hashes along directions that it draws in every pass."""
    sizes = {"hidden_size": 32, "attention_head_size": 8, "num_attention_heads": 4, "feed_forward_size": 48}
    chunks = {"lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "num_buckets": 8, "num_hashes": 1}
    config = ReformerConfig(
        vocab_size=384, attn_layers=["lsh"], axial_pos_embds=False, is_decoder=True, hash_seed=None, **sizes, **chunks
    )
    model = ReformerModelWithLMHead(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Classification(model, tokenizer, TASKS["sst2"], max_length=256)


def rows_of(problem: Problem) -> list[Any]:
    if isinstance(problem, ModuleProblem):
        return problem.rows("train")
    words, rng = ("a", "good", "bad", "film", "it", "was", "great"), np.random.default_rng(0)
    lengths = rng.integers(8, 20, size=6)
    return [{"sentence": " ".join(rng.choice(words, size=length)), "label": k % 2} for k, length in enumerate(lengths)]


@pytest.mark.parametrize("hides", ["example", "client"])
@pytest.mark.parametrize("make", [an_extension_s, reformer])
def test_what_a_model_draws_for_a_row_follows_from_no_row_before(
    tokenizer: Any, make: Callable[[Any], Problem], hides: Hides
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        problem = make(tokenizer)
        losses_of = client_losses(problem, problem.prepare(rows_of(problem)), hides)

        def losses(rows: list[int]) -> Tensor:
            torch.manual_seed(1)  # as torch begins in every process: what is drawn is no chance
            return losses_of([np.array([row]) for row in rows])()

        with torch.no_grad():
            whole, without = losses([0, 1, 2, 3, 4, 5]), losses([1, 2, 3, 4, 5])
        assert len(whole.unique()) == 6
        moved = (whole[1:] - without).abs().max().item()
        assert torch.equal(whole[1:], without), f"a row left out moves the losses of others by {moved:.3g}"


def test_passes_leave_torch_s_generator_as_it_was() -> None:
    problem = an_extension_s(None)
    losses = client_losses(problem, problem.prepare(problem.rows("train")), "example")([np.arange(3)])
    before = torch.random.get_rng_state()
    losses()
    assert torch.equal(torch.random.get_rng_state(), before)


# --- a row whose pass fails ---


@pytest.fixture(scope="module")
def private(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    setting = Setting.make(federation, tmp_path_factory.mktemp("rows"), clients=1, batch_size=8)
    return setting.but(dp="example", dp_noise_multiplier=4.0)


def failing(monkeypatch: pytest.MonkeyPatch, where: str, error: Exception) -> None:
    """Make a pass, or its layout, fail wherever the canary's tokens are in it."""
    plain = getattr(Classification, where)

    def meddled(problem: Classification, given: Any, *purpose: Any) -> Any:
        batch = given if where == "row_losses" else plain(problem, given, *purpose)
        if any(CANARY in problem.tokenizer.decode(ids) for one in batch.passes for ids in one.input_ids):
            raise error
        return plain(problem, given, *purpose)

    monkeypatch.setattr(Classification, where, meddled)


def answer(setting: Setting, tmp_path: Path, rows: list[dict[str, Any]], **accepts: Any) -> tuple[Frame, int]:
    """The frame that answers the first question, and how many answers the site's ledger has."""
    write_rows(tmp_path / "data", rows)
    site = setting.site(0, data=str(tmp_path / "data"), ledger=str(tmp_path / "ledger"), accepts=accepts)
    try:
        asked = frame(Kind.WORK, 0, ServerState(Replica(0, setting.theta_0)), Work(lr=0.0, steps=1, pointer=0).encode())
        sent = site.answer(asked)
    finally:
        site.close()
    assert sent is not None
    return Frame.decode(sent), (tmp_path / "ledger").read_text().count('"kind":"answer"')


ROWS = [{"sentence": "it was good", "label": 0}] * 7


@pytest.mark.parametrize("where", ["row_losses", "batch"])
@pytest.mark.parametrize(
    "error", [RuntimeError(NO_MEMORY), torch.OutOfMemoryError("CUDA"), MemoryError(), KeyError(CANARY)]
)
def test_a_row_whose_pass_fails_shows_in_no_answer_and_no_charge(
    private: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    error: Exception,
) -> None:
    failing(monkeypatch, where, error)
    with_canary, charged = answer(private, tmp_path, [*ROWS, {"sentence": CANARY, "label": 1}], epsilon=5.0)
    assert with_canary.kind is Kind.REPLY, decode_json(with_canary.body)[1]
    assert charged == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "row 8" in line]
    assert len(told) == 1, "once, and in the site's own log"


def test_a_row_whose_pass_fails_has_no_slope_and_moves_no_other(
    private: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[np.ndarray] = []
    monkeypatch.setattr(Mechanism, "release", lambda _, vectors: released.append(vectors) or np.zeros(1))
    failing(monkeypatch, "row_losses", RuntimeError(NO_MEMORY))
    for name, more in {"without": [], "with": [{"sentence": CANARY, "label": 1}]}.items():
        (tmp_path / name).mkdir()
        answer(private, tmp_path / name, [*ROWS, *more], epsilon=5.0)
    without, with_canary = released
    assert with_canary.tolist() == [*without.tolist(), [0.0]]


def test_an_interrupt_is_no_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = an_extension_s(None)
    losses = client_losses(problem, problem.prepare(problem.rows("train")), "example")([np.arange(3)])

    def interrupted(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(ModuleProblem, "row_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        losses()


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError(NO_MEMORY), "out of memory"),
        (torch.OutOfMemoryError("CUDA"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "error"),
    ],
)
def test_without_privacy_a_pass_that_fails_is_told_in_fixed_words(
    private: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, why: str
) -> None:
    failing(monkeypatch, "row_losses", error)
    told, _ = answer(
        private.but(dp="none", dp_noise_multiplier="auto"), tmp_path, [*ROWS, {"sentence": CANARY, "label": 1}]
    )
    assert told.kind is Kind.FAILED
    assert decode_json(told.body)[1] == {"why": why}
