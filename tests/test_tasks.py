import re
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATE
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from meerkat.errors import MeerkatError
from meerkat.problems.data import load_rows
from meerkat.problems.tasks import TASKS, Candidate, Example, Row, Task, check_rows, encode, load_task

LETTERS = Task("letters", "{text} is {label}", ("great", "terrible film", "N"), needs=("text",))
"""With the tiny tokenizer: labels of one, two and one tokens, the first two straddling the prompt's space."""


def one_line(refusal: pytest.ExceptionInfo[MeerkatError]) -> str:
    message = str(refusal.value)
    assert message.strip()
    assert "\n" not in message
    return message


def ids_of(example: Example, candidate: Candidate) -> list[int]:
    """The candidate's tokens from the first of the prompt to the last of the label."""
    return [*example.sequences[candidate.sequence][: candidate.start + 1].tolist(), *candidate.targets.tolist()]


def label_tokens(ids: list[int], label: str, tokenizer: Any) -> int:
    """How many tokens at the end cover the label, counted in characters; ASCII only."""
    lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(ids[-len(label) :])]
    return next(n for n in range(1, len(lengths) + 1) if sum(lengths[-n:]) >= len(label))


def literal_cut(candidates: list[list[int]], max_length: int) -> list[list[int]]:
    """BOS stays, and as many tokens go after it, from each candidate, as the longest has too many."""
    excess = max(0, max(map(len, candidates)) - max_length)
    return [ids[:1] + ids[1 + excess :] for ids in candidates]


# --- prompts, written out by hand ---

PROMPTS: list[tuple[str, Row, str, tuple[str, ...]]] = [
    ("sst2", {"sentence": "a fine film ."}, "a fine film . It was ", ("terrible", "great")),
    (
        "ag_news",
        {"text": "Shares rose."},
        "Shares rose.\nWhat label best describes this news article? ",
        ("World politics", "Sports", "Business", "Science and technology"),
    ),
    ("yelp_polarity", {"text": "Cold soup."}, "Cold soup. It was ", ("terrible", "great")),
    ("boolq", {"passage": "Ice floats.", "question": "is ice light"}, "Ice floats. Is ice light?\n", ("No", "Yes")),
    ("boolq", {"passage": "Ice floats.", "question": "is ice light?"}, "Ice floats. Is ice light?\n", ("No", "Yes")),
    ("boolq", {"passage": "P.", "question": "do NATO and iOS differ"}, "P. Do NATO and iOS differ?\n", ("No", "Yes")),
    (
        "rte",
        {"premise": "It rained.", "hypothesis": "It was wet."},
        'It rained.\nDoes this mean that "It was wet." is true? Yes or No?\n',
        ("Yes", "No"),
    ),
    (
        "wsc",
        {"text": "Mark told Pete. He left.", "span1_text": "Mark", "span2_text": "He"},
        'Mark told Pete. He left.\nIn the previous sentence, does the pronoun "he" refer to Mark? Yes or No?\n',
        ("No", "Yes"),
    ),
    (
        "wic",
        {"word": "board", "sentence1": "Room and board.", "sentence2": "He nailed boards."},
        'Does the word "board" have the same meaning in these two sentences? Yes, No?\n'
        "Room and board.\nHe nailed boards.\n",
        ("No", "Yes"),
    ),
]


@pytest.mark.parametrize(("name", "row", "prompt", "labels"), PROMPTS)
def test_builtin_task_puts_a_row_as_the_method_says(name: str, row: Row, prompt: str, labels: tuple[str, ...]) -> None:
    task = load_task(name)
    assert task.name == name
    assert task.prompt(row | {"label": 0}) == prompt
    assert task.labels == labels


def test_every_builtin_task_has_a_prompt_written_out_here() -> None:
    assert {name for name, *_ in PROMPTS} == set(TASKS)


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, row, *_ in PROMPTS])
def test_builtin_task_needs_exactly_the_fields_it_uses(name: str, row: Row) -> None:
    check_rows(TASKS[name], [row | {"label": 1}], "here")
    for field in row:
        with pytest.raises(MeerkatError, match=f"no field '{field}'"):
            check_rows(TASKS[name], [{k: v for k, v in row.items() if k != field} | {"label": 1}], "here")


def test_braces_in_a_row_are_text() -> None:
    assert TASKS["sst2"].prompt({"sentence": "{label} {0} }{"}) == "{label} {0} }{ It was "


# --- tokens ---


