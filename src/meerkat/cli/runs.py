"""Commands that make something of a model: simulate, resume, compare, mask."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meerkat.cli.parser import Command, add_run_settings, add_settings, given_settings
from meerkat.errors import MeerkatError
from meerkat.settings.config import make_config, read_toml, with_names_of_today

MASK_SETTINGS = (
    "problem",
    "model",
    "text",
    "method",
    "density",
    "mask_scope",
    "exclude",
    "text_sequences",
    "text_length",
    "task",
    "data",
    "objective",
    "max_length",
    "device",
    "dtype",
    "threads",
    "seed",
)


# --- simulate and resume --------------------------------------------------------------------------


def _simulate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "meerkat simulate [CONFIG.toml] [--out RUN] [--SETTING VALUE ...] [--json]"
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml", help="file of settings; flags override it")
    first = add_run_settings(parser)
    first.add_argument("--out", metavar="RUN", help="folder for the run; new or empty [default: a new one under runs/]")


def _simulate(arguments: argparse.Namespace) -> None:
    given = with_names_of_today(read_toml(Path(arguments.config))) if arguments.config else {}
    config = make_config(given | given_settings(arguments))
    from meerkat.run.simulation import simulate

    out = Path(arguments.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.method}")
    _show(simulate(config, out), out, arguments.json)


def run_argument(parser: argparse.ArgumentParser) -> None:
    """Add the folder of a run."""
    parser.add_argument("folder", metavar="RUN", type=Path, help="the run's folder")


def _resume(arguments: argparse.Namespace) -> None:
    from meerkat.run.simulation import resume

    _show(resume(arguments.folder), arguments.folder, arguments.json)


def _show(summary: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Draw a finished run's picture and print its outcome."""
    from meerkat.record.run_folder import explain_disk_errors
    from meerkat.report import draw_curves, summary_in_words

    with explain_disk_errors(folder / "curves.png", f"make room, then 'meerkat resume {folder}'"):
        picture, _ = draw_curves([folder], folder)
    if as_json:
        print(json.dumps(summary))
    else:
        print(f"{summary_in_words(summary, folder)}\nPicture: {picture}")


# --- compare --------------------------------------------------------------------------------------


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "meerkat compare [CONFIG.toml] [--out DIR] [--methods M,M,..] [--SETTING VALUE ...] [--json]"
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG.toml", help="file of studies, see docs/formats.md; flags override it"
    )
    own = ("method", "seed", "local_steps", "lr", "held_back", "threads")
    grid = parser.add_argument_group("the comparison")
    first = add_run_settings(parser, but=own)
    first.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the comparison; one that was begun is continued [default: a new one under runs/]",
    )
    grid.add_argument("--methods", metavar="M,M,..", help="methods to compare, with commas")
    grid.add_argument("--seeds", metavar="N,N,..", help="seeds that each setting is repeated with [default: 0,1,2]")
    grid.add_argument("--local-steps", metavar="T,T,..", help="T: local steps a round, with commas")
    grid.add_argument("--total-steps", metavar="N", type=int, help="local steps of every run: rounds x local steps")
    grid.add_argument(
        "--lr",
        default=argparse.SUPPRESS,
        metavar="search|auto|X",
        help="eta: learning rate: search finds the best on held-back training rows, auto fits it to the number of "
        "parameters that move [default: search]",
    )
    grid.add_argument("--quick", action="store_true", help="the short form that the file's [quick] tables make of it")
    grid.add_argument(
        "--jobs",
        metavar="N",
        type=int,
        default=0,
        help="runs at a time, each on one thread: results stay the same [default: one a CPU, or one on a GPU]",
    )


def _compare(arguments: argparse.Namespace) -> None:
    given = {name: value for name, value in given_settings(arguments).items() if name != "local_steps"}
    for flag, name in (("methods", "method"), ("seeds", "seeds"), ("local_steps", "local_steps")):
        if (text := getattr(arguments, flag, None)) is not None:
            words = [word.strip() for word in text.split(",")]
            given[name] = words if name == "method" else _numbers(words, "--" + flag.replace("_", "-"))
    if arguments.total_steps is not None:
        given["total_steps"] = arguments.total_steps
    if arguments.jobs < 0:
        raise MeerkatError(f"--jobs {arguments.jobs}: must be 1 or more, or 0 for one a CPU")
    from meerkat.comparison.studies import read_comparison

    comparison = read_comparison(Path(arguments.config) if arguments.config else None, given, arguments.quick)
    from meerkat.comparison.compare import compare
    from meerkat.comparison.results import table

    name = Path(arguments.config).stem if arguments.config else "comparison"
    out = Path(arguments.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")
    arguments.cure = f"the same command with --out {out} continues the comparison"
    results = compare(comparison, out, arguments.jobs)
    from meerkat.report import write_comparison_report

    page = write_comparison_report(out)
    print(json.dumps(results) if arguments.json else f"{table(results, sys.stdout.isatty())}\n\nReport: {page}")


def _numbers(words: Sequence[str], flag: str) -> list[int]:
    try:
        return [int(word) for word in words]
    except ValueError:
        raise MeerkatError(f"{flag} {','.join(words)}: must be whole numbers with commas, such as 0,1,2") from None


# --- mask -----------------------------------------------------------------------------------------


def _mask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="FILE", help="mask file to write (.safetensors)")
    add_settings(parser, MASK_SETTINGS)


def _mask(arguments: argparse.Namespace) -> None:
    config = make_config(given_settings(arguments))
    out = Path(arguments.out)
    from meerkat.record.run_folder import write_atomically
    from meerkat.run.mask import make_mask
    from meerkat.run.setup import open_problem, resolve, resolve_model

    if config.recipe.moves == "lora":
        raise MeerkatError("--method lora-fedzo: moves adapters whole and has no mask to write; choose another method")
    if out.exists():
        raise MeerkatError(f"'{out}': exists already; give another --out, or remove it first")
    if not out.parent.is_dir():
        raise MeerkatError(f"'{out}': there is no folder '{out.parent}'; make it first")
    config = resolve(config) if config.recipe.moves == "task" else resolve_model(config)
    mask = make_mask(config, open_problem(config))
    write_atomically(out, mask.save)
    by_tensor = dict(mask.counts())
    if arguments.json:
        size = {"params_total": mask.total, "params_masked": len(mask)}
        print(json.dumps({"mask": str(out), **size, "by_tensor": by_tensor, **mask.facts}))
    else:
        print(f"{out}: {len(mask):,} of {mask.total:,} parameters, in {len(by_tensor)} tensors, most of them in")
        for name, count in sorted(by_tensor.items(), key=lambda item: -item[1])[:5]:
            print(f"  {count / len(mask):6.1%}  {name}")


COMMANDS = (
    Command("simulate", "Fine-tune a model in a federation simulated on this machine.", _simulate_arguments, _simulate),
    Command("resume", "Continue an interrupted run.", run_argument, _resume),
    Command(
        "compare",
        "Compare methods and settings over several seeds, each at its own learning rate.",
        _compare_arguments,
        _compare,
    ),
    Command("mask", "Choose the most sensitive parameters of a model from pre-training text.", _mask_arguments, _mask),
)
