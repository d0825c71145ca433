"""`--workers N`: this process and N - 1 more of this program share a run, or all ranks that torchrun started do.

Processes of one machine meet over a file and talk over its loopback interface alone.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from meerkat.errors import MeerkatError
from meerkat.extensions import load, loaded
from meerkat.progress import use_thread_lock
from meerkat.run.ranks import PATIENCE, RankLost, Ranks
from meerkat.run.simulation import follow

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@contextmanager
def sharing(workers: int) -> Iterator[Ranks | None]:
    """The ranks that share what this process does next, all others of them at its service; None where it is alone.

    A process that torchrun started as another rank than 0 serves here, and ends.

    Raises:
        MeerkatError: the number is none, or torchrun has started processes already.
    """
    launched = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 0
    if workers < 1:
        raise MeerkatError(f"--workers {workers}: must be at least 1")
    if launched and workers > 1:
        raise MeerkatError(f"--workers {workers}: torchrun has started {launched} processes already; leave it out")
    if launched > 1:
        _take_gpu(int(os.environ["LOCAL_RANK"]))
        rank = int(os.environ["RANK"])
        ranks = Ranks(rank, launched, lambda: dist.init_process_group("gloo", timeout=PATIENCE))
        if rank:
            sys.exit(_serve(ranks))
        try:
            yield ranks
            ranks.end()
        finally:
            _leave()
    elif workers > 1:
        with _started(workers) as ranks:
            yield ranks
    else:
        yield None


@contextmanager
def _started(workers: int) -> Iterator[Ranks]:
    """This process as rank 0, and the others."""
    use_thread_lock()
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))  # what `--threads auto` takes
    os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK
    _take_gpu(0)
    with TemporaryDirectory(prefix="meerkat-") as folder:
        context = multiprocessing.get_context("spawn")
        others = [(rank, workers, Path(folder), loaded()) for rank in range(1, workers)]
        processes = [context.Process(target=_worker, args=what, daemon=True) for what in others]
        # they inherit the signal mask: Ctrl-C means something to them only when they say so
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            for process in processes:
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        ranks = Ranks(0, workers, lambda: _meet(0, workers, Path(folder), processes))
        try:
            yield ranks
            ranks.end()
        finally:
            for process in processes:  # nobody waits for one at work: a run loses nothing by it
                process.terminate()
                process.join()
            _leave()


def _meet(rank: int, size: int, folder: Path, others: Sequence[BaseProcess] = ()) -> None:
    """Become one of a group once all are there. Raises RankLost: one of `others` ended before that."""
    (folder / str(rank)).touch()
    while not all((folder / str(other)).exists() for other in range(size)):
        if not all(process.is_alive() for process in others):
            raise RankLost
        time.sleep(0.01)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size, timeout=PATIENCE)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _worker(rank: int, size: int, folder: Path, extensions: Sequence[str]) -> None:
    """What another process than the first does. It ends with the first, and at once on Ctrl-C."""

    def end_with_the_first() -> None:
        if (first := multiprocessing.parent_process()) is not None:
            first.join()
        os._exit(1)

    threading.Thread(target=end_with_the_first, daemon=True).start()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first may wait for this process, and wakes when it ends
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    use_thread_lock()
    load(extensions)
    _take_gpu(rank)
    sys.exit(_serve(Ranks(rank, size, lambda: _meet(rank, size, folder))))


def _serve(ranks: Ranks) -> int:
    """Serve rank 0, in silence; returns an exit status."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    try:
        with ranks.answering():
            follow(ranks)
    except RankLost:
        return 1
    finally:
        _leave()
    return 0


def _take_gpu(local_rank: int) -> None:
    """Make `cuda` mean a GPU of this rank's own, as far as there are enough."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
