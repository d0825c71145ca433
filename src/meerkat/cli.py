"""The command line. Flags of `simulate` are the settings of config.py, nothing else."""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from meerkat import __version__
from meerkat.errors import MeerkatError, RunFailed
from meerkat.settings.config import RunConfig, make_config, read_toml

MASK_SETTINGS = (
    "model",
    "text",
    "method",
    "density",
    "mask_scope",
    "exclude",
    "text_sequences",
    "text_length",
    "task",
    "data",
    "objective",
    "max_length",
    "device",
    "dtype",
    "threads",
    "seed",
)

SPLIT_SETTINGS = ("task", "data", "held_back", "partition", "clients", "seed")


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-[\d.]")  # -1e-5 too is a value, and no flag

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message}; see '{self.prog} --help'\n")


def _add_settings(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    for name in names:
        field = RunConfig.model_fields[name]
        about = field.description or ""
        choices = [str(choice) for choice in get_args(field.annotation)] if isinstance(field.default, str) else []
        if field.default != "" and "[default" not in about:
            about += f" [default: {field.default}]"
        parser.add_argument(
            "--" + name.replace("_", "-"),
            default=argparse.SUPPRESS,
            metavar="|".join(choices) or {int: "N", float: "X"}.get(type(field.default), name.upper()),
            help=about,
        )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="meerkat", description="Sparse zeroth-order federated fine-tuning of language models.")
    parser.add_argument("--version", action="version", version=f"meerkat {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, run: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        made.set_defaults(run=run)
        made.add_argument(
            "--json", action="store_true", help="print one JSON object on standard output, and nothing else there"
        )
        return made

    simulate = command("simulate", "Fine-tune a model in a federation simulated on this machine.", _simulate)
    simulate.add_argument("config", nargs="?", metavar="CONFIG.toml", help="settings; flags override them")
    simulate.add_argument(
        "--out", metavar="RUN", help="folder for the run; new or empty [default: a new one under runs/]"
    )
    _add_settings(simulate, list(RunConfig.model_fields))

    mask = command("mask", "Choose the most sensitive parameters of a model from pre-training text.", _mask)
    mask.add_argument("--out", required=True, metavar="FILE", help="mask file to write (.safetensors)")
    _add_settings(mask, MASK_SETTINGS)

    divide = command("partition", "Write each client's training rows to a folder of its own, site by site.", _partition)
    divide.add_argument("--out", required=True, metavar="DIR", help="folder for site-0, site-1, ...; new or empty")
    _add_settings(divide, SPLIT_SETTINGS)

    sign = command("certify", "Make a federation's certificate authority, certificate and node keys.", _certify)
    sign.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder for the files; new or empty")
    sign.add_argument(
        "--host",
        required=True,
        action="append",
        metavar="HOST",
        help="name or address that sites reach the coordinator by; may be given again",
    )
    sign.add_argument("--nodes", default=0, metavar="N", type=int, help="sites to make a key for [default: 0]")
    sign.add_argument("--days", default=365, metavar="N", type=int, help="validity of the certificates [default: 365]")

    keygen = command("keygen", "Make the key that a site signs its replies with.", _keygen)
    keygen.add_argument(
        "--out",
        required=True,
        metavar="FILE.key",
        type=Path,
        help="private key to write; the public one goes beside it",
    )

    doctor = command("doctor", "Check a federation's site or coordinator before a run does.", _doctor)
    doctor.add_argument("file", metavar="FILE", type=Path, help="a site.toml or a federation.toml")
    doctor.add_argument("--connect", default="", metavar="HOST:PORT", help="a site's: try a TLS handshake there")

    compare = command(
        "compare", "Compare methods and settings over several seeds, each at its own learning rate.", _compare
    )
    compare.add_argument(
        "config", nargs="?", metavar="CONFIG.toml", help="studies; see docs/formats.md; flags override it"
    )
    compare.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the comparison; one that was begun is gone on with [default: under runs/]",
    )
    compare.add_argument("--methods", metavar="M,M,..", help="methods to compare, with commas")
    compare.add_argument("--seeds", metavar="N,N,..", help="seeds that each setting is repeated with [default: 0,1,2]")
    compare.add_argument("--local-steps", metavar="T,T,..", help="T: local steps a round, with commas")
    compare.add_argument("--total-steps", metavar="N", type=int, help="local steps of every run: rounds x local steps")
    compare.add_argument(
        "--quick", action="store_true", help="the short form that the file's [quick] tables make of it"
    )
    compare.add_argument(
        "--jobs",
        metavar="N",
        type=int,
        default=0,
        help="runs at a time, each on one thread: results stay the same [default: one a CPU, or one on a GPU]",
    )
    own = ("method", "seed", "local_steps", "lr", "held_back", "threads")
    _add_settings(compare, [name for name in RunConfig.model_fields if name not in own])

    for name, about, run in (
        ("resume", "Go on with an interrupted run.", _resume),
        ("verify", "Replay a run from its folder alone; check every digest and signature.", _verify),
        ("evaluate", "Judge a run's model, overall and per class.", _evaluate),
        ("export", "Write a run's model as a Hugging Face folder or as a sparse delta.", _export),
        ("report", "Write a page with all figures of a run, or of a comparison of runs.", _report),
    ):
        made = command(name, about, run)
        if name == "report":
            made.add_argument("folder", metavar="DIR", type=Path, help="folder of a run or of a comparison")
            continue
        made.add_argument("folder", metavar="RUN", type=Path, help="the run's folder")
        if name == "verify":
            made.add_argument(
                "--signers",
                default="",
                metavar="FILE",
                help="public keys, a line each, that every reply must be signed with [default: the keys in the log]",
            )
            made.add_argument(
                "--revoked",
                action="append",
                default=[],
                metavar="KEY[@ROUND]|FILE",
                help="a key that is revoked: its fingerprint, perhaps with a round from which on, its .pub file, or a "
                "file of such lines; may be given again",
            )
        if name == "evaluate":
            made.add_argument(
                "--split",
                default="validation",
                choices=["train", "validation", "test"],
                help="rows to judge on [default: validation]",
            )
        if name == "export":
            made.add_argument("--to", required=True, metavar="DIR", type=Path, help="folder to write; new or empty")
            made.add_argument(
                "--form",
                default="merged",
                choices=["merged", "delta"],
                help="a whole model, or mask and values alone [default: merged]",
            )
    return parser


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if name in RunConfig.model_fields}


