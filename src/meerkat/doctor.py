"""`meerkat doctor`: what is wrong with a site or a coordinator, before a run finds out.

A check is a function that gives findings, one line each. None stops another, and whatever one raises is a finding
too. Nothing leaves this machine but the TLS handshake that `--connect` asks for: hub names are looked up in the
cache alone.
"""

import errno
import importlib.metadata
import os
import platform
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import Requirement

from meerkat import demo
from meerkat.agreement import SiteConfig
from meerkat.config import EMBEDDED, RunConfig, read_toml
from meerkat.coordinator import FederationConfig, read_federation
from meerkat.data import load_rows, read_texts
from meerkat.errors import MeerkatError, RunFailed
from meerkat.mask import SparseMask, fingerprint
from meerkat.models import load_model
from meerkat.tasks import TASKS, check_rows, load_task
from meerkat.workplace import load_split, open_task, resolve

_SOON = timedelta(days=30)
_ROOM = 1 << 30
"""Free bytes of a disk under which it is worth a word."""
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Finding:
    """One line of the outcome."""

    level: Literal["ok", "warn", "FAIL"]
    check: str
    found: str
    cure: str = ""
    """What to do; empty where nothing is, or where `found` says it."""

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.check:<12}  {self.found}" + (f"; {self.cure}" if self.cure else "")


Findings = Iterator[Finding]
_REST = Finding("warn", "the rest", "model, data and certificate were not looked at", "mend the settings first")


def examine(file: Path, connect: str = "") -> dict[str, Any]:
    """Check the machine of a site.toml or a federation.toml.

    Args:
        connect: host:port of the coordinator, to try a TLS handshake with; a site's alone.

    Returns:
        `file`, `kind` (site or coordinator), and `checks`, a list of findings as dictionaries.

    Raises:
        MeerkatError: the file cannot be read or is neither, or `connect` is no address.
    """
    held = read_toml(file)
    coordinator = bool(held.keys() & {"run", "federation"})
    if not coordinator and not held.keys() & SiteConfig.model_fields.keys():
        raise MeerkatError(f"'{file}': neither a site.toml (client, data) nor a federation.toml ([run], [federation])")
    if connect and coordinator:
        raise MeerkatError("--connect: is for a site, to reach its coordinator; leave it out with a federation.toml")
    address = _address(connect, "--connect") if connect else None
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    machine = {"disk": lambda: disk(file.absolute().parent), "threads": threads}
    own = _coordinator(file) if coordinator else _site(file, address)
    found = [*_run({"versions": versions, "programs": programs}), *own, *_run(machine)]
    return {
        "file": str(file),
        "kind": "coordinator" if coordinator else "site",
        "checks": [asdict(finding) for finding in found],
    }


def in_lines(outcome: Mapping[str, Any]) -> str:
    """An outcome for a person, a line a check."""
    return "\n".join([f"{outcome['file']}: a {outcome['kind']}'s", *(str(Finding(**f)) for f in outcome["checks"])])


def judge(outcome: Mapping[str, Any]) -> None:
    """Raise RunFailed if any check failed."""
    levels = [finding["level"] for finding in outcome["checks"]]
    if failed := levels.count("FAIL"):
        raise RunFailed(f"{failed} of {len(levels)} checks failed")


