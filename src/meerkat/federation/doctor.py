"""`meerkat doctor`: finds what is wrong with a site or a coordinator before a run does.

A check is a function that yields results, one line each. No check stops another; an exception becomes a failed check.
Hub names are looked up in the local cache only: nothing leaves this machine but the handshake for `--connect`.
"""

import errno
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from cryptography import x509
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from packaging.requirements import Requirement
from transformers.utils import logging

from meerkat import demo
from meerkat.errors import MeerkatError, RunFailed
from meerkat.federation import certificates
from meerkat.federation.address import host_and_port
from meerkat.federation.coordinator_settings import FederationConfig, read_federation
from meerkat.federation.ledger import Ledger
from meerkat.federation.private_rows import read_alone
from meerkat.federation.site_settings import Accepts, SiteConfig
from meerkat.masks import sparse_mask
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.data import load_rows, read_texts
from meerkat.problems.models import find_model, load_model
from meerkat.problems.tasks import Task, check_rows
from meerkat.progress import number_of
from meerkat.record.signatures import fingerprint, read_keys
from meerkat.run.setup import load_split, open_task, resolve
from meerkat.settings.config import CLASSIFICATION, EMBEDDED, RunConfig, read_toml

_TIMEOUT_S = 5.0
_UNFIT_SHOWN = 10
"""Rows that cannot be used, of which a line each is shown, at most."""
_DEQUANTISED = 8
"""Bytes of float32 weights for each byte of a GGUF file of the usual four bits a weight."""
_CERTIFICATE_CURES = {
    9: "it is not valid yet: check the clocks",
    10: "it has expired: make new ones with 'meerkat certify', or check the clock",
    18: "it is self-signed: is this the coordinator?",
    19: "another authority signed it: get the coordinator's ca.crt",
    20: "another authority signed it: get the coordinator's ca.crt",
    62: "use a name that it has, or one with this name from 'meerkat certify --host'",
    64: "use an address that it has, or one with this address from 'meerkat certify --host'",
}
"""What to do about a certificate, by OpenSSL's error number."""


@dataclass(frozen=True)
class CheckResult:
    """One line of the outcome."""

    level: Literal["ok", "warn", "FAIL"]
    """FAIL: a run would fail. warn: it may fail, or will later."""
    check: str
    found: str
    cure: str = ""
    """What to do; empty if there is nothing to do, or if `found` says it."""

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.check:<12}  {self.found}" + (f"; {self.cure}" if self.cure else "")


ok, warn, fail = partial(CheckResult, "ok"), partial(CheckResult, "warn"), partial(CheckResult, "FAIL")
Results = Iterator[CheckResult]


def examine(file: Path, connect: str = "") -> dict[str, Any]:
    """Check the machine of a site.toml or a federation.toml.

    Args:
        connect: host:port of the coordinator, to try a TLS handshake with; for a site only.

    Returns:
        `file`, `kind` (site or coordinator), and `checks`, a list of results as dictionaries.

    Raises:
        MeerkatError: the file cannot be read or is neither, or `connect` is not an address.
    """
    tables = read_toml(file)
    kind = "coordinator" if tables.keys() & {"run", "federation"} else "site"
    if kind == "site" and not tables.keys() & SiteConfig.model_fields.keys():
        raise MeerkatError(f"'{file}': neither a site.toml (client, data) nor a federation.toml ([run], [federation])")
    if connect and kind == "coordinator":
        raise MeerkatError("--connect: is for a site, to reach its coordinator; leave it out with a federation.toml")
    address = host_and_port(connect, "--connect") if connect else None
    checks = {"versions": versions(), "programs": programs(), "disk": resources(file.absolute().parent)}
    try:
        checks |= _coordinator_checks(file) if kind == "coordinator" else _site_checks(file, address)
    except MeerkatError as error:
        wrong = fail("settings", str(error)), warn("the rest", "was not checked", "correct the settings first")
        checks["settings"] = iter(wrong)
    results = [asdict(result) for name, check in checks.items() for result in _results(name, check)]
    return {"file": str(file), "kind": kind, "checks": results}


def in_lines(outcome: Mapping[str, Any]) -> list[str]:
    """An outcome for a person, one line a result."""
    return [str(CheckResult(**result)) for result in outcome["checks"]]


