"""Comparing methods and settings side by side: each at its best learning rate, over several seeds.

Every run is an ordinary run folder under `cells/` or `search/`, named by its settings: the same comparison again
continues where it stopped, and one that was extended makes only the new runs.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from meerkat.comparison.cells import cell_name, run_cell
from meerkat.comparison.evidence import Evidence, Origin, Outcome, check_file, check_origins
from meerkat.comparison.learning_rates import best_rate, rate_in_words, search_rates
from meerkat.comparison.masks import OF_ITS_TEXT, with_masks
from meerkat.comparison.processes import Pool
from meerkat.comparison.results import Line, write_results
from meerkat.comparison.studies import Comparison, Search, Setting, Study, axis_words
from meerkat.errors import MeerkatError, RunFailed
from meerkat.problems.partition import partition
from meerkat.problems.problem import Better, Problem
from meerkat.record.files import check_no_links, make_folder, owned
from meerkat.run.mask import given_mask
from meerkat.run.precision import fitting_dtype
from meerkat.run.sentences import scores_in_words
from meerkat.run.setup import open_problem, resolve
from meerkat.run.split import training_and_evaluation_rows
from meerkat.settings.auto import AUTO, number_or
from meerkat.settings.config import RunConfig


def compare(comparison: Comparison, root: Path, jobs: int = 0, evidence: Path | None = None) -> dict[str, Any]:
    """Search every setting's learning rate, run every seed, and write results.csv, table.csv and compare.json.

    Args:
        root: a new or empty folder, or one that a comparison was begun in, of which finished runs are kept.
        jobs: runs at a time; 0 for one a CPU, or one where there is a GPU. Results do not depend on it: a run
            takes one thread, or what its settings say.
        evidence: a CSV file, which need not exist yet: runs that it has are not made again, all others are added.

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
    searched = [i for i, (study, setting) in enumerate(lines) if study.searches(setting)]
    if evidence is not None:
        check_file(evidence)
    facts = _check(lines, firsts, seeds, search, with_origin=evidence is not None)
    jobs = jobs or ((os.cpu_count() or 1) if resolve(firsts[0]).device == "cpu" else 1)
    known: list[Evidence | None] = [None] * len(lines)
    if evidence is not None:
        made = (root / "masks").resolve()
        known = [None if origin is None else Evidence(evidence, origin, made) for _, origin, _ in facts]
        # what a run is known by is what it is, not what some machine makes of auto
        cells = {(i, seed): c.model_copy(update={"dtype": facts[i].dtype}) for (i, seed), c in cells.items()}

    def is_known(i: int) -> bool:
        configs, searching = [cells[i, seed] for seed in seeds], search if i in searched else None
        return (of := known[i]) is not None and known_line(configs, searching, of) is not None

    with _locked(root):
        if evidence is not None:
            names = (json.dumps([getattr(config, name) for name in _OF_A_PROBLEM + OF_ITS_TEXT]) for config in firsts)
            check_origins(root, {name: of.origin for name, of in zip(names, known, strict=True) if of is not None})
        with Pool(jobs, root) as pool:
            done = {key for key in cells if is_known(key[0])}
            unrated = {(i, seed) for i in searched for seed in seeds[1:]}
            cells = with_masks(cells, done, unrated, pool, root / "masks")
            firsts = [cells[i, seeds[0]] for i in range(len(lines))]
            searches = pool.map_unique(
                "learning-rate searches",
                {i: (_search, firsts[i], search, root / "search", known[i]) for i in searched},
                lambda i, rates: f"{words[i]}: {rate_in_words(rates, firsts[i])}",
            )
            best = {i: best_rate(rates, firsts[i]) for i, rates in searches.items()}
            cells = {(i, s): c.model_copy(update={"lr": best.get(i, c.lr)}) for (i, s), c in cells.items()}
            folders = {key: root / "cells" / cell_name(config) for key, config in cells.items()}
            outcomes = pool.map_unique(
                "runs",
                {key: (run_cell, config, folders[key], known[key[0]]) for key, config in cells.items()},
                lambda key, outcome: f"{words[key[0]]}, seed {key[1]}: {_in_words(outcome)}",
            )
        results = [
            Line(
                study=study,
                setting=setting,
                rates=tuple(searches.get(i, ())),
                lrs=tuple(outcomes[i, seed].lr for seed in seeds),
                better=facts[i].better,
                runs=tuple(folders[i, seed] for seed in seeds),
                summaries=tuple(outcomes[i, seed].summary for seed in seeds),
            )
            for i, (study, setting) in enumerate(lines)
        ]
        return write_results(comparison, results, root)


def _search(config: RunConfig, search: Search, folder: Path, evidence: Evidence | None) -> list[tuple[float, float]]:
    return search_rates(config, search, lambda trial: run_cell(trial, folder / cell_name(trial), evidence))


class _Unknown(Exception):
    """A run is not in the evidence."""


