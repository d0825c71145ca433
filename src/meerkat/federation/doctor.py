"""`meerkat doctor`: what is wrong with a site or a coordinator, before a run finds out.

A check is a function that gives findings, one line each. None stops another, and what one raises is a finding too.
Hub names are looked up in the cache at most: nothing leaves this machine but the handshake that `--connect` asks for.
"""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from packaging.requirements import Requirement
from transformers.utils import logging

from meerkat import demo
from meerkat.errors import MeerkatError, RunFailed
from meerkat.federation.checkup import (
    Finding,
    Findings,
    connection,
    coordinator_certificate,
    coordinator_signers,
    fail,
    ok,
    port,
    site_authority,
    site_keys,
    warn,
)
from meerkat.federation.coordinator import FederationConfig, host_and_port, read_federation
from meerkat.federation.site_settings import SiteConfig
from meerkat.masks.sparse_mask import SparseMask, fingerprint
from meerkat.problems.causal_lm import load_model
from meerkat.problems.data import load_rows, read_texts
from meerkat.problems.tasks import TASKS, check_rows, load_task
from meerkat.progress import number_of
from meerkat.run.setup import load_split, resolve
from meerkat.settings.config import EMBEDDED, RunConfig, read_toml


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
    kind = "coordinator" if held.keys() & {"run", "federation"} else "site"
    if kind == "site" and not held.keys() & SiteConfig.model_fields.keys():
        raise MeerkatError(f"'{file}': neither a site.toml (client, data) nor a federation.toml ([run], [federation])")
    if connect and kind == "coordinator":
        raise MeerkatError("--connect: is for a site, to reach its coordinator; leave it out with a federation.toml")
    address = host_and_port(connect, "--connect") if connect else None
    own = _coordinator(file) if kind == "coordinator" else _site(file, address)
    machine: dict[str, Callable[[], Findings]] = {
        "versions": versions,
        "programs": programs,
        "threads": threads,
        "disk": lambda: disk(file.absolute().parent),
    }
    return {"file": str(file), "kind": kind, "checks": [asdict(finding) for finding in (*_run(machine), *own)]}


