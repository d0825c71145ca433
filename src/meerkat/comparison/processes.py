"""Several tasks at a time, each in a process, with its messages in a log file."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from meerkat.errors import RunFailed
from meerkat.extensions import load, loaded
from meerkat.progress import say, use_thread_lock
from meerkat.record.files import owned

Task = tuple[Any, ...]
"""A function and its arguments."""


class Pool:
    """At most `jobs` processes, which end when this one does. Their logs are in root/logs."""

    def __init__(self, jobs: int, root: Path) -> None:
        self.root = root
        theirs, self._alive = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(theirs, loaded()))

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind:  # nobody waits for what is still running: a run loses nothing by being killed at any instant
            self._alive.close()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._alive.close()

    def map_unique(self, what: str, tasks: Mapping[Any, Task], words: Callable[[Any, Any], str]) -> dict[Any, Any]:
        """Each task's result by its key. Equal tasks, which two studies may share, are done once.

        Args:
            what: the tasks' kind, in the plural, for messages; its last word names the logs.
            words: key and result -> a message that the task is done.

        Raises:
            RunFailed: a process was killed.
        """
        names = {key: repr(task[1:]) for key, task in tasks.items()}
        first_keys = {name: key for key, name in reversed(names.items())}
        unique = {key: task for key, task in tasks.items() if first_keys[names[key]] == key}
        results: dict[str, Any] = {}
        try:
            waiting = self._submit(unique, what.split()[-1])
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    key = waiting.pop(future)
                    results[names[key]] = future.result()
                    say(f"{what} {len(results)} of {len(unique)}: {words(key, future.result())}")
        except BrokenProcessPool:
            raise RunFailed(
                f"{self.root}: a run's process was killed, perhaps for memory; run the same command again with "
                f"--out {self.root} and fewer --jobs: what is finished is kept"
            ) from None
        return {key: results[name] for key, name in names.items()}

    def _submit(self, tasks: Mapping[Any, Task], log: str) -> dict[Future[Any], Any]:
        # processes start here and inherit the signal mask: Ctrl-C is for this process alone, which ends them
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return {
                self._executor.submit(_run_logged, self.root / "logs" / f"{log}-{number:03d}.txt", *task): key
                for number, (key, task) in enumerate(tasks.items())
            }
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _start(parent: Connection, extensions: Sequence[str]) -> None:
    """Prepare a process. It ends at once when its parent is gone, or closes the other end of the pipe."""

    def watch() -> None:
        try:
            parent.recv()
        except (EOFError, OSError):
            os._exit(1)

    use_thread_lock()
    load(extensions)
    threading.Thread(target=watch, daemon=True).start()


def _run_logged(log: Path, task: Callable[..., Any], *arguments: Any) -> Any:
    with open(log, "a", encoding="utf-8", opener=owned) as file, redirect_stderr(file), redirect_stdout(file):
        return task(*arguments)
