"""A site's ledger: every question that it was asked, over all runs, with its reply and the privacy that this spent.

A question is in the file before it is answered, and its reply before it leaves: killing the process loses nothing. Only
a machine that goes down can lose lines that were not synced. Against that, steps are *reserved ahead*: a line that is
synced says how many the site may make, and those that it may have made when the machine went down count as made.

`run_ledger` is one run's part of it.
"""

import base64
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from meerkat.errors import DAMAGE, MeerkatError, RunFailed, in_short
from meerkat.privacy.accounting import Charge, steps_within
from meerkat.privacy.mechanism import Relation
from meerkat.progress import say
from meerkat.record.run_log import LogReader, RunLog

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Request(NamedTuple):
    """Which question of a run: each is asked once."""

    phase: str
    round: int


class Entry(NamedTuple):
    """A question, and its reply."""

    question: str
    """SHA-256 of all that the reply follows from, hexadecimal."""
    theta: str
    """SHA-256 of the theta that it is about, hexadecimal."""
    pointer: int
    """Local steps that were made before."""
    steps: int
    reply: bytes | None = None
    """None where there is none: the site was stopped, or could not make its steps."""
    lost: bool = False
    """Whether there may have been a reply that went down with the machine: it was charged."""
    rows: str = ""
    """SHA-256 of the files of the site's rows, hexadecimal; empty where the ledger did not note it."""

    def gives_way_to(self, other: "Entry") -> bool:
        """Whether another question may take its place: the site's rows were changed, and no reply ever left."""
        changed = "" not in (self.rows, other.rows) and self.rows != other.rows
        return changed and self.theta == other.theta and self.reply is None and not self.lost


@dataclass(frozen=True)
class Budget:
    """The most that may be spent, by one run or by all runs in the ledger."""

    epsilon: float
    delta: float
    relation: Relation
    run: str = ""
    """The run that it limits; empty for all."""


@dataclass
class ClientRecord:
    """What a ledger has of one client of one run."""

    charter: str = ""
    """What the run's signatures are bound to, hexadecimal; empty in ledgers that did not note it."""
    entries: dict[Request, Entry] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    """The last round that was asked about, by phase."""
    pointer: int = 0
    """Local steps made, with those that may have been."""
    scalars: int = 0
    """Scalars in all replies, with those that may have been."""
    charges: list[Charge] = field(default_factory=list)
    left: bool = False
    """Whether the site left the run because of a bound: it answers nothing more."""
    reserved: int = 0
    """The steps that may be made, as far as the disk says so; 0 where none are reserved."""
    _first: int = 0
    """The steps that were made when they were reserved."""
    _boot: str = ""
    _step: Charge | None = None
    """What a reserved step costs."""
    _directions: int = 0
    """The scalars of a reserved step."""

    def read(self, record: Mapping[str, Any]) -> None:
        """Take in a line of the file. Raises one of DAMAGE: it is malformed."""
        match record.get("kind", "charge"):
            case "run":
                self.charter = str(record["charter"])
            case "reserve":
                self.count_lost(record["boot"])
                self._first, self.reserved = _count(record["from"]), _count(record["steps"])
                self._boot, self._directions = record["boot"], _count(record["directions"])
                self._step = _charge(record, 1)
            case "release":
                self.reserved = 0
            case "leave":
                self.left = True
            case "question":
                pointer, steps = _count(record["pointer"]), _count(record["steps"])
                asked, theta, rows = record["question"], record["theta"], record.get("rows", "")
                self._read_question(record, Entry(asked, theta, pointer, steps, rows=rows))
            case "answer":
                self._read_answer(record)
            case "charge":  # of a version that kept noisy replies only, and nothing of what was asked
                self._read_question(record, Entry("", record["theta"], self.pointer, _count(record["steps"])))
                self._read_answer(record)
            case kind:
                raise ValueError(f"a record of kind {kind!r}")

    def _read_question(self, record: Mapping[str, Any], entry: Entry) -> None:
        request = Request(record["phase"], _count(record["round"]))
        if (earlier := self.entries.get(request)) is not None and not earlier.gives_way_to(entry):
            raise ValueError(f"{request.phase} round {request.round} is asked twice")
        self.entries[request] = entry
        self.last[request.phase] = max(request.round, self.last.get(request.phase, -1))
        self.pointer = max(self.pointer, entry.pointer + entry.steps)

    def _read_answer(self, record: Mapping[str, Any]) -> None:
        request = Request(record["phase"], record["round"])
        entry, reply = self.entries[request], base64.b64decode(record["reply"], validate=True)
        if entry.reply is not None:
            raise ValueError(f"{request.phase} round {request.round} is answered twice")
        charge = _charge(record, entry.steps)
        self.entries[request] = entry._replace(reply=reply)
        self.scalars += _count(record.get("scalars", 0))
        self.charges += [charge] if charge else []

    def went_down(self, boot: str) -> bool:
        """Whether the machine may have gone down since steps were reserved; `boot` names its present start."""
        return bool(self.reserved) and (not boot or boot != self._boot)

    def count_lost(self, boot: str) -> None:
        """Count as made what may have been, where the machine may have gone down since; nothing is reserved afterwards.

        That is what was reserved, and what was asked and has no reply: the reply can have left without its line.
        """
        if self.went_down(boot):
            waiting = {request: each for request, each in self.entries.items() if each.reply is None and not each.lost}
            self.entries |= {request: each._replace(lost=True) for request, each in waiting.items()}
            unused = max(0, self.reserved - max(self.pointer, self._first))
            lost = unused + sum(each.steps for each in waiting.values())
            self.pointer, self.scalars = max(self.pointer, self.reserved), self.scalars + lost * self._directions
            if lost and self._step is not None:
                self.charges.append(self._step._replace(steps=lost))
        self.reserved = 0


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value


