"""A tokenizer of our own, a federation small enough to run in a second, and what makes tests quick.

Torch and all that needs it are imported where they are used: the process that only hands tests out needs none of them.
"""

import copy
import gc
import itertools
import json
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # here and in what tests start: tests run side by side, and models are tiny

import hypothesis
import pytest
from nursery import Command, Nursery, run_meerkat, run_script

if TYPE_CHECKING:
    import torch

# how long an example takes says more of what else the machine does
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

SHARED = Path(__file__).parents[2] / "shared"
"""Real data and models, where a checkout has them beside it. Never copied into the project."""

LONGEST = ("test_flower_apps", "test_compare", "test_remote", "test_stream", "test_strangers", "test_workers")
"""The files that take longest come first, after those in folders, so that all processes end at about the same time."""


@pytest.fixture(autouse=True, scope="session")
def what_draws() -> Iterator[dict[tuple[Any, str], Any]]:
    """What draws figures, which stay blank, but in tests marked `draws`: to draw one takes longer than a tiny run."""
    from matplotlib.figure import Figure

    from meerkat import report

    def savefig(_: Figure, to: Any, **__: Any) -> None:
        blank = '<svg viewBox="0 0 1 1"></svg>'
        to.write(blank) if hasattr(to, "write") else Path(to).write_text(blank)

    def curves(_: Sequence[Path], to: Path) -> list[Path]:
        paths = [to / "curves.png", to / "curves.svg"]
        for path in paths:
            savefig(Figure(), path)
        return paths

    blank = {(report, "draw_curves"): curves, (Figure, "savefig"): savefig}
    blank[Figure, "draw_without_rendering"] = lambda _: None
    drawing = {(owner, name): getattr(owner, name) for owner, name in blank}
    with pytest.MonkeyPatch.context() as patch:
        for (owner, name), value in blank.items():
            patch.setattr(owner, name, value)
        yield drawing


@pytest.fixture(autouse=True)
def drawn_figures(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, what_draws: dict[tuple[Any, str], Any]
) -> None:
    """Figures as they are, in tests marked `draws`."""
    if request.node.get_closest_marker("draws"):
        for (owner, name), value in what_draws.items():
            monkeypatch.setattr(owner, name, value)


@pytest.fixture(autouse=True, scope="session")
def weights_read_once() -> Iterator[None]:
    """Weights are read once from files that have not changed since, and copied from then on, in a fifth of the time."""
    import torch

    from meerkat.problems import models

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


@pytest.fixture(autouse=True, scope="session")
def nothing_waits_for_the_disk() -> Iterator[None]:
    """Files are not forced to the disk: no test survives a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
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
    from tiny import VOCABULARY
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

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
def random_sequences() -> "list[torch.Tensor]":
    """Five sequences of token ids of different lengths."""
    import torch
    from tiny import VOCABULARY

    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in (5, 12, 9, 3, 16)]


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a tiny model, text, a task of two multi-token labels, and its data."""
    from tiny import federation_model

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
    from meerkat import demo

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
    """GPU tests are skipped, with a reason, where there is no GPU; the longest files come first."""
    import torch

    items.sort(key=lambda item: item.path.parent.name == "tests" and item.path.stem not in LONGEST)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