def raise_if_failed(outcome: Mapping[str, Any]) -> None:
    """Raise RunFailed if any check failed."""
    levels = [result["level"] for result in outcome["checks"]]
    if failed := levels.count("FAIL"):
        raise RunFailed(f"{failed} of {len(levels)} checks failed")


def _results(name: str, check: Results) -> Results:
    try:
        yield from check
    except MeerkatError as error:
        yield fail(name, str(error))
    except Exception as error:  # a check that breaks must not hide the others' results
        yield fail(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _site_checks(file: Path, address: tuple[str, int] | None) -> dict[str, Results]:
    site = SiteConfig.load(file)
    return {
        "settings": iter([ok("settings", f"a site's: client {site.client}; accepts {_bounds(site.accepts)}")]),
        "model": model(site.model, site.device, site.accepts.model),
        "task": site_task(site),
        "data": site_rows(site),
        "ledger": site_ledger(Path(site.ledger)),
        "coordinator": site_coordinator(site.coordinator),
        "authority": site_authority(site.certificate_authority),
        "signing_key": site_keys(site),
        "connection": connection(address, site.certificate_authority) if address else iter(()),
    }


def _bounds(accepts: Accepts) -> str:
    """Those that are not the defaults."""
    bounds = {name: value for name, value in accepts if value != Accepts.model_fields[name].default}
    return ", ".join(f"{name} = {json.dumps(value)}" for name, value in bounds.items()) or "any run within the defaults"


def _coordinator_checks(file: Path) -> dict[str, Results]:
    given, federation = read_federation(file)
    config = resolve(given, rows=federation.evaluate == "coordinator")
    checks = {
        "settings": coordinator_settings(config),
        "model": model(config.model, config.device, mask=config.mask),
        "data": coordinator_rows(config, federation),
        "signers": coordinator_signers(federation),
        "sites": coordinator_sites(config, federation),
    }
    if federation.stream:
        checks |= {"certificate": coordinator_certificate(federation), "port": port(federation)}
    return checks


# --- the machine ---


def versions() -> Results:
    """Python and the packages that this release requires, by its own metadata."""
    about = importlib.metadata.metadata("meerkat-fl")
    for line in (f"python{about['Requires-Python']}", *(importlib.metadata.requires("meerkat-fl") or ())):
        name, allowed = Requirement(line).name, Requirement(line).specifier
        if name not in ("python", "torch", "transformers", "flwr"):
            continue
        try:
            installed = platform.python_version() if name == "python" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield fail(name, "is not installed", "pip install 'meerkat-fl[flower]'")
            continue
        message = f"{installed}; meerkat {about['Version']} is made for {allowed}"
        fits = allowed.contains(installed, prereleases=True)
        yield ok(name, message) if fits else fail(name, message, "install a version that fits")


def programs() -> Results:
    """The programs that Flower starts by name."""
    missing = [name for name in ("flower-superexec", "flwr-serverapp", "flwr-clientapp") if not shutil.which(name)]
    lacking = warn("programs", f"not on PATH: {', '.join(missing)}", "put this environment's bin folder on PATH")
    yield lacking if missing else ok("programs", "Flower's are on PATH")


def resources(folder: Path) -> Results:
    """The CPUs, and free space beside the file and in the hub's cache. The run says how many threads to use."""
    yield ok("threads", f"{os.cpu_count()} CPUs; the coordinator says how many threads to use of them")
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    for name, path in (("disk", folder), ("hub cache", cache)):
        free = shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free
        message = f"{_size(free)} free at {path}"
        yield ok(name, message) if free > 1e9 else warn(name, message, "free some space: a full disk ends a run")


def _available() -> int:
    """Bytes of memory available to a program, as Linux reports it; elsewhere half of the machine's memory."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


# --- settings, model and rows ---


def coordinator_settings(config: RunConfig) -> Results:
    """The coordinator's settings, and those that have no effect."""
    size = f"{number_of(config.clients, 'client')}, {number_of(config.rounds, 'round')}"
    yield ok("settings", f"a coordinator's: {config.method} on {config.task}, {size}; threads: {config.threads}")
    if config.problem == CLASSIFICATION:
        yield ok("task", _task_in_words(open_task(config.task)))
    for line in config.idle().values():
        yield warn("settings", line, "a new run is refused with it")


def model(name: str, device: str, pinned: str = "", mask: str = "") -> Results:
    """That the model fits into memory, loads, and has the pinned fingerprint; that a mask fits it."""
    named = str(demo.MODEL) if name == EMBEDDED else name
    source = find_model(named)
    patterns = (source.gguf_file,) if source.gguf_file else ("*.safetensors", "*.bin")
    weights = sum(file.stat().st_size for pattern in patterns for file in Path(source.place).glob(pattern))
    weights *= _DEQUANTISED if source.gguf_file else 1
    message = f"{_size(weights)} of weights, {_size(free := _available())} free"
    if weights > free:
        yield fail("memory", message, "use a larger machine; the model was not loaded")
        return
    if Path(named).exists():
        yield ok("memory", message)
    elif _is_hub_name(name):
        try:
            named = snapshot_download(name, local_files_only=True)
        except LocalEntryNotFoundError:
            missing = f"'{name}': not a folder, and not in the hub's cache"
            yield warn("model", missing, "a run would download it, if the hub has it")
            return
    logging.disable_progress_bar()
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    loaded, _ = load_model(named, place)
    actual, size = sparse_mask.fingerprint(loaded), sum(parameter.numel() for parameter in loaded.parameters())
    yield ok("model", f"{name}: {size:,} parameters on {place}, fingerprint {actual}")
    if pinned and actual != pinned:
        yield fail("model", f"its fingerprint is not accepts.model, {pinned}", "use the model that was agreed on")
    if mask:
        entries = SparseMask.load(Path(mask))
        entries.check_fits(loaded)
        yield ok("mask", f"{len(entries):,} of {entries.total:,} parameters, SHA-256 {entries.digest()}")


def site_rows(site: SiteConfig) -> Results:
    """The site's own rows, and whether they fit the task if [accepts] names one that is known here."""
    if not Path(site.data).is_dir():
        raise MeerkatError(f"data '{site.data}': no such folder; give the folder with the site's train.jsonl")
    task = site.known_task()
    if site.accepts.epsilon:
        yield from private_site_rows(site, task)
        return
    for split in ("train", "validation") if site.evaluate else ("train",):
        rows = load_rows(site.data, split)
        if task is not None:
            check_rows(task, rows, f"data '{site.data}', {split}")
        fits = f"that fit task {task.name}" if task else f"with {', '.join(sorted(rows[0]))}"
        yield ok("data", f"{split}: {len(rows)} rows {fits}")


def site_ledger(path: Path) -> Results:
    """Whether the site can keep what it answers, and what it has kept."""
    if not path.exists():
        if os.access(path.parent, os.W_OK):
            yield ok("ledger", f"{path}: will be made by the first run")
        else:
            cure = "give 'ledger' in site.toml a file in a folder that the site can write to"
            yield fail("ledger", f"{path}: cannot be written", cure)
        return
    try:
        with closing(Ledger(path)) as ledger:
            yield ok("ledger", f"{path}: {number_of(ledger.runs, 'run')}, {number_of(ledger.scalars, 'scalar')} sent")
    except RunFailed as error:
        if "another process" not in str(error):
            raise
        yield ok("ledger", f"{path}: in use by a session")


def private_site_rows(site: SiteConfig, task: Task | None) -> Results:
    """The rows of a site with a privacy budget: those that cannot be used are in no run's way, and of no use."""
    rows = read_alone(Path(site.data), task)
    unfit = [row for row in rows if isinstance(row, MeerkatError)]
    yield ok("data", f"train: {len(rows)} rows, {len(rows) - len(unfit)} that fit {task.name if task else 'any task'}")
    for error in unfit[:_UNFIT_SHOWN]:
        yield warn("data", str(error), "until it is corrected, the row is counted, with slopes of zero")


def site_task(site: SiteConfig) -> Results:
    """The task that the site pins, in the words that its rows are shown in."""
    if (task := site.known_task()) is None:
        if site.accepts.epsilon and not site.accepts.task_digest:
            message = "none pinned: with an epsilon, only runs of built-in tasks"
            yield warn("task", message, "for another, give accepts.task the task's file, or accepts.task_digest")
        return
    yield ok("task", _task_in_words(task))
    if site.accepts.task_digest not in ("", task.digest()):
        pinned = site.accepts.task_digest
        yield fail(
            "task", f"its digest is not accepts.task_digest, {pinned}", "ask the coordinator for the task's file"
        )


def _task_in_words(task: Task) -> str:
    return f"{task.name}, SHA-256 {task.digest()}"


def coordinator_rows(config: RunConfig, federation: FederationConfig) -> Results:
    """What the coordinator itself reads: text to make the mask from, and rows to evaluate on."""
    if hub := [name for name in (config.text, config.data) if _is_hub_name(name)]:
        yield warn("data", f"hub names were not looked up: {', '.join(hub)}", "if folders are meant, check the paths")
    if config.text and config.text not in hub:
        if next(read_texts(config.text), None) is None:
            raise MeerkatError(
                f"text '{config.text}': no text in it; give a .jsonl file with 'text' fields, or plain text"
            )
        yield ok("text", f"{config.text} can be read")
    if federation.evaluate == "sites":
        yield ok("data", "none needed here: sites evaluate on their own rows")
    elif config.data not in hub:
        yield ok("data", f"validation: {len(load_split(config, 'validation'))} rows")


def _is_hub_name(name: str) -> bool:
    """Whether a model or data set of this name would be looked up on the hub."""
    return bool(name) and not (Path(name).exists() or Path(name).is_absolute() or name.startswith("."))


# --- keys and certificates ---


def site_keys(site: SiteConfig) -> Results:
    """The site's signing key, and the previous one."""
    for name, key in zip(("signing_key", "signing_key_before"), site.signing_keys(), strict=True):
        if key is not None:
            yield ok(name, f"Ed25519, {fingerprint(key.public)}")
            yield from _readable_by_others(name, getattr(site, name))
    if not site.signing_key:
        yield ok("signing_key", "none: replies are not signed")


def site_coordinator(address: str) -> Results:
    """Where the site finds the stream."""
    if address:
        yield ok("coordinator", f"the stream is at {address}")
    else:
        message = "none: the site can only join runs without a stream"
        yield warn("coordinator", message, "give host:port of the coordinator's stream")


def coordinator_signers(federation: FederationConfig) -> Results:
    """Whose signatures the coordinator accepts."""
    if federation.signers:
        listed = read_keys(federation.signers, "signers")
        yield ok("signers", f"{number_of(len(listed), 'key')} may sign")
        if revoked := sorted(listed.intersection(federation.revoked)):
            yield warn("signers", f"{revoked[0]} is listed, and revoked", "remove it from the list")
    elif federation.sign:
        message = "none listed: the first key that a client shows becomes its key"
        yield warn("signers", message, "list the sites' .pub files, or compare fingerprints afterwards")
    else:
        yield ok("signers", "sign = false: sites without a key do not sign")


def coordinator_sites(config: RunConfig, federation: FederationConfig) -> Results:
    """Which node and key is which client."""
    bound = [binding for binding in federation.sites if binding.node or binding.key]
    places = len(federation.sites) or config.clients
    message = f"{len(bound)} of {number_of(places, 'client')} bound to a node or key"
    if len(bound) == places:
        yield ok("sites", message)
    else:
        yield warn("sites", f"{message}: the first node that claims another has it", "see [[federation.sites]]")


def site_authority(path: str) -> Results:
    """The federation's CA certificate, as the site has it."""
    if not path:
        yield warn("authority", "no certificate_authority: the site can only join runs without a stream", "give ca.crt")
        return
    certificate = certificates.read_certificate(Path(path))
    yield _validity("authority", certificate)
    if not certificates.is_authority(certificate):
        yield fail("authority", f"'{path}' is not an authority's certificate", "give ca.crt, not server.crt")


def coordinator_certificate(federation: FederationConfig) -> Results:
    """The stream's certificate: validity, names, signature and private key."""
    certificate = certificates.read_certificate(Path(federation.certificate))
    yield _validity("certificate", certificate)
    host, _ = host_and_port(federation.stream, "stream")
    message = f"{host}; the certificate is for {', '.join(names := certificates.names_of(certificate))}"
    yield ok("stream", message) if host in names else fail("stream", message, f"meerkat certify --host {host} ...")
    authority = Path(federation.certificate).with_name("ca.crt")
    if not authority.is_file():
        yield warn("authority", f"no {authority}: the certificate's signature was not checked", "sites need it too")
    elif certificates.is_signed_by(certificate, certificates.read_certificate(authority)):
        yield ok("authority", f"{authority} signed the certificate")
    else:
        yield fail("authority", f"{authority} did not sign the certificate", "use files of one 'meerkat certify'")
    key = federation.private_key
    wrong = fail("private_key", f"'{key}' does not belong to the certificate", "use the certificate's own key")
    yield ok("private_key", "belongs to the certificate") if certificates.is_pair(certificate, Path(key)) else wrong
    yield from _readable_by_others("private_key", key)


def _validity(check: str, certificate: x509.Certificate) -> CheckResult:
    now, begin, end = datetime.now(UTC), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    first, last, clock = (f"{time:%Y-%m-%d %H:%M}" for time in (begin, end, now))
    message = f"valid from {first} to {last} UTC; this machine's clock: {clock}"
    if not begin <= now <= end:
        return fail(check, message, "set the clock, or make new certificates with 'meerkat certify'")
    if end - now < timedelta(days=30):
        return warn(check, message, "it expires within 30 days: make new certificates with 'meerkat certify'")
    return ok(check, message)


def _readable_by_others(check: str, key: str) -> Results:
    if Path(key).stat().st_mode & 0o077:
        yield warn(check, f"other users can read '{key}'", f"chmod 600 {key}")


# --- the network ---


def port(federation: FederationConfig) -> Results:
    """Whether the coordinator can listen on the stream's port."""
    listen = federation.listen or federation.stream
    host, number = host_and_port(listen, "listen")
    try:
        with socket.create_server((host, number), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            yield ok("port", f"{listen} is free")
    except OSError as error:
        cure = f'give an address of this machine to listen on, such as listen = "0.0.0.0:{number}"'
        if error.errno == errno.EADDRINUSE:
            cure = "end the run or program that uses it, or give another port"
        yield fail("port", f"cannot listen on {listen}: {error.strerror}", cure)


def connection(address: tuple[str, int], authority: str) -> Results:
    """A TLS handshake with the coordinator under the site's CA, step by step; nothing else is sent to it."""
    host, number = address
    if proxies := sorted(n for n in os.environ if n.lower() in ("https_proxy", "http_proxy", "grpc_proxy")):
        message = f"{', '.join(proxies)} is set: a run may use that proxy, this check does not"
        yield warn("proxy", message, f"put {host} into no_proxy if the proxy is not for it")
    try:
        yield ok("name", f"{host} is {socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][4][0]}")
    except OSError as error:
        yield fail("name", f"'{host}': {error.strerror}", "check the spelling, and this machine's DNS")
        return
    try:
        socket.create_connection(address, _TIMEOUT_S).close()
    except OSError as error:
        cure = "is a firewall in the way?"
        if isinstance(error, ConnectionRefusedError):
            cure = "is the SuperLink up? The stream's port is open during a run only"
        yield fail("port", f"{number} of {host}: {error.strerror or error}", cure)
        return
    yield ok("port", f"{number} of {host} is open")
    try:
        certificate = _handshake(address, ssl.create_default_context(cafile=authority or None))
        yield ok("handshake", "the certificate is signed by the site's authority and names this host")
    except OSError as error:
        why = (getattr(error, "verify_message", "") or error.strerror or str(error)).rstrip(".")
        cure = _CERTIFICATE_CURES.get(getattr(error, "verify_code", 0), "is a TLS server there?")
        yield fail("handshake", why, cure)
        unverified = ssl.create_default_context()
        unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
        certificate = _handshake(address, unverified)
    yield _validity("clock", x509.load_der_x509_certificate(certificate))


def _handshake(address: tuple[str, int], context: ssl.SSLContext) -> bytes:
    """The certificate that the server shows, DER."""
    context.set_alpn_protocols(["h2", "http/1.1"])  # gRPC requires the first
    with (
        socket.create_connection(address, _TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=address[0]) as secure,
    ):
        return secure.getpeercert(binary_form=True) or b""
