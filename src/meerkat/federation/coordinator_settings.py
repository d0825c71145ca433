"""A coordinator's settings: its federation.toml."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from meerkat.errors import MeerkatError
from meerkat.federation.address import host_and_port
from meerkat.federation.admission import ROWS_MAXIMUM, Binding
from meerkat.federation.frames import LIMIT
from meerkat.federation.offer import LONGEST_PATIENCE_S
from meerkat.record.signatures import check_fingerprint, read_keys
from meerkat.settings.config import SITES, RunConfig, make_config, read_toml
from meerkat.settings.validation import Settings, existing_path, validate


class FederationConfig(Settings):
    """Table [federation] of federation.toml: how sites reach the coordinator, and how long it waits for them."""

    stream: str = Field("", description="host:port of the session stream, as sites reach it; empty: Flower messages")
    listen: str = Field("", description="host:port to listen on [default: the stream's own]")
    certificate: str = Field("", description="the coordinator's certificate, PEM; its host is the stream's")
    private_key: str = Field("", description="the certificate's key, PEM")
    clients_minimum: int = Field(1, ge=1, description="clients that must be connected for a round to open")
    clients_wanted: int = Field(0, ge=0, description="clients that the first round waits for; 0 for all")
    start_s: float = Field(300.0, ge=0, description="seconds that it waits for them")
    quorum: int = Field(1, ge=1, description="replies with which a round may close without the others")
    deadline_s: float = Field(
        60.0,
        gt=0,
        description="seconds after which a round closes without slower clients; more for a calibration's more steps",
    )
    patience_s: float = Field(600.0, gt=0, description="seconds that it waits for more where too few clients are left")
    site_patience_s: float = Field(
        30.0, gt=0, le=LONGEST_PATIENCE_S, description="seconds for which a site tries to reconnect"
    )
    sign: bool = Field(False, description="whether every reply must be signed; sites without a key are then refused")
    signers: str = Field("", description="file of the sites' public keys, one a line; no other key may sign")
    revoked: tuple[str, ...] = Field((), description="keys that are no longer accepted: fingerprints or .pub files")
    rows_maximum: int = Field(ROWS_MAXIMUM, ge=1, description="most rows that a site may claim: they are its weight")
    sites: tuple[Binding, ...] = Field((), description="the only clients, with node, key and rows; empty for any")
    evaluate: Literal["coordinator", "sites"] = Field("coordinator", description="who evaluates, each on its own rows")
    extensions: tuple[str, ...] = Field((), description="extensions that the run needs: modules, or .py files")


def read_federation(file: Path) -> tuple[RunConfig, FederationConfig]:
    """The settings in a federation.toml: table [run] as `meerkat simulate` has them, and table [federation].

    Raises:
        MeerkatError: no such file, an unknown key, or a value that is not allowed.
    """
    content = read_toml(file)
    if unknown := sorted(content.keys() - {"run", "federation"}):
        raise MeerkatError(f"{file}: table [{unknown[0]}] is unknown; there are [run] and [federation]")
    tables = {name: content.get(name, {}) for name in ("run", "federation")}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise MeerkatError(f"{file}: {name} {table!r}: must be a table, [{name}] with lines below it")
    if (given := tables["run"].get("partition", SITES)) != SITES:
        raise MeerkatError(f"{file}: [run] partition {given!r}: rows stay at the sites; leave it out")
    run = {**tables["run"], "partition": SITES}
    for name in ("model", "data", "text", "mask", "task"):
        run[name] = existing_path(file, run[name]) if isinstance(run.get(name), str) else run.get(name, "")
    run = {name: value for name, value in run.items() if value != ""}
    config = make_config(run, where=f"{file}: [run] ")
    federation = validate(FederationConfig, tables["federation"], f"{file}: [federation] ")
    names = ("certificate", "private_key", "signers")
    paths: dict[str, Any] = {name: existing_path(file, getattr(federation, name)) for name in names}
    paths["revoked"] = tuple(name for entry in federation.revoked for name in _keys_in(file, entry, "revoked"))
    paths["sites"] = tuple(_with_fingerprint(file, binding) for binding in federation.sites)
    paths["extensions"] = tuple(existing_path(file, name) for name in federation.extensions)
    federation = federation.model_copy(update=paths)
    for message in _conflicts(config, federation):
        raise MeerkatError(f"{file}: {message}")
    for name in ("stream", "listen"):
        if address := getattr(federation, name):
            host_and_port(address, f"{file}: {name}")
    return config, federation


def most_scalars(config: RunConfig) -> int:
    """Scalars of a client's reply, at most."""
    calibrates = config.stopping != "none" and config.local_steps > 1
    return config.directions * max(config.local_steps, config.calibration_steps if calibrates else 0)


