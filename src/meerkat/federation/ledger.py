"""A site's ledger: what its rows were charged by every noisy reply, of whatever run, and the replies themselves.

A charge is on the disk before its reply leaves, so a budget is never passed unnoticed, whoever is killed when. A
request that comes again, to another process as well, gets the same reply again: nothing is drawn or charged twice.
"""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from meerkat.errors import DAMAGE, MeerkatError, RunFailed, in_short
from meerkat.privacy.accounting import Charge, epsilon, steps_within
from meerkat.privacy.mechanism import Relation
from meerkat.progress import say
from meerkat.record.run_log import LogReader, RunLog


class Asked(NamedTuple):
    """What a reply answers: one question is answered for one theta, once."""

    run: str
    """The federation's id, hexadecimal."""
    client: int
    phase: str
    round: int


@dataclass(frozen=True)
class Budget:
    """How much may be spent, at which delta and relation; of one run, or of all in the ledger."""

    epsilon: float
    delta: float
    relation: Relation
    run: str = ""
    """The run that it is for; empty for all."""


class Ledger:
    """An open ledger. One process at a time holds it."""

    def __init__(self, path: Path) -> None:
        """Open a ledger, made where it is not there.

        Raises:
            RunFailed: it is damaged, cannot be written, or another process holds it.
        """
        self.path = path
        self._charges: dict[Asked, Charge] = {}
        self._replies: dict[Asked, tuple[str, bytes]] = {}
        try:
            found = LogReader(path)
            for _ in found:
                pass
            if found.damage and not found.damage.endswith("cut short"):
                # a whole line that does not hold may be a charge whose reply left
                raise RunFailed(f"ledger '{path}': {found.damage}; restore the file from a copy")
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
            for held in LogReader(path):
                self._take(held)
        except DAMAGE as error:
            self.close()
            said = in_short(error)
            raise RunFailed(f"ledger '{path}': a record is damaged ({said}); restore the file from a copy") from None

    def _take(self, held: dict[str, Any]) -> None:
        asked = Asked(held["run"], held["client"], held["phase"], held["round"])
        charge = Charge(float(held["rate"]), float(held["noise_multiplier"]), held["steps"])
        if not all(type(number) is int for number in (asked.client, asked.round, charge.steps)):
            raise TypeError(f"client {asked.client!r} in round {asked.round!r}: {charge.steps!r} steps")
        if not (0 < charge.rate <= 1 and charge.noise_multiplier >= 0 and charge.steps >= 1):
            raise ValueError(
                f"a charge of {charge.steps:g} steps at rate {charge.rate:g} and noise {charge.noise_multiplier:g}"
            )
        if asked in self._charges:
            raise ValueError(f"{asked.phase} round {asked.round} is charged twice")
        self._charges[asked] = charge
        self._replies[asked] = held["theta"], base64.b64decode(held["reply"], validate=True)

    def reply(self, asked: Asked) -> tuple[str, bytes] | None:
        """Theta's digest, hexadecimal, and the reply that was given to what is asked; None where none was."""
        return self._replies.get(asked)

    def charge(self, asked: Asked, theta: str, charge: Charge, reply: bytes) -> None:
        """Write a charge with its reply; both are on the disk when this returns.

        Raises:
            RunFailed: the disk refused it, and nothing is charged; or what is asked was answered before.
        """
        if asked in self._replies:
            raise RunFailed(f"ledger '{self.path}': {asked.phase} round {asked.round} was answered before")
        held = {
            **asked._asdict(),
            "theta": theta,
            **charge._asdict(),
            "reply": base64.b64encode(reply).decode(),
        }
        self._log.append(held)
        self._take(held)

    def knows(self, run: str) -> bool:
        """Whether a run was charged anything."""
        return any(asked.run == run for asked in self._charges)

    def spent(self, budget: Budget) -> float:
        """The epsilon of all that a budget covers, so far."""
        return epsilon(self._covered(budget), budget.delta, budget.relation)

    def steps_left(self, budget: Budget, rate: float, noise_multiplier: float, most: int) -> int:
        """How many more steps of a mechanism the budget lasts for; at most `most` are looked at."""
        spent = self._covered(budget)
        return steps_within(budget.epsilon, budget.delta, rate, noise_multiplier, budget.relation, most, spent)

    def _covered(self, budget: Budget) -> list[Charge]:
        return [charge for asked, charge in self._charges.items() if budget.run in ("", asked.run)]

    def close(self) -> None:
        """Give the file back."""
        self._log.close()
