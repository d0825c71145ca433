"""Comparing methods and settings side by side: each at its own learning rate, over several seeds.

Every run is an ordinary run folder under `cells/` or `search/`, named by what it is, so a comparison that was
interrupted goes on where it stopped, and one that was extended runs only what is new.
"""

import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from meerkat.comparison.results import Line, write_results
from meerkat.comparison.studies import Comparison, Search, Setting, Study, axis_words
from meerkat.errors import Diverged, MeerkatError, RunFailed
from meerkat.extensions import load, loaded
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.partition import partition
from meerkat.problems.problem import Better, Problem
from meerkat.progress import say, use_thread_lock
from meerkat.record.run_folder import RunFolder, write_atomically
from meerkat.run.mask import make_mask
from meerkat.run.sentences import scores_in_words
from meerkat.run.setup import open_problem, resolve
from meerkat.run.simulation import resume, simulate
from meerkat.run.split import training_and_evaluation_rows
from meerkat.settings.auto import AUTO, Auto, number, number_or
from meerkat.settings.config import RunConfig

_FOLDERS = ("cells", "search", "masks", "logs")


def compare(comparison: Comparison, root: Path, jobs: int = 0) -> dict[str, Any]:
    """Search every setting's learning rate, run every seed, and write results.csv, table.csv and compare.json.

    Args:
        root: a new or empty folder, or one that a comparison was begun in: what it finished is kept.
        jobs: runs at a time; 0 for one a CPU, or one where there is a GPU. Results do not depend on it: a run
            takes one thread, or what its settings say.

    Returns:
        What compare.json holds.

    Raises:
        MeerkatError: the settings cannot be met; RunFailed: a run went wrong, other than by diverging.
    """
    _check_free(root)
    lines = [(study, setting) for study in comparison.studies for setting in study.settings()]
    configs = {
        (i, seed): _placed(study.config(setting, seed))
        for i, (study, setting) in enumerate(lines)
        for seed in comparison.seeds
    }
    searched = {i for i, (study, setting) in enumerate(lines) if study.searches(setting)}
    better = _check_means(
        [(configs[i, comparison.seeds[0]], i in searched) for i in range(len(lines))], comparison.search
    )
    for i, (study, _) in enumerate(lines):
        _check_measures(study, better[configs[i, comparison.seeds[0]].problem])
    on_cpu = resolve(configs[0, comparison.seeds[0]]).device == "cpu"
    jobs = jobs or ((os.cpu_count() or 1) if on_cpu else 1)
    with _taken(root):
        configs = {key: _with_mask(config, root / "masks") for key, config in configs.items()}
        firsts = {i: configs[i, comparison.seeds[0]] for i in range(len(lines))}
        with _Pool(jobs, root) as pool:
            searches = pool.map_unique(
                "learning-rate searches",
                {i: (_search, firsts[i], comparison.search, root / "search") for i in sorted(searched)},
                lambda i, found: f"{_words(*lines[i])}: {_found(found, firsts[i])}",
            )
            rates = {i: _best(searches[i], config) if i in searches else config.lr for i, config in firsts.items()}
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
                rates=tuple(searches.get(i, ())),
                lr=number_or(rates[i], None) or _rate_of(folders[i, comparison.seeds[0]]),
                better=better[firsts[i].problem],
                runs=tuple(folders[i, seed] for seed in comparison.seeds),
                summaries=tuple(summaries[i, seed] for seed in comparison.seeds),
            )
            for i, (study, setting) in enumerate(lines)
        ]
        return write_results(comparison, found, root)


# --- before the work ------------------------------------------------------------------------------


def _check_free(root: Path) -> None:
    """Raise MeerkatError unless a comparison may be put in, or gone on with in, a folder."""
    if root.exists() and not root.is_dir():
        raise MeerkatError(f"'{root}': is a file; give a folder as --out")
    held = {entry.name for entry in root.iterdir()} if root.is_dir() else set()
    if held and not {"cells", "search"} <= held:
        raise MeerkatError(f"'{root}': is not empty and no comparison was begun in it; give another --out")


