"""Killed with SIGKILL at any instant and resumed, a run ends as one never touched."""

import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from nursery import Command

from meerkat.cli import main
from meerkat.record.run_folder import RunFolder

Start = Callable[[Sequence[str]], Command]


def killed_and_resumed(start: Start, arguments: list[str], out: Path, kills: int, seed: int) -> int:
    """Start the run, kill it at random instants, resume it each time; how many kills met a living process."""
    rng = random.Random(seed)
    untouched = out.with_name("untouched")
    began = time.monotonic()
    process = start([*arguments, "--out", str(untouched)])
    while _size(untouched) < 2000:
        time.sleep(0.001)
    until_rounds = time.monotonic() - began
    assert process.wait() == 0
    met = 0
    for _ in range(kills):
        process = start(["resume", str(out)] if (out / "config.toml").exists() else [*arguments, "--out", str(out)])
        if rng.random() < 0.5:  # anywhere: while it starts, replays, or makes its first rounds
            time.sleep(rng.uniform(0, 1.2 * until_rounds))
        else:  # while rounds are being written
            before = _size(out)
            while process.poll() is None and _size(out) <= before:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            met += 1
        process.wait()
    while not (out / "summary.json").exists():
        resuming = (out / "config.toml").exists()
        assert start(["resume", str(out)] if resuming else [*arguments, "--out", str(out)]).wait() == 0
    return met


def _size(out: Path) -> int:
    log = out / "rounds.log"
    return log.stat().st_size if log.exists() else 0


def same_run(start: Start, arguments: list[str], tmp_path: Path, kills: int) -> int:
    out = tmp_path / "killed"
    met = killed_and_resumed(start, arguments, out, kills, seed=0)
    untouched, killed = (RunFolder(tmp_path / name).summary() for name in ("untouched", "killed"))
    assert untouched is not None
    assert killed is not None
    assert killed["theta_digest"] == untouched["theta_digest"]
    assert (out / "rounds.log").read_bytes() == (tmp_path / "untouched" / "rounds.log").read_bytes()
    assert main(["verify", str(out)]) == 0
    return met


def test_a_few_kills(start_meerkat: Start, simulate_arguments: list[str], tmp_path: Path) -> None:
    assert (
        same_run(start_meerkat, [*simulate_arguments, "--rounds", "150", "--eval-every", "7"], tmp_path, kills=2) >= 1
    )


@pytest.mark.slow
def test_many_kills(start_meerkat: Start, simulate_arguments: list[str], tmp_path: Path) -> None:
    met = same_run(start_meerkat, [*simulate_arguments, "--rounds", "3000", "--eval-every", "50"], tmp_path, kills=30)
    print(f"{met} of 30 kills met a living process")
    assert met >= 20
