"""Two logs of one federation: one history, or two that fork.

Both can be sound by themselves. A coordinator that shows one log to some and another to others is found by laying them
side by side: a site signs one reply a round, so whoever signed in both after the fork says which of them to ask.
"""

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.rounds import RoundRecord
from meerkat.errors import MeerkatError
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import LogReader


@dataclass(frozen=True)
class Fork:
    """Where two sound logs of one federation part."""

    line: int
    """The first line that differs, from 1."""
    round: int
    """Rounds that both have closed before it."""
    signed_both: tuple[int, ...]
    """Clients that signed two different replies of one round, with a key that both logs have, ascending."""


def fork(one: Path, other: Path) -> Fork | None:
    """Where the logs in two run folders part; None if one continues the other, or they are the same.

    Both are taken to be sound: see `verification.verify`.

    Raises:
        MeerkatError: they are not of one federation.
    """
    logs = [[*LogReader(RunFolder.open(root).log_path)] for root in (one, other)]
    names = [log[0].get("federation", "") if log else "" for log in logs]
    if not names[0] or names[0] != names[1]:
        raise MeerkatError(f"run folders '{one}' and '{other}': not of one federation; give two folders of the same")
    line = next((i for i, (a, b) in enumerate(zip_longest(*logs)) if a != b), len(logs[0]))
    if line in (len(logs[0]), len(logs[1])):
        return None
    before = sum(record["kind"] == "round" for record in logs[0][:line])
    here, there = (_signed(log) for log in logs)
    both = {reply[0] for reply in here.keys() & there.keys() if here[reply] != there[reply]}
    both = {client for client in both if _keys(logs[0], client) & _keys(logs[1], client)}
    return Fork(line + 1, before, tuple(sorted(both)))


def _keys(records: list[dict[str, Any]], client: int) -> set[str]:
    """The keys that a client joined with."""
    return {each["key"] for each in records if each["kind"] == "join" and each["client"] == client}


def _signed(records: list[dict[str, Any]]) -> dict[tuple[int, str, int], tuple[str, int, bytes]]:
    """What was signed for each reply, by client, phase and round: theta, the steps made before, scalars.

    Not the signatures: a site that rotated its key may sign the same reply again.
    """
    kinds = {kind.kind: kind for kind in (RoundRecord, CalibrationRecord)}
    signed: dict[tuple[int, str, int], tuple[str, int, bytes]] = {}
    theta = records[0]["theta"]
    for values in records:
        if values["kind"] in kinds:
            record = kinds[values["kind"]].from_json(values)
            for k in record.signatures:
                about = k, record.plan.phase, record.plan.round
                signed[about] = theta, record.pointers[k], record.scalars[k].tobytes()
            theta = values.get("theta", theta)
    return signed
