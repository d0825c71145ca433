"""Tasks: rows of data -> prompts, label words and token ids (method, section 9).

A task is a template that ends in `{label}`, and a label string for each class. Prompt and label are tokenised as one
string; a label may be several tokens. In a chat, the prompt is the user's message and the label the assistant's reply.
"""

import hashlib
import json
import math
import string
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from meerkat.errors import MeerkatError, in_short, is_utf8
from meerkat.problems.data import Row

Objective = Literal["classification", "language-modelling"]

_TEXTS_TOGETHER = 2000
"""Texts tokenised at a time: the tokenizer's output takes far more memory than the tokens."""
_MOST_LABELS, _LONGEST_LABEL, _LONGEST_TEMPLATE, _MOST_FIELDS = 256, 200, 4000, 16
"""What a row becomes: so many texts, one for each label. A site takes tasks from its coordinator."""


@dataclass(frozen=True)
class Task:
    """How a row is shown to the model."""

    name: str
    template: str
    """Prompt with the row's fields in braces; ends in `{label}`."""
    labels: tuple[str, ...]
    """Label strings; a row's `label` is an index into them."""
    prepare: Callable[[Row], Row] = lambda row: row
    """Row -> the template's fields; by default the row's own."""
    needs: tuple[str, ...] = ()
    """Fields that a row must have beside `label`."""

    def prompt(self, row: Row) -> str:
        """Everything before the label."""
        return self.template.removesuffix("{label}").format_map(dict(self.prepare(row)))

    def digest(self) -> str:
        """SHA-256 of template and label strings, hexadecimal: equal for tasks that show a row in the same words."""
        return hashlib.sha256(json.dumps([self.template, *self.labels]).encode()).hexdigest()


def _boolq(row: Row) -> Row:
    question = str(row["question"]).strip()
    return {"passage": row["passage"], "question": question[:1].upper() + question[1:].removesuffix("?")}


def _wsc(row: Row) -> Row:
    return {"text": row["text"], "span1": row["span1_text"], "span2": str(row["span2_text"]).lower()}


_AG_NEWS = "{text}\nWhat label best describes this news article? {label}"
_RTE = '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n{label}'
_WSC = '{text}\nIn the previous sentence, does the pronoun "{span2}" refer to {span1}? Yes or No?\n{label}'
_WIC = (
    'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n{label}'
)
_TOPICS = ("World politics", "Sports", "Business", "Science and technology")

_TASKS = (
    Task("sst2", "{sentence} It was {label}", ("terrible", "great"), needs=("sentence",)),
    Task("ag_news", _AG_NEWS, _TOPICS, needs=("text",)),
    Task("yelp_polarity", "{text} It was {label}", ("terrible", "great"), needs=("text",)),
    Task("boolq", "{passage} {question}?\n{label}", ("No", "Yes"), _boolq, needs=("question", "passage")),
    Task("rte", _RTE, ("Yes", "No"), needs=("premise", "hypothesis")),
    Task("wsc", _WSC, ("No", "Yes"), _wsc, needs=("text", "span1_text", "span2_text")),
    Task("wic", _WIC, ("No", "Yes"), needs=("word", "sentence1", "sentence2")),
)
TASKS = {task.name: task for task in _TASKS}


def load_task(name: str) -> Task:
    """A built-in task by name, or a user's from a TOML file with `template` and `labels`.

    Raises:
        MeerkatError: no such task, or a malformed file.
    """
    return TASKS[name] if name in TASKS else parse_task(read_task_file(name), name)


def read_task_file(name: str) -> str:
    """The text of a task file. Raises MeerkatError: there is no such file, or it is not a .toml file."""
    path = Path(name)
    if path.suffix != ".toml":
        raise MeerkatError(f"task '{name}': must be one of {', '.join(TASKS)}, or a .toml file of your own")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise MeerkatError(f"task file '{name}': {error.strerror}; give the path of a task file") from None
    except UnicodeDecodeError as error:
        raise MeerkatError(f"task file '{name}': not valid TOML ({error})") from None


def parse_task(text: str, name: str) -> Task:
    """A task from its file's text; `name` is the file's. Raises MeerkatError: the text does not describe a task."""
    try:
        settings = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError, as are numbers too long for Python
        raise MeerkatError(f"task file '{name}': not valid TOML ({in_short(error)})") from None
    try:
        needs = _fields(settings.get("template"), settings.get("labels"))
    except ValueError as error:
        raise MeerkatError(f"task file '{name}': {error}") from None
    title = str(settings.get("name", Path(name).stem))
    return Task(title, settings["template"], tuple(settings["labels"]), needs=needs)


