"""Several processes that share a run's clients write the log that one alone writes, and end together."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import fails
from test_methods import RUNS, SMALL

from meerkat.algorithm.rounds import RoundPlan
from meerkat.cli import main
from meerkat.cli.parser import given_settings
from meerkat.errors import Diverged, RunFailed
from meerkat.privacy import mechanism
from meerkat.run import simulation
from meerkat.run.ranks import RankLost, Ranks
from meerkat.run.shared_engine import share
from meerkat.run.simulation import follow, resume, simulate
from meerkat.settings.config import RunConfig, make_config

# --- ranks as threads -----------------------------------------------------------------------------


class Room:
    """Where threads hear each other, in place of processes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.said = ""


class Threads(Ranks):
    """One rank of several in this process."""

    def __init__(self, rank: int, room: Room) -> None:
        super().__init__(rank, room.size, lambda: None)
        self._room = room

    def _broadcast(self, source: int, message: Any = None) -> Any:
        try:
            if source == self.rank:
                self._room.said = json.dumps(message)
            self._room.barrier.wait()
            said = self._room.said
            self._room.barrier.wait()
        except threading.BrokenBarrierError:
            raise RankLost from None
        return json.loads(said)


@pytest.fixture(autouse=True)
def one_loads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are loaded by one thread at a time: transformers loads them so."""
    lock, load = threading.Lock(), simulation.open_problem

    def open_problem(config: RunConfig) -> Any:
        with lock:
            return load(config)

    monkeypatch.setattr(simulation, "open_problem", open_problem)


def serve(ranks: Ranks) -> None:
    with ranks.answering():
        follow(ranks)


def together(size: int, lead: Callable[[Ranks], Any], kind: type[Threads] = Threads) -> Any:
    """What rank 0 of so many makes."""
    room = Room(size)
    with ThreadPoolExecutor(size - 1) as others:
        served = [others.submit(serve, kind(rank, room)) for rank in range(1, size)]
        try:
            ranks = Threads(0, room)
            made = lead(ranks)
            ranks.end()
        except BaseException:
            room.barrier.abort()
            raise
        for each in served:
            each.result()
    return made


@pytest.fixture
def config(simulate_arguments: list[str]) -> Callable[..., RunConfig]:
    """The tiny federation's settings with some more flags; alike for any number of ranks."""

    def made(*flags: str) -> RunConfig:
        from meerkat.cli import build_parser

        return make_config(given_settings(build_parser().parse_args([*simulate_arguments, *FAST, *flags])))

    return made


FAST = (*SMALL, "--batching", "off")
MORE = {
    "one step": ("--local-steps", "1"),
    "five steps in two directions": ("--local-steps", "5", "--directions", "2"),
    "in bfloat16": ("--dtype", "bfloat16", "--local-steps", "2"),
    "on a quantised base": ("--quantize", "int8", "--local-steps", "2"),
    "fewer clients than ranks": ("--clients", "2", "--clients-per-round", "1"),
    "under attack": ("--attack", "collusion", "--attackers", "1", "--clients", "5", "--aggregation", "median"),
}