def in_lines(outcome: Mapping[str, Any]) -> str:
    """An outcome for a person, a line a check."""
    return "\n".join(str(Finding(**finding)) for finding in outcome["checks"])


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
            yield fail(name, str(error))
        except Exception as error:  # a check that breaks is no reason to keep the others' findings back
            yield fail(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _site(file: Path, address: tuple[str, int] | None) -> Findings:
    try:
        own = SiteConfig.load(file)
    except MeerkatError as error:
        return iter((fail("settings", str(error)), warn("the rest", "was not looked at", "mend the settings first")))
    checks: dict[str, Callable[[], Findings]] = {
        "settings": lambda: iter((ok("settings", f"a site's: client {own.client}"),)),
        "model": lambda: model(own.model, own.device, own.accepts.model),
        "data": lambda: site_rows(own),
        "authority": lambda: site_authority(own.certificate_authority),
        "signing_key": lambda: site_keys(own),
    }
    if address is not None:
        checks["connection"] = lambda: connection(address, own.certificate_authority)
    return _run(checks)


def _coordinator(file: Path) -> Findings:
    try:
        given, federation = read_federation(file)
        config = resolve(given, rows=federation.evaluate == "coordinator")
    except MeerkatError as error:
        return iter((fail("settings", str(error)), warn("the rest", "was not looked at", "mend the settings first")))
    many = f"{number_of(config.clients, 'client')}, {number_of(config.rounds, 'round')}"
    said = f"a coordinator's: {config.method} on {config.task}, {many}"
    checks: dict[str, Callable[[], Findings]] = {
        "settings": lambda: settings(config, f"{said}; threads: {config.threads}"),
        "model": lambda: model(config.model, config.device, mask=config.mask),
        "data": lambda: coordinator_rows(config, federation),
        "signers": lambda: coordinator_signers(federation),
    }
    if federation.stream:
        checks["certificate"] = lambda: coordinator_certificate(federation)
        checks["port"] = lambda: port(federation)
    return _run(checks)


def settings(config: RunConfig, said: str) -> Findings:
    """The coordinator's settings, and those that do nothing."""
    yield ok("settings", said)
    for line in config.idle().values():
        yield warn("settings", line, "a new run is refused with it")


def versions() -> Findings:
    """Python and the packages that this release asks for, by its own metadata."""
    about = importlib.metadata.metadata("meerkat-fl")
    asked = [Requirement(line) for line in importlib.metadata.requires("meerkat-fl") or ()]
    asked = [requirement for requirement in asked if requirement.name in ("torch", "transformers", "flwr")]
    for name, allowed in [("python", Requirement(f"python{about['Requires-Python']}").specifier)] + [
        (requirement.name, requirement.specifier) for requirement in asked
    ]:
        try:
            held = platform.python_version() if name == "python" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield fail(name, "is not installed", "pip install 'meerkat-fl[flower]'")
            continue
        found = f"{held}; meerkat {about['Version']} is made for {allowed}"
        fits = allowed.contains(held, prereleases=True)
        yield ok(name, found) if fits else fail(name, found, "install one that fits")


def programs() -> Findings:
    """The programs that Flower starts by their bare names."""
    missing = [name for name in ("flower-superexec", "flwr-serverapp", "flwr-clientapp") if not shutil.which(name)]
    lacking = warn("programs", f"not on PATH: {', '.join(missing)}", "put this environment's bin folder on PATH")
    yield lacking if missing else ok("programs", "Flower's are on PATH")


def threads() -> Findings:
    """CPUs here; the number of threads is the run's, so that all sites compute the same bits."""
    yield ok("threads", f"{os.cpu_count()} CPUs; how many threads a run takes is the coordinator's setting, for all")


def disk(folder: Path) -> Findings:
    """Room beside the file, and in the hub's cache."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    for what, path in (("disk", folder), ("hub cache", cache)):
        free = shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free
        found = f"{_size(free)} free at {path}"
        yield ok(what, found) if free > 1e9 else warn(what, found, "make room: a full disk ends a run")


def model(name: str, device: str, pinned: str = "", mask: str = "") -> Findings:
    """That the model fits into memory, loads, and is the one that is meant; that a mask fits it."""
    folder = demo.MODEL if name == EMBEDDED else Path(name)
    weights = sum(f.stat().st_size for pattern in ("*.safetensors", "*.bin") for f in folder.glob(pattern))
    found = f"{_size(weights)} of weights, {_size(free := _available())} free"
    if weights > free:
        yield fail("memory", found, "use a larger machine; the model was not loaded")
        return
    if folder.exists():
        yield ok("memory", found)
    elif _is_hub_name(name):
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except LocalEntryNotFoundError:
            yield warn(
                "model", f"'{name}': no folder, and not in the hub's cache", "a run would fetch it, if it is there"
            )
            return
    logging.disable_progress_bar()
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    loaded, _ = load_model(str(folder), place)
    own, size = fingerprint(loaded), sum(parameter.numel() for parameter in loaded.parameters())
    yield ok("model", f"{name}: {size:,} parameters on {place}, fingerprint {own}")
    if pinned and own != pinned:
        yield fail("model", f"its fingerprint is not accepts.model, {pinned}", "use the model that was agreed on")
    if mask:
        held = SparseMask.load(Path(mask))
        held.check_fits(loaded)
        yield ok("mask", f"{len(held):,} of {held.total:,} parameters, SHA-256 {held.digest()}")


def site_rows(own: SiteConfig) -> Findings:
    """The site's own rows, checked against the task where [accepts] names one that is known here."""
    if not Path(own.data).is_dir():
        raise MeerkatError(f"data '{own.data}': no such folder; give the folder with the site's train.jsonl")
    name = own.accepts.task
    task = demo.load_task(name) if name in demo.TASKS else load_task(name) if name in TASKS else None
    for split in ("train", "validation") if own.evaluate else ("train",):
        rows = load_rows(own.data, split)
        if task is not None:
            check_rows(task, rows, f"data '{own.data}', {split}")
        fits = f"as task {name} wants them" if task else f"with {', '.join(sorted(rows[0]))}"
        yield ok("data", f"{split}: {len(rows)} rows {fits}")


def coordinator_rows(config: RunConfig, federation: FederationConfig) -> Findings:
    """What the coordinator itself reads: text for the mask, and rows to judge on."""
    if hub := [name for name in (config.text, config.data) if _is_hub_name(name)]:
        yield warn("data", f"hub names were not looked up: {', '.join(hub)}", "if folders are meant, check the paths")
    if config.text and config.text not in hub:
        next(read_texts(config.text))
        yield ok("text", f"{config.text} can be read")
    if federation.evaluate == "sites":
        yield ok("data", "none needed here: sites judge on their own rows")
    elif config.data not in hub:
        yield ok("data", f"validation: {len(load_split(config, 'validation'))} rows")


def _is_hub_name(name: str) -> bool:
    """Whether a model or data would be looked for on the hub."""
    return bool(name) and not (Path(name).exists() or Path(name).is_absolute() or name.startswith("."))


def _available() -> int:
    """Bytes of memory that a program can have, as Linux tells; elsewhere half of what is built in."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
