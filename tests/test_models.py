import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, tiny_model
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    MistralConfig,
    MistralForCausalLM,
    modeling_utils,
)

from meerkat.errors import MeerkatError, RunFailed
from meerkat.problems.causal_lm import (
    candidate_scores,
    collate,
    evaluate,
    language_modelling_loss,
    load_text,
    longest_input,
    row_losses,
)
from meerkat.problems.classification import Classification
from meerkat.problems.models import load_model
from meerkat.problems.packing import packs
from meerkat.problems.tasks import Candidate, Example, Row, Task, encode

TASK = Task("films", "{text} it was {label}", ("great", "terrible film", "No"), needs=("text",))
TEXTS = ["the film", "x", "the plot, the film the plot: yes", "film or plot or neither", "it was not so"]
ROWS: list[Row] = [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"sort": False},
    {"sequences_per_pass": 1},
    {"sequences_per_pass": 3},
    {"sequences_per_pass": 3, "sort": False},
    {"tokens_per_pass": 40},
    {"tokens_per_pass": 40, "sort": False},
    {"tokens_per_pass": 1},
    {"tokens_per_pass": 60, "sequences_per_pass": 2},
]
PACKED: list[dict[str, Any]] = [
    {"packed": True},
    {"packed": True, "sort": False},
    {"packed": True, "tokens_per_pass": 40},
    {"packed": True, "sequences_per_pass": 2},
]


def one_line(refusal: pytest.ExceptionInfo[MeerkatError]) -> str:
    message = str(refusal.value)
    assert message.strip()
    assert "\n" not in message
    return message


def literal_candidates(row: Row, tokenizer: Any) -> list[tuple[list[int], int]]:
    """Each candidate's tokens, and how many at the end cover the label's characters."""
    pairs = []
    for label in TASK.labels:
        ids = tokenizer(f"{row['text']} it was {label}")["input_ids"]
        lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(ids)]
        pairs.append((ids, next(n for n in range(1, len(ids)) if sum(lengths[-n:]) >= len(label))))
    return pairs


