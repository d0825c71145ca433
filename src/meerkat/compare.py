"""Comparing methods and settings side by side: each at its own learning rate, over several seeds.

Every run is an ordinary run folder under `cells/` or `search/`, named by what it is, so a comparison that was
interrupted goes on where it stopped, and one that was extended runs only what is new.
"""

import hashlib
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from meerkat.config import RunConfig
from meerkat.errors import Diverged, MeerkatError, RunFailed
from meerkat.experiment import resume, simulate
from meerkat.progress import say
from meerkat.results import Line, write_results
from meerkat.runfolder import RunFolder, write_whole
from meerkat.studies import Comparison, Search, Setting, Study, axis_words
from meerkat.workplace import make_mask, open_model, resolve

_OWN_MASKS = "masks"


def compare(comparison: Comparison, root: Path, jobs: int = 0) -> dict[str, Any]:
    """Search every setting's learning rate, run every seed, and write results.csv, table.csv and compare.json.

    Args:
        root: a new or empty folder, or one that a comparison was begun in: what it finished is kept.
        jobs: runs at a time; 0 for one a CPU, or one where there is a GPU.

    Returns:
        What compare.json holds.

    Raises:
        MeerkatError: the settings cannot be met; RunFailed: a run went wrong, other than by diverging.
    """
    _take(root)
    for study in comparison.studies:  # everything that can be refused is refused before the work
        for setting in study.settings():
            resolve(study.config(setting, comparison.seeds[0]))
    lines = [(study, setting) for study in comparison.studies for setting in study.settings()]
    first = resolve(comparison.studies[0].config(lines[0][1], comparison.seeds[0]))
    on_cpu = first.device == "cpu"
    jobs = jobs or ((os.cpu_count() or 1) if on_cpu else 1)
    masks = _Masks(root)
    configs = {
        (i, seed): masks.given_to(study.config(setting, seed).model_copy(update={"threads": 1} if jobs > 1 else {}))
        for i, (study, setting) in enumerate(lines)
        for seed in comparison.seeds
    }
    with _Pool(jobs, root / "logs") as pool:
        firsts = {i: configs[i, comparison.seeds[0]] for i in range(len(lines))}
        searches = pool.map_unique(
            "learning-rate searches",
            {i: (_search, config, comparison.search, root / "search") for i, config in firsts.items()},
            lambda i, found: f"{_words(*lines[i])}: learning rate {_best(found, firsts[i]):g}",
        )
        rates = {i: _best(searches[i], firsts[i]) for i in firsts}
        cells = {key: config.model_copy(update={"lr": rates[key[0]]}) for key, config in configs.items()}
        folders = {key: root / "cells" / _name(config) for key, config in cells.items()}
        summaries = pool.map_unique(
            "runs",
            {key: (_run, config, folders[key]) for key, config in cells.items()},
            lambda key, found: f"{_words(*lines[key[0]])}, seed {key[1]}: " + _outcome(found),
        )
    found = [
        Line(
            study=study,
            setting=setting,
            rates=tuple(searches[i]),
            lr=rates[i],
            runs=tuple(folders[i, seed] for seed in comparison.seeds),
            summaries=tuple(summaries[i, seed] for seed in comparison.seeds),
        )
        for i, (study, setting) in enumerate(lines)
    ]
    return write_results(comparison, found, root)


def _take(root: Path) -> None:
    """Raise MeerkatError unless a comparison may be put in, or gone on with in, a folder."""
    if root.exists() and not root.is_dir():
        raise MeerkatError(f"'{root}': is a file; give a folder as --out")
    strange = [entry.name for entry in root.iterdir()] if root.is_dir() else []
    if strange and not {"cells", "search", _OWN_MASKS, "logs"} & set(strange):
        raise MeerkatError(f"'{root}': is not empty and no comparison was begun in it; give another --out")
    try:
        for name in ("cells", "search", _OWN_MASKS, "logs"):
            (root / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MeerkatError(f"'{root}': {error.strerror}; give another --out") from None


def _words(study: Study, setting: Setting) -> str:
    return f"{study.name}: {axis_words(setting)}"


def _outcome(summary: dict[str, Any] | None) -> str:
    return "diverged" if summary is None else f"accuracy {summary['accuracy']:.3f}, loss {summary['loss']:.3f}"


# --- one run --------------------------------------------------------------------------------------


def _name(config: RunConfig) -> str:
    """A folder's name, the same whenever the settings are: readable, and unique by a hash of all of them."""
    # where and how fast a run is made does not make it another run
    held = config.model_dump(mode="json", exclude={"device", "threads"})
    digest = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:10]
    return f"{config.method}-{config.partition.replace(':', '')}-T{config.local_steps}-s{config.seed}-{digest}"


