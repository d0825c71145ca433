"""The coordinator of a real federation: its federation.toml, and a run from beginning to end over a network.

It holds model, mask and run folder, and no row of the sites'. How nodes are reached and told of the run is the
`Control`'s business: Flower's, in practice.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meerkat.algorithm.rounds import RoundRecord
from meerkat.algorithm.server import ServerState
from meerkat.errors import MeerkatError
from meerkat.federation.admission import Admission
from meerkat.federation.frames import LIMIT
from meerkat.federation.link import Link, WaitingRules
from meerkat.federation.offer import Offer
from meerkat.federation.remote_engine import RemoteEngine
from meerkat.problems.problem import Better, Problem
from meerkat.progress import number_of, say
from meerkat.record.members import KeyRevocation
from meerkat.record.run_folder import RunFolder
from meerkat.record.signatures import check_fingerprint, fingerprint, read_keys
from meerkat.run.loop import Evaluate, evaluation_of, run_rounds
from meerkat.run.run import Run, begin, carry_on
from meerkat.run.sentences import defence_in_words
from meerkat.run.setup import open_problem, resolve
from meerkat.run.summary import write_summary
from meerkat.run.trackers import tracking
from meerkat.settings.auto import AUTO
from meerkat.settings.config import SITES, RunConfig, make_config, read_toml

_STATUS_S = 10.0
"""Seconds between lines on how the federation stands."""


class FederationConfig(BaseModel):
    """Table [federation] of federation.toml: how nodes are reached, and how long they are waited for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: str = Field(
        "", description="host:port of the session stream, as sites reach it; empty to send frames as Flower messages"
    )
    listen: str = Field("", description="host:port to listen on [default: the stream's own]")
    certificate: str = Field("", description="the coordinator's certificate, PEM; its host is the stream's")
    private_key: str = Field("", description="the certificate's key, PEM")
    clients_minimum: int = Field(1, ge=1, description="clients that must be here for a round to open")
    clients_wanted: int = Field(0, ge=0, description="clients that the first round waits for; 0 for all")
    start_s: float = Field(300.0, ge=0, description="seconds that they are waited for")
    quorum: int = Field(1, ge=1, description="replies that a round needs to close without the others")
    deadline_s: float = Field(60.0, gt=0, description="seconds after which a round closes without the slow")
    patience_s: float = Field(600.0, gt=0, description="seconds that too few clients are waited for")
    site_patience_s: float = Field(
        30.0, gt=0, description="seconds for which a site tries to come back before it is free for another run"
    )
    sign: bool = Field(False, description="whether every reply must be signed: sites without a key are refused")
    signers: str = Field("", description="file of the sites' public keys, a line each: no other may sign")
    revoked: tuple[str, ...] = Field((), description="keys that are not taken any more: fingerprints or .pub files")
    evaluate: Literal["coordinator", "sites"] = Field(
        "coordinator", description="who judges: the coordinator on its own rows, or the sites that agree on theirs"
    )

    def waiting_rules(self, clients: int) -> WaitingRules:
        """How the engine waits."""
        return WaitingRules(
            clients_minimum=self.clients_minimum,
            clients_wanted=self.clients_wanted or clients,
            start_s=self.start_s,
            quorum=self.quorum,
            deadline_s=self.deadline_s,
            patience_s=self.patience_s,
        )


