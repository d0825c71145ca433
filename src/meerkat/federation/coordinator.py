"""The coordinator of a real federation: a run from beginning to end over a network.

It has the model, the mask and the run folder, and none of the sites' rows. Reaching nodes and inviting them is the
`Control`'s business: Flower's, in practice.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from meerkat.algorithm.rounds import RoundRecord
from meerkat.algorithm.server import ServerState
from meerkat.errors import MeerkatError
from meerkat.extensions import load
from meerkat.federation.admission import Admission
from meerkat.federation.coordinator_settings import FederationConfig
from meerkat.federation.link import Link, WaitingRules
from meerkat.federation.offer import Offer
from meerkat.federation.remote_engine import RemoteEngine
from meerkat.problems.problem import Better, Problem
from meerkat.progress import number_of, say
from meerkat.record.members import KeyRevocation
from meerkat.record.run_folder import RunFolder
from meerkat.record.signatures import fingerprint, read_keys
from meerkat.run.loop import Evaluate, evaluation_of, run_rounds
from meerkat.run.run import Run, begin, carry_on
from meerkat.run.sentences import defence_in_words
from meerkat.run.setup import open_problem, resolve
from meerkat.run.summary import write_summary
from meerkat.settings.auto import AUTO
from meerkat.settings.config import RunConfig

_STATUS_S = 10.0
"""Seconds between lines on how the federation stands."""


class Control(Protocol):
    """Reaches nodes before they have a session: tells each of the run, again when its session ended early."""

    def open(self, admission: Admission, offer: Offer, stop: Callable[[str], None]) -> None:
        """Begin to invite nodes, from a thread of its own; `stop` is called when the run is to end."""

    def link(self, admission: Admission) -> Link:
        """Where frames go."""

    def stop_inviting(self) -> None:
        """Invite nobody any more."""

    def close(self) -> None:
        """Wait until the nodes are free, if that is soon."""


def coordinate(config: RunConfig, federation: FederationConfig, out: Path, control: Control) -> dict[str, Any]:
    """Run a federation, or resume one, in a run folder. Returns the summary.

    Raises:
        MeerkatError: the settings cannot be met, or are not those that the run began with.
        RunFailed: the run went wrong on the way. What was logged stays, and the run can be resumed.
    """
    load(federation.extensions)
    config = resolve(config, rows=federation.evaluate == "coordinator")
    listed = read_keys(federation.signers, "signers") if federation.signers else None
    resumed = (out / "config.toml").is_file()
    if not resumed:
        RunFolder.check_free(out)
        config.check_none_idle()
    problem = open_problem(config)
    folder = RunFolder.open(out) if resumed else begin(config, out, problem)
    if resumed:
        _check_same(config, folder)
    fresh, cure = secrets.token_hex(8), "start the coordinator again"
    with carry_on(folder, problem, federation=fresh, signed=federation.sign, cure=cure) as run:
        _check_signing(run, federation)
        run.members.listed = listed
        _revoke(run, federation.revoked)
        facts = _coordinate(run, problem, federation, control)
        return write_summary(run, facts=facts)


def _check_same(config: RunConfig, folder: RunFolder) -> None:
    """Raise MeerkatError where settings given now differ from those that the run began with."""
    began = folder.config()
    left_open = {"density", *(name for name in ("lr", "dp_noise_multiplier") if getattr(config, name) == AUTO)}
    for name, value in config.model_dump().items():
        if name not in left_open and value != (then := getattr(began, name)):
            raise MeerkatError(
                f"run folder '{folder.root}': the run in it began with {name} {then!r}, not {value!r}; "
                "restore the setting, or give another run folder"
            )


def _check_signing(run: Run, federation: FederationConfig) -> None:
    if run.opening.signed != federation.sign:
        raise MeerkatError(
            f"run folder '{run.folder.root}': the run in it began with sign = {str(run.opening.signed).lower()}, "
            "which sites have signed; restore the setting, or give another run folder"
        )


def _revoke(run: Run, names: Iterable[str]) -> None:
    """Log that keys are revoked from now on, unless the log says so or has its end."""
    signing = {fingerprint(key) for key in run.members.keys.values()}
    for name in () if run.closed else names:
        if name not in run.members.revoked:
            if signing and name not in signing:
                say(f"note: revoked {name}: no client of this run signs with it now; is it the right one?")
            run.log.append((revocation := KeyRevocation(run.state.round, name)).to_json())
            run.members.revoke(revocation)


def _coordinate(run: Run, problem: Problem, federation: FederationConfig, control: Control) -> dict[str, Any]:
    """Run the rounds that are left. Returns what the summary tells of the network."""
    config, opening = run.config, run.opening
    admission = Admission(run.members, config.clients, run.nodes)
    offer = Offer.of(
        config,
        run.mask,
        opening.theta,
        opening.federation,
        federation.stream,
        federation.site_patience_s,
        federation.sign,
    )
    why = "the coordinator stopped"
    with closing(control), closing(control.link(admission)) as link:
        engine = _Watched(run, link, admission, federation.waiting_rules(config.clients), problem.scores)
        control.open(admission, offer, engine.stop)
        _announce(run)
        try:
            evaluate: Evaluate = engine.evaluate
            if federation.evaluate == "coordinator":
                rows = problem.prepare(problem.rows("validation"))
                evaluate = evaluation_of(problem, run.model, problem.batch(rows, "evaluation"))
            run_rounds(run, engine, evaluate, attendance=engine)
            why = "the run is finished"
        finally:
            control.stop_inviting()
            engine.end(why)
    return engine.outcome()


def _announce(run: Run) -> None:
    """Say what is about to run."""
    config = run.config
    many = f"{number_of(config.clients, 'client')}, {number_of(config.rounds, 'round')}"
    say(
        f"{run.folder.root}: federation {run.opening.federation}: {config.method}, {len(run.mask):,} of "
        f"{run.mask.total:,} parameters move, learning rate {config.lr:g}; up to {many}"
    )
    if defence := defence_in_words(config):
        say(defence)


class _Watched(RemoteEngine):
    """A remote engine that says every few seconds how the federation stands, and keeps its events."""

    def __init__(
        self, run: Run, link: Link, admission: Admission, rules: WaitingRules, better: Mapping[str, Better]
    ) -> None:
        super().__init__(
            link, admission, run.settings, rules, run.opening.federation, run.state, run.directions, better
        )
        self._folder = run.folder
        self._said = 0.0

    def tell(self, event: str, text: str, **facts: Any) -> None:
        """See `RemoteEngine`."""
        super().tell(event, text, **facts)
        self._folder.append_event(event, round=self._trail.round, **facts)

    def closed(self, state: ServerState, record: RoundRecord) -> None:
        """See `loop.Attendance`."""
        super().closed(state, record)
        if (now := time.monotonic()) - self._said >= _STATUS_S:
            self._said = now
            say(self.status())
