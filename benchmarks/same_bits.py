"""Whether a change of the code left every digit where it was: short runs of a commit and of this tree, compared.

    python benchmarks/same_bits.py COMMIT [--json] [--only SUBSTRING] [--keep FILE] [--skip-federation]

COMMIT is checked out into a temporary git worktree. Each tree makes the same list of runs, through the command line
alone, in one process that loads torch once; the two processes go side by side. Then each makes the federation of
examples/federation/run over the network, one tree after the other. Digests, accuracies, losses, decisions and counts of
bytes and steps must be equal to the last digit; times are not looked at. A run that fails is never equal.

--keep writes what COMMIT's runs gave to a file; where the file has a run of that commit already, made with the same
settings and packages, it is not made again. Such a file is good on one machine.

What comes from the operating system's randomness (noise and samples under --dp) is drawn from a fixed source instead,
the same in both trees. Every setting that matters is given, so that a change of defaults is no change of bits, but in
the comparison and the federation, which choose their own learning rates.

Exit status: 0, 1 (something differs) or 2 (bad arguments).
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
FEDERATION = Path("examples") / "federation" / "run"

Result = dict[str, str]
"""What a run came to: a field's name -> its value as Python writes it, to the last digit. FAILED alone: why it did."""
FAILED = "failed"

OF_A_SUMMARY = (
    *("theta_digest", "accuracy", "loss", "accuracy_before", "early_stopped_clients", "extreme_clients"),
    *("payload_bytes_up", "payload_bytes_down", "client_steps"),
)
OF_A_CALIBRATION = (
    *("round", "clients", "abs_g", "gradip", "rho_later", "rho_quie", "later", "thresholds"),
    *("extreme", "early_stopped"),
)
PACKAGES = ("torch", "numpy", "transformers", "peft", "dp-accounting")
"""What the digits depend on beside the code."""


# --- the list -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One thing to do in both trees."""

    name: str
    flags: Mapping[str, Any]
    """Flags of the command, by name without dashes; None leaves one out."""
    kind: Literal["simulate", "resume", "compare", "partition", "federation"] = "simulate"

    @property
    def words(self) -> list[str]:
        """The flags as the command line takes them."""
        given = {name: value for name, value in self.flags.items() if value is not None}
        return [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), str(value))]


ROWS = "rows"
"""Few rows of the embedded task, in each tree's folder for its runs: reading all takes longer than a short run."""
SPLIT: Mapping[str, Any] = {"task": "topics", "held_back": 0.1, "partition": "iid", "clients": 8, "seed": 7}
"""What these rows are: the first two parts."""
JUDGED = 60
"""Rows that runs are judged on, of the second part."""

BASE: Mapping[str, Any] = {
    "model": "embedded",
    "task": "topics",
    "data": ROWS,
    "method": "meerkat",
    "density": 1e-3,
    "mask_scope": "global",
    "exclude": "embeddings",
    "text_sequences": 32,
    "text_length": 64,
    "clients": 4,
    "partition": "dirichlet:0.5",
    "weights": "examples",
    "rounds": 3,
    "local_steps": 2,
    "directions": 1,
    "lr": 0.2,
    "lr_schedule": "constant",
    "eps": 1e-3,
    "batch_size": 4,
    "tokens_per_pass": 4096,
    "objective": "classification",
    "max_length": 256,
    "server_optimizer": "sgd",
    "max_step_norm": 100.0,
    "aggregation": "mean",
    "mixing": "none",
    "clipping": "none",
    "eval_every": 0,
    "device": "cpu",
    "dtype": "float32",
    "batching": "off",
    "threads": 1,
    "seed": 7,
}
"""Settings of every run, where it has no others."""

OWN: Mapping[str, Mapping[str, Any]] = {
    "meerkat": {},
    "meerkat-vp": {},
    "full-fedzo": {"lr": 1e-3},
    "lora-fedzo": {"lr": 5e-2, "eps": 1e-2},
    "weight-magnitude": {},
    "random-mask": {},
    "task-mask": {},
    "random-early-stop": {},
    "feddyn": {"lr": 5e-2, "feddyn_alpha": 1e-3},
    "fo-fedavg": {"lr": 6.0},
}
"""Each method, and settings that fit it."""