def _fields(template: object, labels: object) -> tuple[str, ...]:
    """The fields that a template names beside the label. Raises ValueError unless both can be a task's."""
    if not isinstance(template, str) or not template.endswith("{label}") or template.count("{label}") != 1:
        raise ValueError('needs template = "... {label}", with {label} once, at its end')
    if not isinstance(labels, list) or len(labels) < 2 or not all(isinstance(x, str) and x for x in labels):
        raise ValueError("needs labels = [...] with at least two strings")
    if len(set(labels)) < len(labels):
        raise ValueError("labels must differ from each other")
    if len(labels) > _MOST_LABELS:
        raise ValueError(f"has {len(labels):,} labels; give at most {_MOST_LABELS} labels")
    if (longest := max(map(len, labels))) > _LONGEST_LABEL:
        raise ValueError(f"has a label of {longest:,} characters; give at most {_LONGEST_LABEL} characters")
    if len(template) > _LONGEST_TEMPLATE:
        raise ValueError(
            f"the template has {len(template):,} characters; give at most {_LONGEST_TEMPLATE:,} characters"
        )
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"the template's braces do not match ({error})") from None
    if len(parts) > _MOST_FIELDS:
        raise ValueError(
            f"the template has {len(parts)} fields; give at most {_MOST_FIELDS} fields, the label included"
        )
    for _, field, spec, conversion in parts:
        if not str(field).isidentifier():
            raise ValueError(f"'{{{field}}}' in the template is not a field name")
        if spec or conversion:
            raise ValueError(f"field '{field}' of the template must stand alone in its braces")
    if [field for _, field, _, _ in parts].count("label") != 1:
        raise ValueError("the template names the field label twice; give it once, at the end")
    return tuple(dict.fromkeys(str(field) for _, field, _, _ in parts if field != "label"))


def _is_text(value: object) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def check_rows(task: Task, rows: Sequence[Row], source: str) -> None:
    """Raise MeerkatError unless there are rows, each with the task's fields and a label in range."""
    if not rows:
        raise MeerkatError(f"{source}: no rows; give data with at least one row")
    for number, row in enumerate(rows, 1):
        if missing := [field for field in (*task.needs, "label") if row.get(field) is None]:
            raise MeerkatError(
                f"{source}, row {number}: no field '{missing[0]}', or no value in it (it has {', '.join(row)}); "
                f"task '{task.name}' needs {', '.join((*task.needs, 'label'))}"
            )
        if broken := [field for field in task.needs if isinstance(row[field], str) and not is_utf8(row[field])]:
            raise MeerkatError(
                f"{source}, row {number}: '{broken[0]}' has half a character, such as \\ud800 alone; correct it"
            )
        if odd := [field for field in task.needs if not _is_text(row[field])]:
            raise MeerkatError(f"{source}, row {number}: '{odd[0]}' must be text or a number, not {row[odd[0]]!r:.60}")
        label = row["label"]
        if isinstance(label, bool) or not isinstance(label, int):
            raise MeerkatError(
                f"{source}, row {number}: label {label!r:.60} must be a whole number, from 0 to {len(task.labels) - 1}"
            )
        if not 0 <= label < len(task.labels):
            raise MeerkatError(
                f"{source}, row {number}: label {label!r} is out of range; task '{task.name}' has labels "
                f"0 to {len(task.labels) - 1} ({', '.join(task.labels)})"
            )


@dataclass(frozen=True)
class Candidate:
    """Where one label string's log-probability is read: in which sequence of the example, at which tokens."""

    sequence: int
    start: int
    """The position whose logits predict the label's first token."""
    targets: np.ndarray
    """The label's token ids, int64 [tokens]."""


@dataclass(frozen=True)
class Example:
    """A row as the model sees it. Candidates with the same input share a sequence."""

    sequences: tuple[np.ndarray, ...]
    """Token ids of each, int64 [length]."""
    candidates: tuple[Candidate, ...]
    label: int