def _keys_in(file: Path, entry: str, setting: str) -> list[str]:
    """The fingerprints that an entry of a setting stands for: its own, or those of a file of public keys."""
    where, path = f"{file}: {setting}", existing_path(file, entry)
    return sorted(read_keys(path, where)) if os.path.isfile(path) else [check_fingerprint(entry, where)]


def _with_fingerprint(file: Path, binding: Binding) -> Binding:
    """A binding whose key is a fingerprint, whatever the file gives."""
    if not binding.key:
        return binding
    if len(names := _keys_in(file, binding.key, "sites: key")) != 1:
        raise MeerkatError(f"{file}: sites: key '{binding.key}': has {len(names)} keys; give a file with one")
    return binding.model_copy(update={"key": names[0]})


def _conflicts(config: RunConfig, federation: FederationConfig) -> Iterator[str]:
    """What cannot be together, a line each."""
    if not config.recipe.sends_scalars:
        yield f"method {config.method}: sends 4n bytes a round; a federation takes scalar methods"
    if config.recipe.moves == "task":
        yield f"method {config.method}: needs the sites' rows in one place; use meerkat"
    if config.held_back:
        yield f"[run] held_back {config.held_back:g}: a federation evaluates on validation rows; leave it out"
    if config.dp != "none" and federation.evaluate == "sites":
        scores = "scores on sites' rows are exact, which no noise covers"
        yield f"evaluate sites: {scores}; with dp {config.dp} use evaluate coordinator"
    if federation.stream and not (federation.certificate and federation.private_key):
        yield f"stream {federation.stream}: needs certificate and private_key; see 'meerkat certify'"
    if federation.sign and config.dp == "client":
        yield "sign: dp client keeps no replies, so there is nothing to sign; leave one of the two out"
    if federation.signers and not federation.sign:
        yield "signers: has an effect only with sign = true; give that too"
    yield from _binding_conflicts(config, federation)
    for name in ("clients_minimum", "clients_wanted", "quorum"):
        if (count := getattr(federation, name)) > config.clients:
            yield f"{name} {count}: must be at most [run] clients, {config.clients}"
    if 4 * (scalars := most_scalars(config)) > LIMIT // 2:
        yield (
            f"{scalars:,} scalars a round: at most {LIMIT // 8:,} fit a frame; "
            "use fewer directions, local_steps or calibration_steps"
        )


def _binding_conflicts(config: RunConfig, federation: FederationConfig) -> Iterator[str]:
    """What is wrong with [[federation.sites]], a line each."""
    for name in ("client", "node", "key"):
        given = [value for binding in federation.sites if (value := getattr(binding, name)) != ""]
        for value in {value for value in given if given.count(value) > 1}:
            cure = "give each site one entry, with a client, node and key of its own"
            yield f"sites: {name} {value} is there twice; {cure}"
    listed = read_keys(federation.signers, "signers") if federation.signers else None
    for binding in federation.sites:
        if binding.client >= config.clients:
            yield f"sites: client {binding.client}: must be below [run] clients, {config.clients}"
        if binding.key and listed is not None and binding.key not in listed:
            yield f"sites: key {binding.key} is not in signers; add it there, or leave signers out"