CALIBRATION: Mapping[str, Any] = {
    "partition": "mixed:2",
    "batch_size": 8,
    "vpcs_rule": "automatic",
    "calibration_steps": 40,
    "initial_steps": 12,
    "later_steps": 12,
    "rho_later": 2.0,
    "rho_quie": 0.5,
    "sigma": 0.25,
}
"""As short as one can be that still finds somebody extreme."""
SHORTEST = {**CALIBRATION, "batch_size": 4, "calibration_steps": 12, "initial_steps": 4, "later_steps": 4}
"""For where nobody need be found."""


def runs() -> list[Run]:
    """All runs, in the order they are made."""
    listed = [*_methods(), *_server(), *_attacks(), *_calibrations(), *_settings(), *_privacy()]
    listed.append(_simulated("resume adam", "resume", rounds=5, server_optimizer="adam", server_lr=0.02))
    early = {**CALIBRATION, "method": "meerkat-vp", "local_steps": 5, "directions": 2}
    listed.append(_simulated("resume meerkat-vp", "resume", **early, rounds=5))
    compared = {"methods": "meerkat,lora-fedzo", "seeds": 7, "local_steps": 2, "total_steps": 4, "jobs": 1}
    chosen = ("method", "lr", "eps", "seed", "local_steps", "rounds", "threads")
    shared = {name: value for name, value in BASE.items() if name not in chosen}
    listed.append(Run("compare two methods", {**shared, **compared}, "compare"))
    listed.append(Run("partition mixed", {**SPLIT, "partition": "mixed:3"}, "partition"))
    federated = {"task": "topics", "method": "meerkat", "sites": 2, "rounds": 3, "local_steps": 2, "seed": 7}
    listed.append(Run("federation", federated, "federation"))
    return listed


def _simulated(name: str, kind: Literal["simulate", "resume"] = "simulate", /, **given: Any) -> Run:
    return Run(name, {**BASE, **given}, kind)


def _methods() -> Iterator[Run]:
    for method, own in OWN.items():
        stopping = SHORTEST if method in ("meerkat-vp", "random-early-stop") else {}
        for steps in (1, 5):
            for directions in (1,) if method == "fo-fedavg" else (1, 2):
                size = {"local_steps": steps, "directions": directions}
                yield _simulated(f"method {method} T={steps} P={directions}", method=method, **own, **stopping, **size)


def _server() -> Iterator[Run]:
    betas = {"server_beta1": 0.9, "server_beta2": 0.99, "server_tau": 1e-9}
    yield _simulated("optimizer momentum", server_optimizer="momentum", server_lr=0.7, server_beta1=0.8)
    yield _simulated("optimizer adam", server_optimizer="adam", server_lr=0.02, **betas)
    yield _simulated("optimizer adam full-fedzo", method="full-fedzo", server_optimizer="adam", server_lr=0.05, **betas)
    equal = {"clients": 5, "weights": "equal"}
    yield _simulated("aggregation mean", **equal)
    yield _simulated("aggregation median", **equal, aggregation="median")
    for rule in ("trimmed-mean", "krum", "multi-krum"):
        yield _simulated(f"aggregation {rule}", **equal, aggregation=rule, byzantine=1)
    mixed = {**equal, "mixing": "nearest-neighbour", "byzantine": 1}
    yield _simulated("mixing median", **mixed, aggregation="median")
    yield _simulated("mixing multi-krum", **mixed, aggregation="multi-krum")
    yield _simulated("clipping median", clipping="median")
    yield _simulated("clipping fixed", clipping="fixed", clip_norm=0.1)
    yield _simulated(
        "clipping median trimmed-mean", **equal, clipping="median", aggregation="trimmed-mean", byzantine=1
    )
    loud = {"clients": 5, "partition": "iid", "attack": "gaussian", "attackers": 1, "attack_scale": 500.0}
    yield _simulated("step capped", **loud, lr=0.02, max_step_norm=0.5)
    early = {**equal, **CALIBRATION, "method": "meerkat-vp", "local_steps": 5}
    yield _simulated("aggregation trimmed-mean meerkat-vp", **early, aggregation="trimmed-mean", byzantine=1)