@contextmanager
def _taken(root: Path) -> Iterator[None]:
    """Hold a comparison's folder, made where it is not there yet.

    Raises:
        MeerkatError: it cannot be made, or another process holds it.
    """
    try:
        for name in _FOLDERS:
            (root / name).mkdir(parents=True, exist_ok=True)
        lock = os.open(root / "logs" / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise MeerkatError(f"'{root}': {error.strerror}; give another --out") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise MeerkatError(
            f"'{root}': another process is comparing in it; wait for it, stop it, or give another --out"
        ) from None
    try:
        yield
    finally:
        os.close(lock)


def _placed(config: RunConfig) -> RunConfig:
    """Settings that say the same from anywhere, with any number of runs at a time."""
    settled = resolve(config)
    update: dict[str, Any] = {name: getattr(settled, name) for name in ("model", "task", "data", "text", "mask")}
    if config.recipe.moves in ("full", "lora"):  # what moves is no choice: runs that differ in it alone are the same
        update |= {name: RunConfig.model_fields[name].default for name in ("density", "mask_scope", "exclude")}
    # nor is what nobody reads
    update |= {name: RunConfig.model_fields[name].default for name in config.idle()}
    return config.model_copy(update={**update, "threads": number_or(config.threads, 1)})


_OF_A_PROBLEM = ("problem", "model", "dtype", "device", "task", "data", "max_length")
_OF_ITS_TEXT = ("text", "text_sequences", "text_length")
_OF_THE_ROWS = ("partition", "clients", "mask")


def _check_means(configs: Iterable[tuple[RunConfig, bool]], search: Search) -> dict[str, Mapping[str, Better]]:
    """Raise MeerkatError for what only the models, the data or a mask can tell, before anything is written.

    Args:
        configs: each with whether its learning rate is searched for.

    Returns:
        Each problem's scores by its name, and which values of them are better.
    """
    groups: dict[tuple[Any, ...], list[tuple[RunConfig, bool]]] = {}
    for given, searched in configs:
        config = resolve(given)
        key = tuple(getattr(config, name) for name in _OF_A_PROBLEM + _OF_ITS_TEXT)
        groups.setdefault(key, []).append((config, searched))
    better = {}
    for group in groups.values():
        first, _ = group[0]
        problem = open_problem(first.model_copy(update={"method": "full-fedzo"}))
        better[first.problem] = problem.scores
        if any(not config.mask for config, _ in group):
            problem.public()
        training = problem.rows("train")
        problem.prepare(training[:1])
        for config, searched in {(*(getattr(c, n) for n in _OF_THE_ROWS), s): (c, s) for c, s in group}.values():
            _check_rows(config, problem, search if searched else None)
    return better


def _check_rows(config: RunConfig, problem: Problem, search: Search | None) -> None:
    if config.mask:
        SparseMask.load(Path(config.mask)).check_fits(problem.model)
    training, _ = training_and_evaluation_rows(config, problem.rows)
    partition(config.partition, training, config.clients, config.seed)
    if search is None:
        return
    try:
        trial = config.model_copy(update={"held_back": search.held_back})
        training, _ = training_and_evaluation_rows(trial, problem.rows)
        partition(config.partition, training, config.clients, config.seed)
    except MeerkatError as error:
        raise MeerkatError(
            f"learning-rate search, with {search.held_back:g} of the training rows held back: {error}; or give lr"
        ) from None


def _check_measures(study: Study, better: Mapping[str, Better]) -> None:
    """Raise MeerkatError for a claim about a score that there is none of."""
    for check in study.check:
        if check.measure and check.measure not in better:
            raise MeerkatError(
                f"study '{study.name}': check '{check.claim}': measure {check.measure}: must be one of the problem's "
                f"scores, {', '.join(better)}"
            )


def _with_mask(config: RunConfig, folder: Path) -> RunConfig:
    """The settings with their sensitivity mask as a file, made once for all runs; other methods make their own."""
    if config.mask or config.recipe.moves != "sensitivity":
        return config
    names = ("problem", "model", "density", "mask_scope", "exclude", "dtype", *_OF_ITS_TEXT)
    held = {name: value for name, value in config.model_dump(mode="json").items() if name in names}
    path = folder / f"{hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:10]}.safetensors"
    if not path.exists():
        settled = resolve(config)
        say(f"mask of density {config.density:g}: {path}")
        write_atomically(path, make_mask(settled, open_problem(settled)).save)
    return config.model_copy(update={"mask": str(path.resolve())})


def _words(study: Study, setting: Setting) -> str:
    return f"{study.name}: {axis_words(setting)}"


def _outcome(summary: dict[str, Any] | None) -> str:
    return "diverged" if summary is None else scores_in_words(summary["scores"])


# --- one run --------------------------------------------------------------------------------------


def _name(config: RunConfig) -> str:
    """A folder's name, the same whenever the settings are: readable, and unique by a hash of all of them."""
    # where and how fast a run is made does not make it another run, nor does where its mask lies
    held = config.model_dump(mode="json", exclude={"device", "threads"})
    held["mask"] = _mask_digest(config.mask) if config.mask else ""
    digest = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:10]
    split = re.sub(r"[^\w.-]", "", config.partition)
    return f"{config.method}-{split}-T{config.local_steps}-s{config.seed}-{digest}"


@lru_cache
def _mask_digest(path: str) -> str:
    return SparseMask.load(Path(path)).digest()


def _run(config: RunConfig, folder: Path) -> dict[str, Any] | None:
    """A run's summary: of a finished one, of one gone on with, or of a new one. None where it diverged."""
    diverged = folder.with_name(folder.name + ".diverged")
    if diverged.exists():
        return None
    there = folder.exists()
    try:
        return resume(folder) if (folder / "config.toml").exists() else simulate(config, folder)
    except Diverged as error:
        reason = f"{error}\n"
        write_atomically(diverged, lambda part: part.write_text(reason, encoding="utf-8"))
        return None
    except MeerkatError as error:
        if there:
            raise RunFailed(f"{error}; or delete '{folder}', and the same command makes that run anew") from None
        raise


