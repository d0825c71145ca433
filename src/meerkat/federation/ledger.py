"""A site's ledger: the privacy that its rows have spent over all runs; and `RunAccountant`, one run's part of it.

The ledger keeps every noisy reply with its charge. A charge is on the disk before its reply leaves, so a crash at any
moment leaves nothing uncharged. A request that comes again, even to another process, gets the same reply again:
nothing is drawn or charged twice.
"""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from meerkat.errors import DAMAGE, MeerkatError, RunFailed, in_short
from meerkat.federation.frames import BadFrame
from meerkat.federation.site_settings import Refused, SiteConfig, details_in_own_log
from meerkat.privacy.accounting import Charge, epsilon, steps_within
from meerkat.privacy.mechanism import Mechanism, Relation
from meerkat.progress import number_of, say
from meerkat.record.run_log import LogReader, RunLog
from meerkat.settings import budget as run_budget
from meerkat.settings.config import RunConfig

_LEDGER = "the site's ledger cannot be used"


class Request(NamedTuple):
    """What a reply answers. Each request is answered once, about one theta."""

    run: str
    """The federation's id, hexadecimal."""
    client: int
    phase: str
    round: int


@dataclass(frozen=True)
class Budget:
    """The most that may be spent, by one run or by all runs in the ledger."""

    epsilon: float
    delta: float
    relation: Relation
    run: str = ""
    """The run that it limits; empty for all."""


class Ledger:
    """An open ledger. Only one process at a time can have it open."""

    def __init__(self, path: Path) -> None:
        """Open a ledger, or create it.

        Raises:
            RunFailed: it is damaged, cannot be written, or is open in another process.
        """
        self.path = path
        self._charges: dict[Request, Charge] = {}
        self._replies: dict[Request, tuple[str, bytes]] = {}
        try:
            reader = LogReader(path)
            for _ in reader:
                pass
            if reader.damage and not reader.damage.endswith("cut short"):
                # a complete line that is damaged may be a charge whose reply left
                raise RunFailed(f"ledger '{path}': {reader.damage}; restore the file from a copy")
            self._log = RunLog(path, "start the site again")
        except OSError as error:
            raise RunFailed(f"ledger '{path}': {error.strerror}; give a file that can be written") from None
        except RunFailed:
            raise
        except MeerkatError as error:
            raise RunFailed(f"ledger {error}") from None
        if self._log.dropped:
            say(f"note: ledger '{path}': {self._log.dropped}; that record is dropped: its reply never left")
        try:
            for record in LogReader(path):
                self._load(record)
        except DAMAGE as error:
            self.close()
            damage = f"a record is damaged ({in_short(error)})"
            raise RunFailed(f"ledger '{path}': {damage}; restore the file from a copy") from None

    def _load(self, record: dict[str, Any]) -> None:
        request = Request(record["run"], record["client"], record["phase"], record["round"])
        charge = Charge(float(record["rate"]), float(record["noise_multiplier"]), record["steps"])
        if not all(type(number) is int for number in (request.client, request.round, charge.steps)):
            raise TypeError(f"{request}, {charge}")
        if not (0 < charge.rate <= 1 and charge.noise_multiplier >= 0 and charge.steps >= 1):
            raise ValueError(str(charge))
        if request in self._charges:
            raise ValueError(f"{request.phase} round {request.round} is charged twice")
        self._charges[request] = charge
        self._replies[request] = record["theta"], base64.b64decode(record["reply"], validate=True)

    def reply(self, request: Request) -> tuple[str, bytes] | None:
        """Theta's digest, hexadecimal, and the reply that was given to a request; None if it was not answered yet."""
        return self._replies.get(request)

    def charge(self, request: Request, theta: str, charge: Charge, reply: bytes) -> None:
        """Write a charge with its reply; both are on the disk when this returns.

        Raises:
            RunFailed: the disk refused it, and nothing is charged; or the request was answered before.
        """
        if request in self._replies:
            raise RunFailed(f"ledger '{self.path}': {request.phase} round {request.round} was answered before")
        encoded = base64.b64encode(reply).decode()
        record = {**request._asdict(), "theta": theta, **charge._asdict(), "reply": encoded}
        self._log.append(record)
        self._load(record)

    def has_charges(self, run: str) -> bool:
        """Whether a run was charged anything."""
        return any(request.run == run for request in self._charges)

    def spent(self, budget: Budget) -> float:
        """The epsilon of everything charged so far that counts against a budget."""
        return epsilon(self._charges_against(budget), budget.delta, budget.relation)

    def steps_left(self, budget: Budget, rate: float, noise_multiplier: float, most: int) -> int:
        """How many more steps of a mechanism a budget allows; counts up to `most`."""
        spent = self._charges_against(budget)
        return steps_within(budget.epsilon, budget.delta, rate, noise_multiplier, budget.relation, most, spent)

    def _charges_against(self, budget: Budget) -> list[Charge]:
        return [charge for request, charge in self._charges.items() if budget.run in ("", request.run)]

    def close(self) -> None:
        """Close the file, for another process to open."""
        self._log.close()