def test_prompt_and_label_are_tokenised_as_one_string(tokenizer: Any) -> None:
    row = {"text": "the film it was", "label": 2}
    [example] = encode(LETTERS, [row], tokenizer, 128)
    assert example.label == 2
    for label, candidate in zip(LETTERS.labels, example.candidates, strict=True):
        whole = tokenizer("the film it was is " + label)["input_ids"]
        assert ids_of(example, candidate) == whole
        assert len(candidate.targets) == label_tokens(whole, label, tokenizer)
        assert candidate.targets.dtype == example.sequences[candidate.sequence].dtype == np.int64


def test_label_spans_of_one_token_and_of_several(tokenizer: Any) -> None:
    [example] = encode(LETTERS, [{"text": "x", "label": 0}], tokenizer, 128)
    spans = [tokenizer.convert_ids_to_tokens(candidate.targets.tolist()) for candidate in example.candidates]
    assert spans == [["Ġgreat"], ["Ġterrible", "Ġfilm"], ["N"]]  # the space before N is a token of the prompt's


@settings(deadline=None)
@given(text=st.text("abc film was\n.?", max_size=30), max_length=st.integers(14, 40), data=st.data())
def test_candidates_tokens_are_the_whole_texts_cut_from_the_left(
    tokenizer: Any, text: str, max_length: int, data: st.DataObject
) -> None:
    labels = tuple(data.draw(st.lists(st.sampled_from(["great", "No", "yes", "the film"]), min_size=2, max_size=4)))
    task = Task("own", "so: {text} {label}", labels, needs=("text",))
    [example] = encode(task, [{"text": text, "label": 0}], tokenizer, max_length)
    whole = [tokenizer(f"so: {text} {label}")["input_ids"] for label in labels]
    assert [ids_of(example, candidate) for candidate in example.candidates] == literal_cut(whole, max_length)
    for ids, label, candidate in zip(whole, labels, example.candidates, strict=True):
        assert len(candidate.targets) == label_tokens(ids, label, tokenizer)


def with_eos(tokenizer: Any) -> Any:
    """The same tokenizer, putting a token after the text too."""
    made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bos = ("<s>", tokenizer.bos_token_id)
    made.post_processor = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def without_bos(tokenizer: Any) -> Any:
    """The same tokenizer, putting nothing in front."""
    made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    made.post_processor = processors.processors.TemplateProcessing(single="$A", special_tokens=[])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<s>", pad_token="<s>")


def test_a_token_after_the_text_is_not_the_labels(tokenizer: Any) -> None:
    assert with_eos(tokenizer)("x")["input_ids"][-1] == tokenizer.eos_token_id
    [plain] = encode(LETTERS, [{"text": "x", "label": 0}], tokenizer, 128)
    [ended] = encode(LETTERS, [{"text": "x", "label": 0}], with_eos(tokenizer), 128)
    for candidate, other in zip(plain.candidates, ended.candidates, strict=True):
        assert ids_of(plain, candidate) == ids_of(ended, other)


def test_a_tokenizer_without_bos_loses_none_when_cut(tokenizer: Any) -> None:
    bare = without_bos(tokenizer)
    [example] = encode(TASKS["sst2"], [{"sentence": "the film " * 20, "label": 0}], bare, 10)
    for label, candidate in zip(TASKS["sst2"].labels, example.candidates, strict=True):
        assert ids_of(example, candidate) == bare("the film " * 20 + " It was " + label)["input_ids"][-10:]


def test_a_tokenizer_without_offsets_is_refused() -> None:
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(MeerkatError, match="no offsets") as refusal:
        encode(LETTERS, [{"text": "x", "label": 0}], slow, 128)
    one_line(refusal)


# --- candidates that share a forward pass ---


@pytest.mark.parametrize(
    ("labels", "sequences"),
    [
        (("great", "terrible"), 1),  # one token each: the prompt alone is read
        (("great", "great film", "great film was"), 1),  # each input is a prefix of the next
        (("great", "terrible film", "yes"), 1),  # only one has two tokens
        (("terrible film", "great film"), 2),
        (("great film", "great plot"), 1),  # they differ in the last token only
        (("No", "Yes"), 2),
        (("great film", "terrible film", "great", "terrible"), 2),
    ],
)
def test_candidates_share_a_sequence_where_inputs_are_prefixes(
    tokenizer: Any, labels: tuple[str, ...], sequences: int
) -> None:
    task = Task("own", "x {label}", labels)
    [example] = encode(task, [{"label": 0}], tokenizer, 128)
    assert len(example.sequences) == sequences
    for label, candidate in zip(labels, example.candidates, strict=True):
        assert ids_of(example, candidate) == tokenizer("x " + label)["input_ids"]


