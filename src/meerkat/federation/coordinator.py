"""The coordinator of a real federation: a run from beginning to end over a network.

It has the model, the mask and the run folder, and none of the sites' rows. Reaching nodes and inviting them is the
`Control`'s business: Flower's, in practice.
"""

import secrets
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn, Protocol

from meerkat.errors import MeerkatError
from meerkat.extensions import load
from meerkat.federation.admission import Admission
from meerkat.federation.coordinator_settings import FederationConfig
from meerkat.federation.link import Link
from meerkat.federation.offer import Offer
from meerkat.federation.remote_engine import RemoteEngine
from meerkat.problems.problem import Problem
from meerkat.progress import number_of, say
from meerkat.record.members import KeyRevocation
from meerkat.record.run_folder import RunFolder
from meerkat.record.signatures import fingerprint, read_keys
from meerkat.record.summary import Summary
from meerkat.run.loop import Evaluate, evaluation_of, run_rounds
from meerkat.run.metrics import EvaluationMetric
from meerkat.run.run import Run, begin, carry_on
from meerkat.run.sentences import defence_in_words, rate_in_words
from meerkat.run.setup import has_device, open_problem, resolve
from meerkat.run.split import evenly
from meerkat.run.summary import write_summary
from meerkat.settings.auto import AUTO
from meerkat.settings.config import RunConfig


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
    given, config = config, resolve(config, rows=federation.evaluate == "coordinator")
    listed = read_keys(federation.signers, "signers") if federation.signers else None
    if (out / "config.toml").is_file():
        folder = RunFolder.open(out)
        _check_same(given, config, folder)
        if not has_device(device := folder.config().device):
            cure = "start its coordinator on one that has it"
            raise MeerkatError(f"{out}: was begun on {device}, which this machine does not have; {cure}")
        problem = open_problem(folder.config())
    else:
        RunFolder.check_free(out)
        config.check_none_idle()
        problem = open_problem(config)
        folder = begin(config, out, problem)
    new_id, cure = secrets.token_hex(8), "start the coordinator again"
    with carry_on(folder, problem, federation=new_id, signed=federation.sign, cure=cure) as run:
        if run.opening.signed != federation.sign:
            _refuse_change(folder, f"sign = {str(run.opening.signed).lower()}, which sites have signed")
        run.members.listed = listed
        if run.closed and (summary := _outcome(folder)) is not None:
            say(f"{out}: the run is finished, after {number_of(run.state.round, 'round')}")
            return summary
        _revoke(run, federation.revoked)
        network = _coordinate(run, problem, federation, control)
        return write_summary(run, network=network)


_MAY_DIFFER = ("lr", "server_lr", "eps", "dtype", "dp_noise_multiplier", "device", "threads", "tokens_per_pass")
"""Settings that may be left open, which whoever begins a run fills in."""


def _outcome(folder: RunFolder) -> dict[str, Any] | None:
    """The summary of a closed run; None where it, or what it follows from, is missing or damaged, and is made again."""
    try:
        summary = folder.summary()
        if summary is None or not EvaluationMetric.of_run(folder):
            return None
        Summary.from_json(summary)
        return summary
    except (LookupError, ValueError):
        return None


def _check_same(given: RunConfig, config: RunConfig, folder: RunFolder) -> None:
    """Raise MeerkatError where a setting that is given, filled in in `config`, is not what the run began with."""
    # config.toml of an earlier version says what by-method stood for
    config, began = (each.model_copy(update={"early_stop": each.stopping}) for each in (config, folder.config()))
    left_open = {name for name in _MAY_DIFFER if getattr(given, name) == AUTO}
    for name, value in config.model_dump().items():
        if name not in ("density", "held_back", *left_open) and value != (then := getattr(began, name)):
            _refuse_change(folder, f"{name} {then!r}, not {value!r}")


def _refuse_change(folder: RunFolder, began: str) -> NoReturn:
    raise MeerkatError(
        f"run folder '{folder.root}': the run in it began with {began}; restore the setting, or give another run folder"
    )


def _revoke(run: Run, names: Iterable[str]) -> None:
    """Log that keys are revoked from now on, unless the log says so already or is closed."""
    signing = {fingerprint(key) for key in run.members.keys.values()}
    for name in () if run.closed else names:
        if name not in run.members.revoked:
            if signing and name not in signing:
                say(f"note: revoked {name}: no client of this run signs with it now; is it the right one?")
            run.log.append((revocation := KeyRevocation(run.state.round, name)).to_json())
            run.members.revoke(revocation)


def _coordinate(run: Run, problem: Problem, federation: FederationConfig, control: Control) -> dict[str, Any]:
    """Run the rounds that are left. Returns the network's part of the summary."""
    config, outcome = run.config, "the coordinator stopped"
    admission = Admission(run.members, config.clients, federation.sites, federation.rows_maximum)
    offer = Offer.of(config, run.mask, run.opening, federation.stream, federation.site_patience_s)
    run.folder.open_files()
    with closing(control), closing(control.link(admission)) as link:
        engine = RemoteEngine(
            link,
            admission,
            run.settings,
            federation,
            run.state,
            run.directions,
            problem.scores,
            run.folder.append_event,
        )
        control.open(admission, offer, engine.stop)
        _announce(run)
        try:
            evaluate: Evaluate = engine.evaluate
            if federation.evaluate == "coordinator":
                rows = problem.prepare(evenly(problem.rows("validation"), config.max_eval_samples))
                evaluate = evaluation_of(problem, run.model, problem.batch(rows, "evaluation"))
            run_rounds(run, engine, evaluate, attendance=engine)
            outcome = "the run is finished"
        finally:
            control.stop_inviting()
            engine.end(outcome)
    return engine.outcome()


def _announce(run: Run) -> None:
    """Say what is about to run."""
    config, mask = run.config, run.mask
    say(
        f"{run.folder.root}: federation {run.opening.federation}: {config.method}, {len(mask):,} of {mask.total:,} "
        f"parameters move, learning rate {rate_in_words(config)}; up to {number_of(config.clients, 'client')}, "
        f"{number_of(config.rounds, 'round')}"
    )
    if defence := defence_in_words(config):
        say(defence)