def literal_scores(model: nn.Module, rows: Sequence[Row], tokenizer: Any) -> Tensor:
    """Each candidate in an unpadded pass of its own, by the slow twin."""
    with torch.no_grad():
        return torch.tensor(
            [
                [
                    reference._token_log_probabilities(model, torch.tensor(ids))[-count:].mean().item()
                    for ids, count in literal_candidates(row, tokenizer)
                ]
                for row in rows
            ]
        )


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> list[Example]:
    encoded = encode(TASK, ROWS, tokenizer, 128)
    lengths = {len(sequence) for example in encoded for sequence in example.sequences}
    assert len(lengths) > 4  # they need padding
    assert {len(c.targets) for example in encoded for c in example.candidates} == {1, 2}
    assert {len(example.sequences) for example in encoded} == {2}
    return encoded


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def scored(request: pytest.FixtureRequest, tokenizer: Any) -> tuple[nn.Module, Tensor]:
    """A model, and the scores it should give to ROWS."""
    model = tiny_model(request.param)
    return model, literal_scores(model, ROWS, tokenizer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_padding_token_s_embedding_has_the_gradient_of_the_loss(
    architecture: str, tokenizer: Any, tmp_path: Path
) -> None:
    """Here, as in many models, the token that pads also begins every text."""
    tiny_model(architecture).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    model = model.double()
    ids, table = torch.tensor([[0, 5, 1, 9, 0]]), model.get_input_embeddings().weight.requires_grad_(True)
    along = torch.zeros_like(table)
    along[[0, 1]] = torch.randn(2, table.shape[1], generator=torch.Generator().manual_seed(0)).double()

    def loss(by: float) -> Tensor:
        with torch.no_grad():
            table.add_(along, alpha=by)
        value: Tensor = model(input_ids=ids).logits.logsumexp(-1).sum()
        return value

    (gradient,) = torch.autograd.grad(loss(0.0), table)
    above, below = loss(1e-3), loss(-2e-3)
    assert (gradient * along).sum().item() == pytest.approx((above - below).item() / 2e-3, rel=0.01)


# --- scores ---


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scores_are_those_of_unpadded_single_passes(
    scored: tuple[nn.Module, Tensor], examples: list[Example], layout: dict[str, Any]
) -> None:
    model, expected = scored
    scores = candidate_scores(model, collate(examples, **layout))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert expected.std(0).min() > 0.01  # rows and candidates do differ
    assert expected.std(1).min() > 0.01


@pytest.mark.parametrize("layout", PACKED, ids=str)
def test_scores_in_packs_are_those_of_unpadded_single_passes(
    scored: tuple[nn.Module, Tensor], examples: list[Example], layout: dict[str, Any]
) -> None:
    model, expected = scored
    if not packs(model):
        pytest.skip("its attention knows no trees")
    torch.testing.assert_close(candidate_scores(model, collate(examples, **layout)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [collate, partial(collate, packed=True)])
def test_losses_of_single_tokens_are_those_of_their_log_probabilities(batch: Callable[..., Any]) -> None:
    """The output layer computes the candidates' logits alone."""
    model = tiny_model()
    rows = batch([token_row_of_one_prompt(length, 7, 8, 30) for length in (9, 4, 6)])
    shapes: list[torch.Size] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: shapes.append(logits.shape))
    losses = row_losses(model, rows)
    assert {shape[-1] for shape in shapes} == {3}
    expected = nn.functional.cross_entropy(candidate_scores(model, rows), rows.labels, reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.01


def test_scores_are_the_same_where_all_sequences_keep_the_same_positions(
    scored: tuple[nn.Module, Tensor], examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(modeling_utils, "slice_logits_to_keep", raising=False)  # so it is before transformers 5.21
    model, expected = scored
    torch.testing.assert_close(candidate_scores(model, collate(examples)), expected, atol=1e-5, rtol=1e-5)


def test_losses_of_classification_are_the_slow_twins(
    scored: tuple[nn.Module, Tensor], examples: list[Example], tokenizer: Any
) -> None:
    model, _ = scored
    losses = row_losses(model, collate(examples, sequences_per_pass=3))
    expected = [
        reference.candidate_loss(model, literal_candidates(row, tokenizer), row["label"]).item() for row in ROWS
    ]
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)


def test_losses_of_language_modelling_are_those_of_the_right_labels_tokens(
    scored: tuple[nn.Module, Tensor], examples: list[Example]
) -> None:
    model, scores = scored
    losses = row_losses(model, collate(examples, sequences_per_pass=3), "language-modelling")
    expected = [-scores[i, row["label"]].item() for i, row in enumerate(ROWS)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)


def test_cut_examples_are_scored_as_their_tokens_are(tokenizer: Any) -> None:
    model, row = tiny_model(), {"text": "the film " * 20, "label": 0}
    whole = literal_candidates(row, tokenizer)
    excess = max(len(ids) for ids, _ in whole) - 12
    expected = [
        reference._token_log_probabilities(model, torch.tensor(ids[:1] + ids[1 + excess :]))[-count:].mean().item()
        for ids, count in whole
    ]
    scores = candidate_scores(model, collate(encode(TASK, [row], tokenizer, 12)))
    assert scores[0].tolist() == pytest.approx(expected, abs=1e-5)


def token_row(length: int, *labels: Sequence[int], label: int = 0, first: int = 1) -> Example:
    """A prompt of `length` made-up tokens and candidates of given ones, each in a sequence of its own."""
    prompt = [first + i % 5 for i in range(length)]
    return Example(
        sequences=tuple(np.array([*prompt, *tokens[:-1]]) for tokens in labels),
        candidates=tuple(Candidate(i, length - 1, np.array(tokens)) for i, tokens in enumerate(labels)),
        label=label,
    )


def token_row_of_one_prompt(length: int, *labels: int) -> Example:
    """A prompt of `length` made-up tokens and candidates of one token each."""
    prompt = np.array([1 + (length * i) % 11 for i in range(length)])
    return Example((prompt,), tuple(Candidate(0, length - 1, np.array([token])) for token in labels), label=0)


@pytest.fixture(scope="module")
def gemma() -> nn.Module:
    model: nn.Module = tiny_model("gemma2")
    return model


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6),
    st.booleans(),
    st.integers(0, 4),
    st.integers(0, 60),
)
def test_layout_never_changes_scores(
    gemma: nn.Module, shapes: list[tuple[int, int, int]], sort: bool, sequences_per_pass: int, tokens_per_pass: int
) -> None:
    rows = [token_row(length, range(10, 10 + a), range(20, 20 + b), first=length) for length, a, b in shapes]
    batch = collate(rows, sort=sort, sequences_per_pass=sequences_per_pass, tokens_per_pass=tokens_per_pass)
    expected = torch.cat([candidate_scores(gemma, collate([row], sequences_per_pass=1)) for row in rows])
    torch.testing.assert_close(candidate_scores(gemma, batch), expected, atol=1e-5, rtol=1e-5)