# --- cutting ---


def test_cutting_keeps_bos_and_labels_and_cuts_all_candidates_alike(tokenizer: Any) -> None:
    row = {"text": "the film was " * 30, "label": 1}
    whole = [tokenizer(LETTERS.prompt(row) + label)["input_ids"] for label in LETTERS.labels]
    [uncut], [cut] = (encode(LETTERS, [row], tokenizer, length) for length in (1000, 20))
    kept = [ids_of(cut, candidate) for candidate in cut.candidates]
    assert max(map(len, kept)) == 20
    assert {len(ids) - len(rest) for ids, rest in zip(whole, kept, strict=True)} == {max(map(len, whole)) - 20}
    for before, after, ids, rest in zip(uncut.candidates, cut.candidates, whole, kept, strict=True):
        assert rest[0] == tokenizer.bos_token_id
        assert rest[1:] == ids[-len(rest) + 1 :]
        assert after.targets.tolist() == before.targets.tolist()


def test_a_text_of_exactly_max_length_is_not_cut(tokenizer: Any) -> None:
    row = {"text": "the film", "label": 0}
    longest = max(len(tokenizer(LETTERS.prompt(row) + label)["input_ids"]) for label in LETTERS.labels)
    [whole], [exact], [cut] = (encode(LETTERS, [row], tokenizer, n) for n in (1000, longest, longest - 1))
    assert ids_of(exact, exact.candidates[1]) == ids_of(whole, whole.candidates[1])
    assert len(ids_of(cut, cut.candidates[1])) == longest - 1


@pytest.mark.parametrize("max_length", [1, 2, 3])
def test_max_length_without_room_for_a_prompt_is_refused(tokenizer: Any, max_length: int) -> None:
    with pytest.raises(MeerkatError, match=rf"max_length {max_length} .*'letters'") as refusal:
        encode(LETTERS, [{"text": "the film", "label": 0}], tokenizer, max_length)
    one_line(refusal)


def test_the_smallest_max_length_keeps_one_token_of_the_prompt(tokenizer: Any) -> None:
    [example] = encode(LETTERS, [{"text": "the film", "label": 0}], tokenizer, 4)  # BOS, one, and two of the label
    kept = tokenizer.convert_ids_to_tokens(ids_of(example, example.candidates[1]))
    assert kept[2:] == ["Ġterrible", "Ġfilm"]
    assert len(kept) == 4


# --- chats ---

BEFORE, AFTER = "<s>the plot<s>user\n", "\n<s>yes\n"
"""What the template puts around the user's message."""


@pytest.fixture(scope="module")
def chatty(tokenizer: Any) -> Any:
    made = deepcopy(tokenizer)
    made.chat_template = CHAT_TEMPLATE
    return made


def test_a_prompt_is_the_user_s_message_and_the_label_begins_the_reply(chatty: Any) -> None:
    [example] = encode(LETTERS, [{"text": " the film", "label": 1}], chatty, 128, chat=True)
    for label, candidate in zip(LETTERS.labels, example.candidates, strict=True):
        whole = chatty(f"{BEFORE}the film is{AFTER}{label}", add_special_tokens=False)["input_ids"]
        assert ids_of(example, candidate) == whole
        assert whole.count(chatty.bos_token_id) == 3  # the template's own: none is added
        assert chatty.decode(candidate.targets) == label


def test_an_empty_prompt_is_no_matter_of_length(tokenizer: Any) -> None:
    bare = deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    task = Task("bare", "{text}{label}", ("yes", "no"), needs=("text",))
    with pytest.raises(MeerkatError, match="a row of task 'bare' has an empty prompt; leave the row out"):
        encode(task, [{"text": "", "label": 1}], bare, 128)


