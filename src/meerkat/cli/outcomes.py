"""Commands on the folder of a run or of a comparison: verify, evaluate, report, export."""

import argparse
from pathlib import Path

from meerkat.cli.parser import Command, add_list, run_argument, show
from meerkat.errors import MeerkatError


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    about = "public keys, a line each, that every reply must be signed with [default: the keys in the log]"
    parser.add_argument("--signers", metavar="FILE", help=about)
    about = "a revoked key: its fingerprint, optionally with the round from which it is revoked, its .pub file, or a "
    add_list(parser, "--revoked", "KEY[@ROUND]|FILE", f"{about}file of such lines")
    about = "another folder of the same federation: is its log the same history, or do the two fork?"
    parser.add_argument("--against", type=Path, metavar="FOLDER", help=about)
    about = "evaluate the model too, and compare its scores with the summary's; needs the model and the rows"
    parser.add_argument("--evaluate", action="store_true", help=about)


def _verify(arguments: argparse.Namespace) -> None:
    from meerkat.algorithm.path import digest
    from meerkat.progress import number_of, say
    from meerkat.record.signatures import read_keys, read_revoked
    from meerkat.record.verification import verify

    listed = read_keys(arguments.signers, "--signers") if arguments.signers is not None else None
    revoked = read_revoked(arguments.revoked, "--revoked")
    run = verify(arguments.folder, listed, revoked)
    if arguments.against is not None:
        verify(arguments.against, listed, revoked)
        _compare_histories(arguments.folder, arguments.against)
    if revoked and not run.signed:
        say("note: --revoked: no reply of this run is signed, so there was nothing to check")
    else:
        for name in sorted(revoked.keys() - {key for _, key in run.signed}):
            say(f"note: --revoked {name}: no reply of this run is signed with it; is it the right one?")

    if arguments.evaluate:
        from meerkat.run.evaluate import check_scores

        check_scores(arguments.folder, run)

    theta_digest, keys, signed = digest(run.theta), sorted(run.signed.items()), sum(run.signed.values())
    outcome = {
        "rounds": run.rounds,
        "finished": run.finished,
        "theta_digest": theta_digest,
        "replies": run.replies,
        "signed": signed,
        "signers": [{"client": client, "key": key, "replies": count} for (client, key), count in keys],
        "privacy": None if run.guarantee is None else run.guarantee.to_json(),
        "not_checked": run.not_checked(arguments.evaluate),
    }
    state = "finished" if run.finished else f"not finished: {run.rounds} of {number_of(run.config.rounds, 'round')}"
    signatures = "a simulation: no signatures"
    if run.opening.federation:
        signatures = f"{signed:,} of {run.replies:,} replies signed"
    if run.opening.federation and keys:
        known = "as listed" if listed is not None else "as the log has them; --signers checks them against a list"
        signatures += f", with {number_of(len(keys), 'key')} ({known})"
    private = "no differential privacy" if run.guarantee is None else run.guarantee.in_words()
    replayed = f"{number_of(run.rounds, 'round')} replayed, theta {theta_digest[:16]}"
    lines = [f"{arguments.folder}: sound, {state}; {replayed}; {signatures}; {private}"]
    lines += [f"  client {client}  {key}  {count:,} replies" for (client, key), count in keys]
    show(arguments, outcome, *lines, f"  not checked: {', '.join(run.not_checked(arguments.evaluate))}")


def _compare_histories(one: Path, other: Path) -> None:
    """Raise RunFailed if two folders of one federation have different histories."""
    from meerkat.errors import RunFailed
    from meerkat.progress import say
    from meerkat.record.forks import fork
    from meerkat.run.sentences import clients_in_words

    if (parted := fork(one, other)) is not None:
        who = "nobody signed in both"
        if parted.signed_both:
            who = f"{clients_in_words(parted.signed_both)} signed different replies of one round"
        raise RunFailed(
            f"run folders '{one}' and '{other}': two histories of one federation, which fork at line {parted.line} of "
            f"rounds.log, after round {parted.round}; {who}: ask the sites which one they took part in"
        )
    say(f"{other}: the same history, as far as both go")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    splits, about = ["train", "validation", "test"], "rows to evaluate on [default: validation]"
    parser.add_argument("--split", default="validation", choices=splits, help=about)


def _evaluate(arguments: argparse.Namespace) -> None:
    from meerkat.run.evaluate import evaluate
    from meerkat.run.sentences import scores_in_words

    evaluation = evaluate(arguments.folder, arguments.split)
    scores, per_class = evaluation.scores, evaluation.per_class
    usual = {name: scores[name] for name in ("accuracy", "loss") if name in scores}
    outcome = {"split": arguments.split, "rows": evaluation.rows, **usual, "per_class": per_class, "scores": scores}
    total = f"{arguments.split}, {evaluation.rows} rows: {scores_in_words(scores)}"
    show(arguments, outcome, total, *(f"  {score:.3f}  {label}" for label, score in per_class.items()))


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of a run or of a comparison")


def _report(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.folder
    kinds = [name for name in ("compare.json", "config.toml") if (folder / name).is_file()]
    if not kinds and (folder / "cells").is_dir():
        raise MeerkatError(f"'{folder}': a comparison that is not finished; the same 'meerkat compare' continues it")
    if not kinds:
        raise MeerkatError(
            f"'{folder}': neither a run nor a comparison (no config.toml, no compare.json); "
            "give the folder that 'meerkat simulate' or 'meerkat compare' wrote"
        )
    from meerkat.report import write_comparison_report, write_run_report

    written = (write_comparison_report if kinds[0] == "compare.json" else write_run_report)(folder)
    show(arguments, {"report": str(written)}, f"Report: {written}")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument("--to", required=True, metavar="DIR", type=Path, help="folder to write; new or empty")
    about = "a whole model, or only the mask and its values [default: merged]"
    parser.add_argument("--form", default="merged", choices=["merged", "delta"], help=about)


def _export(arguments: argparse.Namespace) -> None:
    from meerkat.export.model import export

    written = export(arguments.folder, arguments.to, arguments.form)
    show(arguments, {"written": str(written)}, f"written: {written}")


COMMANDS = (
    Command(
        "verify",
        "Replay a run from its folder alone; check every record, digest and signature.",
        _verify_arguments,
        _verify,
    ),
    Command("evaluate", "Evaluate a run's model, overall and per class.", _evaluate_arguments, _evaluate),
    Command("report", "Write a page with all figures of a run, or of a comparison.", _report_arguments, _report),
    Command("export", "Write a run's model as a Hugging Face folder or as a sparse delta.", _export_arguments, _export),
)