def _attacks() -> Iterator[Run]:
    two = {"clients": 5, "attackers": 2, "partition": "iid"}
    yield _simulated("attack label-flip", **two, attack="label-flip")
    scales = {"sign-flip": 1.5, "gaussian": 2.0, "scaled": 2.5, "little-is-enough": 0.5, "collusion": 3.0}
    for attack, scale in scales.items():
        yield _simulated(f"attack {attack}", **two, attack=attack, attack_scale=scale)
    forged = {**CALIBRATION, "method": "meerkat-vp", "local_steps": 5, "attack": "gradip-forgery", "attack_scale": 1.0}
    yield _simulated("attack gradip-forgery", **{**two, **forged})
    robust = {"weights": "equal", "aggregation": "multi-krum", "byzantine": 1}
    one = {"clients": 5, "attackers": 1, "partition": "iid"}
    yield _simulated("attack collusion multi-krum", **one, **robust, attack="collusion", attack_scale=3.0)


def _calibrations() -> Iterator[Run]:
    mixed = {**CALIBRATION, "clients": 6, "local_steps": 5}
    vp = {**mixed, "method": "meerkat-vp"}
    yield _simulated("calibration automatic", **vp)
    yield _simulated("calibration thresholds", **{**vp, "vpcs_rule": "thresholds", "rho_later": 1.2, "sigma": 0.5})
    yield _simulated("calibration random", **mixed, method="random-early-stop")
    yield _simulated("calibration again", **vp, recalibrate_every=2)
    yield _simulated("calibration full-fedzo", **{**mixed, **OWN["full-fedzo"]}, method="full-fedzo", early_stop="vp")


def _settings() -> Iterator[Run]:
    yield _simulated("clients per round", clients_per_round=2)
    yield _simulated("clients per round feddyn", clients_per_round=2, method="feddyn", **OWN["feddyn"])
    yield _simulated("batching auto", batching="auto")
    yield _simulated("schedule linear", lr_schedule="linear")
    yield _simulated("schedule cosine", lr_schedule="cosine")
    yield _simulated("held back", held_back=0.2)
    yield _simulated("evaluated every round", eval_every=1)
    yield _simulated("micro-batch", micro_batch=2)
    yield _simulated("objective vocabulary", objective="language-modelling")
    yield _simulated("mask of each tensor", mask_scope="per-tensor")
    yield _simulated("mask with embeddings", exclude="none")
    yield _simulated("partition iid", partition="iid")
    yield _simulated("partition single-label", partition="single-label", weights="equal")
    yield _simulated("task topics, all rows", data=None)
    yield _simulated("task reviews", task="reviews", data=None)


def _privacy() -> Iterator[Run]:
    noise = {"dp_delta": 1e-5, "dp_clip": 1.0, "dp_noise_multiplier": 0.7, "dp_relation": "add-or-remove"}
    yield _simulated("privacy example", dp="example", **noise)
    yield _simulated("privacy example P=2", dp="example", **{**noise, "dp_relation": "replace"}, directions=2)
    yield _simulated("privacy example budget", dp="example", **{**noise, "dp_epsilon": 3.0, "dp_noise_multiplier": 1.0})
    own = {"clients": 6, "weights": "equal", "clients_per_round": 3}
    yield _simulated("privacy client", dp="client", **noise, **own)
    yield _simulated("privacy client P=2", dp="client", **noise, **own, directions=2)


# --- in a tree: runs through the command line -----------------------------------------------------


class FixedSource:
    """In place of the operating system's randomness: after each reset the same bytes.

    Each length has a sequence of its own, so that a token drawn here or there does not shift the noise.
    """

    def __init__(self) -> None:
        self._drawn: Counter[int] = Counter()

    def reset(self) -> None:
        self._drawn.clear()

    def __call__(self, size: int, _: int = 0) -> bytes:
        self._drawn[size] += 1
        return hashlib.shake_256(f"{size} {self._drawn[size]}".encode()).digest(size)

    def install(self) -> None:
        """For all of this process: os.urandom, random.SystemRandom, and `secrets`, which draws from that."""
        os.urandom = os.getrandom = self
        vars(random)["_urandom"] = self  # SystemRandom's own name for it


class Failed(Exception):
    """A run went wrong; says how."""


