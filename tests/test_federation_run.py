"""The one-command federation: its arguments, what Flower takes for an app, and that nothing it started is left."""

import importlib.machinery
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

SCRIPT = Path(__file__).parents[1] / "examples" / "federation" / "run"


@pytest.fixture(scope="module")
def run() -> Any:
    loader = importlib.machinery.SourceFileLoader("federation_run", str(SCRIPT))
    spec = importlib.util.spec_from_loader("federation_run", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "{here}"], "is not an empty folder"),
        (["--out", "{here}/mine/new"], "cannot be written to; give another folder"),
        (["--out", "{here}/it's"], "no path with a quote"),
        (["--out", "{here}/new", "--rounds", "0"], "--rounds 0: must be"),
        (["--out", "{here}/new", "--sites", "many"], "--sites many: must be"),
        (["--out", "{here}/new", "--sites", "5000"], "at most the number of training rows"),
        (["--out", "{here}/new", "--task", "sst2"], "--data: needed with task 'sst2'"),
        (["--out", "{here}/new", "--model", "./nowhere", "--task", "sst2"], "model './nowhere': no such folder"),
        (["--out", "{here}/new", "--dtype", "int4"], "--dtype int4: must be"),
        (["--out", "{here}/new", "--speed", "9"], "unrecognized arguments: --speed"),
    ],
)
def test_bad_arguments_are_told_in_one_line(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (tmp_path / "mine").write_text("")
    try:
        status = run.main([argument.format(here=tmp_path) for argument in arguments])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2, err
    assert not out
    assert len(err.strip().splitlines()) == 1
    assert said in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_a_model_of_one_s_own_is_the_simulation_to_the_bit(federation: Path, tmp_path: Path) -> None:
    own = ["--model", "model", "--task", "sst2", "--data", "data", "--text", "text.jsonl", "--dtype", "bfloat16"]
    small = ["--rounds", "3", "--sites", "2", "--eps", "3e-2", "--batch-size", "4", "--density", "0.01"]
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "new"), *own, *small]
    outcome = subprocess.run(command, cwd=federation, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert "equal: theta after 3 rounds" in outcome.stdout


def test_without_meerkat_it_runs_in_the_project_s_own_environment(tmp_path: Path) -> None:
    script = tmp_path / "examples" / "federation" / "run"
    script.parent.mkdir(parents=True)
    script.write_bytes(SCRIPT.read_bytes())
    command = [sys.executable, "-ES", str(script), "--out", "x"]  # without the packages installed here
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 2
    assert "run 'make federation'" in outcome.stderr
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{script} --out x\n"


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own
def test_flower_takes_the_app_and_it_carries_no_code(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    config, warnings = load_and_validate(run.APP / "pyproject.toml", check_module=False)
    assert not warnings
    assert set(config["tool"]["flwr"]["app"]["config"]) == {"config", "out"}
    assert not config["project"]["dependencies"]
    assert [file.name for file in run.APP.iterdir()] == ["pyproject.toml"]
    assert len(build_fab_from_disk(run.APP)) < 10_000


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_everything_that_was_started_is_ended_whatever_it_does_against_it(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "BIN", Path(sys.executable).parent)
    monkeypatch.setattr(run, "GRACE_S", 1)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(90)"
    child = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {deaf!r}], start_new_session=True)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    processes = run.Processes(tmp_path)
    processes.serve("parent", [Path(sys.executable).name, "-c", child], tmp_path)
    said = _said(tmp_path / "parent.log", lines=2)
    pid = int(next(line for line in said if line.isdigit()))
    os.kill(pid, 0)
    processes.check()
    processes.end()
    assert not processes._alive()
    until = time.monotonic() + 20  # far less than it sleeps
    while _runs(pid) and time.monotonic() < until:  # killed, a process still has to end
        time.sleep(0.05)
    assert not _runs(pid)


def test_a_server_that_ends_by_itself_is_noticed(run: Any, tmp_path: Path) -> None:
    processes = run.Processes(tmp_path)
    processes.serve("brief", [Path(sys.executable).name, "-c", "raise SystemExit(3)"], tmp_path)
    processes._servers["brief"].wait(60)
    with pytest.raises(run.RunFailed, match="brief ended by itself, exit status 3"):
        processes.check()
    processes.end()


def test_interrupted_it_ends_all_and_says_so(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path / "new")], stderr=subprocess.PIPE, text=True
    ) as process:
        log = tmp_path / "new" / "federation" / "logs" / "superlink.log"
        until = time.monotonic() + 120
        while not log.exists() and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "interrupted" in said
    here = str(tmp_path).encode()
    assert not [file for file in Path("/proc").glob("[0-9]*/cmdline") if here in _read(file)]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _said(log: Path, lines: int) -> list[str]:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if log.exists() and len(logged := log.read_text().splitlines()) >= lines:
            return logged
        time.sleep(0.05)
    raise AssertionError(f"{log} stayed short")
