"""Comparing methods and settings side by side: each at its best learning rate, over several seeds.

Every run is an ordinary run folder under `cells/` or `search/`, named by its settings: the same comparison again
continues where it stopped, and one that was extended makes only the new runs.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meerkat.comparison.cells import cell_name, rate_of, run_cell, settings_hash
from meerkat.comparison.learning_rates import best_rate, rate_in_words, search_rates
from meerkat.comparison.processes import Pool
from meerkat.comparison.results import Line, write_results
from meerkat.comparison.studies import Comparison, Search, Setting, Study, axis_words
from meerkat.errors import MeerkatError
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.partition import partition
from meerkat.problems.problem import Better, Problem
from meerkat.progress import say
from meerkat.record.files import check_no_links, make_folder, owned, remove_leftovers, write_atomically
from meerkat.run.mask import make_mask
from meerkat.run.sentences import scores_in_words
from meerkat.run.setup import open_problem, resolve
from meerkat.run.split import training_and_evaluation_rows
from meerkat.settings.auto import number_or
from meerkat.settings.config import RunConfig


def compare(comparison: Comparison, root: Path, jobs: int = 0) -> dict[str, Any]:
    """Search every setting's learning rate, run every seed, and write results.csv, table.csv and compare.json.

    Args:
        root: a new or empty folder, or one that a comparison was begun in, of which finished runs are kept.
        jobs: runs at a time; 0 for one a CPU, or one where there is a GPU. Results do not depend on it: a run
            takes one thread, or what its settings say.

    Returns:
        The content of compare.json.

    Raises:
        MeerkatError: the settings cannot be met.
        RunFailed: a run failed other than by diverging, or diverged at every learning rate.
    """
    seeds, search = comparison.seeds, comparison.search
    _check_folder(root)
    lines = [(study, setting) for study in comparison.studies for setting in study.settings()]
    words = [f"{study.name}: {axis_words(setting)}" for study, setting in lines]
    cells = {
        (i, seed): _portable(study.config(setting, seed)) for i, (study, setting) in enumerate(lines) for seed in seeds
    }
    firsts = [cells[i, seeds[0]] for i in range(len(lines))]
    better = _check(lines, firsts, search)
    jobs = jobs or ((os.cpu_count() or 1) if resolve(firsts[0]).device == "cpu" else 1)
    with _locked(root):
        cells = {key: _with_mask(config, root / "masks") for key, config in cells.items()}
        firsts = [cells[i, seeds[0]] for i in range(len(lines))]
        searched = [i for i, (study, setting) in enumerate(lines) if study.searches(setting)]
        with Pool(jobs, root) as pool:
            searches = pool.map_unique(
                "learning-rate searches",
                {i: (search_rates, firsts[i], search, root / "search") for i in searched},
                lambda i, rates: f"{words[i]}: {rate_in_words(rates, firsts[i])}",
            )
            best = {i: best_rate(rates, firsts[i]) for i, rates in searches.items()}
            cells = {(i, s): c.model_copy(update={"lr": best.get(i, c.lr)}) for (i, s), c in cells.items()}
            folders = {key: root / "cells" / cell_name(config) for key, config in cells.items()}
            summaries = pool.map_unique(
                "runs",
                {key: (run_cell, config, folders[key]) for key, config in cells.items()},
                lambda key, summary: f"{words[key[0]]}, seed {key[1]}: {_outcome(summary)}",
            )
        outcomes = [
            Line(
                study=study,
                setting=setting,
                rates=tuple(searches.get(i, ())),
                lr=number_or(cells[i, seeds[0]].lr, None) or rate_of(folders[i, seeds[0]]),
                better=better[firsts[i].problem],
                runs=tuple(folders[i, seed] for seed in seeds),
                summaries=tuple(summaries[i, seed] for seed in seeds),
            )
            for i, (study, setting) in enumerate(lines)
        ]
        return write_results(comparison, outcomes, root)


def _outcome(summary: dict[str, Any] | None) -> str:
    return "diverged" if summary is None else scores_in_words(summary["scores"])


# --- before the first run -------------------------------------------------------------------------


def _check_folder(root: Path) -> None:
    """Raise MeerkatError unless a comparison can begin, or continue, in a folder."""
    if root.exists() and not root.is_dir():
        raise MeerkatError(f"'{root}': is a file; give a folder as --out")
    entries = {entry.name for entry in root.iterdir()} if root.is_dir() else set()
    if entries and not {"cells", "search"} <= entries:
        raise MeerkatError(f"'{root}': is not empty and no comparison was begun in it; give another --out")
    check_no_links(root)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Make a comparison's folder, and keep other processes out of it.

    Raises:
        MeerkatError: it cannot be made, or another process is comparing in it.
    """
    try:
        for folder in (root, *(root / name for name in ("cells", "search", "masks", "logs"))):
            make_folder(folder)
        descriptor = owned(root / "logs" / "lock", os.O_WRONLY | os.O_CREAT)
    except OSError as error:
        raise MeerkatError(f"'{root}': {error.strerror}; give another --out") from None
    with os.fdopen(descriptor, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MeerkatError(
                f"'{root}': another process is comparing in it; wait for it, stop it, or give another --out"
            ) from None
        yield


def _portable(config: RunConfig) -> RunConfig:
    """Settings that mean the same from any folder, with any number of runs at a time."""
    resolved = resolve(config)
    update: dict[str, Any] = {name: getattr(resolved, name) for name in ("model", "task", "data", "text", "mask")}
    # settings without effect take their defaults: runs that differ in them alone are the same run
    unused = {"density", "mask_scope", "exclude"} if config.recipe.moves in ("full", "lora") else set()
    update |= {name: RunConfig.model_fields[name].default for name in unused.union(config.idle())}
    return config.model_copy(update={**update, "threads": number_or(config.threads, 1)})


_OF_A_PROBLEM = ("problem", "model", "device", "task", "data", "max_length", "chat_template")
_OF_ITS_TEXT = ("text", "text_sequences", "text_length")
_OF_THE_ROWS = ("partition", "clients", "mask")


def _check(
    lines: Sequence[tuple[Study, Setting]], configs: Sequence[RunConfig], search: Search
) -> dict[str, Mapping[str, Better]]:
    """Check what only the models, the data and the masks can show, before anything is written.

    Args:
        configs: each line's run of the first seed.

    Returns:
        Each problem's scores by its name, and which values of them are better.

    Raises:
        MeerkatError: a run cannot be made, or a claim is about a score that its problem does not have.
    """
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], tuple[RunConfig, bool]]] = {}
    for (study, setting), given in zip(lines, configs, strict=True):
        config, searched = resolve(given), study.searches(setting)
        same_rows = (*(getattr(config, name) for name in _OF_THE_ROWS), searched)
        same_problem = tuple(getattr(config, name) for name in _OF_A_PROBLEM + _OF_ITS_TEXT)
        groups.setdefault(same_problem, {})[same_rows] = config, searched
    better = {}
    for group in groups.values():
        first, _ = next(iter(group.values()))
        problem = open_problem(first.model_copy(update={"method": "full-fedzo"}))
        better[first.problem] = problem.scores
        if any(not config.mask for config, _ in group.values()):
            problem.public()
        problem.prepare(problem.rows("train")[:1])
        for config, searched in group.values():
            _check_rows(config, problem, search if searched else None)
    for (study, _), config in zip(lines, configs, strict=True):
        scores = better[config.problem]
        if wrong := [check for check in study.check if check.measure and check.measure not in scores]:
            raise MeerkatError(
                f"study '{study.name}': check '{wrong[0].claim}': measure {wrong[0].measure}: must be one of the "
                f"problem's scores, {', '.join(scores)}"
            )
    return better


