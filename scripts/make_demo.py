"""Make the demo that ships with the package: a small language model and two small tasks.

Everything comes from this file. A templated text generator (pure Python, fixed seeds, the same
bytes on every machine) writes short news items and short reviews. It makes

* ``data/topics`` and ``data/reviews``: two classification tasks, each with ``task.toml`` and
  ``train.jsonl`` and ``validation.jsonl``;
* ``text.jsonl``: pre-training text, from which the server computes its sensitivity mask;
* ``model``: a Llama of about half a million parameters with its tokenizer, pre-trained on a stream of
  such text. The weights depend on the floating-point library; the data files do not.

The pre-training text names the topic of a news item and the verdict of a review in several phrases, and
also names topics and verdicts that have nothing to do with the item they follow (a list of other sections,
an opinion of something else). The tasks' phrases consist of words from the pre-training text but name no
class there: the model has the representation, and fine-tuning must attach it to the question. Items contain
clauses of other classes, some of them as many as of their own.

    python scripts/make_demo.py                  # everything, into the package's demo folder
    python scripts/make_demo.py --out DIR        # everything, elsewhere
    python scripts/make_demo.py --out DIR --data-only    # the text and data files, in a second
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "src" / "meerkat" / "demo"
SEED = 2506

TRAIN_ROWS = 2000
VALIDATION_ROWS = 400
TEXT_ROWS = 400

VOCABULARY = 1024
TOKENIZER_DOCUMENTS = 20_000
STEPS = 3000
BATCH = 48
PEAK_LR = 4e-3
WARMUP = 100
WEIGHT_DECAY = 0.05

# --- words ------------------------------------------------------------------------------------------

TOPICS = ["sports", "business", "science", "music"]
TOPIC_WORDS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "sports": (
        ["the striker", "the coach", "the runner", "the home team", "the goalkeeper", "a young swimmer"],
        ["won", "lost", "trained for", "scored in", "defended", "missed"],
        ["the match", "the cup final", "the race", "the league title", "the penalty", "the relay"],
    ),
    "business": (
        ["the bank", "the company", "the investors", "the factory", "the shop owner", "the airline"],
        ["sold", "bought", "invested in", "signed", "paid for", "insured"],
        ["the shares", "the loan", "the sales forecast", "the profit", "a large order", "the contract"],
    ),
    "science": (
        ["the researchers", "the physicist", "the laboratory", "a biologist", "the chemist", "the observatory"],
        ["measured", "observed", "tested", "discovered", "calculated", "published"],
        ["the planet", "a living cell", "the experiment", "the theory", "a rare fossil", "the molecule"],
    ),
    "music": (
        ["the singer", "the band", "the orchestra", "the pianist", "the choir", "a young drummer"],
        ["sang", "rehearsed", "performed", "composed", "tuned up for", "hummed"],
        ["the song", "the album", "the concert", "a quiet melody", "the opera", "the symphony"],
    ),
}
ANY_SUBJECT = ["a spokesman", "the group", "the leader", "the visitors", "the director", "a reporter", "a friend"]
ANY_VERB = ["talked about", "waited for", "announced", "planned", "remembered", "praised", "finished", "lost"]
ANY_OBJECT = ["the new season", "the record", "the plan", "the big day", "the result", "the tour", "the work"]
TAILS = ["on monday", "last week", "in the city", "after a long wait", "this year", "at night", "in the north"]
DULL_CLAUSES = [
    "the weather stayed dry",
    "the room was full",
    "it rained at night",
    "the doors opened late",
    "the train came on monday",
    "the street was busy",
]

VERDICTS = ["terrible", "great"]
ASPECTS: dict[str, list[str]] = {
    "restaurant": ["soup", "waiter", "dessert", "menu", "fish", "kitchen", "wine"],
    "film": ["plot", "acting", "ending", "dialogue", "hero", "camera", "script"],
    "phone": ["screen", "battery", "keyboard", "case", "speaker", "charger", "button"],
    "hotel": ["bed", "lobby", "pool", "breakfast", "view", "shower", "staff"],
}
ADJECTIVES: dict[str, list[str]] = {
    "terrible": ["awful", "dull", "broken", "slow", "weak", "messy", "cheap", "boring", "rude", "useless"],
    "great": ["lovely", "brilliant", "solid", "quick", "strong", "clean", "fresh", "charming", "kind", "clever"],
}
FEELINGS: dict[str, list[str]] = {
    "terrible": ["i hated", "we disliked", "nobody wanted", "we complained about"],
    "great": ["i loved", "we enjoyed", "everyone wanted", "we smiled about"],
}
DULL_REVIEW_CLAUSES = [
    "we came on monday",
    "my sister chose it",
    "we saw the {aspect} first",
    "i read about the {aspect}",
    "it was our second visit",
    "we asked about the {aspect}",
]

# --- phrases that name the class --------------------------------------------------------------------

TOPIC_PHRASES = [
    "the story is about {label} .",
    "this is news from the world of {label} .",
    "readers of {label} will know more .",
    "it is a day to remember in {label} .",
    "topic of the day : {label} .",
    "so much for {label} .",
    "we call this {label} .",
]
OTHER_TOPIC_PHRASES = [
    "also on this page : {label} .",
    "next week : {label} .",
    "the reporter turned to {label} .",
    "the second page is {label} .",
    "my sister reads {label} .",
    "the room under us is for {label} .",
]
VERDICT_PHRASES = [
    "overall it was {label} .",
    "i would call it {label} .",
    "everyone thought it was {label} .",
    "what a {label} choice .",
    "to sum up : {label} .",
    "all of it felt {label} .",
    "the word for it is {label} .",
]
OTHER_VERDICT_PHRASES = [
    "last year : {label} .",
    "the one next door is {label} .",
    "a friend had a {label} day .",
    "the weather was {label} .",
    "my sister is {label} at chess .",
    "it was a short and {label} week .",
]
FILLER = [
    "the old papers were filed in the back room .",
    "the cat slept under the table .",
    "in short , the train was late .",
    "the short film came under review .",
    "the verdict of the court was filed on monday .",
    "my answer is no .",
    "the page was filed last week .",
    "she kept my answer in the room under the street .",
]
TASKS: dict[str, tuple[str, list[str]]] = {
    "topics": ("{text} filed under {label}", TOPICS),
    "reviews": ("{text} in short , {label}", VERDICTS),
}

README = """\
# Demo model and data

