"""A coordinator in a process of its own, with few files to open: rounds with one site, noted in a run folder.

Says its port and a token for client 1. At the end of standard input it says what became of the run, as JSON.
"""

import json
import os
import resource
import sys
import threading
import time
from pathlib import Path

from stub import Coordinator

from meerkat.errors import MeerkatError
from meerkat.federation.coordinator_settings import FederationConfig
from meerkat.federation.flower import stream
from meerkat.record.run_folder import RunFolder


def main(certificates: Path, run: Path, soft: int, hard: int, timeout_s: float) -> None:
    """Run rounds until standard input ends, or they fail.

    Args:
        soft, hard: the limits of open files at the start.
        timeout_s: how long callers who have not been admitted have for whatever they do.
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    stream._HANDSHAKE_S = stream._CALL_S = stream._HELLO_S = stream._AGE_S = timeout_s
    names = {"authority": "ca.crt", "server": "server.crt", "server key": "server.key"}
    keys = {name: certificates / file for name, file in names.items()}
    folder = RunFolder(run)
    folder.open_files()
    coordinator = Coordinator(keys, 2, FederationConfig(clients_wanted=1, deadline_s=20.0, patience_s=20.0))
    coordinator.engine.keep_event = folder.append_event
    coordinator.attending(0)
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    print(json.dumps([coordinator.port, coordinator.admission.token("node 1")]), flush=True)
    rounds, clients, failed = 0, set[int](), ""
    try:
        for record in coordinator.rounds(10**6):
            folder.append_metric({"kind": "round", "round": rounds}, sync=False)
            rounds, clients = rounds + 1, clients | {*record.scalars}
            if over.is_set():
                break
            time.sleep(0.01)
    except MeerkatError as error:
        failed = f"{type(error).__name__}: {error}"
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    outcome = {"rounds": rounds, "clients": sorted(clients), "failed": failed, "limit": limit}
    print(json.dumps(outcome), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
