"""A site's example-level privacy in one run: its mechanism, its budgets, and the ledger that both rest on.

What is wrong with the ledger is told here alone: such words name the site's own files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meerkat.errors import RunFailed
from meerkat.federation.frames import BadFrame
from meerkat.federation.ledger import Asked, Budget, Ledger
from meerkat.federation.site_settings import Refused, SiteConfig
from meerkat.privacy.accounting import Charge
from meerkat.privacy.mechanism import Mechanism
from meerkat.progress import say
from meerkat.settings import budget
from meerkat.settings.config import RunConfig


class Account:
    """Notes every noisy reply before it leaves, and says when the next one would pass a budget."""

    def __init__(
        self, mechanism: Mechanism, ledger: Ledger, budgets: list[Budget], run: str, client: int, rows: int
    ) -> None:
        """Of a site with so many rows; `run` is the federation's id, hexadecimal."""
        self.mechanism = mechanism
        self.ledger = ledger
        self._run = run
        self._client = client
        self._rate = mechanism.rate(rows)
        self._budgets = budgets
        self._left: list[int] = []
        """Steps that each budget still lasts for, as far as was looked."""

    @classmethod
    def of(cls, config: RunConfig, own: SiteConfig, run: str, rows: int) -> "Account | None":
        """The account that a run and the site's own bounds call for; None without example-level privacy.

        Raises:
            RunFailed: the ledger cannot be opened; Refused: the budget does not last for a step. A run that was
                answered before may be over its last one, and has yet to be told of what followed.
        """
        mechanism = budget.mechanism(config)
        if config.dp != "example" or mechanism is None:
            return None
        bounds, budgets = own.accepts, []
        if config.dp_epsilon:
            budgets.append(Budget(config.dp_epsilon, config.dp_delta, config.dp_relation, run))
        if bounds.epsilon:
            budgets.append(Budget(bounds.epsilon, bounds.delta, bounds.relation))
        with _told_here():
            ledger = Ledger(Path(own.ledger))
        account = cls(mechanism, ledger, budgets, run, own.client, rows)
        try:
            account.look(budget.steps_asked(config))
            if not ledger.knows(run):
                account.check_lasts(1)
        except BaseException:
            account.ledger.close()
            raise
        return account

    def look(self, most: int) -> None:
        """See how far the budgets reach, up to so many steps: no other process charges the ledger meanwhile."""
        noise = self.mechanism.noise_multiplier
        self._left = [self.ledger.steps_left(limit, self._rate, noise, most) for limit in self._budgets]

    def check_lasts(self, steps: int) -> None:
        """Raise Refused unless every budget lasts for so many more steps."""
        for limit, left in zip(self._budgets, self._left, strict=True):
            if steps > left:
                whose = "the run's" if limit.run else "the site's"
                raise Refused(
                    f"epsilon: {whose} budget of {limit.epsilon:g} at delta {limit.delta:g} is spent "
                    f"({left} steps left): the site leaves"
                )

    def again(self, phase: str, round: int, theta: bytes) -> bytes | None:
        """The reply that was given before to what is asked, by this process or another; None where none was.

        Raises:
            BadFrame: it was given for another theta.
        """
        found = self.ledger.reply(Asked(self._run, self._client, phase, round))
        if found is None:
            return None
        if found[0] != theta.hex():
            raise BadFrame(
                f"{phase} asked for in round {round}, after it was answered for another theta: not as agreed"
            )
        return found[1]

    def charge(self, phase: str, round: int, theta: bytes, steps: int, reply: bytes) -> None:
        """Charge a reply's steps, durably, with the reply itself."""
        charge = Charge(self._rate, self.mechanism.noise_multiplier, steps)
        with _told_here():
            self.ledger.charge(Asked(self._run, self._client, phase, round), theta.hex(), charge, reply)
        self._left = [left - steps for left in self._left]


@contextmanager
def _told_here() -> Iterator[None]:
    try:
        yield
    except RunFailed as error:
        say(f"meerkat: {error}")
        raise RunFailed("the site's ledger cannot be used; its own log says why") from None
