"""The coordinator of a real federation: its federation.toml, and a run from beginning to end over a network.

It holds model, mask and run folder, and no row of the sites'. How nodes are reached and told of the run is the
`Control`'s business: Flower's, in practice.
"""

import os
import secrets
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meerkat.algorithm.rounds import RoundRecord
from meerkat.algorithm.server import ServerState
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.errors import MeerkatError
from meerkat.federation.admission import Door
from meerkat.federation.frames import LIMIT
from meerkat.federation.link import Link, Terms
from meerkat.federation.offer import Offer
from meerkat.federation.remote_engine import RemoteEngine
from meerkat.problems.problem import Problem
from meerkat.progress import number_of, say
from meerkat.record.members import KeyRevocation
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import RunLog
from meerkat.record.signatures import check_fingerprint, fingerprint, read_keys
from meerkat.run.mask import default_lr, make_mask, settled_mask, store_mask
from meerkat.run.sentences import defence_in_words
from meerkat.run.setup import open_problem, resolve
from meerkat.run.simulation import Evaluate, evaluation_of, opening_of, replay_log, run_rounds
from meerkat.run.summary import write_summary
from meerkat.run.trackers import tracking
from meerkat.settings import budget
from meerkat.settings.auto import AUTO, number_or
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

    def terms(self, clients: int) -> Terms:
        """How the engine waits."""
        return Terms(
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
            f"{file}: evaluate sites: counts on sites' rows are exact, which no noise covers; with dp {config.dp} use "
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

    def open(self, door: Door, offer: Offer, stop: Callable[[str], None]) -> None:
        """Begin to invite nodes, from a thread of its own; `stop` is called when the run is to end."""

    def link(self, door: Door) -> Link:
        """Where frames go."""

    def stop_inviting(self) -> None:
        """Invite nobody any more."""

    def close(self) -> None:
        """Wait until the nodes are free, if that is soon."""


def coordinate(config: RunConfig, federation: FederationConfig, out: Path, control: Control) -> dict[str, Any]:
    """Run a federation, or go on with one, in a run folder. Returns the summary.

    Raises:
        MeerkatError: the settings cannot be met, or are not those that the run began with.
        RunFailed: the run went wrong on the way; what was logged stays, and can be gone on with.
    """
    config = resolve(config, rows=federation.evaluate == "coordinator")
    listed = read_keys(federation.signers, "signers") if federation.signers else None
    going_on = (out / "config.toml").is_file()
    if not going_on:
        RunFolder.check_free(out)
        config.check_none_idle()
    problem = open_problem(config)
    if going_on:
        folder = RunFolder.open(out)
        config = _same(config, folder)
    else:
        mask = make_mask(config, problem)
        rate = number_or(config.lr, default_lr(config.method, len(mask)))
        config = budget.with_noise(config, ()).model_copy(update={"density": mask.density, "lr": rate})
        folder = RunFolder.create(out, config)
        store_mask(folder, mask, problem)
    log = RunLog(folder.log_path, "start the coordinator again")
    try:
        if log.dropped:
            say(f"note: {folder.log_path}: {log.dropped}; that record is dropped and its round is run again")
        return _coordinate(config, problem, federation, listed, folder, log, control)
    finally:
        log.close()


def _same(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The settings that a run began with, if those given now do not differ."""
    held = folder.config()
    left_to_us = {"density", *(name for name in ("lr", "dp_noise_multiplier") if getattr(config, name) == AUTO)}
    for name, value in config.model_dump().items():
        if name not in left_to_us and value != (then := getattr(held, name)):
            raise MeerkatError(
                f"run folder '{folder.root}': the run in it began with {name} {then!r}, not {value!r}; "
                "restore the setting, or give another run folder"
            )
    return held


def _coordinate(
    config: RunConfig,
    problem: Problem,
    federation: FederationConfig,
    listed: frozenset[str] | None,
    folder: RunFolder,
    log: RunLog,
    control: Control,
) -> dict[str, Any]:
    mask = settled_mask(folder, config, problem)
    model = MaskedModel(problem.model, mask)
    theta_0 = model.read()
    fresh = opening_of(folder, config, mask, theta_0, federation=secrets.token_hex(8), signed=federation.sign)
    replayed, z, opening, lost = replay_log(folder, log, fresh, config, mask, theta_0)
    if opening.signed != federation.sign:
        raise MeerkatError(
            f"run folder '{folder.root}': the run in it began with sign = {str(opening.signed).lower()}, which sites "
            "have signed; restore the setting, or give another run folder"
        )
    replayed.register.listed = listed
    signing = {fingerprint(key) for key in replayed.register.keys.values()}
    for name in () if replayed.closed else federation.revoked:
        if name not in replayed.register.revoked:
            if signing and name not in signing:
                say(f"note: revoked {name}: no client of this run signs with it now; is it the right one?")
            log.append((revocation := KeyRevocation(replayed.state.round, name)).to_json())
            replayed.register.revoke(revocation)
    terms = federation.terms(config.clients)
    door = Door(replayed.register, config.clients, replayed.nodes)
    offer = Offer.of(
        config,
        mask,
        opening.theta,
        opening.federation,
        federation.stream,
        federation.site_patience_s,
        federation.sign,
    )
    why = "the coordinator stopped"
    with closing(control), closing(control.link(door)) as link:
        engine = _Watched(
            folder, link, door, replayed.settings, terms, opening.federation, replayed.state, z, problem.scores
        )
        control.open(door, offer, engine.stop)
        many = f"{number_of(config.clients, 'client')}, {number_of(config.rounds, 'round')}"
        say(
            f"{folder.root}: federation {opening.federation}: {config.method}, {len(mask):,} of {mask.total:,} "
            f"parameters move, learning rate {config.lr:g}; up to {many}"
        )
        if defence := defence_in_words(config):
            say(defence)
        try:
            evaluate: Evaluate = engine.evaluate
            if federation.evaluate == "coordinator":
                rows = problem.prepare(problem.rows("validation"))
                evaluate = evaluation_of(problem, model, problem.batch(rows, "evaluation"))
            with tracking(config.tracker, folder.root, replayed.state.round) as follower:
                folder.on_metric(follower)
                try:
                    state = run_rounds(folder, log, replayed, z, config, mask, engine, evaluate, lost=lost)
                finally:
                    engine.settle()
            why = "the run is finished"
        finally:
            control.stop_inviting()
            engine.end(why)
    return write_summary(folder, config, mask, state, facts=engine.outcome())


class _Watched(RemoteEngine):
    """A remote engine that says every few seconds how the federation stands, and keeps its events."""

    def __init__(self, folder: RunFolder, *rest: Any) -> None:
        super().__init__(*rest)
        self._folder = folder
        self._said = 0.0

    def tell(self, event: str, text: str, **facts: Any) -> None:
        """See `RemoteEngine`."""
        super().tell(event, text, **facts)
        self._folder.append_event(event, round=self._trail.round, **facts)

    def closed(self, state: ServerState, record: RoundRecord) -> None:
        """See `experiment.Engine`."""
        super().closed(state, record)
        if (now := time.monotonic()) - self._said >= _STATUS_S:
            self._said = now
            say(self.status())