class WithoutLogitsToKeep(nn.Module):
    """A model that always gives all logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return self.inner(input_ids=input_ids, use_cache=use_cache)


@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=str)
def test_a_model_that_gives_all_logits_scores_the_same(
    scored: tuple[nn.Module, Tensor], examples: list[Example], layout: dict[str, Any]
) -> None:
    model, expected = scored
    scores = candidate_scores(WithoutLogitsToKeep(model), collate(examples, **layout))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_float32_scores(examples: list[Example], tokenizer: Any, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    batch = collate(examples)
    scores, losses = candidate_scores(model, batch), row_losses(model, batch)
    assert scores.dtype == losses.dtype == torch.float32
    assert (scores.to(dtype).float() != scores).float().mean() > 0.8  # no half-precision numbers in a wider type
    torch.testing.assert_close(scores, literal_scores(model, ROWS, tokenizer), atol=0.05, rtol=0)


def test_losses_can_be_differentiated_for_a_baseline_that_backpropagates(examples: list[Example]) -> None:
    model = tiny_model()
    row_losses(model, collate(examples)).mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# --- what goes through the model ---


def passes_through(model: nn.Module, batch: Any) -> list[torch.Size]:
    """Shape of the input of each forward pass."""
    shapes: list[torch.Size] = []

    def note(_: nn.Module, __: Any, arguments: dict[str, Any]) -> None:
        shapes.append(arguments["input_ids"].shape)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    candidate_scores(model, batch)
    handle.remove()
    return shapes


def padded_tokens(shapes: Sequence[torch.Size]) -> int:
    return sum(math.prod(shape) for shape in shapes)


MIXED_LENGTHS = [token_row(length, [7], first=length) for length in (4, 40, 5, 38, 4, 41, 6, 39)]


def test_sorting_saves_padded_tokens() -> None:
    model = tiny_model()
    unsorted = passes_through(model, collate(MIXED_LENGTHS, sort=False, sequences_per_pass=2))
    by_length = passes_through(model, collate(MIXED_LENGTHS, sequences_per_pass=2))
    assert padded_tokens(unsorted) == 2 * (40 + 38 + 41 + 39)
    assert padded_tokens(by_length) == 2 * (4 + 6 + 39 + 41)


def test_sorting_saves_forward_passes_at_a_limit_of_tokens() -> None:
    model = tiny_model()
    unsorted = passes_through(model, collate(MIXED_LENGTHS, sort=False, tokens_per_pass=82))
    by_length = passes_through(model, collate(MIXED_LENGTHS, tokens_per_pass=82))
    assert [tuple(shape) for shape in unsorted] == [(2, 40), (2, 38), (2, 41), (2, 39)]
    assert [tuple(shape) for shape in by_length] == [(4, 6), (2, 39), (2, 41)]


def test_a_pack_has_no_padding_and_each_prompt_once() -> None:
    model = tiny_model()
    rows = [token_row(length, [7, 8, 9], [10, 11], [12]) for length in (5, 20, 9)]  # branches of 2, 1 and 0 tokens
    assert [tuple(shape) for shape in passes_through(model, collate(rows, packed=True))] == [(1, 5 + 20 + 9 + 3 * 3)]
    by_limit = passes_through(model, collate(rows, packed=True, tokens_per_pass=21))
    assert [tuple(shape) for shape in by_limit] == [(1, 5 + 3 + 9 + 3), (1, 20 + 3)]


@pytest.mark.parametrize("lengths", [(3, 5), (12, 40), (12, 12, 7)])
def test_a_window_reaches_as_far_back_in_a_pack_as_in_a_pass_alone(lengths: tuple[int, ...]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=64, num_hidden_layers=2, sliding_window=6, **sizes)
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    assert packs(model)
    rows = [token_row(length, [7, 8, 9], [10, 11], first=length) for length in lengths]
    expected = torch.cat([candidate_scores(model, collate([row], sequences_per_pass=1)) for row in rows])
    torch.testing.assert_close(candidate_scores(model, collate(rows, packed=True)), expected, atol=1e-5, rtol=1e-5)


def test_models_whose_tokens_see_others_than_attention_tells_them_are_not_packed() -> None:
    assert packs(tiny_model())
    assert not packs(tiny_model("gemma2"))  # its attention is not sdpa
    assert not packs(STUB)
    without_positions = WithoutLogitsToKeep(tiny_model())
    without_positions.config = without_positions.inner.config
    assert not packs(without_positions)
    leaking = tiny_model()
    leaking.model.layers[1].register_forward_pre_hook(lambda _, inputs: (inputs[0].cumsum(1), *inputs[1:]))
    assert not packs(leaking)


def test_short_sequences_after_a_long_one_fill_their_pass() -> None:
    rows = [token_row(length, [7]) for length in (40, 4, 4, 4, 4)]
    shapes = passes_through(tiny_model(), collate(rows, sort=False, tokens_per_pass=40))
    assert [tuple(shape) for shape in shapes] == [(1, 40), (4, 4)]


def test_without_limits_all_goes_in_one_pass(examples: list[Example]) -> None:
    lengths = [len(sequence) for example in examples for sequence in example.sequences]
    for sort in (True, False):
        shapes = passes_through(tiny_model(), collate(examples, sort=sort))
        assert [tuple(shape) for shape in shapes] == [(len(lengths), max(lengths))]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.booleans(), st.integers(0, 5), st.integers(0, 100))
def test_passes_keep_to_their_limits(lengths: list[int], sort: bool, sequences: int, tokens: int) -> None:
    rows = [token_row(length, [7]) for length in lengths]
    shapes = passes_through(STUB, collate(rows, sort=sort, sequences_per_pass=sequences, tokens_per_pass=tokens))
    assert sum(count for count, _ in shapes) == len(lengths)
    for count, length in shapes:
        assert not sequences or count <= sequences
        assert not tokens or count * length <= tokens or count == 1


def test_candidates_of_one_token_share_one_short_sequence(tokenizer: Any) -> None:
    task = Task("own", "{text} {label}", ("great", "terrible", "film", "plot"), needs=("text",))
    batch = collate(encode(task, [{"text": "the film", "label": 0}], tokenizer, 128))
    prompt = len(tokenizer("the film")["input_ids"])
    assert [tuple(shape) for shape in passes_through(tiny_model(), batch)] == [(1, prompt)]


@pytest.mark.parametrize("by_sequence", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_positions_that_are_read_reach_the_head(
    architecture: str, by_sequence: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_sequence and not hasattr(modeling_utils, "slice_logits_to_keep"):
        pytest.skip("needs transformers 5.21")
    if not by_sequence:
        monkeypatch.delattr(modeling_utils, "slice_logits_to_keep", raising=False)
    model = tiny_model(architecture)
    shapes: list[torch.Size] = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    rows = [token_row(30, [7, 8, 9]), token_row(20, [7]), token_row(25, [7, 8])]
    candidate_scores(model, collate(rows))
    # sequences, the most label tokens of one or those of all, hidden size
    assert [tuple(shape) for shape in shapes] == [(3, 3 if by_sequence else 6, 32)]


# --- evaluation, by hand ---


class Bigrams(nn.Module):
    """A model whose next token's probabilities follow from the last one alone."""

    def __init__(self, probabilities: dict[int, dict[int, float]], vocabulary: int = 64) -> None:
        super().__init__()
        table = torch.full((vocabulary, vocabulary), -math.inf)
        table[:, 0] = 0.0  # what is not said is certain to be followed by token 0
        for token, following in probabilities.items():
            table[token, 0] = math.log(1 - sum(following.values()))
            for next_token, probability in following.items():
                table[token, next_token] = math.log(probability)
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        return SimpleNamespace(logits=self.table[input_ids])