def _rate_of(folder: Path) -> float:
    """The learning rate that a run began with."""
    return number(RunFolder.open(folder).config().lr)


# --- learning rates -------------------------------------------------------------------------------


def _search(config: RunConfig, search: Search, folder: Path) -> list[tuple[float, float]]:
    """Held-back loss by learning rate, ascending; nan where it diverged. The rule is the same for every setting."""
    trial = config.model_copy(
        update={
            "held_back": search.held_back,
            "rounds": max(1, round(search.rounds * config.rounds)),
            "eval_every": 0,
        }
    )

    def loss_with(lr: float | Auto) -> float:
        tried = trial.model_copy(update={"lr": lr})
        summary = _run(tried, folder / _name(tried))
        return math.inf if summary is None else float(summary["loss"])

    default = loss_with(AUTO)  # the method's default, which the run then knows
    start = _rate_of(folder / _name(trial))

    def rate(place: int) -> float:
        return float(f"{start * search.factor**place:.3g}")

    losses = search_lowest(lambda place: loss_with(rate(place)) if place else default, search.trials)
    return [(rate(place), loss if math.isfinite(loss) else math.nan) for place, loss in sorted(losses.items())]


def search_lowest(loss_at: Callable[[int], float], trials: int) -> dict[int, float]:
    """Losses at neighbouring places, from 0 on, until both neighbours of the best are known, or trials run out.

    The lower neighbour is tried first, and of equally good places the lower is the best: where all have diverged
    (an infinite loss), the search goes down.
    """
    losses = {0: loss_at(0)}
    while len(losses) < trials:
        best = min(losses, key=lambda place: (losses[place], place))
        unknown = [place for place in (best - 1, best + 1) if place not in losses]
        if not unknown:
            break
        losses[unknown[0]] = loss_at(unknown[0])
    return losses


def _best(rates: Sequence[tuple[float, float]], config: RunConfig) -> float:
    sound = [(loss, rate) for rate, loss in rates if not math.isnan(loss)]
    if not sound:
        raise RunFailed(
            f"{config.method}: diverged at every learning rate tried, {rates[0][0]:g} to {rates[-1][0]:g}; "
            "give lr, or let the search try more (search.trials)"
        )
    return min(sound)[1]


def _found(rates: Sequence[tuple[float, float]], config: RunConfig) -> str:
    best = _best(rates, config)
    end = {rates[0][0]: "lowest", rates[-1][0]: "highest"}.get(best)
    edge = f", the {end} of {len(rates)} tried: a search with more trials may find a better one" if end else ""
    return f"learning rate {best:g}{edge}"


# --- several at a time ----------------------------------------------------------------------------


class _Pool:
    """Runs side by side in processes of their own; what they have to say goes to a log each."""

    def __init__(self, jobs: int, root: Path) -> None:
        self.root = root
        theirs, self._alive = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(jobs, context, initializer=_live_with, initargs=(theirs, loaded()))

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind:  # nobody waits for runs that go on: they lose nothing by being ended at any instant
            self._alive.close()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._alive.close()

    def map_unique(
        self, what: str, tasks: Mapping[Any, tuple[Any, ...]], words: Callable[[Any, Any], str]
    ) -> dict[Any, Any]:
        """Each task's result by its key; equal tasks, which two studies may share, are done once."""
        of_key = {key: repr(task[1:]) for key, task in tasks.items()}
        distinct = {name: key for key, name in reversed(of_key.items())}
        ordered = [key for key, name in of_key.items() if distinct[name] == key]
        results: dict[str, Any] = {}
        try:
            waiting = self._submit({key: tasks[key] for key in ordered}, what.split()[-1])
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    key = waiting.pop(future)
                    results[of_key[key]] = future.result()
                    say(f"{what} {len(results)} of {len(ordered)}: {words(key, future.result())}")
        except BrokenProcessPool:
            raise RunFailed(
                f"{self.root}: a run's process was killed, perhaps for memory; run the same command again with "
                f"--out {self.root} and fewer --jobs: what is finished is kept"
            ) from None
        return {key: results[name] for key, name in of_key.items()}

    def _submit(self, tasks: Mapping[Any, tuple[Any, ...]], log: str) -> dict[Future[Any], Any]:
        # processes start here, and take over what is blocked: Ctrl-C is for this process alone, which ends them
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return {
                self._executor.submit(_quietly, self.root / "logs" / f"{log}-{number:03d}.txt", *task): key
                for number, (key, task) in enumerate(tasks.items())
            }
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _live_with(other: Connection, extensions: Sequence[str]) -> None:
    """End this process at once when the one that started it is gone, or lets go of the other end."""

    def watch() -> None:
        try:
            other.recv()
        except (EOFError, OSError):
            os._exit(1)

    use_thread_lock()
    load(extensions)
    threading.Thread(target=watch, daemon=True).start()


def _quietly(log: Path, task: Callable[..., Any], *arguments: Any) -> Any:
    """Run a task with its messages in a file."""
    with log.open("a", encoding="utf-8") as file, redirect_stderr(file), redirect_stdout(file):
        return task(*arguments)
