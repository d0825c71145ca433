"""One run's part of a site's ledger: each question is answered once, and answers stay within what the site agreed to.

When a question comes again, even to another process, it gets the same reply again. Another question in its place gets
none: two histories of one federation cannot both have the site's replies. Where the site's rows were changed before any
reply left, the question about the new ones takes the old one's place.
"""

import base64
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from meerkat.errors import MeerkatError, RunFailed
from meerkat.federation.frames import BadFrame
from meerkat.federation.ledger import Budget, Entry, Ledger, Request
from meerkat.federation.site_settings import Accepts, Refused, SiteConfig, details_in_own_log
from meerkat.privacy.mechanism import Mechanism
from meerkat.progress import number_of, say
from meerkat.settings import budget as run_budget
from meerkat.settings.config import RunConfig

AHEAD = 64
"""Rounds whose steps are reserved at a time."""
EVALUATION: Literal["evaluation"] = "evaluation"
"""The phase of an evaluation, which takes no steps."""

_PHASES = ("calibration", "training", EVALUATION)
_SYNC_S = 1.0
"""Seconds after which an answer is synced while it travels, if none was."""
_EXACT: dict[str, float | None] = {"rate": None, "noise_multiplier": None}
_UNUSABLE = "the site's ledger cannot be used"


class RunLedger:
    """What a client answered in a run, what it may still answer, and what that costs.

    What is wrong with the ledger goes to the site's own log only: such messages name the site's files.
    """

    def __init__(self, ledger: Ledger, config: RunConfig, accepts: Accepts, run: str, client: int, rows: int) -> None:
        """A client's part of an open ledger; arguments as in `open`."""
        self.ledger = ledger
        self.mechanism: Mechanism | None = run_budget.mechanism(config) if config.dp == "example" else None
        """What makes scalars noisy; None where they are exact."""
        self._key, self._record = (run, client), ledger.of(run, client)
        self._ahead, self._directions = AHEAD * config.local_steps, config.directions
        self._scalars_left = accepts.scalars - ledger.scalars if accepts.scalars else math.inf
        self._price, self._budgets = _EXACT, list[Budget]()
        self._steps_left: list[int] = []
        """Steps that each budget still allows, up to the most that the run can ask for."""
        if self.mechanism is not None:
            rate, noise = self.mechanism.rate(rows), self.mechanism.noise_multiplier
            most = run_budget.steps_asked(config)
            self._price = {"rate": rate, "noise_multiplier": noise}
            of_run = Budget(config.dp_epsilon, config.dp_delta, config.dp_relation, run)
            of_site = Budget(accepts.epsilon, accepts.delta, accepts.relation)
            self._budgets = [budget for budget in (of_run, of_site) if budget.epsilon]  # 0 is no budget
            self._steps_left = [ledger.steps_left(budget, rate, noise, most) for budget in self._budgets]
        self._safe = 0
        """Steps that a reservation on the disk covers."""
        self._syncing: tuple[int, Future[None]] | None = None
        """The steps that are covered once all lines are on the disk, while they are on their way."""
        self._synced_at = -math.inf
        self._thread = ThreadPoolExecutor(1, "ledger")

    @classmethod
    def open(cls, config: RunConfig, site: SiteConfig, run: str, charter: str, rows: int) -> "RunLedger":
        """Open the site's ledger for a run.

        Args:
            run: the federation's id, hexadecimal.
            charter: what the run's signatures are bound to, hexadecimal.
            rows: how many the site has.

        Raises:
            RunFailed: the ledger cannot be opened.
            Refused: the run has changed; or no bound allows it a single step, and it was never answered. A run that
                was answered may have spent its budget with the last reply, and must still hear how it ended.
        """
        if not site.ledger:
            raise MeerkatError("ledger: missing; name a file in site.toml, where the site keeps what it answered")
        with details_in_own_log(_UNUSABLE):
            ledger = Ledger(Path(site.ledger))
        try:
            opened = cls(ledger, config, site.accepts, run, site.client, rows)
            if not opened._record.entries:
                opened._check_bounds(1)
            opened._begin(charter)
        except BaseException:
            ledger.close()
            raise
        return opened

    def _begin(self, charter: str) -> None:
        """Note what the run is, where it is new, and reserve its first steps."""
        known = self._record.charter
        if known and known != charter:
            raise Refused("run: it began with other settings, another model or another mask; start a new run")
        with details_in_own_log(_UNUSABLE):
            if not known:
                self._append("run", charter=charter)
            self._reserve(self._record.pointer)

    def close(self) -> None:
        """Give back what was reserved and not used, and close the ledger."""
        self._thread.shutdown()
        try:
            with details_in_own_log(_UNUSABLE):
                if self._record.reserved and not self.ledger.interrupted:
                    self._append("release")
        finally:
            self.ledger.close()

    def entry(self, phase: str, round: int) -> Entry | None:
        """What was asked in a round, and replied; None if nothing was asked."""
        return self._record.entries.get(Request(phase, round))

    def begin_at(self, pointer: int) -> None:
        """Begin after the steps that the coordinator counted, in a run that the ledger knows no local step of."""
        if not any(entry.steps for entry in self._record.entries.values()):
            self._record.pointer = max(self._record.pointer, pointer)

    def answer(
        self,
        phase: str,
        round: int,
        question: str,
        theta: str,
        steps: int,
        reply: Callable[[int], bytes],
        rows: str = "",
    ) -> bytes:
        """The reply to a question, which is new or was answered before.

        Args:
            question: SHA-256 of all that the reply follows from, hexadecimal.
            theta: SHA-256 of the theta that it is about, hexadecimal.
            steps: the local steps that it asks for; 0 for an evaluation.
            reply: makes the reply; given the local steps that were made before.
            rows: SHA-256 of the files of the site's rows, hexadecimal; whoever asks has no part in it.

        Raises:
            BadFrame: another question was asked in its place, or about a later round.
            Refused: a bound does not allow it.
            RunFailed: the disk refused to keep it: nothing may leave.
        """
        entry = self.entry(phase, round)
        new = Entry(question, theta, self._record.pointer if entry is None else entry.pointer, steps, rows=rows)
        if entry is not None and entry.question != question and not entry.gives_way_to(new):
            raise BadFrame(f"{phase} asked for in round {round}, where something else was asked before: not as agreed")
        if entry is not None and entry.reply is not None:
            return entry.reply
        if entry is None and round <= self._record.last.get(phase, -1):
            raise BadFrame(f"{phase} asked for in round {round}, after a later one: not as agreed")
        thetas = {known.theta for each in _PHASES if (known := self.entry(each, round)) is not None}
        if thetas - {theta}:
            raise BadFrame(f"{phase} asked for in round {round}, about another theta than before: not as agreed")
        self._stay_within_bounds(steps)
        if entry is None or entry.question != question:
            entry = new
            with details_in_own_log(_UNUSABLE):
                self._reserve(entry.pointer + steps)
                if (earlier := self.entry(phase, round)) is not None and not earlier.gives_way_to(entry):
                    raise RunFailed(f"{phase} of round {round}: a reply to another question may have been lost")
                asked = {"question": question, "theta": theta, "pointer": entry.pointer, "steps": steps, "rows": rows}
                self._append("question", phase=phase, round=round, **asked)
        made = reply(entry.pointer)
        price, scalars = self._price if steps else _EXACT, steps * self._directions
        with details_in_own_log(_UNUSABLE):
            encoded = base64.b64encode(made).decode()
            self._append("answer", phase=phase, round=round, scalars=scalars, **price, reply=encoded)
            self._sync_soon(steps)
        self._steps_left = [left - steps for left in self._steps_left]
        self._scalars_left -= scalars
        return made

    def _stay_within_bounds(self, steps: int) -> None:
        """Raise Refused unless the site is in the run, and every bound allows this many more steps.

        A site that has left stays away. It could be asked for fewer and fewer steps, and tell how many are left.
        """
        if self._record.left:
            raise Refused("the site has left the run")
        try:
            self._check_bounds(steps)
        except Refused:
            with details_in_own_log(_UNUSABLE):
                self._append("leave")
            raise

    def _check_bounds(self, steps: int) -> None:
        """Raise Refused unless every bound allows this many more steps.

        The coordinator hears no number, and not whose budget it is: it would learn what was spent on others.
        """
        for budget, left in zip(self._budgets, self._steps_left, strict=True):
            if steps > left:
                whose = "the run's" if budget.run else "the site's"
                amount = f"{budget.epsilon:g} at delta {budget.delta:g}"
                say(f"epsilon: {whose} budget of {amount} allows {number_of(left, 'more step')}, not {steps}")
                raise Refused("epsilon: the privacy budget is spent: the site leaves")
        if steps * self._directions > self._scalars_left:
            say(f"scalars: {self._scalars_left:,} more may be sent, not {steps * self._directions:,}")
            raise Refused("scalars: the site has sent as many as it agreed to, over all runs: the site leaves")

    def _append(self, kind: str, **fields: Any) -> None:
        self.ledger.append(*self._key, kind, fields)

    def _reserve(self, steps: int) -> None:
        """Return when the disk says that so many steps may be made in all.

        The next reservation is synced while half of the last one is left, so that hardly any round waits for it.
        """
        if self._syncing and (steps > self._safe or self._syncing[1].done()):
            self._wait_for_sync(*self._syncing)
        if not self._syncing and steps + self._ahead // 2 > self._safe:
            allowed = self._record.pointer + min(self._steps_left, default=2 * self._ahead)
            covered = min(steps + self._ahead, allowed)
            if covered > self._safe:
                reserved = {"from": self._record.pointer, "steps": covered, "directions": self._directions}
                self._append("reserve", **reserved, boot=self.ledger.boot, **self._price)
                self._begin_sync(covered)
        if self._syncing and steps > self._safe:
            self._wait_for_sync(*self._syncing)

    def _sync_soon(self, steps: int) -> None:
        """Have an answer synced while it travels, at most once a second; an evaluation, which is rare, before."""
        if self._syncing and not steps:
            self._wait_for_sync(*self._syncing)  # it began before this answer was written
        if not self._syncing and (not steps or time.monotonic() - self._synced_at > _SYNC_S):
            self._begin_sync(self._safe)
        if self._syncing and not steps:
            self._wait_for_sync(*self._syncing)

    def _begin_sync(self, covered: int) -> None:
        self._syncing, self._synced_at = (covered, self._thread.submit(self.ledger.sync)), time.monotonic()

    def _wait_for_sync(self, covered: int, synced: Future[None]) -> None:
        self._syncing = None
        synced.result()
        self._safe = covered