def _run(checks: Mapping[str, Callable[[], Findings]]) -> Findings:
    for name, check in checks.items():
        try:
            yield from check()
        except MeerkatError as error:
            yield Finding("FAIL", name, str(error))
        except Exception as error:  # a check that breaks is no reason to keep the others' findings back
            yield Finding("FAIL", name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _site(file: Path, address: tuple[str, int] | None) -> list[Finding]:
    try:
        own = SiteConfig.load(file)
    except MeerkatError as error:
        return [Finding("FAIL", "settings", str(error)), _REST]
    authority = own.certificate_authority
    checks: dict[str, Callable[[], Findings]] = {
        "model": lambda: model(own.model, own.device, own.accepts.model),
        "data": lambda: site_rows(own),
        "authority": lambda: site_authority(authority),
    }
    if address is not None:
        checks["connection"] = lambda: connection(address, authority)
    return [Finding("ok", "settings", f"client {own.client}"), *_run(checks)]


def _coordinator(file: Path) -> list[Finding]:
    try:
        config, federation = read_federation(file)
        config = resolve(config, rows=federation.evaluate == "coordinator")
    except MeerkatError as error:
        return [Finding("FAIL", "settings", str(error)), _REST]
    said = f"{config.method} on {config.task}, up to {config.clients} clients, {config.rounds} rounds"
    checks = {
        "model": lambda: model(config.model, config.device, mask=config.mask),
        "data": lambda: coordinator_rows(config, federation),
        "certificate": lambda: coordinator_certificate(federation),
        "port": lambda: port(federation),
    }
    return [Finding("ok", "settings", said), *_run(checks)]


# --- the machine ----------------------------------------------------------------------------------


def versions() -> Findings:
    """Python and the packages that this release asks for, by its own metadata."""
    about = importlib.metadata.metadata("meerkat-fl")
    python = Requirement(f"python{about['Requires-Python']}")
    asked = [Requirement(line) for line in importlib.metadata.requires("meerkat-fl") or ()]
    asked = [r for r in asked if r.name in ("torch", "transformers", "flwr")]
    for requirement in (python, *asked):
        name, allowed = requirement.name, requirement.specifier
        try:
            held = platform.python_version() if name == "python" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("FAIL", name, "is not installed", "pip install 'meerkat-fl[flower]'")
            continue
        level: Literal["ok", "FAIL"] = "ok" if allowed.contains(held, prereleases=True) else "FAIL"
        cure = "" if level == "ok" else "install one that fits"
        yield Finding(level, name, f"{held}; meerkat {about['Version']} is made for {allowed}", cure)


def programs() -> Findings:
    """The programs that Flower starts by their bare names."""
    missing = [name for name in ("flower-superexec", "flwr-serverapp", "flwr-clientapp") if not shutil.which(name)]
    if missing:
        yield Finding(
            "warn", "programs", f"not on PATH: {', '.join(missing)}", "put this environment's bin folder on it"
        )
    else:
        yield Finding("ok", "programs", "Flower's are on PATH")


def disk(folder: Path) -> Findings:
    """Room beside the file, and in the hub's cache."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    for what, path in (("disk", folder), ("hub cache", cache)):
        held = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(held).free
        cure = "" if free > _ROOM else "make room: a log that cannot be written ends a run"
        yield Finding("ok" if free > _ROOM else "warn", what, f"{_size(free)} free at {path}", cure)


def threads() -> Findings:
    """CPUs, and torch's choice. What a run uses is the coordinator's setting, at every site alike."""
    yield Finding("ok", "threads", f"{os.cpu_count()} CPUs; torch would take {torch.get_num_threads()}")


# --- model and data -------------------------------------------------------------------------------


def model(name: str, device: str, pinned: str = "", mask: str = "") -> Findings:
    """That the model fits into memory, loads, and is the one that is meant."""
    folder = demo.MODEL if name == EMBEDDED else Path(name)
    weights = sum(f.stat().st_size for pattern in ("*.safetensors", "*.bin") for f in folder.glob(pattern))
    if weights > (free := _available()):
        yield Finding("FAIL", "memory", f"{_size(weights)} of weights, {_size(free)} free", "use a larger machine")
        return
    if weights:
        yield Finding("ok", "memory", f"{_size(weights)} of weights, {_size(free)} free")
    if not folder.exists() and not folder.is_absolute() and not name.startswith("."):
        found = f"'{name}': no folder here, so a hub name; looked for in the hub's cache alone"
        yield Finding("warn", "model", found, "if it is meant to be a folder, check the path")
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    loaded, _ = load_model(str(folder), place)
    print_of = fingerprint(loaded)
    size = sum(p.numel() for p in loaded.parameters())
    yield Finding("ok", "model", f"{name}: {size:,} parameters on {place}, fingerprint {print_of}")
    if pinned:
        same = print_of == pinned
        found = "is the model of accepts.model" if same else f"is not the model of accepts.model, {pinned}"
        yield Finding("ok" if same else "FAIL", "model", found, "" if same else "use the model that was agreed on")
    if mask:
        held = SparseMask.load(Path(mask))
        held.check_fits(loaded)
        yield Finding("ok", "mask", f"{len(held):,} of {held.total:,} parameters, SHA-256 {held.digest()}")


def site_rows(own: SiteConfig) -> Findings:
    """The site's own rows, checked against the task where its operator named one."""
    if not Path(own.data).is_dir():
        raise MeerkatError(f"data '{own.data}': no such folder; give the folder with the site's train.jsonl")
    pinned = own.accepts.task
    known = pinned in TASKS or pinned in demo.TASKS
    task = (demo.load_task(pinned) if pinned in demo.TASKS else load_task(pinned)) if known else None
    for split in ("train", "validation") if own.evaluate else ("train",):
        rows = load_rows(own.data, split)
        if task is not None:
            check_rows(task, rows, f"data '{own.data}', {split}")
        fits = f", as task {pinned} wants them" if task else f" with {', '.join(sorted(rows[0]))}"
        yield Finding("ok", "data", f"{split}: {len(rows)} rows{fits}")


def coordinator_rows(config: RunConfig, federation: FederationConfig) -> Findings:
    """What the coordinator itself reads: text for the mask, and rows to judge on."""
    if config.text:
        next(read_texts(config.text))
        yield Finding("ok", "text", f"{config.text} can be read")
    task = open_task(config)
    if federation.evaluate == "coordinator":
        yield Finding("ok", "data", f"validation: {len(load_split(config, task, 'validation'))} rows")
    else:
        yield Finding("ok", "data", "none needed here: sites judge on their own rows")


# --- certificates ---------------------------------------------------------------------------------


def _certificate(name: str, path: str) -> Any:
    """A PEM certificate."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(Path(path).read_bytes())
    except OSError as error:
        raise MeerkatError(f"{name} '{path}': {error.strerror}; see 'meerkat certify'") from None
    except ValueError:
        raise MeerkatError(f"{name} '{path}': is no PEM certificate; see 'meerkat certify'") from None


def _validity(check: str, certificate: Any) -> Finding:
    now, begin, end = datetime.now(UTC), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    found = f"valid from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC; this machine's clock: {now:%Y-%m-%d %H:%M}"
    if not begin <= now <= end:
        return Finding("FAIL", check, found, "set the clock, or make new ones with 'meerkat certify'")
    if end - now < _SOON:
        return Finding("warn", check, found, "it ends within 30 days: make new ones with 'meerkat certify' in time")
    return Finding("ok", check, found)


def site_authority(path: str) -> Findings:
    """The federation's CA, as the site has it."""
    from cryptography import x509

    if not path:
        found = "certificate_authority is not set: fit for runs without a stream alone"
        yield Finding("warn", "authority", found, "give the path of the federation's ca.crt")
        return
    held = _certificate("certificate_authority", path)
    try:
        authority = held.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        authority = False
    if not authority:
        yield Finding("FAIL", "authority", f"'{path}' is not an authority's certificate", "give ca.crt, not server.crt")
    yield _validity("authority", held)


def coordinator_certificate(federation: FederationConfig) -> Findings:
    """The stream's certificate: its days, key, names and signature."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if not federation.stream:
        yield Finding("ok", "certificate", "none needed: no stream, frames travel in Flower's messages")
        return
    held = _certificate("certificate", federation.certificate)
    yield _validity("certificate", held)
    key = Path(federation.private_key)
    if load_pem_private_key(key.read_bytes(), password=None).public_key() == held.public_key():
        yield Finding("ok", "private_key", "belongs to the certificate")
    else:
        yield Finding("FAIL", "private_key", f"'{key}' does not belong to the certificate", "give the pair's own key")
    if key.stat().st_mode & 0o077:
        yield Finding("warn", "private_key", f"'{key}' is readable for others", f"chmod 600 {key}")
    host, _ = _address(federation.stream, "stream")
    names = held.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    listed = [str(name.value) for name in names]
    if host in listed:
        yield Finding("ok", "stream", f"'{host}' is among the certificate's names: {', '.join(listed)}")
    else:
        found = f"'{host}' is not among the certificate's names: {', '.join(listed)}"
        yield Finding("FAIL", "stream", found, f"meerkat certify --host {host} ...")
    beside = Path(federation.certificate).with_name("ca.crt")
    if not beside.is_file():
        yield Finding("warn", "authority", f"no {beside} to check the signature against", "sites need that file too")
        return
    try:
        held.verify_directly_issued_by(_certificate("authority", str(beside)))
        yield Finding("ok", "authority", f"{beside} signed the certificate")
    except Exception:  # another issuer, another kind of key, a signature that is wrong
        yield Finding(
            "FAIL", "authority", f"{beside} did not sign the certificate", "use files of one 'meerkat certify'"
        )


# --- the network ----------------------------------------------------------------------------------


def _address(text: str, what: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise MeerkatError(f"{what} '{text}': must be host:port, such as coordinator.example.org:9092")
    return host.removeprefix("[").removesuffix("]"), int(port)


def port(federation: FederationConfig) -> Findings:
    """Whether the stream can be listened on."""
    if not (listen := federation.listen or federation.stream):
        return
    host, number = _address(listen, "listen" if federation.listen else "stream")
    try:
        with socket.create_server((host, number), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            yield Finding("ok", "port", f"{listen} is free")
    except OSError as error:
        cure = "end the run or program that holds it, or give another port"
        if error.errno != errno.EADDRINUSE:
            cure = f'give an address of this machine to listen on, such as listen = "0.0.0.0:{number}"'
        yield Finding("FAIL", "port", f"{listen} cannot be listened on: {error.strerror}", cure)


def connection(address: tuple[str, int], authority: str) -> Findings:
    """A TLS handshake with the coordinator under the site's CA, step by step; nothing else is said to it."""
    host, number = address
    if proxies := sorted(n for n in os.environ if n.lower() in ("https_proxy", "http_proxy", "grpc_proxy")):
        found = f"{', '.join(proxies)} is set: a run would go by that proxy, this check does not"
        yield Finding("warn", "proxy", found, f"put {host} into no_proxy if the proxy is not for it")
    try:
        there = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        yield Finding("FAIL", "name", f"'{host}': {error.strerror}", "check the spelling, and this machine's DNS")
        return
    yield Finding("ok", "name", f"{host} is {there}")
    try:
        socket.create_connection(address, _PATIENCE_S).close()
    except OSError as error:
        refused = isinstance(error, ConnectionRefusedError)
        cure = (
            "is the SuperLink up? The stream's port is open during a run only" if refused else "is a firewall between?"
        )
        yield Finding("FAIL", "port", f"{number} of {host}: {error.strerror or error}", cure)
        return
    yield Finding("ok", "port", f"{number} of {host} is open")
    if not authority:
        yield Finding("FAIL", "handshake", "no certificate_authority to check the coordinator with", "set it")
        return
    try:
        shown = _shake(address, ssl.create_default_context(cafile=authority))
        yield Finding("ok", "handshake", "the certificate is signed by the site's authority and names this host")
    except (OSError, ValueError) as error:
        why = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error)
        yield Finding(
            "FAIL", "handshake", f"refused by this site: {why}", _CURES.get(getattr(error, "verify_code", 0), "")
        )
        blind = ssl.create_default_context()
        blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
        shown = _shake(address, blind)
    from cryptography import x509

    yield _validity("clock", x509.load_der_x509_certificate(shown))


def _shake(address: tuple[str, int], context: ssl.SSLContext) -> bytes:
    """The certificate that is shown in a handshake, DER."""
    context.set_alpn_protocols(["h2", "http/1.1"])  # gRPC wants the first
    with (
        socket.create_connection(address, _PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname=address[0]) as secure,
    ):
        return secure.getpeercert(binary_form=True) or b""


_CURES = {
    9: "it is not valid yet: check the clocks",
    10: "it has expired: make new ones with 'meerkat certify', or check the clock",
    18: "it is signed by itself: is this the coordinator?",
    19: "another authority signed it: get the coordinator's ca.crt",
    20: "another authority signed it: get the coordinator's ca.crt",
    62: "use a name that the certificate has, or 'meerkat certify' with --host for this one",
    64: "use an address that the certificate has, or 'meerkat certify' with --host for this one",
}
"""What to do, by OpenSSL's number of what is wrong with a certificate."""


def _available() -> int:
    """Bytes of memory that a program can have, as Linux tells; elsewhere those that are quite free."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
