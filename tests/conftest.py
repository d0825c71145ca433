"""Tiny random models, a tokenizer of our own, and a federation small enough to run in a second."""

import copy
import gc
import itertools
import json
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # here and in what tests start: tests run side by side, and models are tiny

import hypothesis
import pytest
import torch
from matplotlib.figure import Figure
from nursery import Command, Nursery, run_meerkat, run_script
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from meerkat import demo, report
from meerkat.problems import models

# how long an example takes says more of what else the machine does
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

SHARED = Path(__file__).parents[2] / "shared"
"""Real data and models, where a checkout has them beside it. Never copied into the project."""

DRAWING = {
    (owner, name): getattr(owner, name)
    for owner, name in ((report, "draw_curves"), (Figure, "savefig"), (Figure, "draw_without_rendering"))
}
"""What draws figures."""

CHAT_TEMPLATE = (
    "{{ bos_token }}the plot"
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>yes\n{% endif %}"
)
"""In the manner of the real ones: it trims a message and writes BOS itself."""

VOCABULARY = 384
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, Any] = {
    "llama": LlamaConfig(**_SMALL, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**_SMALL, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    ),
}


def tiny_model(architecture: str = "llama-tied", seed: int = 0, layers: int = 2) -> Any:
    """A random causal LM of some 30,000 parameters, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(ARCHITECTURES[architecture])
    config.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # larger than the usual initialisation, so that losses differ visibly
            torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return model.eval()


def federation_model(seed: int = 0) -> Any:
    """The tiny federation's model: one layer, which takes half the time of two."""
    return tiny_model(seed=seed, layers=1)


@pytest.fixture(autouse=True, scope="session")
def blank_figures() -> Iterator[None]:
    """Figures stay blank, but in tests marked `draws`: to draw one takes longer than a tiny run."""

    def savefig(_: Figure, to: Any, **__: Any) -> None:
        blank = '<svg viewBox="0 0 1 1"></svg>'
        to.write(blank) if hasattr(to, "write") else Path(to).write_text(blank)

    def curves(_: Sequence[Path], to: Path) -> list[Path]:
        paths = [to / "curves.png", to / "curves.svg"]
        for path in paths:
            savefig(Figure(), path)
        return paths

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_curves", curves)
        patch.setattr(Figure, "savefig", savefig)
        patch.setattr(Figure, "draw_without_rendering", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def drawn_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures as they are, in tests marked `draws`."""
    if request.node.get_closest_marker("draws"):
        for (owner, name), value in DRAWING.items():
            monkeypatch.setattr(owner, name, value)


@pytest.fixture(autouse=True, scope="session")
def weights_read_once() -> Iterator[None]:
    """Weights are read once from files that have not changed since, and copied from then on, in a fifth of the time."""
    read, known = models.load_weights, dict[Any, torch.nn.Module]()

    def load_weights(source: models.Source) -> torch.nn.Module:
        files = [file for file in sorted(Path(source.place).glob("*")) if file.is_file()]
        stats = [(file, file.stat()) for file in files]
        stamp = (source, *((file, stat.st_ino, stat.st_mtime_ns, stat.st_size) for file, stat in stats))
        if files and stamp not in known:
            known[stamp] = read(source)
        return copy.deepcopy(known[stamp]) if files else read(source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_weights", load_weights)
        yield


@contextmanager
def full_disk() -> Iterator[Callable[[int], None]]:
    """What is called with a file size fills the disk for files that grow past it, until the end of the `with`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def start_meerkat(nursery: Nursery, tmp_path: Path) -> Callable[..., Command]:
    """Starts `python -m meerkat` with arguments, in a process of its own; `modules`: a folder to import from."""
    numbers = itertools.count()

    def start(arguments: Sequence[str], modules: Path | None = None) -> Command:
        printed = tmp_path / f"process-{next(numbers)}"
        given = {"arguments": [*arguments], "modules": str(modules or "")}
        return nursery.command(run_meerkat, given, printed)

    return start


@pytest.fixture
def run_example(nursery: Nursery, tmp_path: Path) -> Callable[..., Command]:
    """Runs a Python script with arguments to its end, in a process of its own that stands in a folder."""

    def run(script: Path, arguments: Sequence[str] = (), folder: Path | None = None) -> Command:
        given = {"script": str(script), "arguments": [*arguments]}
        command = nursery.command(run_script, given, tmp_path / "example", folder)
        command.wait()
        return command

    return run


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE with few merges: words are several tokens, and BOS stands in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(
        ["it was great", "it was terrible", "yes or no, yes or no", "the film the plot"] * 5, trainer
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>", pad_token="<s>")


@pytest.fixture
def random_sequences() -> list[torch.Tensor]:
    """Five sequences of token ids of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in (5, 12, 9, 3, 16)]


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a tiny model, text, a task of two multi-token labels, and its data."""
    root = tmp_path_factory.mktemp("federation")
    federation_model().save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "data").mkdir()
    good, bad = ["fine", "lovely", "the best"], ["dull", "sad", "the worst"]
    for split, count in (("train", 48), ("validation", 12)):
        rows = [
            {
                "sentence": f"film {i} is {(bad, good)[i % 2][i % 3]}" + " indeed" * (i % 5),
                "label": i % 2,
                "site": i % 4,
            }
            for i in range(count)
        ]
        (root / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["the film it was great", "the plot it was terrible", "yes or no", "it was the film"]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


@pytest.fixture(scope="session")
def few_topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with few rows of the demo's topics, since to encode all of them takes longer than a run."""
    folder = tmp_path_factory.mktemp("topics")
    for split, count in (("train", 300), ("validation", 40)):
        rows = (demo.TASKS["topics"] / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(rows[:count]))
    return folder


@pytest.fixture(scope="session")
def simulate_arguments(federation: Path) -> list[str]:
    """The command line of a run over the tiny federation, but for --out."""
    return [
        *("simulate", "--model", str(federation / "model"), "--task", "sst2", "--data", str(federation / "data")),
        *("--text", str(federation / "text.jsonl"), "--density", "0.01", "--clients", "3", "--partition", "iid"),
        *("--rounds", "6", "--batch-size", "4", "--eval-every", "2", "--threads", "1"),
        *("--lr", "0.01", "--eps", "1e-3"),  # given, since to measure them takes longer than the run
    ]


def pytest_collection_finish() -> None:
    """From here on garbage is not looked for among what was imported, which takes an eighth of a test's time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped, with a reason, where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