def encode(task: Task, rows: Sequence[Row], tokenizer: Any, max_length: int, chat: bool = False) -> list[Example]:
    """Tokenise rows: each prompt with each label string as one text, cut from the left to max_length.

    `tokenizer` is a fast Hugging Face one. Special tokens that it puts in front (BOS) survive the cut, as does all that
    its chat template puts around the prompt.

    Args:
        chat: put the prompt into the tokenizer's chat template, which then writes all special tokens itself.

    Raises:
        MeerkatError: the tokenizer reports no offsets, or max_length leaves no room for a prompt, or the chat template
            cannot show one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise MeerkatError(
            f"tokenizer {type(tokenizer).__name__} reports no offsets; use the model's fast tokenizer (tokenizer.json)"
        )
    together = max(1, _TEXTS_TOGETHER // len(task.labels))
    parts = (rows[first : first + together] for first in range(0, len(rows), together))
    return [example for part in parts for example in _encode(task, part, tokenizer, max_length, chat)]


@dataclass(frozen=True)
class _Prompt:
    text: str
    """Everything before the label."""
    start: int
    end: int
    """The task's own prompt is text[start:end]; the rest is a chat template's."""


def _as_chat(prompt: str, tokenizer: Any) -> _Prompt:
    """A prompt as the user's message, up to where the assistant's reply begins; blanks around it are left out."""
    message = prompt.strip()
    said = [{"role": "user", "content": message}]
    try:
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template's author wrote
        raise MeerkatError(f"chat_template on: the model's template fails ({in_short(error)}); use off") from None
    if (start := text.rfind(message)) < 0:
        raise MeerkatError("chat_template on: the model's template does not show the user's message as it is; use off")
    return _Prompt(text, start, start + len(message))


def _encode(task: Task, rows: Sequence[Row], tokenizer: Any, max_length: int, chat: bool) -> list[Example]:
    plain = [task.prompt(row) for row in rows]
    prompts = [_as_chat(text, tokenizer) if chat else _Prompt(text, 0, len(text)) for text in plain]
    texts = [prompt.text + label for prompt in prompts for label in task.labels]
    tokenised = tokenizer(
        texts, add_special_tokens=not chat, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    tokens = list(zip(tokenised["input_ids"], tokenised["offset_mapping"], strict=True))
    width = len(task.labels)
    examples = []
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        candidates = tokens[i * width : (i + 1) * width]
        pieces = [_label_span(ids, offsets, prompt) for ids, offsets in candidates]
        examples.append(_share_prefixes(_cut_left(pieces, max_length, task), row["label"]))
    return examples


@dataclass(frozen=True)
class _LabelledText:
    ids: list[int]
    start: int
    end: int
    """The prompt's own tokens are ids[start:end]: what is in front of them and after them is not cut."""
    label_at: int
    """Index of the label's first token; all tokens from there on are the label's."""


def _label_span(ids: list[int], offsets: list[tuple[int, int]], prompt: _Prompt) -> _LabelledText:
    """Split one tokenised text: a token that covers characters of two parts belongs to the later one."""

    def tokens_beyond(character: int) -> list[int]:
        return [i for i, (_, end) in enumerate(offsets) if end > character]

    of_label = tokens_beyond(len(prompt.text))
    start, end = tokens_beyond(prompt.start)[0], tokens_beyond(prompt.end)[0]
    return _LabelledText(ids[: of_label[-1] + 1], start, end, of_label[0])


def _cut_left(pieces: list[_LabelledText], max_length: int, task: Task) -> list[_LabelledText]:
    """Cut the same number of prompt tokens from all candidates, so that they keep the same prompt."""
    excess = max(0, max(len(piece.ids) for piece in pieces) - max_length)
    cut = [
        _LabelledText(p.ids[: p.start] + p.ids[p.start + excess :], p.start, p.end - excess, p.label_at - excess)
        for p in pieces
    ]
    if not excess and any(p.label_at < 1 for p in cut):
        raise MeerkatError(f"a row of task '{task.name}' has an empty prompt; leave the row out")
    if any(p.end <= p.start and excess for p in cut) or any(p.label_at < 1 for p in cut):
        raise MeerkatError(
            f"max_length {max_length} leaves no prompt before the labels of task '{task.name}'; use a larger one"
        )
    return cut


def _share_prefixes(pieces: list[_LabelledText], label: int) -> Example:
    """Keep one sequence for all candidates whose inputs are prefixes of it: a causal model gives all their logits."""
    sequences: list[list[int]] = []
    sequence_of = [0] * len(pieces)
    for c in sorted(range(len(pieces)), key=lambda c: -len(pieces[c].ids)):
        inputs = pieces[c].ids[:-1]  # the last token is only predicted
        for s, sequence in enumerate(sequences):
            if sequence[: len(inputs)] == inputs:
                sequence_of[c] = s
                break
        else:
            sequence_of[c] = len(sequences)
            sequences.append(inputs)
    return Example(
        sequences=tuple(np.array(sequence, dtype=np.int64) for sequence in sequences),
        candidates=tuple(
            Candidate(sequence_of[c], piece.label_at - 1, np.array(piece.ids[piece.label_at :], dtype=np.int64))
            for c, piece in enumerate(pieces)
        ),
        label=label,
    )