def known_line(
    configs: Sequence[RunConfig], search: Search | None, evidence: Evidence
) -> tuple[list[tuple[float, float]], list[Outcome]] | None:
    """What evidence has of a setting: its search, by rates and held-back losses, and its run of each seed.

    Args:
        configs: the setting's run of each seed.
        search: how its rate is searched for; None where it is not.

    Returns:
        None where a run is missing.
    """

    def outcome_of(config: RunConfig) -> Outcome:
        if (outcome := evidence.outcome(config)) is None:
            raise _Unknown
        return outcome

    try:
        rates = search_rates(configs[0], search, outcome_of) if search else []
        chosen = {"lr": best_rate(rates, configs[0])} if rates else {}
        return rates, [outcome_of(config.model_copy(update=chosen)) for config in configs]
    except (_Unknown, RunFailed):
        return None


def _in_words(outcome: Outcome) -> str:
    return "diverged" if outcome.summary is None else scores_in_words(outcome.summary["scores"])


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


def without_idle(config: RunConfig) -> RunConfig:
    """The settings, those without effect at their defaults: runs that differ only in them are the same run."""
    chosen = config.recipe.moves not in ("full", "lora") and not config.mask
    unused = set() if chosen else {"density", "mask_scope", "exclude"}
    defaults = {name: RunConfig.model_fields[name].default for name in unused.union(config.idle())}
    return config.model_copy(update=defaults)


def _portable(config: RunConfig) -> RunConfig:
    """Settings that mean the same from any folder, with any number of runs at a time."""
    resolved = resolve(config)
    update: dict[str, Any] = {name: getattr(resolved, name) for name in ("model", "task", "data", "text", "mask")}
    return without_idle(config).model_copy(update={**update, "threads": number_or(config.threads, 1)})


_OF_A_PROBLEM = ("problem", "model", "device", "task", "data", "max_length", "chat_template")
_OF_THE_ROWS = ("partition", "clients", "mask", "method", "held_back")


class _Facts(NamedTuple):
    """What a line's problem shows."""

    better: Mapping[str, Better]
    """Its scores, and which values of them are better."""
    origin: Origin | None
    """None where nobody asks."""
    dtype: str
    """Of the run's weights, as this machine has it."""


def _check(
    lines: Sequence[tuple[Study, Setting]],
    configs: Sequence[RunConfig],
    seeds: Sequence[int],
    search: Search,
    with_origin: bool,
) -> list[_Facts]:
    """Check what only the models, the data and the masks can show, before anything is written.

    Args:
        configs: each line's run of the first seed.

    Returns:
        Of each line.

    Raises:
        MeerkatError: a run cannot be made, or a claim is about a score that its problem does not have.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    resolved = [resolve(config) for config in configs]
    for i, config in enumerate(resolved):
        groups.setdefault(tuple(getattr(config, name) for name in _OF_A_PROBLEM + OF_ITS_TEXT), []).append(i)
    facts: dict[int, _Facts] = {}
    for group in groups.values():
        problem = open_problem(resolved[group[0]].model_copy(update={"method": "full-fedzo"}))
        if any(not resolved[i].mask for i in group):
            problem.public()
        problem.prepare(problem.rows("train")[:1])
        checked = set()
        for i in group:
            searched = lines[i][0].searches(lines[i][1])
            if (same_rows := (*(getattr(resolved[i], name) for name in _OF_THE_ROWS), searched)) not in checked:
                _check_rows(resolved[i], problem, seeds, search if searched else None)
            checked.add(same_rows)
        origin = Origin.of(problem) if with_origin else None
        facts |= {i: _Facts(problem.scores, origin, _dtype(resolved[i], problem)) for i in group}
    for i, (study, _) in enumerate(lines):
        scores = facts[i].better
        if wrong := [check for check in study.check if check.measure and check.measure not in scores]:
            raise MeerkatError(
                f"study '{study.name}': check '{wrong[0].claim}': measure {wrong[0].measure}: must be one of the "
                f"problem's scores, {', '.join(scores)}"
            )
    return [facts[i] for i in range(len(lines))]


def _dtype(config: RunConfig, problem: Problem) -> str:
    return fitting_dtype(config, problem.model) if config.dtype == AUTO else config.dtype


def _check_rows(config: RunConfig, problem: Problem, seeds: Sequence[int], search: Search | None) -> None:
    def split(config: RunConfig) -> None:
        training, _ = training_and_evaluation_rows(config, problem.rows)
        partition(config.partition, training, config.clients, config.seed)

    if config.mask:
        if config.recipe.moves == "lora":
            raise MeerkatError(f"method {config.method}: adapters depend on the seed; leave --mask out")
        given_mask(config, problem.model)
    for seed in seeds:
        split(config.model_copy(update={"seed": seed}))
    if search is None:
        return
    try:
        split(config.model_copy(update={"held_back": search.held_back}))
    except MeerkatError as error:
        raise MeerkatError(
            f"learning-rate search, with {search.held_back:g} of the training rows held back: {error}; or give lr"
        ) from None
