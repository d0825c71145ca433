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
from meerkat.progress import say
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
            raise RunFailed(
                f"ledger '{path}': a record is damaged ({in_short(error)}); restore the file from a copy"
            ) from None

    def _load(self, record: dict[str, Any]) -> None:
        request = Request(record["run"], record["client"], record["phase"], record["round"])
        charge = Charge(float(record["rate"]), float(record["noise_multiplier"]), record["steps"])
        if not all(type(number) is int for number in (request.client, request.round, charge.steps)):
            raise TypeError(f"client {request.client!r} in round {request.round!r}: {charge.steps!r} steps")
        if not (0 < charge.rate <= 1 and charge.noise_multiplier >= 0 and charge.steps >= 1):
            raise ValueError(
                f"a charge of {charge.steps:g} steps at rate {charge.rate:g} and noise {charge.noise_multiplier:g}"
            )
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
        record = {
            **request._asdict(),
            "theta": theta,
            **charge._asdict(),
            "reply": base64.b64encode(reply).decode(),
        }
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
        self.mechanism = mechanism
        self.ledger = ledger
        self._run = run
        self._client = client
        self._rate = mechanism.rate(rows)
        self._budgets = budgets
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
        mechanism = run_budget.mechanism(config)
        if config.dp != "example" or mechanism is None:
            return None
        bounds, budgets = site.accepts, []
        if config.dp_epsilon:
            budgets.append(Budget(config.dp_epsilon, config.dp_delta, config.dp_relation, run))
        if bounds.epsilon:
            budgets.append(Budget(bounds.epsilon, bounds.delta, bounds.relation))
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
        """Raise Refused unless every budget allows this many more steps."""
        for budget, left in zip(self._budgets, self._steps_left, strict=True):
            if steps > left:
                whose = "the run's" if budget.run else "the site's"
                raise Refused(
                    f"epsilon: {whose} budget of {budget.epsilon:g} at delta {budget.delta:g} is spent "
                    f"({left} steps left): the site leaves"
                )

    def earlier_reply(self, phase: str, round: int, theta: bytes) -> bytes | None:
        """The reply that this or another process gave to the same request; None if it was not answered yet.

        Raises:
            BadFrame: it was answered about another theta.
        """
        answer = self.ledger.reply(Request(self._run, self._client, phase, round))
        if answer is None:
            return None
        digest, reply = answer
        if digest != theta.hex():
            raise BadFrame(
                f"{phase} asked for in round {round}, after it was answered for another theta: not as agreed"
            )
        return reply

    def charge(self, phase: str, round: int, theta: bytes, steps: int, reply: bytes) -> None:
        """Charge a reply's steps; the charge and the reply are on the disk when this returns."""
        charge = Charge(self._rate, self.mechanism.noise_multiplier, steps)
        with details_in_own_log(_LEDGER):
            self.ledger.charge(Request(self._run, self._client, phase, round), theta.hex(), charge, reply)
        self._steps_left = [left - steps for left in self._steps_left]
