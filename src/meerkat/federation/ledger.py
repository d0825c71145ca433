"""A site's ledger: every question that it was asked, over all runs, with its reply and the privacy that this spent.

A question is answered once. When it comes again, even to another process, it gets the same reply again; another
question in its place gets none. Two histories of one federation cannot both have the site's replies.

A question is in the file before it is answered, and its reply before it leaves, so that killing the process loses
nothing. Only a machine that goes down can lose lines that were not synced. Against that steps are *reserved ahead*: a
line that is synced says how many the site may make, and those that it may have made when the machine went down count
as made. Rounds do not wait for it: the next reservation is synced while the last one is used.
"""

import base64
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from meerkat.errors import DAMAGE, MeerkatError, RunFailed, in_short
from meerkat.federation.frames import BadFrame
from meerkat.federation.site_settings import Refused, SiteConfig, details_in_own_log
from meerkat.privacy.accounting import Charge, epsilon, steps_within
from meerkat.privacy.mechanism import Mechanism, Relation
from meerkat.progress import say
from meerkat.record.run_log import LogReader, RunLog
from meerkat.settings import budget as run_budget
from meerkat.settings.config import RunConfig

AHEAD = 64
"""Rounds whose steps are reserved at a time."""
EVALUATION: Literal["evaluation"] = "evaluation"
"""The phase of an evaluation: a question of no steps."""

_FREE: dict[str, float | None] = {"rate": None, "noise_multiplier": None}
_LEDGER = "the site's ledger cannot be used"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Request(NamedTuple):
    """Which question of a run: each is asked once."""

    phase: str
    round: int


class Entry(NamedTuple):
    """A question, and its reply."""

    question: str
    """SHA-256 of all that the reply follows from, hexadecimal."""
    pointer: int
    """Local steps that were made before."""
    steps: int
    reply: bytes | None
    """None where there is none yet: the site was stopped, or could not make its steps."""


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
    scalars: int = 0
    """Scalars in all replies."""
    pointer: int = 0
    """Local steps made, and those that may have been."""
    entries: dict[Request, Entry] = field(default_factory=dict)
    charges: list[Charge] = field(default_factory=list)
    reserved: int = 0
    """The steps that the disk says may be made."""
    _boot: str = ""
    _each: Charge | None = None
    """What a reserved step costs."""

    def read(self, record: dict[str, Any]) -> None:
        """Take one of its lines. Raises one of DAMAGE: it is malformed."""
        match record.get("kind", "charge"):
            case "run":
                self.charter = record["charter"]
            case "reserve":
                self.count_lost(record["boot"])
                self.reserved, self._boot = _count(record["steps"]), record["boot"]
                self._each = _charge(record, 1) if record["rate"] is not None else None
            case "release":
                self.reserved = 0
            case "question":
                self._ask(record, record["question"], _count(record["pointer"]), _count(record["steps"]))
            case "answer":
                self._answer(record)
            case "charge":  # as written before the ledger had questions: nothing is known of what was asked
                self._ask(record, "", self.pointer, _count(record["steps"]))
                self._answer(record)
            case kind:
                raise ValueError(f"a record of kind {kind!r}")

    def _ask(self, record: dict[str, Any], question: str, pointer: int, steps: int) -> None:
        request = Request(str(record["phase"]), _count(record["round"]))
        if request in self.entries:
            raise ValueError(f"{request.phase} round {request.round} is asked twice")
        self.entries[request] = Entry(question, pointer, steps, None)
        self.pointer = max(self.pointer, pointer + steps)

    def _answer(self, record: dict[str, Any]) -> None:
        request = Request(record["phase"], record["round"])
        entry, reply = self.entries[request], base64.b64decode(record["reply"], validate=True)
        if entry.reply is not None:
            raise ValueError(f"{request.phase} round {request.round} is answered twice")
        self.entries[request] = entry._replace(reply=reply)
        self.scalars += _count(record.get("scalars", 0))
        if record["rate"] is not None:
            self.charges.append(_charge(record, entry.steps))

    def count_lost(self, boot: str) -> None:
        """Count the steps that were reserved, unless the machine that reserved them still runs: `boot` says which."""
        if self.reserved > self.pointer and self.went_down(boot):
            if self._each is not None:
                self.charges.append(self._each._replace(steps=self.reserved - self.pointer))
            self.pointer = self.reserved
        self.reserved = 0

    def went_down(self, boot: str) -> bool:
        """Whether the machine may have gone down since the last reservation: `boot` says which start this is."""
        return not boot or boot != self._boot

    def last(self, phase: str) -> int:
        """The last round of a phase that was asked; -1 if none was."""
        return max((request.round for request in self.entries if request.phase == phase), default=-1)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value


