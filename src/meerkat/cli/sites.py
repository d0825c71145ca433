"""Commands for those who run a federation or a site of one: partition, certify, keygen, doctor."""

import argparse
from pathlib import Path

from meerkat.cli.parser import Command, add_list, add_settings, given_settings, show
from meerkat.errors import MeerkatError
from meerkat.settings.config import make_config

SPLIT_SETTINGS = ("task", "data", "held_back", "partition", "clients", "seed")


def _partition_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for site-0, site-1, ...; new or empty")
    add_settings(parser, SPLIT_SETTINGS)


def _partition(arguments: argparse.Namespace) -> None:
    config = make_config(given_settings(arguments))
    from meerkat.federation.site_folders import write_sites

    counts = write_sites(config, Path(arguments.out))
    total = f"{arguments.out}: {sum(counts)} rows in {len(counts)} folders"
    each = [f"  site-{client}  {count} rows" for client, count in enumerate(counts)]
    show(arguments, {"written": arguments.out, "clients": len(counts), "rows": counts}, total, *each)


def _certify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder for the files; new or empty")
    add_list(parser, "--host", "HOST", "name or address that sites reach the coordinator by", required=True)
    parser.add_argument("--nodes", default=0, metavar="N", type=int, help="sites to make a key for [default: 0]")
    about = "validity of the certificates [default: 365]"
    parser.add_argument("--days", default=365, metavar="N", type=int, help=about)


def _certify(arguments: argparse.Namespace) -> None:
    from meerkat.federation.certificates import certify

    made = certify(arguments.out, arguments.host, arguments.nodes, arguments.days)
    files = {name: str(path) for name, path in made.items()}
    show(arguments, files, *(f"{name:>14}  {path}" for name, path in files.items()))


def _keygen_arguments(parser: argparse.ArgumentParser) -> None:
    about = "private key to write; the public one goes beside it"
    parser.add_argument("--out", required=True, metavar="FILE.key", type=Path, help=about)


def _keygen(arguments: argparse.Namespace) -> None:
    from meerkat.federation.certificates import make_signing_key
    from meerkat.record.signatures import SigningKey, fingerprint

    if not arguments.out.name or arguments.out.is_dir():
        raise MeerkatError(f"keygen: --out '{arguments.out}': must be a new file, such as signing.key")
    try:
        made = make_signing_key(arguments.out)
    except OSError as error:
        raise MeerkatError(f"keygen: --out '{arguments.out}': {error.strerror}; give another file") from None
    name = fingerprint(SigningKey.load(str(made.private)).public)
    show(
        arguments,
        {"key": str(made.private), "public": str(made.public), "fingerprint": name},
        f"{made.private}  stays on the site",
        f"{made.public}  goes to the coordinator, and to anyone who verifies",
        name,
    )


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a site.toml or a federation.toml")
    parser.add_argument("--connect", metavar="HOST:PORT", help="for a site: try a TLS handshake there")


def _doctor(arguments: argparse.Namespace) -> None:
    from meerkat.federation.doctor import examine, in_lines, raise_if_failed

    outcome = examine(arguments.file, arguments.connect or "")
    show(arguments, outcome, *in_lines(outcome))
    raise_if_failed(outcome)


COMMANDS = (
    Command(
        "partition", "Write each client's training rows to a folder, site by site.", _partition_arguments, _partition
    ),
    Command("certify", "Make a federation's authority, certificate and node keys.", _certify_arguments, _certify),
    Command("keygen", "Make the key that a site signs its replies with.", _keygen_arguments, _keygen),
    Command("doctor", "Check a federation's site or coordinator before a run.", _doctor_arguments, _doctor),
)
