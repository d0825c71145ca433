"""`meerkat`, and `python -m meerkat`: the command line, which Ctrl-C ends quietly even while it loads."""

import os
import signal
import sys


def main() -> int:
    """Run one command; returns its exit status: see `meerkat.cli.main`."""
    if (usual := signal.getsignal(signal.SIGINT)) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end)  # an exception might be lost in what imports call
    from meerkat.cli import main

    signal.signal(signal.SIGINT, usual)
    return main()


def _end(*_: object) -> None:
    os.write(2, b"meerkat: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
