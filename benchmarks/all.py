"""The figures of this project that a few minutes give, in one table: medians of several turns, and their range.

    make bench                                                              # random and embedded models
    make bench MODEL=DIR TASK=sst2 DATA=DIR [GGUF=FILE] [DTYPE=bfloat16]    # your own, where one can be given

Each turn runs every program once, one after another, so that what else the machine does meets all of them alike. What
follows from no clock is computed in the first turn alone. A program that cannot run here is named with its reason.
The table is printed at the end. OUT/bench.md has it after each program, OUT/bench.json all that they said.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meerkat import demo
from meerkat.progress import say

HERE = Path(__file__).parent
Figures = Callable[[Mapping[str, Any]], Mapping[str, float]]
"""What a program printed -> its figures, by what they say."""


@dataclass(frozen=True)
class Program:
    """One of the programs beside this one."""

    name: str
    options: tuple[str, ...]
    figures: Figures
    timed: bool = True
    """Whether another turn may give another figure."""


def of_peers(printed: Mapping[str, Any]) -> dict[str, float]:
    names = {"meerkat": "Meerkat", "mezo": "literal MeZO", "dense_z": "dense z", "lora": "LoRA, zeroth order"}
    figures: dict[str, float] = {}
    for name, each in printed["methods"].items():
        figures[f"{names.get(name, name)}: a step over two forward passes"] = each["ratio"]
        figures[f"{names.get(name, name)}: peak memory of a step over inference"] = each["memory"]
    figures["tokens a second that a Meerkat step forwards, both passes"] = printed["tokens_per_s"]
    for name, each in printed["engines"].items():
        figures[f"tokens a second that {name} forwards"] = each["tokens_per_s"]
        figures[f"ours over {name}"] = each["ratio"]
    return figures


def programs(arguments: argparse.Namespace) -> list[Program]:
    """All of them, in the table's order."""
    task = demo.TASKS["reviews"]
    model = ("--model", arguments.model or str(demo.MODEL), "--data", arguments.data or str(task))
    model += ("--task", arguments.task or str(task / "task.toml"), "--repeats", "3" if arguments.model else "7")
    peers = ("--dtype", arguments.dtype, "--repeats", "3" if arguments.model else "7")
    for name in ("model", "gguf"):
        peers += (f"--{name}", getattr(arguments, name)) if getattr(arguments, name) else ()
    return [
        Program("peers", peers, of_peers),
        Program(
            "client_batching",
            model,
            lambda f: {"a round of ten clients over its 20 separate padded passes": f["ratio"]},
        ),
        Program(
            "memory",
            (),
            lambda f: {
                "110M parameters: peak memory of a step over inference": f["ratio"],
                "1,000 simulated clients over 10: peak memory": f["clients_1000_over_10"],
                "the same, all parameters moving": f["clients_1000_over_10_full"],
            },
        ),
        Program("gradip", ("--repeats", "1"), lambda f: {"GradIP: 100,000 clients over 10": f["ratio"]}),
        Program(
            "protections",
            ("--repeats", "3"),
            lambda f: {
                "all protections, percent of a step": f["share_percent"],
                "a step under example-level privacy over one without": f["private_step_ratio"]["random Llama"],
            },
        ),
        Program(
            "round_latency",
            ("--rounds", "200", "--message-rounds", "0"),
            lambda f: {
                "a round over TLS, four sites: ms": f["median_ms"],
                "the same over a bare gRPC echo": f["median_ms"] / f["echo_ms"],
                "bytes a client on the wire": f["bytes"],
            },
        ),
        Program(
            "streams",
            ("--rounds", "100"),
            lambda f: {"64 sites on one coordinator: rounds a second": f["rounds_per_s"]},
        ),
        Program(
            "catch_up",
            ("--rounds", "3"),
            lambda f: {"100 missed rounds over theta, n = 1,240,000: bytes": f["ratio"]},
            timed=False,
        ),
        Program(
            "reconstruction",
            ("--steps", "4", "--ratio", "0.01"),
            lambda f: {"one row identified among 1,000 from one exact scalar: share": f["ratio"]},
            timed=False,
        ),
    ]


def outcome(program: Program) -> dict[str, Any] | str:
    """What the program printed, or why it did not run."""
    command = [sys.executable, str(HERE / f"{program.name}.py"), "--json", *program.options]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        return (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1]
    printed: dict[str, Any] = json.loads(ran.stdout)
    return printed


def in_words(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(chosen: list[Program], outcomes: Mapping[str, list[dict[str, Any] | str]]) -> str:
    """A Markdown table: what, median, range over the turns, program."""
    lines = ["| what | median | range | program |", "| --- | --- | --- | --- |"]
    for program in chosen:
        ran = [printed for printed in outcomes[program.name] if not isinstance(printed, str)]
        failed = [reason for reason in outcomes[program.name] if isinstance(reason, str)]
        turns = [program.figures(printed) for printed in ran]
        for what in turns[0] if turns else ():
            values = [turn[what] for turn in turns]
            spread = f"{in_words(min(values))} to {in_words(max(values))}" if program.timed else "no clock"
            lines.append(f"| {what} | {in_words(statistics.median(values))} | {spread} | `{program.name}` |")
        lines += [f"| not run: {reason} | | | `{program.name}` |" for reason in dict.fromkeys(failed)]
    ran_once = {
        name: each_turn[0] for name, each_turn in outcomes.items() if each_turn and not isinstance(each_turn[0], str)
    }
    return "\n".join([*lines, "", *(f"- `{name}`: {printed['measured_on']}" for name, printed in ran_once.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print bench.json in place of the table")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="", help="programs, with commas [default: all]")
    parser.add_argument("--model", default="", help="folder of a Hugging Face model")
    parser.add_argument("--task", default="", help="what its rows are, with --data")
    parser.add_argument("--data", default="")
    parser.add_argument("--dtype", default="float32", help="of the model's weights in peers")
    parser.add_argument("--gguf", default="", help="the same model for llama.cpp")
    arguments = parser.parse_args()
    if arguments.model and not (arguments.task and arguments.data):
        parser.error("--model needs --task and --data")
    chosen = programs(arguments)
    names = [program.name for program in chosen]
    if unknown := set(filter(None, arguments.only.split(","))) - set(names):
        parser.error(f"--only: must be some of {', '.join(names)}, with commas, not {', '.join(unknown)}")
    chosen = [program for program in chosen if not arguments.only or program.name in arguments.only.split(",")]

    outcomes: dict[str, list[dict[str, Any] | str]] = {program.name: [] for program in chosen}
    text, result = "", dict[str, Any]()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for turn in range(arguments.turns):
        for program in chosen:
            if not program.timed and turn:
                continue
            say(f"turn {turn + 1} of {arguments.turns}: {program.name}")
            outcomes[program.name].append(outcome(program))
            load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end, {turn + 1} turns"
            result = {"name": "all", "measured_on": load, "programs": outcomes}
            text = f"{table(chosen, outcomes)}\n\n{load}"
            (arguments.out / "bench.md").write_text(text + "\n")
            (arguments.out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if arguments.json else text)


if __name__ == "__main__":
    main()