@pytest.mark.parametrize(
    "name", [*MORE, "meerkat-vp", "feddyn that stops early", "fo-fedavg by adam", "momentum", "full-fedzo"]
)
def test_ranks_write_the_log_that_one_process_writes(
    name: str, config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    settings = config(*{**RUNS, **MORE}[name])
    simulate(settings, tmp_path / "1")
    for size in (2, 3):
        together(size, lambda ranks, out=tmp_path / str(size): simulate(settings, out, ranks))
        assert (tmp_path / str(size) / "rounds.log").read_bytes() == (tmp_path / "1" / "rounds.log").read_bytes()


def test_each_rank_adds_its_own_clients_noise(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechanism, "gaussian", lambda count: np.arange(1.0, count + 1))
    monkeypatch.setattr(
        mechanism.os, "urandom", lambda count: bytes(range(64, 64 + count % 128)) + bytes(count - count % 128)
    )
    settings = config("--dp", "example", "--dp-noise-multiplier", "1", "--rounds", "2")
    alone = simulate(settings, tmp_path / "1")
    shared = together(2, lambda ranks: simulate(settings, tmp_path / "2", ranks))
    assert shared["theta_digest"] == alone["theta_digest"]


def test_the_servers_noise_is_drawn_once(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    settings = config("--dp", "client", "--dp-noise-multiplier", "1", "--weights", "equal", "--clients-per-round", "2")
    together(3, lambda ranks: simulate(settings, tmp_path / "3", ranks))  # each rank checks every digest
    assert main(["verify", str(tmp_path / "3")]) == 0


def test_a_run_goes_on_with_any_number_of_ranks(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    settings, cut = config(*RUNS["meerkat-vp"]), tmp_path / "cut"
    simulate(settings, tmp_path / "1")
    whole = (tmp_path / "1" / "rounds.log").read_bytes()
    together(3, lambda ranks: simulate(settings, cut, ranks))
    for records, size in ((2, 2), (3, 3), (4, 2)):
        (cut / "summary.json").unlink()
        (cut / "rounds.log").write_bytes(b"".join(whole.splitlines(keepends=True)[:records]))
        together(size, lambda ranks: resume(cut, ranks))
        assert (cut / "rounds.log").read_bytes() == whole
    together(2, lambda ranks: resume(cut, ranks))  # it is finished: nobody has anything to do


class Elsewhere(Threads):
    """A rank that hears another aggregate than was logged, and so moves elsewhere."""

    def heard(self) -> Iterator[Any]:
        for message in super().heard():
            if "record" in message:
                message["record"]["theta"] = "0" * 64
            yield message


def test_a_rank_that_stands_elsewhere_stops_the_run(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"rank 1: does not follow rank 0.*theta after round 0"):
        together(2, lambda ranks: simulate(config(), tmp_path / "run", ranks), Elsewhere)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (Diverged("the loss is nan; start a new run with a lower --lr"), Diverged, r"^round 0: the loss is nan; start"),
        (OSError("no room"), RunFailed, r"^rank 1: OSError: no room$"),
    ],
)
def test_what_fails_on_another_rank_is_said_by_the_first(
    error: Exception, kind: type[Exception], said: str, config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    class Failing(Threads):
        def heard(self) -> Iterator[Any]:
            next(super().heard())
            raise error

    with pytest.raises(kind, match=said):
        together(2, lambda ranks: simulate(config(), tmp_path / "run", ranks), Failing)


def test_shares_are_even_and_whole() -> None:
    steps = {0: 10, 1: 1, 2: 10, 3: 1, 4: 10, 5: 1, 9: 4}
    plan = RoundPlan(0, 0.1, 1e-3, 1, steps)
    shares = [dict(share(plan, rank, 3).steps) for rank in range(3)]
    assert {client: count for share in shares for client, count in share.items()} == steps
    assert sum(map(len, shares)) == len(steps)
    assert sorted(sum(share.values()) for share in shares) == [11, 12, 14]
    assert all([*share] == sorted(share) for share in shares)


# --- ranks as processes ---------------------------------------------------------------------------


class Shared:
    """A run shared by processes, in a process group of their own."""

    def __init__(self, *command: str) -> None:
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        self.first: subprocess.Popen[str] = subprocess.Popen([sys.executable, "-m", *command], **pipes)

    def others(self) -> list[int]:
        listing = subprocess.run(
            ["pgrep", "-P", str(self.first.pid), "-f", "spawn_main"], capture_output=True, text=True
        )
        return [int(pid) for pid in listing.stdout.split()]

    def status(self) -> tuple[int, str]:
        """The exit status of the first, and what it said last, once all processes have ended."""
        _, said = self.first.communicate(timeout=300)
        for _ in range(200):
            try:
                os.killpg(self.first.pid, 0)
            except ProcessLookupError:
                return self.first.returncode, said.splitlines()[-1] if said else ""
            time.sleep(0.05)
        raise AssertionError("a process is left")


def wait_for(log: Path, lines: int) -> None:
    for _ in range(15000):
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.02)
    raise AssertionError(f"{log} does not grow")


LONG = ("--rounds", "120", "--clients", "2", "--batching", "off", "--eval-every", "0")


def test_a_killed_worker_ends_the_run_and_any_number_resumes_it(simulate_arguments: list[str], tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "run" / "rounds.log"
    shared = Shared("meerkat", *simulate_arguments, *LONG, "--out", str(out), "--workers", "2")
    wait_for(log, 4)
    os.kill(shared.others()[-1], signal.SIGKILL)
    status, said = shared.status()
    assert status == 1
    assert said.startswith("meerkat: another process of this run ended")
    assert log.read_bytes().count(b"\n") < 122
    assert main(["resume", str(out)]) == 0
    assert main([*simulate_arguments, *LONG, "--out", str(tmp_path / "alone")]) == 0
    assert log.read_bytes() == (tmp_path / "alone" / "rounds.log").read_bytes()


@pytest.mark.slow
def test_no_process_outlives_the_first(simulate_arguments: list[str], tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and what it starts
    out, log = tmp_path / "run", tmp_path / "run" / "rounds.log"
    run = ("meerkat", *simulate_arguments, *LONG, "--rounds", "2000", "--out", str(out))
    shared = Shared(*run, "--workers", "3")
    wait_for(log, 4)
    os.killpg(shared.first.pid, signal.SIGINT)  # as Ctrl-C on a terminal does
    status, said = shared.status()
    safe = f"meerkat: interrupted; what was logged is safe: 'meerkat resume {out}' continues the run"
    assert (status, said) == (130, safe)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        shared = Shared("meerkat", "resume", str(out), "--workers", "2")
        wait_for(log, log.read_bytes().count(b"\n") + 4)
        shared.first.send_signal(number)
        status, _ = shared.status()
        assert status == (130 if number == signal.SIGINT else -number)
    assert main(["verify", str(out)]) == 0


@pytest.mark.slow
def test_torchrun(simulate_arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    launched = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "meerkat")  # on a free port
    arguments = [*simulate_arguments, "--batching", "off"]
    status, said = Shared(*launched, *arguments, "--out", str(out)).status()
    assert status == 0, said
    assert main([*arguments, "--out", str(tmp_path / "alone")]) == 0
    assert (out / "rounds.log").read_bytes() == (tmp_path / "alone" / "rounds.log").read_bytes()
    (out / "summary.json").unlink()
    lines = (out / "rounds.log").read_bytes().splitlines(keepends=True)
    (out / "rounds.log").write_bytes(b"".join(lines[:3]))
    status, said = Shared(*launched, "resume", str(out)).status()
    assert status == 0, said
    assert (out / "rounds.log").read_bytes() == b"".join(lines)


def test_workers_are_at_least_one_and_torchruns_are_counted_by_it(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*simulate_arguments, "--out", str(tmp_path / "run")]
    fails([*arguments, "--workers", "0"], capsys, "--workers 0: must be at least 1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "4")
    fails([*arguments, "--workers", "2"], capsys, "--workers 2: torchrun has started 4 processes already; leave it out")
    assert not (tmp_path / "run").exists()