STUB = Bigrams({})
BAD, GOOD, ODD = 10, 11, 12
BY_HAND = Bigrams(
    {
        1: {BAD: 0.6, GOOD: 0.2, ODD: 0.05},
        2: {BAD: 0.1, GOOD: 0.3, ODD: 0.05},
        3: {BAD: 0.2, GOOD: 0.3, ODD: 0.05},
        BAD: {20: 0.5},
        GOOD: {21: 0.125},
    }
)


def by_hand_row(last: int, label: int) -> Example:
    candidates = tuple(Candidate(0, 1, np.array([token])) for token in (BAD, GOOD, ODD))
    return Example((np.array([9, last]),), candidates, label)


def test_evaluation_counts_what_is_right_overall_and_by_class() -> None:
    batch = collate([by_hand_row(1, 0), by_hand_row(2, 0), by_hand_row(3, 1), by_hand_row(1, 0)])
    evaluation = evaluate(BY_HAND, batch, ("bad", "good", "odd"))
    losses = [-math.log(p) for p in (0.6 / 0.85, 0.1 / 0.45, 0.3 / 0.55, 0.6 / 0.85)]
    assert evaluation.rows == 4
    assert evaluation.per_class == {"bad": pytest.approx(2 / 3), "good": 1.0}  # no rows are odd
    assert evaluation.scores == {"accuracy": 0.75, "loss": pytest.approx(sum(losses) / 4)}