def _charge(record: dict[str, Any], steps: int) -> Charge:
    charge = Charge(float(record["rate"]), float(record["noise_multiplier"]), steps)
    if not (0 < charge.rate <= 1 and charge.noise_multiplier >= 0 and steps >= 1):
        raise ValueError(str(charge))
    return charge


class Ledger:
    """An open ledger. Only one process at a time can have it open."""

    def __init__(self, path: Path, boot: str | None = None) -> None:
        """Open a ledger, or create it.

        Args:
            boot: what tells one start of this machine from the next; None for what Linux says, empty for unknown.

        Raises:
            RunFailed: it is damaged, cannot be written, or is open in another process.
        """
        self.path = path
        self.boot = _boot_id() if boot is None else boot
        self._of: dict[tuple[str, int], ClientRecord] = {}
        try:
            self._log = RunLog(path, "start the site again", self._read, self._may_drop)
        except OSError as error:
            raise RunFailed(f"ledger '{path}': {error.strerror}; give a file that can be written") from None
        except DAMAGE as error:
            damage = f"a record is damaged ({in_short(error)})"
            raise RunFailed(f"ledger '{path}': {damage}; restore the file from a copy") from None
        except MeerkatError as error:
            raise RunFailed(f"ledger {error}") from None
        if self._log.dropped:
            say(f"note: ledger '{path}': {self._log.dropped}; the rest is dropped, and counts as answered")
        for record in self._of.values():
            record.count_lost(self.boot)

    def _read(self, record: dict[str, Any]) -> None:
        run, client = record["run"], _count(record["client"])
        if type(run) is not str:
            raise TypeError(f"a run {run!r}")
        self.of(run, client).read(record)

    def _may_drop(self, reader: LogReader) -> bool:
        """Whether the end of a damaged ledger is one reply that never left, or what a reservation covers."""
        open_ones = [record for record in self._of.values() if record.reserved]
        return reader.damage.endswith("cut short") or any(record.went_down(self.boot) for record in open_ones)

    def of(self, run: str, client: int) -> ClientRecord:
        """What there is of a client of a run; empty at first."""
        return self._of.setdefault((run, client), ClientRecord())

    def append(self, run: str, client: int, kind: str, fields: Mapping[str, Any]) -> None:
        """Write a line, and take it into account. Raises RunFailed: the disk refused it, and nothing is changed."""
        record = {"kind": kind, "run": run, "client": client, **fields}
        self._log.append(record, sync=False)
        self._read(record)

    def sync(self) -> None:
        """Return when all lines are on the disk. Raises RunFailed: the disk refused them."""
        self._log.sync()

    @property
    def scalars(self) -> int:
        """Scalars that were sent, over all runs."""
        return sum(record.scalars for record in self._of.values())

    def spent(self, budget: Budget) -> float:
        """The epsilon of everything charged so far that counts against a budget."""
        return epsilon([*self._charges_against(budget)], budget.delta, budget.relation)

    def steps_left(self, budget: Budget, rate: float, noise_multiplier: float, most: int) -> int:
        """How many more steps of a mechanism a budget allows; counts up to `most`."""
        spent = [*self._charges_against(budget)]
        return steps_within(budget.epsilon, budget.delta, rate, noise_multiplier, budget.relation, most, spent)

    def _charges_against(self, budget: Budget) -> Iterator[Charge]:
        for (run, _), record in self._of.items():
            if budget.run in ("", run):
                yield from record.charges

    def close(self) -> None:
        """Close the file, for another process to open."""
        self._log.close()