def test_a_cut_leaves_what_the_chat_template_puts_around_the_message(chatty: Any) -> None:
    text = "the film it was " * 9
    [whole], [cut] = (encode(LETTERS, [{"text": text, "label": 0}], chatty, n, chat=True) for n in (500, 40))
    before, after = (chatty(part, add_special_tokens=False)["input_ids"] for part in (BEFORE, AFTER))
    for full, short in zip(whole.candidates, cut.candidates, strict=True):
        ids, kept = ids_of(whole, full), ids_of(cut, short)
        assert kept[: len(before)] == ids[: len(before)] == before
        assert kept[len(before) :] == ids[len(before) - len(kept) :]
        assert kept[-len(after) - len(short.targets) : -len(short.targets)] == after
    assert max(len(ids_of(cut, candidate)) for candidate in cut.candidates) == 40
    room = len(before) + len(after) + max(len(candidate.targets) for candidate in cut.candidates)
    with pytest.raises(MeerkatError, match=f"max_length {room} leaves no prompt"):
        encode(LETTERS, [{"text": text, "label": 0}], chatty, room, chat=True)
    encode(LETTERS, [{"text": text, "label": 0}], chatty, room + 1, chat=True)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{{ messages[0].content | upper }}", "does not show the user's message as it is"),
        ("{% for", "fails"),
    ],
)
def test_a_chat_template_that_cannot_show_a_prompt_is_refused(chatty: Any, template: str, said: str) -> None:
    broken = deepcopy(chatty)
    broken.chat_template = template
    with pytest.raises(MeerkatError, match=said) as refusal:
        encode(LETTERS, [{"text": "the film", "label": 0}], broken, 128, chat=True)
    assert one_line(refusal).endswith("use off")


# --- a task of one's own ---


def task_file(folder: Path, text: str) -> str:
    file = folder / "tickets.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_own_task_from_a_file(tmp_path: Path) -> None:
    text = 'template = "{subject}\\n{body} {{!}} {subject}: {label}"\nlabels = ["low", "very high", "é"]\n'
    task = load_task(task_file(tmp_path, text))
    assert task.name == "tickets"
    assert task.labels == ("low", "very high", "é")
    assert task.prompt({"subject": "Printer", "body": "on fire", "label": 1}) == "Printer\non fire {!} Printer: "
    check_rows(task, [{"subject": "Printer", "body": "on fire", "label": 2}], "here")
    for field in ("subject", "body"):
        with pytest.raises(MeerkatError, match=f"no field '{field}'"):
            check_rows(task, [{"subject": "a", "body": "b", "label": 0} | {field: None}], "here")


def test_own_task_may_have_a_name(tmp_path: Path) -> None:
    text = 'name = "urgency"\ntemplate = "{body} {label}"\nlabels = ["low", "high"]\n'
    assert load_task(task_file(tmp_path, text)).name == "urgency"


LABELS = 'labels = ["a", "b"]\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LABELS, "needs template"),
        (LABELS + "template = 3", "needs template"),
        (LABELS + 'template = "{text}"', "needs template"),
        (LABELS + 'template = "{label} {text}"', "at its end"),
        (LABELS + 'template = "{text} {label} "', "at its end"),
        (LABELS + 'template = "{label} {text} {label}"', "once"),
        (LABELS + 'template = "{label!r} {text} {label}"', "template"),
        (LABELS + 'template = "{label:>9} {text} {label}"', "template"),
        (LABELS + 'template = "{text} {label:} is {label}"', "names the field label twice"),
        (LABELS + 'template = "{text {label}"', "braces"),
        (LABELS + 'template = "text} {label}"', "braces"),
        (LABELS + 'template = "{text} {{label}"', "braces"),
        (LABELS + 'template = "{a.b} {label}"', "{a.b}"),
        (LABELS + 'template = "{a[0]} {label}"', "{a[0]}"),
        (LABELS + 'template = "{0} {label}"', "{0}"),
        (LABELS + 'template = "{} {label}"', "{}"),
        (LABELS + 'template = "{text:d} {label}"', "text"),
        (LABELS + 'template = "{text!x} {label}"', "text"),
        (LABELS + 'template = "{text:{width}} {label}"', "text"),
        ('template = "{text} {label}"', "needs labels"),
        ('template = "{text} {label}"\nlabels = ["a"]', "at least two"),
        ('template = "{text} {label}"\nlabels = "ab"', "at least two"),
        ('template = "{text} {label}"\nlabels = ["a", 1]', "strings"),
        ('template = "{text} {label}"\nlabels = ["a", ""]', "strings"),
        ('template = "{text} {label}"\nlabels = ["a", "b", "a"]', "labels"),
        ("template = ", "not valid TOML"),
    ],
)
def test_a_bad_task_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    name = task_file(tmp_path, text)
    with pytest.raises(MeerkatError, match=re.escape(said)) as refusal:
        load_task(name)
    assert name in one_line(refusal)


