"""Commands that make something of a model: simulate, resume, compare, mask."""

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meerkat.cli.parser import Command, add_run_settings, add_settings, given_settings, run_argument, show
from meerkat.errors import MeerkatError, RunFailed
from meerkat.settings.config import RunConfig, make_config, read_toml, with_names_of_today

MASK_SETTINGS = (
    *("problem", "model", "text", "method", "density", "mask_scope", "exclude", "text_sequences", "text_length"),
    *("task", "data", "objective", "max_length", "chat_template", "device", "threads", "seed"),
)


def _new_folder(arguments: argparse.Namespace, name: str) -> Path:
    return Path(arguments.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")


# --- simulate and resume --------------------------------------------------------------------------


def _simulate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "meerkat simulate [CONFIG.toml] [--out RUN] [--SETTING VALUE ...] [--json]"
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml", help="file of settings; flags override it")
    first = add_run_settings(parser)
    first.add_argument("--out", metavar="RUN", help="folder for the run; new or empty [default: a new one under runs/]")
    _add_workers(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    about = "processes that share the clients of each round; any number may resume the run [default: 1]"
    parser.add_argument("--workers", metavar="N", type=int, default=1, help=about)


def _simulate(arguments: argparse.Namespace) -> None:
    given = with_names_of_today(read_toml(Path(arguments.config))) if arguments.config else {}
    config = _overridden(given, given_settings(arguments))
    from meerkat.cli.workers import sharing
    from meerkat.run.simulation import simulate

    out = _new_folder(arguments, config.method)
    arguments.safe = out / "config.toml", _resuming(out)
    with sharing(arguments.workers) as ranks:
        summary = simulate(config, out, ranks)
    _show_run(arguments, summary, out)


def _overridden(file: Mapping[str, Any], flags: Mapping[str, Any]) -> RunConfig:
    """A file's settings and flags. What these leave without use, such as another method's settings, is left out."""
    config = make_config({**file, **flags})
    try:
        idle_by_itself = make_config(file).idle()
    except MeerkatError:  # the file needs the flags
        idle_by_itself = {}
    unused = config.idle().keys() - flags.keys() - idle_by_itself.keys()
    return config.model_copy(update={name: RunConfig.model_fields[name].default for name in unused})


def _resume_arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    _add_workers(parser)


def _resume(arguments: argparse.Namespace) -> None:
    from meerkat.cli.workers import sharing
    from meerkat.run.simulation import resume

    arguments.safe = arguments.folder / "config.toml", _resuming(arguments.folder)
    with sharing(arguments.workers) as ranks:
        summary = resume(arguments.folder, ranks)
    _show_run(arguments, summary, arguments.folder)


def _resuming(folder: Path) -> str:
    return f"'meerkat resume {folder}' continues the run"


def _show_run(arguments: argparse.Namespace, summary: dict[str, Any], folder: Path) -> None:
    """Draw a finished run's picture, unless it is there, and print its outcome, even if there is no room to draw."""
    from meerkat.report import draw_curves, summary_in_words

    drawn = f"Picture: {folder / 'curves.png'}"
    try:
        if not all((folder / name).exists() for name in ("curves.png", "curves.svg")):
            draw_curves([folder], folder)
    except RunFailed as error:
        drawn = f"Picture: not written ({error})"
    show(arguments, summary, summary_in_words(summary, folder), drawn)


# --- compare --------------------------------------------------------------------------------------


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "meerkat compare [CONFIG.toml] [--out DIR] [--methods M,M,..] [--SETTING VALUE ...] [--json]"
    about = "file of studies, see docs/formats.md; flags override it"
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml", help=about)
    grid = parser.add_argument_group("the comparison")
    first = add_run_settings(parser, but=("method", "seed", "local_steps", "lr", "held_back", "threads"))
    about = "folder for the comparison; one that was begun is continued [default: a new one under runs/]"
    first.add_argument("--out", metavar="DIR", help=about)
    grid.add_argument("--studies", metavar="NAME,NAME,..", help="studies of the file to run [default: all]")
    grid.add_argument("--methods", metavar="M,M,..", help="methods to compare, with commas")
    grid.add_argument("--seeds", metavar="N,N,..", help="seeds that each setting is repeated with [default: 0,1,2]")
    grid.add_argument("--local-steps", metavar="T,T,..", help="T: local steps a round, with commas")
    grid.add_argument("--total-steps", metavar="N", type=int, help="local steps of every run: rounds x local steps")
    about = (
        "eta: learning rate: search finds the best on held-back training rows, auto measures it on public "
        "text [default: search]"
    )
    grid.add_argument("--lr", default=argparse.SUPPRESS, metavar="search|auto|X", help=about)
    grid.add_argument("--quick", action="store_true", help="the short form that the file's [quick] tables make of it")
    about = "CSV file of finished runs: those in it are not made again, and new ones are added"
    grid.add_argument("--evidence", metavar="FILE.csv", help=about)
    about = "runs at a time, each on one thread: results stay the same [default: one a CPU, or one on a GPU]"
    grid.add_argument("--jobs", metavar="N", type=int, default=0, help=about)


def _compare(arguments: argparse.Namespace) -> None:
    given = {name: value for name, value in given_settings(arguments).items() if name != "local_steps"}
    if arguments.methods is not None:
        given["method"] = [word.strip() for word in arguments.methods.split(",")]
    for name in ("seeds", "local_steps"):
        if (text := getattr(arguments, name)) is not None:
            given[name] = _numbers(text, "--" + name.replace("_", "-"))
    if arguments.total_steps is not None:
        given["total_steps"] = arguments.total_steps
    if arguments.jobs < 0:
        raise MeerkatError(f"--jobs {arguments.jobs}: must be 1 or more, or 0 for one a CPU")
    from meerkat.comparison.studies import read_comparison, with_studies

    file = Path(arguments.config) if arguments.config else None
    comparison = read_comparison(file, given, arguments.quick)
    if arguments.studies is not None:
        comparison = with_studies(comparison, [name.strip() for name in arguments.studies.split(",")])
    from meerkat.comparison.compare import compare
    from meerkat.comparison.results import table

    out = _new_folder(arguments, file.stem if file else "comparison")
    arguments.safe = out / "cells", f"the same command with --out {out} continues the comparison"
    evidence = Path(arguments.evidence) if arguments.evidence else None
    results = compare(comparison, out, arguments.jobs, evidence)
    from meerkat.report import write_comparison_report

    page = write_comparison_report(out)
    show(arguments, results, table(results, sys.stdout.isatty()), "", f"Report: {page}")


def _numbers(text: str, flag: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise MeerkatError(f"{flag} {text}: must be whole numbers with commas, such as 0,1,2") from None


# --- mask -----------------------------------------------------------------------------------------


def _mask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="FILE", help="mask file to write (.safetensors)")
    add_settings(parser, MASK_SETTINGS)


def _mask(arguments: argparse.Namespace) -> None:
    config = make_config(given_settings(arguments))
    out = Path(arguments.out)
    from meerkat.record.files import write_atomically
    from meerkat.run.mask import make_mask
    from meerkat.run.setup import open_problem, resolve, resolve_model

    if config.recipe.moves == "lora":
        raise MeerkatError("--method lora-fedzo: moves adapters whole and has no mask to write; choose another method")
    if out.exists():
        raise MeerkatError(f"'{out}': exists already; give another --out, or remove it first")
    if not out.parent.is_dir():
        raise MeerkatError(f"'{out}': there is no folder '{out.parent}'; make it first")
    if not os.access(out.parent, os.W_OK):
        raise MeerkatError(f"'{out}': '{out.parent}' cannot be written to; give another --out")
    config = resolve(config) if config.recipe.moves == "task" else resolve_model(config)
    mask = make_mask(config, open_problem(config))
    write_atomically(out, mask.save)
    by_tensor = dict(mask.counts())
    size = {"params_total": mask.total, "params_masked": len(mask)}
    show(
        arguments,
        {"mask": str(out), **size, "by_tensor": by_tensor, **mask.facts},
        f"{out}: {len(mask):,} of {mask.total:,} parameters, in {len(by_tensor)} tensors, most of them in",
        *(f"  {n / len(mask):6.1%}  {name}" for name, n in sorted(by_tensor.items(), key=lambda item: -item[1])[:5]),
    )


COMMANDS = (
    Command("simulate", "Fine-tune a model in a federation simulated on this machine.", _simulate_arguments, _simulate),
    Command("resume", "Continue an interrupted run.", _resume_arguments, _resume),
    Command("compare", "Compare methods and settings, each at its own learning rate.", _compare_arguments, _compare),
    Command("mask", "Choose the most sensitive parameters of a model from pre-training text.", _mask_arguments, _mask),
)