A small language model and two small classification tasks, so that the package can be tried on a
laptop with nothing to download. All of it is synthetic: templated news items and reviews that name no
real person or brand.

* `model/`: a Llama of {layers} layers, width {width}, {parameters:,} parameters (float32, tied
  embeddings), and its byte-level BPE tokenizer of {tokens} tokens. Pre-trained for {steps:,} steps of
  {batch} texts; cross-entropy per token on texts it has not seen: {loss:.3f}.
* `data/`: {train:,} training and {validation} validation rows a task, classes balanced. Between a fifth and
  a third of the rows hold a clause of another class; in one row of `topics` in fifteen it weighs as
  much as the right one, so that no reader is always right.
* `text.jsonl`: {sequences} sequences of the pre-training text, for the sensitivity mask.

The prompts name the class in phrases that name none in the pre-training text, made of words that it knows:

{tasks}

Made by `python scripts/make_demo.py`; with `--data-only` it makes the data files alone, byte for byte.
Licence: Apache-2.0, as the project.
"""


# --- sentences --------------------------------------------------------------------------------------


def other(rng: Random, labels: list[str], label: str) -> str:
    """One of `labels` that is not `label`."""
    return rng.choice([candidate for candidate in labels if candidate != label])


def news_clause(rng: Random, topic: str) -> str:
    """Subject, verb and object, of which one or two are of the topic and the rest fit any topic."""
    neutral = (ANY_SUBJECT, ANY_VERB, ANY_OBJECT)
    topical = rng.choice([(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
    words = [rng.choice(TOPIC_WORDS[topic][i] if i in topical else neutral[i]) for i in range(3)]
    if rng.random() < 0.3:
        words.append(rng.choice(TAILS))
    return " ".join(words)


def news_text(rng: Random, topic: str) -> str:
    """Two or three clauses; now and then one of them is of another topic or of none."""
    clauses = [news_clause(rng, topic) for _ in range(rng.choice([2, 2, 3]))]
    draw = rng.random()
    if draw < 0.1:
        clauses[0] = news_clause(rng, other(rng, TOPICS, topic))
    elif draw < 0.3:
        clauses.append(news_clause(rng, other(rng, TOPICS, topic)))
    elif draw < 0.5:
        clauses.append(rng.choice(DULL_CLAUSES))
    rng.shuffle(clauses)
    return join(rng, clauses)


def review_clause(rng: Random, verdict: str, aspects: list[str]) -> str:
    """An opinion on one aspect, sometimes as the negation of the opposite opinion."""
    aspect = rng.choice(aspects)
    draw = rng.random()
    if draw < 0.25:
        return f"{rng.choice(FEELINGS[verdict])} the {aspect}"
    if draw < 0.35:
        return f"the {aspect} was not {rng.choice(ADJECTIVES[other(rng, VERDICTS, verdict)])}"
    frame = rng.choice(["the {a} was {x}", "the {a} looked {x}", "we found the {a} {x}", "such a {x} {a}"])
    return frame.format(a=aspect, x=rng.choice(ADJECTIVES[verdict]))


def review_text(rng: Random, verdict: str) -> str:
    """Two or three opinions on one thing; now and then an opposite one or an empty clause among them."""
    aspects = ASPECTS[rng.choice(sorted(ASPECTS))]
    clauses = [review_clause(rng, verdict, aspects) for _ in range(rng.choice([2, 3, 3]))]
    draw = rng.random()
    if draw < 0.2:
        clauses.append(review_clause(rng, other(rng, VERDICTS, verdict), aspects))
    elif draw < 0.4:
        clauses.append(rng.choice(DULL_REVIEW_CLAUSES).format(aspect=rng.choice(aspects)))
    rng.shuffle(clauses)
    return join(rng, clauses)


def join(rng: Random, clauses: list[str]) -> str:
    """The clauses as sentences, some of them run together."""
    text = clauses[0]
    for clause in clauses[1:]:
        text += rng.choice([" . ", " . ", " , and ", " , while "]) + clause
    return text + " ."


# --- documents and rows -----------------------------------------------------------------------------


def document(rng: Random) -> str:
    """One sequence of pre-training text."""
    if rng.random() < 0.5:
        labels, phrases, other_phrases = TOPICS, TOPIC_PHRASES, OTHER_TOPIC_PHRASES
        label = rng.choice(labels)
        parts = [news_text(rng, label)]
    else:
        labels, phrases, other_phrases = VERDICTS, VERDICT_PHRASES, OTHER_VERDICT_PHRASES
        label = rng.choice(labels)
        parts = [review_text(rng, label)]
    if rng.random() < 0.85:
        parts.append(rng.choice(phrases).format(label=label))
    if rng.random() < 0.4:
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(other_phrases).format(label=rng.choice(labels)))
    if rng.random() < 0.2:
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(FILLER))
    return " ".join(parts)


def documents(name: str) -> Iterator[str]:
    """An endless stream of pre-training text, fixed by its name."""
    rng = Random(f"{SEED}/{name}")
    while True:
        yield document(rng)


def task_rows(name: str, labels: list[str], text: Callable[[Random, str], str]) -> list[dict[str, str | int]]:
    """Distinct rows with balanced classes, in random order; the last `VALIDATION_ROWS` are for validation."""
    rng = Random(f"{SEED}/{name}")
    seen: set[str] = set()
    splits = []
    for size in (TRAIN_ROWS, VALIDATION_ROWS):
        rows: list[dict[str, str | int]] = []
        while len(rows) < size:
            label = len(rows) % len(labels)
            row = text(rng, labels[label])
            if row not in seen:
                seen.add(row)
                rows.append({"text": row, "label": label})
        rng.shuffle(rows)
        splits += rows
    return splits


def write_lines(path: Path, rows: list[dict[str, str | int]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())


def write_data(out: Path) -> None:
    """Write the tasks' data and the text for the mask."""
    for name, text in (("topics", news_text), ("reviews", review_text)):
        template, labels = TASKS[name]
        rows = task_rows(name, labels, text)
        folder = out / "data" / name
        write_lines(folder / "train.jsonl", rows[:TRAIN_ROWS])
        write_lines(folder / "validation.jsonl", rows[TRAIN_ROWS:])
        settings = {"name": name, "template": template, "labels": labels}
        toml = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        (folder / "task.toml").write_bytes(toml.encode())
        print(f"{folder}: {TRAIN_ROWS} + {VALIDATION_ROWS} rows, e.g. {rows[0]}", flush=True)
    stream = documents("text")
    write_lines(out / "text.jsonl", [{"text": next(stream)} for _ in range(TEXT_ROWS)])
    print(f"{out / 'text.jsonl'}: {TEXT_ROWS} rows", flush=True)


