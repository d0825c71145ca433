"""Comparing: the search for learning rates, runs that are made once, whatever happens, and what a person meets."""

import csv
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest
from nursery import Command

from meerkat.cli import main
from meerkat.comparison import cells, compare, processes
from meerkat.comparison.evidence import Outcome
from meerkat.comparison.learning_rates import search_lowest
from meerkat.comparison.masks import with_masks
from meerkat.comparison.studies import Comparison
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import LogReader
from meerkat.run.simulation import simulate
from meerkat.settings.config import make_config

# --- the rule of the search -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "trials", "visited", "best"),
    [
        (lambda place: (place - 2) ** 2, 7, [0, -1, 1, 2, 3], 2),
        (lambda place: (place + 2) ** 2, 7, [0, -1, -2, -3], -2),
        (lambda place: place**2, 7, [0, -1, 1], 0),
        (lambda place: -place, 4, [0, -1, 1, 2], 2),  # still falling: trials ran out
        (lambda _: 0.5, 4, [0, -1, -2, -3], -3),  # nothing to tell rates apart
        (lambda place: max(place, -2), 7, [0, -1, -2, -3, -4, -5, -6], -6),  # a plateau below
        (lambda place: math.inf if place > -3 else 1 + (place + 4) ** 2, 9, [0, -1, -2, -3, -4, -5], -4),
        (lambda place: math.inf if place > 0 else -place, 7, [0, -1, 1], 0),
        (lambda _: math.inf, 5, [0, -1, -2, -3, -4], -4),  # all diverge: down, and no further than trials
    ],
)
def test_the_search_goes_on_until_the_best_rates_neighbours_are_worse(
    curve: Callable[[int], float], trials: int, visited: list[int], best: int
) -> None:
    losses = search_lowest(curve, trials)
    assert list(losses) == visited
    assert losses == {place: curve(place) for place in visited}
    assert min(losses, key=lambda place: (losses[place], place)) == best


@pytest.mark.parametrize("order", [1, -1])
def test_the_run_that_needs_most_makes_the_mask_that_runs_share(order: int, tmp_path: Path) -> None:
    made: list[str] = []

    class Pool:
        def map_unique(self, _: str, jobs: dict[Path, tuple[Any, ...]], __: Any) -> None:
            made.extend(config.update_rule for _, config, _ in jobs.values())

    given: list[dict[str, Any]] = [
        {"update_rule": "sgd"},
        {"update_rule": "adam"},
        {"method": "fo-fedavg", "lr": "auto"},
    ]
    configs = [make_config({"lr": 0.1, **settings}) for settings in given][::order]
    with_masks(dict(enumerate(configs)), (), (), cast(Any, Pool()), tmp_path)
    assert made == ["adam"]


# --- whole comparisons, of a federation that runs in a second -------------------------------------


class InThisProcess:
    """Runs what it is given at once, here: a second in place of the five that a process needs to start."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        made: Future[Any] = Future()
        try:
            made.set_result(task(*arguments))
        except Exception as error:
            made.set_exception(error)
        return made

    def shutdown(self, **_: object) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)


def settings(federation: Path, **more: Any) -> str:
    """The top of a comparison's file: the tiny federation, three clients, and more settings."""
    given = {
        **{name: str(federation / name) for name in ("model", "data")},
        **{"text": str(federation / "text.jsonl"), "task": "sst2", "density": 0.01, "clients": 3, "partition": "iid"},
        **{"batch_size": 4, "total_steps": 4, "eps": 1e-3, **more},
    }
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in given.items())


def command(folder: Path, text: str, *more: str) -> list[str]:
    (folder / "studies.toml").write_text(text)
    return ["compare", str(folder / "studies.toml"), "--out", str(folder / "out"), *more]