def test_a_label_of_several_tokens_is_scored_by_its_mean() -> None:
    row = token_row(1, [BAD, 20], [GOOD, 21], [BAD], first=1)
    [scores] = candidate_scores(BY_HAND, collate([row])).tolist()
    assert scores == pytest.approx(
        [(math.log(0.6) + math.log(0.5)) / 2, (math.log(0.2) + math.log(0.125)) / 2, math.log(0.6)]
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_fail_the_run(bad: float) -> None:
    model = Bigrams({1: {BAD: 0.5, GOOD: 0.2, ODD: 0.1}, 2: {BAD: 0.5, GOOD: 0.2, ODD: 0.1}})
    with torch.no_grad():
        model.table[2, GOOD] = bad
    good, spoilt = by_hand_row(1, 0), by_hand_row(2, 0)
    assert evaluate(model, collate([good]), ("bad", "good", "odd")).scores["accuracy"] == 1.0
    with pytest.raises(RunFailed, match="not finite") as failure:
        evaluate(model, collate([good, spoilt]), ("bad", "good", "odd"))
    one_line(failure)


# --- loading a model ---


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: Any) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_loaded_model_is_the_saved_one_ready_for_evaluation(model_folder: Path, tokenizer: Any) -> None:
    model, loaded = load_model(str(model_folder))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert loaded("it was great")["input_ids"] == tokenizer("it was great")["input_ids"]
    saved = dict(tiny_model().named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(saved)
    assert all(p.dtype == torch.float32 and torch.equal(p, saved[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_a_model_is_loaded_as_its_checkpoint_has_it(
    tmp_path: Path, model_folder: Path, name: str, dtype: torch.dtype
) -> None:
    folder = tmp_path / name
    shutil.copytree(model_folder, folder)
    tiny_model().to(dtype).save_pretrained(folder)
    model, _ = load_model(str(folder))
    saved = dict(tiny_model().named_parameters())
    assert all(torch.equal(p, saved[n].to(dtype)) and p.dtype == dtype for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["none", "./none", "a/b/none"])
def test_a_missing_model_folder_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in (name, str(tmp_path / name)):
        with pytest.raises(MeerkatError, match="no such folder") as refusal:
            load_model(source)
        assert f"'{source}'" in one_line(refusal)


def test_a_hub_model_offline_is_refused_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(MeerkatError, match="cannot be loaded") as refusal:
        load_model("meerkat-tests/none")
    assert time.monotonic() - began < 30  # and not after many tries; a busy machine is slow
    assert "'meerkat-tests/none'" in one_line(refusal)


def test_a_token_of_the_text_that_the_model_does_not_know_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"wombat{number:02}" for number in range(93)])
    (tmp_path / "text.txt").write_text("the plot\nof the wombat92\n")
    problem = Classification(tiny_model(), larger, text=str(tmp_path / "text.txt"))
    with pytest.raises(MeerkatError, match=r"token 384 of the text: the model has embeddings for 0 to 383"):
        problem.public()


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def put(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def fill_with_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def save_bert(folder: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=384, **sizes)).save_pretrained(folder)


def save_without_head(folder: Path) -> None:
    AutoModelForSequenceClassification.from_config(ARCHITECTURES["llama"]).save_pretrained(folder)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config.json": (remove("config.json"), "no config.json"),
    "no tokenizer": (remove("tokenizer.json"), "no tokenizer"),
    "no weights": (remove("model.safetensors"), "cannot be loaded"),
    "config.json cut": (put("config.json", '{"model_type": '), "config"),
    "config.json a list": (put("config.json", "[]"), "cannot be loaded"),
    "config.json empty": (put("config.json", "{}"), "cannot be loaded"),
    "config.json of an unknown type": (put("config.json", '{"model_type": "meerkat"}'), "cannot be loaded"),
    "config.json with a bad value": (lambda folder: change_config(folder, hidden_size="x"), "hidden_size"),
    "config.json of another size": (lambda folder: change_config(folder, vocab_size=500), "cannot be loaded"),
    "config.json of more layers": (lambda folder: change_config(folder, num_hidden_layers=3), "cannot be loaded"),
    "tokenizer.json cut": (put("tokenizer.json", '{"version": '), "cannot be loaded"),
    "tokenizer.json empty": (put("tokenizer.json", "{}"), "cannot be loaded"),
    "weights cut": (cut_weights, "cannot be loaded"),
    "weights not safetensors": (put("model.safetensors", "x"), "cannot be loaded"),
    "weights that are no numbers": (fill_with_nan, "its logits are not finite"),
    "an encoder (BERT)": (save_bert, "causal"),
    "no language-model head": (save_without_head, "cannot be loaded"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_model_folder_is_refused_in_one_line(model_folder: Path, fault: str) -> None:
    breaks, said = BROKEN[fault]
    breaks(model_folder)
    with pytest.raises(MeerkatError, match=said) as refusal:
        load_model(str(model_folder))
    assert f"model '{model_folder}'" in one_line(refusal)


def test_an_unknown_device_is_refused(model_folder: Path) -> None:
    with pytest.raises(MeerkatError, match="device 'abacus'") as refusal:
        load_model(str(model_folder), device="abacus")
    one_line(refusal)


# --- text ---


def text_file(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def jsonl(*texts: str) -> str:
    return "".join(json.dumps({"text": text, "source": "here"}, ensure_ascii=False) + "\n" for text in texts)


TWO_LINES = "the film: it was great\nyes or no\u2028the plot"
SEPARATED = ["the film: it was great", "yes or no\u2028the plot"]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", TWO_LINES, SEPARATED),
        ("a.txt", "\n" + TWO_LINES.replace("\n", "  \n \n") + "\n\n", SEPARATED),
        ("a", TWO_LINES, SEPARATED),
        ("a.jsonl", jsonl(TWO_LINES, "yes"), [TWO_LINES, "yes"]),
        ("a.jsonl", "\n" + jsonl(TWO_LINES) + " \n" + jsonl("yes").rstrip(), [TWO_LINES, "yes"]),
        ("a.txt", '{"text": "yes"}', ['{"text": "yes"}']),
        ("a.jsonl", jsonl("", "yes", ""), ["yes"]),  # of an empty text BOS alone is left
    ],
)
def test_text_is_read_a_sequence_a_line(
    tmp_path: Path, tokenizer: Any, name: str, content: str, texts: list[str]
) -> None:
    sequences = load_text(text_file(tmp_path, name, content), tokenizer, 10, 1000)
    assert [ids.tolist() for ids in sequences] == [tokenizer(text)["input_ids"] for text in texts]
    assert {ids.dtype for ids in sequences} == {torch.int64}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_is_cut_to_count_and_length(tmp_path: Path, tokenizer: Any, name: str) -> None:
    texts = ["the film it was great", "yes", "the plot it was terrible", "no"]
    content = "\n" + (jsonl(*texts) if name == "a.jsonl" else "\n\n".join(texts))
    sequences = load_text(text_file(tmp_path, name, content), tokenizer, 3, 4)
    assert [ids.tolist() for ids in sequences] == [tokenizer(text)["input_ids"][:4] for text in texts[:3]]


def test_lines_past_the_count_are_not_read(tmp_path: Path, tokenizer: Any) -> None:
    path = text_file(tmp_path, "a.jsonl", jsonl("yes", "no") + "broken")
    assert len(load_text(path, tokenizer, 2, 10)) == 2


def test_reading_text_leaves_the_tokenizer_as_it_was(tmp_path: Path, tokenizer: Any) -> None:
    load_text(text_file(tmp_path, "a.txt", "the film it was great"), tokenizer, 1, 3)
    [example] = encode(TASK, [{"text": "the film " * 9, "label": 0}], tokenizer, 128)
    assert len(example.sequences[0]) > 18


@pytest.mark.parametrize(
    "bad", ["broken", "[1]", '"text"', "3", "null", '{"txt": "x"}', '{"text": ["x"]}', '{"text": 1}']
)
def test_a_bad_line_of_text_is_refused_by_its_number(tmp_path: Path, tokenizer: Any, bad: str) -> None:
    path = text_file(tmp_path, "a.jsonl", jsonl("yes") + "\n" + bad + "\n" + jsonl("no"))
    with pytest.raises(MeerkatError, match="line 3: must be a JSON object with a 'text' string") as refusal:
        load_text(path, tokenizer, 10, 10)
    assert path in one_line(refusal)


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", ""), ("a.jsonl", ""), ("a.txt", " \n\n"), ("a.jsonl", jsonl(""))]
)
def test_a_file_without_text_is_refused(tmp_path: Path, tokenizer: Any, name: str, content: str) -> None:
    path = text_file(tmp_path, name, content)
    with pytest.raises(MeerkatError, match="no text in it") as refusal:
        load_text(path, tokenizer, 10, 10)
    assert path in one_line(refusal)


def test_a_missing_text_file_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(MeerkatError, match=r"give a \.jsonl file") as refusal:
            load_text(str(path), tokenizer, 10, 10)
        assert f"'{path}'" in one_line(refusal)


def test_a_text_that_is_not_utf8_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(MeerkatError, match="not UTF-8") as refusal:
        load_text(str(tmp_path / "a.txt"), tokenizer, 10, 10)
    one_line(refusal)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_language_modelling_loss_is_the_mean_over_the_tokens(architecture: str, random_sequences: list[Tensor]) -> None:
    model = tiny_model(architecture)
    loss = language_modelling_loss(model)
    for ids in random_sequences:
        expected = -reference._token_log_probabilities(model, ids).mean().item()
        assert loss(ids).item() == pytest.approx(expected, abs=1e-5)


# --- lengths ---


@pytest.mark.parametrize(("limit", "longest"), [(64, 64), (128, 128), (129, 128), (2048, 128)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_longest_input_fits_limit_and_position_table(architecture: str, limit: int, longest: int) -> None:
    assert longest_input(tiny_model(architecture), limit) == longest


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_longest_input_goes_through_the_model(architecture: str) -> None:
    model = tiny_model(architecture)
    row = token_row(longest_input(model, 10**6), [7])
    assert torch.isfinite(candidate_scores(model, collate([row]))).all()


def test_a_model_without_a_position_table_takes_the_limit() -> None:
    for config in (SimpleNamespace(), SimpleNamespace(max_position_embeddings=None)):
        model = nn.Module()
        model.config = config
        assert longest_input(model, 777) == 777