class RunAccountant:
    """Charges one run's noisy replies to the ledger before they leave, and stops before a budget is exceeded.

    What is wrong with the ledger goes to the site's own log only: such messages name the site's files.
    """

    def __init__(
        self, mechanism: Mechanism, ledger: Ledger, budgets: list[Budget], run: str, client: int, rows: int
    ) -> None:
        """For a site with this many rows; `run` is the federation's id, hexadecimal."""
        self.mechanism, self.ledger = mechanism, ledger
        self._run, self._client, self._rate, self._budgets = run, client, mechanism.rate(rows), budgets
        self._steps_left: list[int] = []
        """Steps that each budget still allows, up to the most that `count_steps_left` was asked for."""

    @classmethod
    def open(cls, config: RunConfig, site: SiteConfig, run: str, rows: int) -> "RunAccountant | None":
        """The accountant for a run and the site's own bounds; None without example-level privacy.

        Raises:
            RunFailed: the ledger cannot be opened.
            Refused: the budget does not allow a single step, in a run that was never answered. A run that was
                answered may have spent its budget with the last reply, and must still hear how it ended.
        """
        mechanism, accepts = run_budget.mechanism(config), site.accepts
        if config.dp != "example" or mechanism is None:
            return None
        of_run = Budget(config.dp_epsilon, config.dp_delta, config.dp_relation, run)
        of_site = Budget(accepts.epsilon, accepts.delta, accepts.relation)
        budgets = [budget for budget in (of_run, of_site) if budget.epsilon]  # 0 is no budget
        with details_in_own_log(_LEDGER):
            ledger = Ledger(Path(site.ledger))
        accountant = cls(mechanism, ledger, budgets, run, site.client, rows)
        try:
            accountant.count_steps_left(run_budget.steps_asked(config))
            if not ledger.has_charges(run):
                accountant.check_budgets(1)
        except BaseException:
            ledger.close()
            raise
        return accountant

    def count_steps_left(self, most: int) -> None:
        """Count how many steps each budget allows, up to `most`. No other process can charge the ledger meanwhile."""
        noise = self.mechanism.noise_multiplier
        self._steps_left = [self.ledger.steps_left(budget, self._rate, noise, most) for budget in self._budgets]

    def check_budgets(self, steps: int) -> None:
        """Raise Refused unless every budget allows this many more steps.

        The coordinator hears no number, and not whose budget it is: it would learn what was spent on others.
        """
        for budget, left in zip(self._budgets, self._steps_left, strict=True):
            if steps > left:
                whose = "the run's" if budget.run else "the site's"
                amount = f"{budget.epsilon:g} at delta {budget.delta:g}"
                say(f"epsilon: {whose} budget of {amount} allows {number_of(left, 'more step')}, not {steps}")
                raise Refused("epsilon: the privacy budget is spent: the site leaves")

    def earlier_reply(self, phase: str, round: int, theta: bytes) -> bytes | None:
        """The reply that this or another process gave to the same request; None if it was not answered yet.

        Raises:
            BadFrame: it was answered about another theta.
        """
        digest, reply = self.ledger.reply(Request(self._run, self._client, phase, round)) or (theta.hex(), None)
        if digest != theta.hex():
            before = "after it was answered for another theta"
            raise BadFrame(f"{phase} asked for in round {round}, {before}: not as agreed")
        return reply

    def charge(self, phase: str, round: int, theta: bytes, steps: int, reply: bytes) -> None:
        """Charge a reply's steps; the charge and the reply are on the disk when this returns."""
        charge = Charge(self._rate, self.mechanism.noise_multiplier, steps)
        with details_in_own_log(_LEDGER):
            self.ledger.charge(Request(self._run, self._client, phase, round), theta.hex(), charge, reply)
        self._steps_left = [left - steps for left in self._steps_left]