def drive(tree: Path, folder: Path, wanted: Sequence[Run]) -> dict[str, Result]:
    """Make runs with a tree's package, which must be the one that Python finds; their results by name.

    Args:
        folder: a new folder for the runs' own.
    """
    source = FixedSource()
    source.install()
    import meerkat

    if not Path(meerkat.__file__).resolve().is_relative_to(tree.resolve()):
        raise Failed(f"{meerkat.__file__}: is not of {tree}, whose package was to be run")
    few_rows(folder / ROWS)
    results: dict[str, Result] = {}
    for number, run in enumerate(wanted, 1):
        source.reset()
        out = folder / f"{number:03d}"
        try:
            results[run.name] = MAKE[run.kind](run, out)
        except (Failed, OSError, ValueError) as error:
            results[run.name] = {FAILED: str(error)}
        except KeyError as error:
            results[run.name] = {FAILED: f"no {error} in what the run wrote"}
        shutil.rmtree(out, ignore_errors=True)
        if number % 10 == 0 or number == len(wanted):
            print(f"{folder.name}: {number} of {len(wanted)} runs", file=sys.stderr, flush=True)
    return results


def few_rows(to: Path) -> None:
    """Make the data that most runs have, by the command that divides rows among sites."""
    parts = to.with_name("parts")
    _command("partition", "--out", parts, *Run("", SPLIT).words)
    to.mkdir()
    shutil.copy(parts / "site-0" / "train.jsonl", to / "train.jsonl")
    lines = (parts / "site-1" / "train.jsonl").read_bytes().splitlines(keepends=True)
    (to / "validation.jsonl").write_bytes(b"".join(lines[:JUDGED]))


def _command(*words: str | Path) -> None:
    """One command of meerkat's in this process.

    Raises:
        Failed: it ended with another status than 0, or with an exception.
    """
    from meerkat.cli import main

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main([str(word) for word in words])
    except SystemExit as end:
        status = end.code
    except Exception as error:  # whatever a tree does wrong, the other runs are made
        raise Failed(f"{words[0]}: {type(error).__name__}: {error}") from error
    if status:
        raise Failed(f"{words[0]}: exit status {status}: {said.getvalue().strip().rpartition(chr(10))[2]}")


def _simulate(run: Run, out: Path) -> Result:
    _command("simulate", "--out", out, *run.words)
    return _outcome(out)