def test_a_task_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "task.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MeerkatError, match="not valid TOML") as refusal:
        load_task(str(tmp_path / "task.toml"))
    one_line(refusal)


def test_a_missing_task_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MeerkatError, match="No such file") as refusal:
        load_task(str(tmp_path / "none.toml"))
    assert str(tmp_path / "none.toml") in one_line(refusal)


def test_an_unknown_task_is_answered_with_those_there_are() -> None:
    with pytest.raises(MeerkatError, match="'sst3'") as refusal:
        load_task("sst3")
    assert all(name in one_line(refusal) for name in TASKS)


# --- rows ---


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"sentence": "x"}, "row 2: no field 'label'"),
        ({"label": 1}, "row 2: no field 'sentence'"),
        ({"text": "x", "label": 1}, "it has text, label"),
        ({"sentence": "x", "label": 2}, "label 2 is out of range"),
        ({"sentence": "x", "label": -1}, "label -1 is out of range"),
        ({"sentence": "x", "label": "1"}, "label '1' must be a whole number, from 0 to 1"),
        ({"sentence": "x", "label": 1.0}, "label 1.0 must be a whole number"),
        ({"sentence": "x", "label": "1"}, "label '1'"),
        ({"sentence": "x", "label": "great"}, "label 'great'"),
        ({"sentence": "x", "label": True}, "label True"),
        ({"sentence": "x", "label": False}, "label False"),
        ({"sentence": "x", "label": 1.0}, "label 1.0"),
        ({"sentence": "x", "label": float("nan")}, "label nan"),
        ({"sentence": "x", "label": [1]}, "label [1]"),
        ({"sentence": "half a \ud800", "label": 1}, "'sentence' has half a character"),
        ({"sentence": float("nan"), "label": 1}, "'sentence' must be text or a number, not nan"),
        ({"sentence": ["x"], "label": 1}, "'sentence' must be text or a number, not ['x']"),
        ({"sentence": {"x": 1}, "label": 1}, "'sentence' must be text or a number"),
    ],
)
def test_a_row_that_does_not_fit_the_task_is_refused_by_its_number(row: dict[str, Any], said: str) -> None:
    good = {"sentence": "x", "label": 0}
    with pytest.raises(MeerkatError, match=re.escape(said)) as refusal:
        check_rows(TASKS["sst2"], [good, row, good], "data 'here', train")
    assert one_line(refusal).startswith("data 'here', train, row 2")


def test_no_rows_are_refused() -> None:
    with pytest.raises(MeerkatError, match="data 'here', train: no rows") as refusal:
        check_rows(TASKS["sst2"], [], "data 'here', train")
    one_line(refusal)


def test_rows_may_hold_more_than_the_task_needs() -> None:
    check_rows(TASKS["sst2"], [{"sentence": "", "label": label, "site": None} for label in (0, 1)], "here")


# --- real data ---


@pytest.fixture(scope="session")
def real_tokenizers() -> dict[str, Any]:
    if not (SHARED / "models").is_dir():
        pytest.skip(f"no real models at {SHARED / 'models'}")
    return {name: AutoTokenizer.from_pretrained(SHARED / "models" / name) for name in ("imdb-6m", "stories260K")}


@pytest.mark.parametrize("name", ["sst2", "boolq", "rte", "wsc", "wic"])
@pytest.mark.parametrize("model", ["imdb-6m", "stories260K"])
def test_real_rows_are_encoded_as_tokenised_whole(real_tokenizers: dict[str, Any], model: str, name: str) -> None:
    if not (SHARED / "data" / name).is_dir():
        pytest.skip(f"no real data at {SHARED / 'data' / name}")
    tokenizer, task, max_length = real_tokenizers[model], TASKS[name], 512
    rows = load_rows(str(SHARED / "data" / name), "validation")
    check_rows(task, rows, name)
    examples = encode(task, rows, tokenizer, max_length)
    assert [example.label for example in examples] == [row["label"] for row in rows]
    for row, example in list(zip(rows, examples, strict=True))[::4]:
        whole = tokenizer([task.prompt(row) + label for label in task.labels], verbose=False)["input_ids"]
        assert [ids_of(example, candidate) for candidate in example.candidates] == literal_cut(whole, max_length)
        for ids, label, candidate in zip(whole, task.labels, example.candidates, strict=True):
            assert len(candidate.targets) == label_tokens(ids, label, tokenizer)
            assert (len(candidate.targets) > 1) == (model == "stories260K")