def _run(config: RunConfig, folder: Path) -> dict[str, Any] | None:
    """A run's summary: of a finished one, of one gone on with, or of a new one. None where it diverged."""
    diverged = folder.with_name(folder.name + ".diverged")
    if diverged.exists():
        return None
    try:
        begun = (folder / "config.toml").exists()
        return resume(folder) if begun else simulate(config, folder)
    except Diverged as error:
        reason = f"{error}\n"
        write_whole(diverged, lambda part: part.write_text(reason, encoding="utf-8"))
        return None


def _search(config: RunConfig, search: Search, folder: Path) -> list[tuple[float, float]]:
    """Held-back loss by learning rate: from the method's default to both sides until neighbours are worse.

    The rule is the same for every setting. A rate that was given is not searched.
    """
    if config.lr:
        return []
    trial = config.model_copy(
        update={
            "held_back": search.held_back,
            "rounds": max(1, round(search.rounds * config.rounds)),
            "eval_every": 0,
        }
    )
    losses: dict[int, float] = {}
    start = 0.0

    def loss_at(place: int) -> float:
        tried = trial.model_copy(update={"lr": float(f"{start * search.factor**place:.3g}")})
        summary = _run(tried, folder / _name(tried))
        losses[place] = math.inf if summary is None else summary["loss"]
        return losses[place]

    loss_at(0)  # a rate of zero takes the method's default, which the run then knows
    start = RunFolder.open(folder / _name(trial)).config().lr
    while len(losses) < search.trials:
        best = min(losses, key=lambda place: losses[place])
        open_sides = [place for place in (best - 1, best + 1) if place not in losses]
        if not open_sides:
            break
        loss_at(open_sides[0])
    return [
        (float(f"{start * search.factor**place:.3g}"), losses[place] if math.isfinite(losses[place]) else math.nan)
        for place in sorted(losses)
    ]


def _best(rates: Sequence[tuple[float, float]], config: RunConfig) -> float:
    sound = [(loss, rate) for rate, loss in rates if not math.isnan(loss)]
    if rates and not sound:
        raise RunFailed(f"{config.method}: diverged at every learning rate tried, {rates[0][0]:g} to {rates[-1][0]:g}")
    return min(sound)[1] if sound else config.lr


# --- masks, made once -----------------------------------------------------------------------------


def _mask_key(config: RunConfig) -> str:
    names = ("model", "text", "density", "mask_scope", "exclude", "text_sequences", "text_length", "dtype")
    held = {name: value for name, value in config.model_dump(mode="json").items() if name in names}
    return hashlib.sha256(json.dumps([config.recipe.moves, held], sort_keys=True).encode()).hexdigest()[:10]


class _Masks:
    """Sensitivity masks, each made once and given to all runs that move by it."""

    def __init__(self, root: Path) -> None:
        self.folder = root / _OWN_MASKS

    def given_to(self, config: RunConfig) -> RunConfig:
        """The settings with their sensitivity mask as a file; others make masks of their own."""
        if config.mask or config.recipe.moves != "sensitivity":
            return config
        path = self.folder / f"{_mask_key(config)}.safetensors"
        if not path.exists():
            settled = resolve(config)
            say(f"mask of density {config.density:g}: {path}")
            write_whole(path, make_mask(settled, *open_model(settled)).save)
        return config.model_copy(update={"mask": str(path.resolve())})


# --- several at a time ----------------------------------------------------------------------------


class _Pool:
    """Runs side by side in processes of their own; what they have to say goes to a log each."""

    def __init__(self, jobs: int, logs: Path) -> None:
        self.logs = logs
        self._executor = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def map_unique(
        self, what: str, tasks: dict[Any, tuple[Any, ...]], words: Callable[[Any, Any], str]
    ) -> dict[Any, Any]:
        """Each task's result by its key; equal tasks, which two studies may share, are done once."""
        of_key = {key: repr(task[1:]) for key, task in tasks.items()}
        distinct = {of_key[key]: (key, task) for key, task in reversed(tasks.items())}
        ordered = sorted(distinct.items(), key=lambda item: list(tasks).index(item[1][0]))
        waiting: dict[Future[Any], tuple[str, Any]] = {}
        for number, (name, (key, task)) in enumerate(ordered):
            log = self.logs / f"{what.split()[-1]}-{number:03d}.txt"
            waiting[self._executor.submit(_quietly, log, *task)] = (name, key)
        results: dict[str, Any] = {}
        try:
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    name, key = waiting.pop(future)
                    results[name] = future.result()
                    say(f"{what} {len(results)} of {len(ordered)}: {words(key, results[name])}")
        except BrokenProcessPool:
            raise RunFailed(
                f"{self.logs.parent}: a run's process was killed, perhaps for memory; run the same command again, "
                "with fewer --jobs: what is finished is kept"
            ) from None
        return {key: results[of_key[key]] for key in tasks}


def _quietly(log: Path, task: Callable[..., Any], *arguments: Any) -> Any:
    """Run a task with its messages in a file."""
    with log.open("a", encoding="utf-8") as file, redirect_stderr(file):
        return task(*arguments)