def _resume(run: Run, out: Path) -> Result:
    """A whole run, and a copy of it that goes on after half of its log."""
    whole, cut = out / "whole", out / "cut"
    _command("simulate", "--out", whole, *run.words)
    shutil.copytree(whole, cut)
    lines = (cut / "rounds.log").read_bytes().splitlines(keepends=True)
    (cut / "rounds.log").write_bytes(b"".join(lines[: len(lines) // 2]))
    (cut / "summary.json").unlink()
    _command("resume", cut)
    uninterrupted, resumed = _outcome(whole), _outcome(cut)
    if resumed != uninterrupted:
        raise Failed(f"resumed {resumed}, uninterrupted {uninterrupted}")
    return resumed


def _compare(run: Run, out: Path) -> Result:
    """Every run of a comparison. Those on validation rows are the final ones, each at the rate that was chosen."""
    _command("compare", "--out", out, *run.words)
    result: Result = {}
    for path in out.rglob("summary.json"):
        summary = json.loads(path.read_text(encoding="utf-8"))
        name = f"{summary['method']} seed {summary['seed']} lr {summary['lr']!r} on {summary['evaluated_on']}"
        result |= {f"{name}: {of}": value for of, value in _of_summary(summary).items()}
    if not result:
        raise Failed(f"compare: no run in {out}")
    return dict(sorted(result.items()))


def _partition(run: Run, out: Path) -> Result:
    """Every site's rows, byte by byte."""
    _command("partition", "--out", out, *run.words)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _outcome(folder: Path) -> Result:
    """What is compared of a run folder."""
    result = _of_summary(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        metric = json.loads(line)
        if metric["kind"] == "calibration":
            result |= {f"calibration {metric['round']}: {name}": repr(metric[name]) for name in OF_A_CALIBRATION}
    return result


def _of_summary(summary: Mapping[str, Any]) -> Result:
    result = {name: repr(summary[name]) for name in OF_A_SUMMARY}
    if summary.get("privacy"):
        result["epsilon"] = repr(summary["privacy"]["epsilon"])
    return result


MAKE = {"simulate": _simulate, "resume": _resume, "compare": _compare, "partition": _partition}


# --- both trees -----------------------------------------------------------------------------------


@dataclass
class Tree:
    """A checked-out tree, and what came out of it."""

    root: Path
    work: Path
    """A folder of its own for runs; its name is what the tree is called."""
    results: dict[str, Result] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def environment(self) -> dict[str, str]:
        """That of its processes, the same in both trees but for where the package lies."""
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        fixed = {"PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
        return {**os.environ, **single, **fixed, "PYTHONPATH": str(self.root / "src")}


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A worktree of a commit, removed at the end."""
    _git("worktree", "add", "--quiet", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *words], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def make(wanted: Mapping[str, Sequence[Run]], trees: Mapping[str, Tree]) -> None:
    """Make each tree's runs: those of the command line side by side, then federations one after another."""
    began = time.monotonic()
    drivers: dict[str, subprocess.Popen[str]] = {}
    try:
        for name, tree in trees.items():
            tree.work.mkdir()
            names = [run.name for run in wanted[name] if run.kind != "federation"]
            if names:
                # -P: benchmarks/ is no place for the package to find modules in
                command = [sys.executable, "-P", __file__, "--drive", str(tree.root), str(tree.work), json.dumps(names)]
                drivers[name] = subprocess.Popen(command, env=tree.environment, cwd=tree.work)
        waiting = set(drivers)
        while waiting:
            time.sleep(0.2)
            for name in [name for name in waiting if drivers[name].poll() is not None]:
                waiting.remove(name)
                trees[name].seconds = time.monotonic() - began
                if drivers[name].returncode:
                    raise SystemExit(f"{name}: the process of its runs ended with {drivers[name].returncode}")
                trees[name].results |= json.loads((trees[name].work / "results.json").read_text(encoding="utf-8"))
    finally:
        for driver in drivers.values():
            driver.terminate()
            driver.wait()
    for name, tree in trees.items():
        for run in wanted[name]:
            if run.kind == "federation":
                began = time.monotonic()
                tree.results[run.name] = _federate(run, tree)
                tree.seconds += time.monotonic() - began


def _federate(run: Run, tree: Tree) -> Result:
    """A federation over the network and the same simulated."""
    out = tree.work / "federation"
    command = [sys.executable, str(tree.root / FEDERATION), "--out", str(out), *run.words]
    done = subprocess.run(
        command, env=tree.environment, cwd=tree.work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(f"{tree.work.name}: federation, exit status {done.returncode}", file=sys.stderr, flush=True)
    if done.returncode:
        return {FAILED: f"exit status {done.returncode}: {done.stdout.strip().rpartition(chr(10))[2]}"}
    result: Result = {}
    for folder, of in (("run", ""), ("simulated", "simulated ")):
        summary = json.loads((out / folder / "summary.json").read_text(encoding="utf-8"))
        result |= {of + name: value for name, value in _of_summary(summary).items()}
    return result


# --- what COMMIT gave, kept -----------------------------------------------------------------------


def _place() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def kept(file: Path | None, commit: str, listed: Sequence[Run]) -> dict[str, Result]:
    """The results in a file that these runs of a commit would give again."""
    if file is None or not file.exists():
        return {}
    written = json.loads(file.read_text(encoding="utf-8"))
    if written["commit"] != commit or written["made_with"] != _place():
        return {}
    words = {run.name: run.words for run in listed}
    return {name: each["result"] for name, each in written["runs"].items() if words.get(name) == each["flags"]}


def keep(file: Path, commit: str, listed: Sequence[Run], results: Mapping[str, Result]) -> None:
    """Write the results of runs that did not fail."""
    sound = [run for run in listed if run.name in results and FAILED not in results[run.name]]
    records = {run.name: {"flags": run.words, "result": results[run.name]} for run in sound}
    text = json.dumps({"commit": commit, "made_with": _place(), "runs": records}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")


# --- what is told ---------------------------------------------------------------------------------


def differences(then: Result, now: Result) -> dict[str, tuple[str, str]]:
    """Fields that are not equal, with both values; a run that failed in both trees has nothing that is equal."""
    names = dict.fromkeys([*then, *now])
    pairs = {name: (then.get(name, "-"), now.get(name, "-")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] or name == FAILED}


def shortened(result: Result) -> str:
    """A run's digest, or one of all it came to where it has several."""
    if FAILED in result:
        return FAILED
    of_theta = [value.strip("'") for name, value in result.items() if name.endswith("theta_digest")]
    digests = sorted(set(of_theta or result.values()))
    return (digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest())[:12]


def tell(listed: Sequence[Run], then: Mapping[str, Result], now: Mapping[str, Result]) -> list[str]:
    """The table: a line a run, and under one that differs a line a field."""
    width = max(len(run.name) for run in listed)
    lines = [f"{'run':<{width}}  {'':<9}  {'COMMIT':<12}  {'this tree':<12}"]
    for run in listed:
        here, there = now[run.name], then[run.name]
        differing = differences(there, here)
        word = "DIFFERENT" if differing else "equal"
        lines.append(f"{run.name:<{width}}  {word:<9}  {shortened(there):<12}  {shortened(here):<12}")
        lines += [f"    {name}: {one[:200]} | {other[:200]}" for name, (one, other) in differing.items()]
    return lines


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commit", metavar="COMMIT", help="what this working tree is held against")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="runs whose names have this in them")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="where COMMIT's results are kept, and found again")
    parser.add_argument("--skip-federation", action="store_true", help="leave out the federation over the network")
    arguments = parser.parse_args()
    try:
        arguments.commit = _git("rev-parse", "--verify", "--quiet", f"{arguments.commit}^{{commit}}")
    except subprocess.CalledProcessError:
        parser.error(f"COMMIT {arguments.commit}: no commit of this repository")
    return arguments


def main() -> int:
    """Make the runs, compare, and print; returns the exit status."""
    arguments = _arguments()
    everything = runs()
    listed = [run for run in everything if arguments.only in run.name]
    listed = [run for run in listed if not (arguments.skip_federation and run.kind == "federation")]
    if not listed:
        print(f"--only {arguments.only}: no run has that in its name", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through every `finally`
    try:
        known = kept(arguments.keep, arguments.commit, everything)
    except (ValueError, KeyError, TypeError):
        print(f"--keep {arguments.keep}: not a file that --keep wrote; give another, or remove it", file=sys.stderr)
        return 2
    missing = [run for run in listed if run.name not in known]
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same-bits-")))
        trees = {"this tree": Tree(ROOT, work / "this-tree")}
        if missing:
            commit = stack.enter_context(checked_out(arguments.commit, work / "checkout"))
            trees = {"COMMIT": Tree(commit, work / "commit"), **trees}
        make({"COMMIT": missing, "this tree": listed}, trees)
    then = {**known, **(trees["COMMIT"].results if missing else {})}
    now = trees["this tree"].results
    if arguments.keep and missing:
        keep(arguments.keep, arguments.commit, everything, then)
    differing = [run.name for run in listed if differences(then[run.name], now[run.name])]
    equal = len(listed) - len(differing)
    if arguments.json:
        result = {
            "name": "same_bits",
            "ratio": equal / len(listed),
            "equal": equal,
            "total": len(listed),
            "commit": arguments.commit,
            "seconds": {name: round(tree.seconds, 1) for name, tree in trees.items()},
            "differing": differing,
            "differences": {name: differences(then[name], now[name]) for name in differing},
            "measured_on": f"one thread a tree, torch {_version('torch')}, {os.cpu_count()} cores",
        }
        print(json.dumps(result))
    else:
        for line in tell(listed, then, now):
            print(line)
        print(", ".join(f"{name} took {tree.seconds:.0f} s" for name, tree in trees.items()))
        print(f"{equal} of {len(listed)} equal")
    return 1 if differing else 0


def _drive(root: str, work: str, names: str) -> int:
    """The process of one tree's runs."""
    chosen = set(json.loads(names))
    results = drive(Path(root), Path(work), [run for run in runs() if run.name in chosen])
    (Path(work) / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_drive(*sys.argv[2:]) if sys.argv[1:2] == ["--drive"] else main())