def read_federation(file: Path) -> tuple[RunConfig, FederationConfig]:
    """The settings in a federation.toml: table [run] as `meerkat simulate` has them, and table [federation].

    Raises:
        MeerkatError: no such file, an unknown key, or a value that is not allowed.
    """
    held = read_toml(file)
    if unknown := sorted(held.keys() - {"run", "federation"}):
        raise MeerkatError(f"{file}: table [{unknown[0]}] is unknown; there are [run] and [federation]")
    tables = {name: held.get(name, {}) for name in ("run", "federation")}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise MeerkatError(f"{file}: {name} {table!r}: must be a table, [{name}] with lines below it")
    run = {**tables["run"], "partition": SITES}
    for name in ("model", "data", "text", "mask", "task"):
        run[name] = _beside(file, run[name]) if isinstance(run.get(name), str) else run.get(name, "")
    run = {name: value for name, value in run.items() if value != ""}
    config = make_config(run, spell=f"{file}: [run] ")
    try:
        federation = FederationConfig(**tables["federation"])
    except ValidationError as error:
        first = error.errors()[0]
        name, allowed = ".".join(map(str, first["loc"])), ", ".join(FederationConfig.model_fields)
        said = f"unknown; must be one of {allowed}" if first["type"] == "extra_forbidden" else first["msg"]
        raise MeerkatError(f"{file}: [federation] {name}: {said}") from None
    paths = {name: _beside(file, getattr(federation, name)) for name in ("certificate", "private_key", "signers")}
    revoked = tuple(name for entry in federation.revoked for name in _revoked_in(file, entry))
    federation = federation.model_copy(update={**paths, "revoked": revoked})
    _check(file, config, federation)
    return config, federation


def host_and_port(text: str, name: str) -> tuple[str, int]:
    """An address such as coordinator.example.org:9001, taken apart; `name` stands in the message.

    Raises:
        MeerkatError: it is none.
    """
    host, _, port = text.rpartition(":")
    if not host or "/" in host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise MeerkatError(f"{name} '{text}': must be host:port, such as coordinator.example.org:9001")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _beside(file: Path, value: str) -> str:
    beside = file.parent / value
    return str(beside.resolve()) if value and os.path.exists(beside) else value  # a name too long is none


def _revoked_in(file: Path, entry: str) -> list[str]:
    """The fingerprints that an entry of `revoked` stands for: its own, or those of a file of public keys."""
    where, path = f"{file}: revoked", _beside(file, entry)
    return sorted(read_keys(path, where)) if os.path.isfile(path) else [check_fingerprint(entry, where)]


def _check(file: Path, config: RunConfig, federation: FederationConfig) -> None:
    if config.recipe.update == "first-order":
        raise MeerkatError(f"{file}: method {config.method}: sends 4n bytes a round; a federation takes scalar methods")
    if config.recipe.moves == "task":
        raise MeerkatError(f"{file}: method {config.method}: needs the sites' rows in one place; use meerkat")
    if config.dp != "none" and federation.evaluate == "sites":
        raise MeerkatError(
            f"{file}: evaluate sites: scores on sites' rows are exact, which no noise covers; with dp {config.dp} use "
            "evaluate coordinator"
        )
    if federation.stream and not (federation.certificate and federation.private_key):
        raise MeerkatError(
            f"{file}: stream {federation.stream}: needs certificate and private_key; see 'meerkat certify'"
        )
    if federation.sign and config.dp == "client":
        raise MeerkatError(
            f"{file}: sign: dp client keeps no replies that signatures could be of; leave one of the two out"
        )
    if federation.signers and not federation.sign:
        raise MeerkatError(f"{file}: signers: says whose replies are taken where sign = true; give that too")
    for name in ("stream", "listen"):
        if value := getattr(federation, name):
            host_and_port(value, f"{file}: {name}")
    for name in ("clients_minimum", "clients_wanted", "quorum"):
        if (value := getattr(federation, name)) > config.clients:
            raise MeerkatError(f"{file}: {name} {value}: must be at most [run] clients, {config.clients}")
    scalars = config.directions * max(config.local_steps, config.calibration_steps)
    if 4 * scalars > LIMIT // 2:
        raise MeerkatError(
            f"{file}: {scalars:,} scalars a round: at most {LIMIT // 8:,} fit a frame; use fewer local_steps"
        )


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
        return write_summary(folder, run.config, run.mask, run.state, facts=facts)


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
            with tracking(config.tracker, run.folder.root, run.state.round) as tracker:
                run.folder.on_metric(tracker)
                try:
                    run_rounds(run, engine, evaluate, attendance=engine)
                finally:
                    engine.run_deferred()
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