def results(out: Path) -> list[dict[str, str]]:
    """The runs' lines in results.csv, but for their times."""
    with (out / "results.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "wall_s"} for row in csv.DictReader(file)]


def comparison_of(out: Path) -> dict[str, Any]:
    comparison = json.loads((out / "compare.json").read_text(), parse_constant=pytest.fail)
    assert isinstance(comparison, dict)
    return comparison


def work(out: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file of every run and mask: when it was written, and what it holds."""
    files = [file for name in ("cells", "search", "masks") for file in (out / name).rglob("*") if file.is_file()]
    return {file.relative_to(out): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


GRID = 'method = ["meerkat", "full-fedzo"]\nlocal_steps = [1, 2]\nseeds = [0, 1]\nsearch = { trials = 3 }\n'


@pytest.fixture(scope="module")
def compared(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished comparison of two methods at two T and two seeds, two runs at a time."""
    folder = tmp_path_factory.mktemp("compared")
    assert main(command(folder, settings(federation) + GRID, "--jobs", "2")) == 0
    return folder


def again(compared: Path, folder: Path) -> Path:
    """A copy of the finished comparison, to do something to."""
    shutil.copytree(compared, folder, dirs_exist_ok=True)
    return folder / "out"


def test_every_setting_runs_every_seed_at_the_rate_that_its_own_search_found_best(compared: Path) -> None:
    rows = comparison_of(compared / "out")["studies"][0]["rows"]
    assert len(rows) == 4
    for row in rows:
        assert row["seeds"] == [0, 1]
        assert len(row["rates"]) == 3
        assert row["lr"] == min((loss, rate) for rate, loss in row["rates"])[1]
    lines = results(compared / "out")
    assert len(lines) == 8
    assert {(line["method"], line["local_steps"], line["rounds"]) for line in lines} == {
        *(("meerkat", "1", "4"), ("meerkat", "2", "2"), ("full-fedzo", "1", "4"), ("full-fedzo", "2", "2"))
    }
    assert [float(line["lr"]) for line in lines] == [row["lr"] for row in rows for _ in range(2)]


@pytest.mark.usefixtures("here")
def test_each_run_s_line_has_its_own_measured_rate(federation: Path, tmp_path: Path) -> None:
    text = settings(federation, method="random-mask", lr="auto", seeds=[0, 1])
    assert main(command(tmp_path, text)) == 0
    lines = results(tmp_path / "out")
    made = [RunFolder(tmp_path / "out" / line["run"]).config().lr for line in lines]
    assert [float(line["lr"]) for line in lines] == made
    assert made[0] != made[1]


def test_a_cell_is_an_ordinary_run(compared: Path, federation: Path, tmp_path: Path) -> None:
    line = results(compared / "out")[3]
    assert (line["method"], line["local_steps"], line["seed"]) == ("meerkat", "2", "1")
    config = make_config(
        {
            **{"model": str(federation / "model"), "data": str(federation / "data"), "task": "sst2", "density": 0.01},
            **{"text": str(federation / "text.jsonl"), "clients": 3, "partition": "iid", "batch_size": 4},
            **{"local_steps": 2, "rounds": 2, "lr": float(line["lr"]), "seed": 1, "threads": 1},
        }
    )
    summary = simulate(config, tmp_path / "run")
    assert summary["theta_digest"] == line["theta_digest"]
    assert summary["accuracy"] == float(line["accuracy"])


def test_settings_of_one_seed_share_the_split_and_seeds_do_not(compared: Path) -> None:
    splits: dict[str, set[str]] = {}
    for line in results(compared / "out"):
        opening = next(iter(LogReader(compared / "out" / line["run"] / "rounds.log")))
        splits.setdefault(line["seed"], set()).add(opening["data"])
    assert {seed: len(digests) for seed, digests in splits.items()} == {"0": 1, "1": 1}
    assert splits["0"] != splits["1"]


@pytest.mark.usefixtures("here")
def test_the_same_command_again_runs_nothing(compared: Path, tmp_path: Path) -> None:
    out = again(compared, tmp_path)
    shutil.rmtree(out / "masks")  # made again, the same, it makes no run another one
    before, lines = work(out), results(out)
    for file in ("results.csv", "table.csv", "compare.json"):
        (out / file).unlink()
    assert main(command(tmp_path, (tmp_path / "studies.toml").read_text())) == 0
    after = work(out)
    assert {path: after[path] for path in before} == before
    assert not [path for path in after if path not in before and path.parts[0] != "masks"]
    assert results(out) == lines


@pytest.mark.usefixtures("here")
def test_what_is_added_alone_is_run(compared: Path, tmp_path: Path) -> None:
    out = again(compared, tmp_path)
    before, lines = work(out), results(out)
    assert main(command(tmp_path, (tmp_path / "studies.toml").read_text(), "--seeds", "0,1,2")) == 0
    after = work(out)
    assert {path: after[path] for path in before} == before
    assert len({path.parts[1] for path in after if path not in before}) == 4  # a run a setting, and no search
    assert [line for line in results(out) if line["seed"] != "2"] == lines


@pytest.mark.usefixtures("here")
def test_results_do_not_depend_on_how_many_run_at_a_time(compared: Path, tmp_path: Path) -> None:
    assert main(command(tmp_path, (compared / "studies.toml").read_text(), "--jobs", "1")) == 0
    assert results(tmp_path / "out") == results(compared / "out")


@pytest.mark.usefixtures("here")
def test_the_search_does_not_look_at_the_validation_rows(compared: Path, federation: Path, tmp_path: Path) -> None:
    shutil.copytree(federation, tmp_path / "federation")
    file = tmp_path / "federation" / "data" / "validation.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "label": 1 - row["label"]}) + "\n" for row in rows))
    assert main(command(tmp_path, settings(tmp_path / "federation") + GRID)) == 0
    ours, theirs = (comparison_of(out / "out")["studies"][0]["rows"] for out in (tmp_path, compared))
    assert [row["rates"] for row in ours] == [row["rates"] for row in theirs]
    assert [row["lr"] for row in ours] == [row["lr"] for row in theirs]
    # whereas the runs are judged on them: with every label turned, right is wrong
    assert [a for row in ours for a in row["accuracy"]] == pytest.approx(
        [1 - a for row in theirs for a in row["accuracy"]]
    )


@pytest.mark.usefixtures("here")
def test_where_all_runs_hold_rows_back_no_validation_rows_are_needed(federation: Path, tmp_path: Path) -> None:
    shutil.copytree(federation, tmp_path / "federation")
    (tmp_path / "federation" / "data" / "validation.jsonl").unlink()
    given = settings(tmp_path / "federation", held_back=0.25, lr=0.1)
    assert main(command(tmp_path, given + "seeds = [0]\n", "--evidence", str(tmp_path / "runs.csv"))) == 0
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 2


def test_no_row_that_a_trial_is_judged_on_is_trained_on(compared: Path) -> None:
    for trial in (compared / "out" / "search").iterdir():
        summary = json.loads((trial / "summary.json").read_text())
        assert summary["evaluated_on"] == "held-back"
        assert sum(next(iter(LogReader(trial / "rounds.log")))["examples"]) == 48 - round(0.2 * 48)


@pytest.mark.usefixtures("here")
def test_a_rate_that_is_given_is_not_searched_and_one_that_diverges_is_told(
    federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = settings(federation, lr=[1e-3, 1e30], seeds=[0, 1], title="Rates")
    claim = 'check = [{ claim = "low", axis = "lr", better = 1e-3, than = [1e30] }]'
    arguments = command(tmp_path, text + '[[study]]\nname = "a"\n' + claim)
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert next(line for line in shown.splitlines() if "1e+30" in line).split()[:2] == ["1e+30", "diverged"]
    assert "undecided: low" in shown
    out = tmp_path / "out"
    assert not list((out / "search").iterdir())
    assert [(line["lr"], line["outcome"]) for line in results(out)] == [
        *(("0.001", "finished"), ("0.001", "finished"), ("1e+30", "diverged"), ("1e+30", "diverged"))
    ]
    assert comparison_of(out)["studies"][0]["rows"][1]["diverged"] == [0, 1]
    before = work(out)
    assert main(arguments) == 0
    assert work(out) == before


@pytest.mark.usefixtures("here")
def test_a_setting_that_diverges_at_every_rate_ends_it_with_a_way_out(
    federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = cells.run_cell
    monkeypatch.setattr(compare, "run_cell", lambda *arguments: Outcome(run(*arguments).lr, None))
    assert main(command(tmp_path, settings(federation) + "search = { trials = 3 }")) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "meerkat: diverged at every learning rate tried" in said
    assert "search.trials" in said
    assert not (tmp_path / "out" / "compare.json").exists()


@pytest.mark.usefixtures("here")
def test_where_everything_moves_a_density_makes_no_new_run(federation: Path, tmp_path: Path) -> None:
    text = settings(federation, method="full-fedzo", density=[0.1, 0.5], lr=1e-3, seeds=[0])
    assert main(command(tmp_path, text)) == 0
    one, two = results(tmp_path / "out")
    assert (one["density"], two["density"]) == ("0.1", "0.5")
    assert one["run"] == two["run"]


@pytest.mark.usefixtures("here")
def test_without_privacy_its_clip_makes_no_new_run(federation: Path, tmp_path: Path) -> None:
    given = {"dp_clip": [0.5, 1.0], "dp_delta": 1e-6, "dp_relation": "replace", "lr": 1e-3, "seeds": [0]}
    noisy = '[[study]]\nname = "noisy"\ndp = "example"\ndp_noise_multiplier = 1.0\n'
    assert main(command(tmp_path, settings(federation, **given) + noisy + '[[study]]\nname = "plain"\n')) == 0
    half, whole, *plain = results(tmp_path / "out")
    assert half["run"] != whole["run"]
    assert [line["dp_clip"] for line in plain] == ["0.5", "1.0"]
    assert plain[0]["run"] == plain[1]["run"]
    kept = make_config(tomllib.loads((tmp_path / "out" / plain[0]["run"] / "config.toml").read_text()))
    assert (kept.dp_clip, kept.dp_delta, kept.dp_relation) == (1.0, 1e-5, "add-or-remove")


@pytest.mark.usefixtures("here")
def test_json_stands_alone_on_standard_output(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = again(compared, tmp_path)
    capsys.readouterr()
    assert main(command(tmp_path, (tmp_path / "studies.toml").read_text(), "--json")) == 0
    assert json.loads(capsys.readouterr().out) == comparison_of(out)


@pytest.mark.usefixtures("here")
def test_flags_alone_are_enough(federation: Path, tmp_path: Path) -> None:
    flags = ["--model", str(federation / "model"), "--task", "sst2", "--data", str(federation / "data")]
    flags += ["--methods", "full-fedzo, random-mask", "--density", "0.01", "--clients", "3", "--partition", "iid"]
    flags += [
        "--seeds",
        "3",
        "--local-steps",
        "1,2",
        "--total-steps",
        "2",
        "--text",
        str(federation / "text.jsonl"),
        "--eps",
        "1e-3",
    ]
    assert main(["compare", *flags, "--out", str(tmp_path / "out")]) == 0
    assert [(line["method"], line["local_steps"], line["seed"]) for line in results(tmp_path / "out")] == [
        *(("full-fedzo", "1", "3"), ("full-fedzo", "2", "3"), ("random-mask", "1", "3"), ("random-mask", "2", "3"))
    ]


# --- what goes wrong ------------------------------------------------------------------------------


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], *said: str, status: int = 2) -> None:
    capsys.readouterr()
    assert main(arguments) == status
    out, err = capsys.readouterr()
    assert not out
    last = err.strip().splitlines()[-1]
    assert last.startswith("meerkat: ")
    for text in said:
        assert text in last


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "/no/model"}, "no such folder"),
        ({"model": "/no/model", "method": "full-fedzo"}, "no such folder"),
        ({"data": "/no/data"}, "no such folder"),
        ({"text": "/no/text"}, "No such file"),
        ({"mask": "/no/mask"}, "no such file"),
        ({"task": "boolq"}, "no field 'question'"),
        ({"task": ""}, "--task: needed"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"partition": ["iid", "column:name"]}, "has no field 'name'"),
        ({"clients": [3, 49]}, "at most the number of training rows, 48"),
        ({"clients": 40}, "learning-rate search, with 0.2 of the training rows held back: 40 clients"),
        ({"clients": 8, "partition": "dirichlet:0.15", "lr": 0.1}, "clients without rows in each of"),
        ({"max_length": 2}, "leaves no prompt"),
        ({"method": ["meerkat", "task-mask"], "mask": "m"}, "task-mask: makes its mask from the run's own rows"),
        ({"method": ["meerkat", "full-fedzo"], "mask": "m"}, "mask 'm': no such file"),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_is_written(
    federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: dict[str, Any], said: str
) -> None:
    fails(command(tmp_path, settings(federation, **given)), capsys, said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--methods", "meerkat,sgd"], "method sgd: must be 'meerkat'"),
        (["--methods", ","], "must be 'meerkat'"),
        (["--seeds", ","], "--seeds ,: must be whole numbers"),
        (["--seeds", "0;1"], "--seeds 0;1: must be whole numbers"),
        (["--seeds", "0,0"], "each seed may stand there once"),
        (["--local-steps", "1,3"], "must be a multiple of every local_steps, such as 3"),
        (["--jobs", "-1"], "--jobs -1: must be 1 or more"),
        (["--studies", "masks"], "--studies masks: no study is called 'masks'; give comparison"),
        (["--studies", ","], "no study is called ''; give comparison"),
        (["--total-steps", "0"], "total_steps 0: must be at least 1"),
        (["--server-tau", "1e-3"], "server_tau 0.001: does nothing with update_rule sgd"),
    ],
)
def test_flags_that_cannot_be_met_are_refused(
    federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    fails(command(tmp_path, settings(federation), *flags), capsys, said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["thesis.txt", "logs/server.log", "config.toml"])
def test_a_folder_with_anything_else_in_it_is_left_alone(
    federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("x")
    fails(command(tmp_path, settings(federation)), capsys, "no comparison was begun in it", "--out")
    assert [file for file in (tmp_path / "out").rglob("*") if file.is_file()] == [mine]
    (tmp_path / "file").write_text("x")
    fails([*command(tmp_path, settings(federation)), "--out", str(tmp_path / "file")], capsys, "is a file")


@pytest.mark.usefixtures("here")
def test_a_folder_is_compared_in_by_one_process_at_a_time(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = again(compared, tmp_path)
    text = (tmp_path / "studies.toml").read_text()
    with (out / "logs" / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        fails(command(tmp_path, text), capsys, "another process is comparing in it")
    assert main(command(tmp_path, text)) == 0


@pytest.mark.usefixtures("here")
def test_a_damaged_run_ends_it_with_a_cure_that_works(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = again(compared, tmp_path)
    lines, text = results(out), (tmp_path / "studies.toml").read_text()
    cell = out / lines[0]["run"]
    (cell / "summary.json").write_text('{"acc')
    assert main(command(tmp_path, text)) == 0  # the summary follows from log and metrics
    assert results(out) == lines
    (cell / "summary.json").unlink()
    log = (cell / "rounds.log").read_bytes()
    (cell / "rounds.log").write_bytes(log.replace(b'"round":1', b'"round":7', 1))
    fails(command(tmp_path, text), capsys, "damaged", f"or delete '{cell}'", status=1)
    (cell / "config.toml").unlink()
    fails(command(tmp_path, text), capsys, f"or delete '{cell}'", status=1)
    shutil.rmtree(cell)
    assert main(command(tmp_path, text)) == 0
    assert results(out) == lines


def test_a_process_that_is_killed_is_told(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with processes.Pool(1, tmp_path) as pool, pytest.raises(processes.RunFailed, match=r"was killed.*--out.*--jobs"):
        pool.map_unique("runs", {0: (os._exit, 3)}, lambda *_: "")


def children(pid: int) -> list[int]:
    said = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(own) for own, parent in map(str.split, said.splitlines()) if int(parent) == pid]


def lives(pid: int) -> bool:
    said = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(said.strip()) and not said.startswith("Z")


def until(true: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
@pytest.mark.usefixtures("here")
def test_an_interrupted_comparison_leaves_nobody_behind_and_goes_on(
    start_meerkat: Callable[[list[str]], Command], federation: Path, tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    text = settings(federation, lr=1e-2, seeds=[0]).replace("total_steps = 4", "rounds = 150")
    arguments = command(tmp_path, text, "--jobs", "1")
    out = tmp_path / "out"
    running = start_meerkat(arguments)
    try:
        until(lambda: any(log.stat().st_size > 2000 for log in out.glob("cells/*/rounds.log")))
        workers = children(running.pid)
        # Ctrl-C goes to all processes of a terminal
        os.killpg(running.pid, sent) if sent == signal.SIGINT else running.send_signal(sent)
        assert running.wait() == status
    finally:
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
    assert workers
    if sent == signal.SIGINT:
        said = [line for line in running.stderr.splitlines() if "mask" not in line and "gradient" not in line]
        assert said[-1].endswith(f"the same command with --out {out} continues the comparison")
        assert not [line for line in said[:-1] if not line.startswith("sensitivity")]
    until(lambda: not any(lives(pid) for pid in workers))
    (log,) = out.glob("cells/*/rounds.log")
    begun = log.read_bytes()
    assert not (log.parent / "summary.json").exists()
    assert main(arguments) == 0
    whole = begun[: begun.rindex(b"\n") + 1]
    assert log.read_bytes().startswith(whole)
    assert results(out)[0]["outcome"] == "finished"


@pytest.mark.usefixtures("here")
def test_the_python_call_takes_a_comparison(federation: Path, tmp_path: Path) -> None:
    from meerkat.comparison.studies import read_comparison

    (tmp_path / "c.toml").write_text(settings(federation, lr=1e-3, seeds=[5]))
    asked = read_comparison(tmp_path / "c.toml", {})
    assert isinstance(asked, Comparison)
    comparison = compare.compare(asked, tmp_path / "out")
    assert comparison["studies"][0]["rows"][0]["seeds"] == [5]
    assert comparison["studies"][0]["rows"][0]["client_steps"] == [4 * 3]