def _simulate(arguments: argparse.Namespace) -> None:
    given = read_toml(Path(arguments.config)) if arguments.config else {}
    config = make_config(given | _settings(arguments))
    from meerkat.run.simulation import simulate

    out = Path(arguments.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.method}")
    _finish(simulate(config, out), out, arguments.json)


def _compare(arguments: argparse.Namespace) -> None:
    given = {n: v for n, v in _settings(arguments).items() if n != "local_steps"}
    for flag, name in (("methods", "method"), ("seeds", "seeds"), ("local_steps", "local_steps")):
        if (text := getattr(arguments, flag, None)) is not None:
            words = [word.strip() for word in text.split(",")]
            given[name] = words if name == "method" else _numbers(words, "--" + flag.replace("_", "-"))
    if arguments.total_steps is not None:
        given["total_steps"] = arguments.total_steps
    if arguments.jobs < 0:
        raise MeerkatError(f"--jobs {arguments.jobs}: must be 1 or more, or 0 for one a CPU")
    from meerkat.comparison.studies import read_comparison

    comparison = read_comparison(Path(arguments.config) if arguments.config else None, given, arguments.quick)
    from meerkat.comparison.compare import compare
    from meerkat.comparison.results import table

    name = Path(arguments.config).stem if arguments.config else "comparison"
    out = Path(arguments.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")
    arguments.cure = f"the same command with --out {out} goes on with the comparison"
    found = compare(comparison, out, arguments.jobs)
    from meerkat.report import write_comparison_report

    page = write_comparison_report(out)
    print(json.dumps(found) if arguments.json else f"{table(found, sys.stdout.isatty())}\n\nReport: {page}")


def _numbers(words: Sequence[str], flag: str) -> list[int]:
    try:
        return [int(word) for word in words]
    except ValueError:
        raise MeerkatError(f"{flag} {','.join(words)}: must be whole numbers with commas, such as 0,1,2") from None


def _resume(arguments: argparse.Namespace) -> None:
    from meerkat.run.simulation import resume

    _finish(resume(arguments.folder), arguments.folder, arguments.json)


def _finish(summary: dict[str, Any], folder: Path, as_json: bool) -> None:
    from meerkat.record.run_folder import explain_disk_errors
    from meerkat.report import curves, in_words

    with explain_disk_errors(folder / "curves.png", f"make room, then 'meerkat resume {folder}'"):
        picture, _ = curves([folder], folder)
    if as_json:
        print(json.dumps(summary))
    else:
        print(f"{in_words(summary, folder)}\nPicture: {picture}")


def _mask(arguments: argparse.Namespace) -> None:
    config = make_config(_settings(arguments))
    out = Path(arguments.out)
    from meerkat.record.run_folder import write_atomically
    from meerkat.run.setup import make_mask, open_model, resolve, resolve_model

    if config.recipe.moves == "lora":
        raise MeerkatError("--method lora-fedzo: moves adapters whole and has no mask to write; choose another method")

    if out.exists():
        raise MeerkatError(f"'{out}': exists already; give another --out, or remove it first")
    if not out.parent.is_dir():
        raise MeerkatError(f"'{out}': there is no folder '{out.parent}'; make it first")
    config = resolve(config) if config.recipe.moves == "task" else resolve_model(config)
    mask = make_mask(config, *open_model(config))
    write_atomically(out, mask.save)
    by_tensor = dict(mask.counts())
    if arguments.json:
        print(
            json.dumps(
                {
                    "mask": str(out),
                    "params_total": mask.total,
                    "params_masked": len(mask),
                    "by_tensor": by_tensor,
                    **mask.facts,
                }
            )
        )
    else:
        print(f"{out}: {len(mask):,} of {mask.total:,} parameters, in {len(by_tensor)} tensors, most of them in")
        for name, count in sorted(by_tensor.items(), key=lambda item: -item[1])[:5]:
            print(f"  {count / len(mask):6.1%}  {name}")


def _partition(arguments: argparse.Namespace) -> None:
    config = make_config(_settings(arguments))
    from meerkat.federation.site_folders import write_sites

    counts = write_sites(config, Path(arguments.out))
    if arguments.json:
        print(json.dumps({"written": arguments.out, "clients": len(counts), "rows": counts}))
    else:
        print(f"{arguments.out}: {sum(counts)} rows in {len(counts)} folders")
        for client, count in enumerate(counts):
            print(f"  site-{client}  {count} rows")


def _certify(arguments: argparse.Namespace) -> None:
    try:
        from meerkat.federation.certificates import certify
    except ImportError:
        raise MeerkatError("certify: needs the 'cryptography' package; pip install 'meerkat-fl[flower]'") from None
    made = certify(arguments.out, arguments.host, arguments.nodes, arguments.days)
    if arguments.json:
        print(json.dumps({name: str(path) for name, path in made.items()}))
    else:
        for name, path in made.items():
            print(f"{name:>14}  {path}")


def _keygen(arguments: argparse.Namespace) -> None:
    try:
        from meerkat.federation.certificates import make_signing_key
    except ImportError:
        raise MeerkatError("keygen: needs the 'cryptography' package; pip install 'meerkat-fl[flower]'") from None
    from meerkat.record.signatures import SigningKey, fingerprint

    if not arguments.out.name or arguments.out.is_dir():
        raise MeerkatError(f"keygen: --out '{arguments.out}': must be a new file, such as signing.key")
    try:
        made = make_signing_key(arguments.out)
    except OSError as error:
        raise MeerkatError(f"keygen: --out '{arguments.out}': {error.strerror}; give another file") from None
    name = fingerprint(SigningKey.load(str(made.private)).public)
    if arguments.json:
        print(json.dumps({"key": str(made.private), "public": str(made.public), "fingerprint": name}))
    else:
        print(f"{made.private}  stays on the site\n{made.public}  goes to the coordinator, and to who verifies\n{name}")


def _doctor(arguments: argparse.Namespace) -> None:
    try:
        from meerkat.federation.doctor import examine, in_lines, judge
    except ImportError:
        raise MeerkatError("doctor: needs the 'cryptography' package; pip install 'meerkat-fl[flower]'") from None
    outcome = examine(arguments.file, arguments.connect)
    print(json.dumps(outcome) if arguments.json else in_lines(outcome))
    judge(outcome)


def _verify(arguments: argparse.Namespace) -> None:
    from meerkat.record.signatures import read_keys, read_revoked
    from meerkat.record.verification import verify

    listed = read_keys(arguments.signers, "--signers") if arguments.signers else None
    revoked = read_revoked(arguments.revoked, "--revoked")
    run = verify(arguments.folder, listed, revoked)
    from meerkat.algorithm.path import digest
    from meerkat.progress import say

    if revoked and not run.signed:
        say("note: --revoked: no reply of this run is signed, so there was nothing to check")
    else:
        for name in sorted(revoked.keys() - {key for _, key in run.signed}):
            say(f"note: --revoked {name}: no reply of this run is signed with it; is it the right one?")

    theta_digest, keys = digest(run.theta), sorted(run.signed.items())
    if arguments.json:
        told = {"rounds": run.rounds, "finished": run.finished, "theta_digest": theta_digest, "replies": run.replies}
        signers = [{"client": client, "key": key, "replies": count} for (client, key), count in keys]
        privacy = None if run.guarantee is None else run.guarantee.to_json()
        print(json.dumps({**told, "signed": sum(run.signed.values()), "signers": signers, "privacy": privacy}))
        return
    state = "finished" if run.finished else f"not finished: {run.rounds} of {run.config.rounds} rounds"
    signed = f"{sum(run.signed.values()):,} of {run.replies:,} replies signed"
    if keys:
        known = "as listed" if listed is not None else "as the log has them; --signers holds them against a list"
        signed += f", with {len(keys)} {'key' if len(keys) == 1 else 'keys'} ({known})"
    signatures = signed if run.opening.federation else "a simulation: no signatures"
    private = "no differential privacy" if run.guarantee is None else run.guarantee.in_words()
    replayed = f"{run.rounds} rounds replayed, theta {theta_digest[:16]}"
    print(f"{arguments.folder}: sound, {state}; {replayed}; {signatures}; {private}")
    for (client, key), count in keys:
        print(f"  client {client}  {key}  {count:,} replies")


def _evaluate(arguments: argparse.Namespace) -> None:
    from meerkat.run.evaluate import evaluate

    found = evaluate(arguments.folder, arguments.split)
    if arguments.json:
        print(
            json.dumps(
                {
                    "split": arguments.split,
                    "rows": len(found.predictions),
                    "accuracy": found.accuracy,
                    "loss": found.loss,
                    "per_class": found.per_class,
                }
            )
        )
    else:
        print(f"{arguments.split}, {len(found.predictions)} rows: accuracy {found.accuracy:.3f}, loss {found.loss:.3f}")
        for label, accuracy in found.per_class.items():
            print(f"  {accuracy:.3f}  {label}")


def _export(arguments: argparse.Namespace) -> None:
    from meerkat.export.model import export

    written = export(arguments.folder, arguments.to, arguments.form)
    print(json.dumps({"written": str(written)}) if arguments.json else f"written: {written}")


def _report(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.folder
    kinds = [name for name in ("compare.json", "config.toml") if (folder / name).is_file()]
    if not kinds and (folder / "cells").is_dir():
        raise MeerkatError(f"'{folder}': a comparison that is not finished; the same 'meerkat compare' goes on with it")
    if not kinds:
        raise MeerkatError(
            f"'{folder}': neither a run nor a comparison (no config.toml, no compare.json); "
            "give the folder that 'meerkat simulate' or 'meerkat compare' wrote"
        )
    from meerkat.report import write_comparison_report, write_run_report

    written = (write_comparison_report if kinds[0] == "compare.json" else write_run_report)(folder)
    print(json.dumps({"report": str(written)}) if arguments.json else f"Report: {written}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0, 1 for a run that failed, 2 for bad arguments."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except RunFailed as error:
        print(f"meerkat: {error}", file=sys.stderr)
        return 1
    except MeerkatError as error:
        print(f"meerkat: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"meerkat: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        cure = getattr(arguments, "cure", "'meerkat resume' goes on with the run")
        print(f"meerkat: interrupted; what was logged is safe: {cure}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