def _boot_id() -> str:
    return _BOOT.read_text().strip() if _BOOT.exists() else ""


class RunLedger:
    """One client's run in its site's ledger: what it answered, what it may still answer, and what that costs.

    What is wrong with the ledger goes to the site's own log only: such messages name the site's files.
    """

    def __init__(
        self,
        ledger: Ledger,
        run: str,
        client: int,
        ahead: int,
        mechanism: Mechanism | None = None,
        rate: float = 0.0,
        scalars_left: float = float("inf"),
    ) -> None:
        """See `open`; `ahead` is the number of steps that are reserved at a time."""
        self.ledger, self.mechanism = ledger, mechanism
        self._record = ledger.of(run, client)
        self._key = (run, client)
        self._ahead = ahead
        self._price = _FREE if mechanism is None else {"rate": rate, "noise_multiplier": mechanism.noise_multiplier}
        """What a step costs, as the file has it."""
        self._scalars_left = scalars_left
        self._budgets: list[Budget] = []
        self._steps_left: list[int] = []
        """Steps that each budget still allows, up to the most that a run can ask."""
        self._safe = 0
        """Steps that a synced reservation covers."""
        self._syncing: tuple[int, Future[None]] | None = None
        """The steps of the next one, while it is being synced."""
        self._thread = ThreadPoolExecutor(1, "ledger")

    @classmethod
    def open(cls, config: RunConfig, site: SiteConfig, run: str, charter: str, rows: int) -> "RunLedger":
        """A run's part of the site's ledger.

        Args:
            run: the federation's id, hexadecimal.
            charter: what the run's signatures are bound to, hexadecimal.
            rows: how many the site has.

        Raises:
            RunFailed: the ledger cannot be opened.
            Refused: the run was another before, or may not take a single step, in a run that was never answered. A run
                that was answered may have spent its budget with the last reply, and must still hear how it ended.
        """
        if not site.ledger:
            raise MeerkatError("ledger: missing; name the file where the site keeps what it answered, in site.toml")
        mechanism = run_budget.mechanism(config) if config.dp == "example" else None
        with details_in_own_log(_LEDGER):
            ledger = Ledger(Path(site.ledger))
        try:
            left = site.accepts.scalars - ledger.scalars if site.accepts.scalars else float("inf")
            rate = 0.0 if mechanism is None else mechanism.rate(rows)
            ahead = AHEAD * config.local_steps
            made = cls(ledger, run, site.client, ahead, mechanism, rate, left)
            made._begin(charter)
            if mechanism is not None:
                made._open_budgets(config, site, run)
            if not made._record.entries:
                made.check(1, config.directions)
            with details_in_own_log(_LEDGER):
                made._reserve(made.pointer)
        except BaseException:
            ledger.close()
            raise
        return made

    def _begin(self, charter: str) -> None:
        known = self._record.charter
        if known and known != charter:
            raise Refused("run: it began with other settings, model or mask, and the site answers one run of this id")
        if not known:
            with details_in_own_log(_LEDGER):
                self.ledger.append(*self._key, "run", {"charter": charter})

    def _open_budgets(self, config: RunConfig, site: SiteConfig, run: str) -> None:
        accepts, noise = site.accepts, self._price["noise_multiplier"]
        of_run = Budget(config.dp_epsilon, config.dp_delta, config.dp_relation, run)
        of_site = Budget(accepts.epsilon, accepts.delta, accepts.relation)
        self._budgets = [budget for budget in (of_run, of_site) if budget.epsilon]  # 0 is no budget
        most = run_budget.steps_asked(config)
        rate = self._price["rate"] or 0.0
        self._steps_left = [self.ledger.steps_left(budget, rate, noise or 0.0, most) for budget in self._budgets]

    @property
    def pointer(self) -> int:
        """Local steps that the site has made in the run, and those that it may have made."""
        return self._record.pointer

    def begin_at(self, pointer: int) -> None:
        """Begin after the steps that the coordinator counted, in a run of which the ledger has nothing."""
        if not self._record.entries:
            self._record.pointer = max(self._record.pointer, pointer)

    def entry(self, phase: str, round: int) -> Entry | None:
        """What was asked in a round, and replied; None if nothing was asked."""
        return self._record.entries.get(Request(phase, round))

    def check(self, steps: int, directions: int) -> None:
        """Raise Refused unless every bound allows this many more steps."""
        for budget, left in zip(self._budgets, self._steps_left, strict=True):
            if steps > left:
                whose = "the run's" if budget.run else "the site's"
                amount = f"{budget.epsilon:g} at delta {budget.delta:g}"
                raise Refused(f"epsilon: {whose} budget of {amount} is spent ({left} steps left): the site leaves")
        if steps * directions > self._scalars_left:
            raise Refused("scalars: the site has sent as many as it agrees to, over all runs: the site leaves")

    def answer(
        self, phase: str, round: int, question: str, shape: tuple[int, int], compute: Callable[[int], bytes]
    ) -> bytes:
        """Answer a question, or give the reply that it got before.

        Args:
            question: SHA-256 of all that the reply follows from, hexadecimal.
            shape: the local steps that it asks for, and the scalars of each.
            compute: the local steps made before -> the reply.

        Raises:
            BadFrame: another question was asked in its place, or in a later round.
            Refused: a budget does not allow it.
            RunFailed: the disk refused to keep it; nothing may leave.
        """
        entry = self.entry(phase, round)
        if entry is not None and entry.question != question:
            raise BadFrame(f"{phase} asked for in round {round}, where something else was asked before: not as agreed")
        if entry is not None and entry.reply is not None:
            return entry.reply
        if entry is None and round <= self._record.last(phase):
            raise BadFrame(f"{phase} asked for in round {round}, after later ones: not as agreed")
        self.check(*shape)
        with details_in_own_log(_LEDGER):
            entry = entry or self._ask(phase, round, question, shape[0])
        reply = compute(entry.pointer)
        with details_in_own_log(_LEDGER):
            self._answer(phase, round, shape, reply)
        return reply

    def _ask(self, phase: str, round: int, question: str, steps: int) -> Entry:
        """Note a question, once the disk says that so many steps more may be made."""
        entry = Entry(question, self.pointer, steps, None)
        self._reserve(entry.pointer + steps)
        fields = {"phase": phase, "round": round, "question": question, "pointer": entry.pointer, "steps": steps}
        self.ledger.append(*self._key, "question", fields)
        return entry

    def _answer(self, phase: str, round: int, shape: tuple[int, int], reply: bytes) -> None:
        steps, scalars = shape[0], math.prod(shape)
        price = self._price if steps else _FREE
        fields = {
            "phase": phase,
            "round": round,
            "scalars": scalars,
            **price,
            "reply": base64.b64encode(reply).decode(),
        }
        self.ledger.append(*self._key, "answer", fields)
        self._steps_left = [left - steps for left in self._steps_left]
        self._scalars_left -= scalars

    def _reserve(self, until: int) -> None:
        """Return when a reservation on the disk covers so many steps; begin to sync the next one in time."""
        if self._syncing and (until > self._safe or self._syncing[1].done()):
            self._wait_for_sync()
        if not self._syncing and until + self._ahead // 2 > self._safe:
            covered = min(until + self._ahead, self.pointer + min(self._steps_left, default=2 * self._ahead))
            if covered > self._safe:
                self.ledger.append(*self._key, "reserve", {"steps": covered, "boot": self.ledger.boot, **self._price})
                self._syncing = covered, self._thread.submit(self.ledger.sync)
        if self._syncing and until > self._safe:
            self._wait_for_sync()

    def _wait_for_sync(self) -> None:
        assert self._syncing is not None
        (covered, synced), self._syncing = self._syncing, None
        synced.result()
        self._safe = covered

    def close(self) -> None:
        """Give back what is reserved and not used, and close the ledger."""
        self._thread.shutdown()
        with details_in_own_log(_LEDGER):
            try:
                if self._record.reserved:
                    self.ledger.append(*self._key, "release", {})
            finally:
                self.ledger.close()