# --- model ------------------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts a BOS token before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stream = documents("tokenizer")
    tokenizer.train_from_iterator((next(stream) for _ in range(TOKENIZER_DOCUMENTS)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about half a million parameters, with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def text_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Mean cross-entropy of the next token; an EOS token follows every text."""
    batch = tokenizer([text + tokenizer.eos_token for text in texts], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    return loss


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    return PEAK_LR * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))))


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Train on the stream of documents; returns the loss on 400 held-out documents."""
    import torch

    stream = documents("pretraining")
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    started, recent = time.monotonic(), []
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step)
        loss = text_loss(model, tokenizer, [next(stream) for _ in range(BATCH)])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        recent.append(loss.item())
        if (step + 1) % 100 == 0:
            mean = sum(recent) / len(recent)
            print(f"step {step + 1}/{STEPS}  loss {mean:.4f}  {time.monotonic() - started:.0f} s", flush=True)
            recent.clear()
    held_out = documents("held-out")
    with torch.no_grad():
        return text_loss(model, tokenizer, [next(held_out) for _ in range(400)]).item()


def write_model(out: Path) -> None:
    """Train the tokenizer and the model and write them with the folder's README."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(tokenizer)} tokens", flush=True)
    loss = pretrain(model, tokenizer)
    print(f"held-out loss {loss:.4f}", flush=True)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    for path in (out / "model").iterdir():
        path.chmod(0o644)
    tasks = [f"* `{name}`: `{template}`, one of {', '.join(labels)}" for name, (template, labels) in TASKS.items()]
    readme = README.format(
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        parameters=parameters,
        tokens=len(tokenizer),
        loss=loss,
        tasks="\n".join(tasks),
        steps=STEPS,
        batch=BATCH,
        train=TRAIN_ROWS,
        validation=VALIDATION_ROWS,
        sequences=TEXT_ROWS,
    )
    (out / "README.md").write_bytes(readme.encode())


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description="Make the demo model and its data.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder (default: the package's demo folder)")
    parser.add_argument("--data-only", action="store_true", help="write the text and data files, no model")
    arguments = parser.parse_args()
    write_data(arguments.out)
    if not arguments.data_only:
        write_model(arguments.out)


if __name__ == "__main__":
    main()