def _charge(record: Mapping[str, Any], steps: int) -> Charge | None:
    """What steps cost, as a line says; None where their scalars are exact."""
    if record["rate"] is None:
        return None
    charge = Charge(float(record["rate"]), float(record["noise_multiplier"]), steps)
    if not (0 < charge.rate <= 1 and charge.noise_multiplier >= 0 and steps >= 1):
        raise ValueError(str(charge))
    return charge


class Ledger:
    """An open ledger. Only one process at a time can have it open."""

    def __init__(self, path: Path) -> None:
        """Open or make a ledger. Raises RunFailed: it is damaged, cannot be written, or is open in another process."""
        # where the machine tells no start from another, every process counts as one
        self.path, self.boot = path, _boot_id() or f"process {os.urandom(8).hex()}"
        self._records: dict[tuple[str, int], ClientRecord] = {}
        try:
            self._log = RunLog(path, "start the site again", self._read, self._may_drop)
        except OSError as error:
            raise RunFailed(f"ledger '{path}': {error.strerror}; give a file that can be written") from None
        except MeerkatError as error:
            raise RunFailed(f"ledger {error}") from None
        except DAMAGE as error:
            damage = f"a record is damaged ({in_short(error)})"
            raise RunFailed(f"ledger '{path}': {damage}; restore the file from a copy") from None
        if self._log.dropped:
            say(f"note: ledger '{path}': {self._log.dropped}; it is dropped, and counts as answered if it was")
        for record in self._records.values():
            record.count_lost(self.boot)

    def _read(self, record: Mapping[str, Any]) -> None:
        run = record["run"]
        if type(run) is not str:
            raise TypeError(f"{run!r} is not a run")
        self.of(run, _count(record["client"])).read(record)

    def _may_drop(self, reader: LogReader) -> bool:
        """Whether a damaged end is a line whose reply never left, or lines that were not synced.

        Those are after the last reservation, and it covers them.
        """
        if reader.damage.endswith("cut short"):
            return True
        went_down = any(record.went_down(self.boot) for record in self._records.values())
        return went_down and b'"kind":"reserve"' not in reader.path.read_bytes()[reader.end :]

    def of(self, run: str, client: int) -> ClientRecord:
        """What there is of a client of a run; nothing at first."""
        return self._records.setdefault((run, client), ClientRecord())

    def append(self, run: str, client: int, kind: str, fields: Mapping[str, Any]) -> None:
        """Write a line, not synced, and take it in. Raises RunFailed: the disk refused it, and nothing has changed."""
        record = {"kind": kind, "run": run, "client": client, **fields}
        self._log.append(record, sync=False)
        self._read(record)

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended a line on the way: nothing can be added before the ledger is opened again."""
        return self._log.interrupted

    def sync(self) -> None:
        """Return when all lines are on the disk; from any thread. Raises RunFailed: the disk refused them."""
        self._log.sync()

    @property
    def runs(self) -> int:
        """Runs that the site took part in."""
        return len({run for run, _ in self._records})

    @property
    def scalars(self) -> int:
        """Scalars that were sent, in all runs."""
        return sum(record.scalars for record in self._records.values())

    def steps_left(self, budget: Budget, rate: float, noise_multiplier: float, most: int) -> int:
        """How many more steps of a mechanism a budget allows; counts up to `most`."""
        spent = [*self.charges_against(budget)]
        return steps_within(budget.epsilon, budget.delta, rate, noise_multiplier, budget.relation, most, spent)

    def charges_against(self, budget: Budget) -> Iterator[Charge]:
        """All that was charged so far and counts against a budget."""
        for (run, _), record in self._records.items():
            if budget.run in ("", run):
                yield from record.charges

    def close(self) -> None:
        """Close the file, for another process to open."""
        self._log.close()


def _boot_id() -> str:
    """What tells this start of the machine from others; empty where the system does not say."""
    return _BOOT.read_text().strip() if _BOOT.exists() else ""