def _check_rows(config: RunConfig, problem: Problem, search: Search | None) -> None:
    def split(config: RunConfig) -> None:
        training, _ = training_and_evaluation_rows(config, problem.rows)
        partition(config.partition, training, config.clients, config.seed)

    if config.mask:
        SparseMask.load(Path(config.mask)).check_fits(problem.model)
    split(config)
    if search is None:
        return
    try:
        split(config.model_copy(update={"held_back": search.held_back}))
    except MeerkatError as error:
        raise MeerkatError(
            f"learning-rate search, with {search.held_back:g} of the training rows held back: {error}; or give lr"
        ) from None


def _with_mask(config: RunConfig, folder: Path) -> RunConfig:
    """The settings with their sensitivity mask as a file, made once for all runs; other methods make their own."""
    if config.mask or config.recipe.moves != "sensitivity":
        return config
    names = {"problem", "model", "density", "mask_scope", "exclude", *_OF_ITS_TEXT}
    path = folder / f"{settings_hash(config.model_dump(mode='json', include=names))}.safetensors"
    if not path.exists():
        resolved = resolve(config)
        say(f"mask of density {config.density:g}: {path}")
        remove_leftovers(path)
        write_atomically(path, make_mask(resolved, open_problem(resolved)).save)
    return config.model_copy(update={"mask": str(path.resolve())})
