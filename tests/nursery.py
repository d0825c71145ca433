"""Commands in processes of their own, without the seconds that each would take to load torch and transformers.

Run as a program, this file is a nursery: it loads them once, and forks a process whenever it is told to, by a line of
JSON. Such a process can be killed, stopped and interrupted like any other.
"""

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

# what a forked process may be asked to do


def run_meerkat(arguments: list[str], modules: str = "") -> int:
    """`python -m meerkat`, with PYTHONPATH a folder of modules if there is one."""
    sys.path[:0] = [modules] if modules else []
    return run_script("meerkat", arguments)


def run_script(script: str, arguments: list[str]) -> int:
    """`python SCRIPT`, or `python -m MODULE`."""
    sys.argv = [script, *arguments]
    try:
        if script.endswith(".py"):
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


# in the nursery's process


def _nursery() -> None:
    from meerkat.run.setup import open_problem, resolve
    from meerkat.settings.config import RunConfig

    for module in ("meerkat.cli.runs", "meerkat.cli.outcomes", "meerkat.comparison.compare", "meerkat.report"):
        import_module(module)
    open_problem(resolve(RunConfig(threads=1, device="cpu")))
    gc.freeze()  # or every fork copies what the collector looks at
    print("ready", flush=True)
    children: set[int] = set()
    for line in sys.stdin:
        asked = json.loads(line)
        if "poll" in asked:
            pid, status = os.waitpid(asked["poll"], 0 if asked["wait"] else os.WNOHANG)
            children.discard(pid)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        module, name = asked["what"]
        what = getattr(import_module(module), name)  # loaded here, for all that are forked from now on
        pid = os.fork()
        if pid == 0:
            _be(asked, what)
        children.add(pid)
        print(pid, flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _be(asked: dict[str, Any], what: Callable[..., int]) -> None:
    """Become what was asked for, in a forked child."""
    status = 70
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for file, stream in ((asked["out"], 1), (asked["err"], 2)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
        os.chdir(asked["folder"])
        tempfile.tempdir = asked["tmp"]
        status = what(**asked["given"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# in the test's process


class Nursery:
    """The program above, as tests talk to it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def _ask(self, **asked: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        what: Callable[..., int],
        given: dict[str, Any],
        out: Path,
        err: Path | None = None,
        tmp: Path | None = None,
        folder: Path | None = None,
    ) -> int:
        """Start a process that calls a module's function, whose value is its exit status; its process id.

        Its group is its own. What it prints is added to `out` and `err`.
        """
        return int(
            self._ask(
                what=(what.__module__, what.__name__),
                out=str(out),
                err=str(err or out),
                tmp=str(tmp) if tmp else None,
                folder=str(folder or Path.cwd()),
                given=given,
            )
        )

    def command(
        self, what: Callable[..., int], given: dict[str, Any], printed: Path, folder: Path | None = None
    ) -> "Command":
        """Start a process like `start`; what it prints goes to two files of that name, .out and .err."""
        out, err = (printed.with_suffix(kind) for kind in (".out", ".err"))
        return Command(self, self.start(what, given, out, err, folder=folder), printed)

    def poll(self, pid: int, wait: bool = False) -> int | None:
        """A process' exit status, once: then it is gone for good."""
        return self._ask(poll=pid, wait=wait)

    def close(self) -> None:
        """End it, with all that it started."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)


class Command:
    """A command in a forked process, as far as possible like `subprocess.Popen`."""

    def __init__(self, nursery: Nursery, pid: int, printed: Path) -> None:
        self._nursery, self.pid, self._printed = nursery, pid, printed
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._nursery.poll(self.pid)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """Its exit status, minus the signal's number if it was killed."""
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            assert time.monotonic() < end, "it does not end"
            time.sleep(0.005)
        return status

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        return self._printed.with_suffix(".out").read_text()

    @property
    def stderr(self) -> str:
        return self._printed.with_suffix(".err").read_text()


if __name__ == "__main__":
    _nursery()
