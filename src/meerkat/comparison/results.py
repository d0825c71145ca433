"""A comparison's outcome: tables, claims checked on paired differences, and their files.

Differences are paired by seed: the same split on both sides, and where T, what moves and calibration agree also
the same batches and directions. A pair holds where the mean difference exceeds its one-sided 95% t limit, fails
where it does so the other way, and is undecided between; with three seeds that takes a clear difference. A claim
about several pairs holds where each does.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from meerkat.comparison.studies import Check, Comparison, Setting, Study, spelled
from meerkat.problems.problem import Better, primary
from meerkat.record.run_folder import write_atomically
from meerkat.run.summary import worst_class

FORMAT = 2

_OF_A_RUN = (
    *("payload_bytes_up", "payload_bytes_down"),
    *("client_steps", "calibration_steps", "wall_s", "theta_digest"),
)
"""What results.csv takes from a run's summary beside its scores; empty where it diverged."""

_T95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}
"""One-sided 95% quantiles of Student's t by degrees of freedom; 1.83 is used beyond."""


@dataclass(frozen=True)
class Line:
    """One setting of a study: the rate that was found for it, and its run of each seed."""

    study: Study
    setting: Setting
    rates: tuple[tuple[float, float], ...]
    """The search: (learning rate, held-back loss), ascending; nan where it diverged."""
    lr: float
    better: Mapping[str, Better]
    """The problem's scores, the first of which runs are compared by, and which values of them are better."""
    runs: tuple[Path, ...]
    """Run folders, one a seed, in the order of the comparison's seeds."""
    summaries: tuple[dict[str, Any] | None, ...]
    """Each run's summary; None where it diverged."""

    def values(self, score: str) -> list[float]:
        """One score of each seed's run; nan where it diverged."""
        return [math.nan if summary is None else float(summary["scores"][score]) for summary in self.summaries]


def write_results(comparison: Comparison, lines: Sequence[Line], root: Path) -> dict[str, Any]:
    """Write results.csv (a line a run), table.csv (a line a setting) and compare.json, whose content it returns."""
    held: dict[str, Any] = {
        "format": FORMAT,
        "title": comparison.title,
        "model": _shared(lines, "model"),
        "task": _shared(lines, "task") or _shared(lines, "problem"),
        "studies": [
            {
                "name": study.name,
                "title": study.title,
                "note": study.note,
                "axes": study.axes,
                "score": primary(better := next(line.better for line in lines if line.study is study)),
                "better": dict(better),
                "rows": _rows(comparison, [line for line in lines if line.study is study], root),
                "checks": [_checked(check, [line for line in lines if line.study is study]) for check in study.check],
            }
            for study in comparison.studies
        ],
    }
    _write(root / "compare.json", json.dumps(held, indent=1) + "\n")
    _write(root / "results.csv", _as_csv(_runs(comparison, lines, root)))
    _write(root / "table.csv", _as_csv([_flat(study, row) for study in held["studies"] for row in study["rows"]]))
    return held


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def _shared(lines: Sequence[Line], name: str) -> str:
    found = {str(s[name]) for line in lines for s in line.summaries if s is not None}
    return Path(found.pop()).name if len(found) == 1 else ", ".join(sorted(Path(value).name for value in found))


def _rows(comparison: Comparison, lines: Sequence[Line], root: Path) -> list[dict[str, Any]]:
    rows = [_row(comparison, line, root) for line in lines]
    score = primary(better := lines[0].better)
    level = [None if row["diverged"] else mean(row["scores"][score]) for row in rows]
    best_of = max if better[score] == "higher" else min
    best = best_of((value for value in level if value is not None), default=None)
    return [{**row, "best": value is not None and value == best} for row, value in zip(rows, level, strict=True)]


def _row(comparison: Comparison, line: Line, root: Path) -> dict[str, Any]:
    sound = [(seed, s) for seed, s in zip(comparison.seeds, line.summaries, strict=True) if s is not None]
    config = line.study.config(line.setting, comparison.seeds[0])
    clients = config.clients

    def each(name: str) -> list[Any]:
        return [summary[name] for _, summary in sound]

    return {
        "setting": dict(line.setting),
        "lr": line.lr,
        "rates": [[rate, None if math.isnan(loss) else loss] for rate, loss in line.rates],
        "seeds": [seed for seed, _ in sound],
        "diverged": [seed for seed, s in zip(comparison.seeds, line.summaries, strict=True) if s is None],
        "scores": {name: [summary["scores"][name] for _, summary in sound] for name in line.better},
        "scores_before": {name: [summary["scores_before"][name] for _, summary in sound] for name in line.better},
        "worst_class": [worst_class(summary["per_class"], next(iter(line.better.values()))) for _, summary in sound],
        **(_accuracies([summary for _, summary in sound]) if "accuracy" in line.better else {}),
        "loss": each("loss"),
        "rounds": config.rounds,
        "local_steps": config.local_steps,
        "params_masked": each("params_masked")[0] if sound else 0,
        "payload_bytes_up_per_client": mean(each("payload_bytes_up")) / clients if sound else 0.0,
        "payload_bytes_down_per_client": mean(each("payload_bytes_down")) / clients if sound else 0.0,
        "client_steps": each("client_steps"),
        "calibration_steps": each("calibration_steps"),
        "wall_s": each("wall_s"),
        "early_stopped": [len(found) for found in each("early_stopped_clients")],
        "runs": [
            run.relative_to(root).as_posix() for run, s in zip(line.runs, line.summaries, strict=True) if s is not None
        ],
    }


def _accuracies(summaries: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = ("accuracy", "accuracy_worst_class", "accuracy_before")
    return {name: [summary.get(name) for summary in summaries] for name in names}


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _sd(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _runs(comparison: Comparison, lines: Sequence[Line], root: Path) -> list[dict[str, Any]]:
    return [
        {
            "study": line.study.name,
            **spelled(line.setting),
            "seed": seed,
            "outcome": "diverged" if summary is None else "finished",
            # a setting may be called as one of these: what is known without a run stands there in any case
            "lr": line.lr,
            "rounds": (config := line.study.config(line.setting, seed)).rounds,
            "local_steps": config.local_steps,
            "params_masked": None if summary is None else summary["params_masked"],
            **_scores_of(line.better, summary),
            **{name: None if summary is None else summary.get(name) for name in _OF_A_RUN},
            "run": run.relative_to(root).as_posix(),
        }
        for line in lines
        for seed, summary, run in zip(comparison.seeds, line.summaries, line.runs, strict=True)
    ]


def _scores_of(better: Mapping[str, Better], summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """A run's scores as columns: the first one before and after and of the label that does worst, then the others."""
    first, *others = better
    names = (f"{first}_before", first, f"{first}_worst_class", *others)
    if summary is None:
        return dict.fromkeys(names)
    after = summary["scores"]
    worst = worst_class(summary["per_class"], better[first])
    values = (summary["scores_before"][first], after[first], worst, *(after[name] for name in others))
    return dict(zip(names, values, strict=True))


def _flat(study: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "study": study["name"],
        **spelled(row["setting"]),
        "seeds": len(row["seeds"]),
        "diverged": len(row["diverged"]),
        **_mean_scores(study["score"], row),
        "lr": row["lr"],
        "rounds": row["rounds"],
        "params_masked": row["params_masked"],
        "payload_bytes_up_per_client": row["payload_bytes_up_per_client"],
        "payload_bytes_down_per_client": row["payload_bytes_down_per_client"],
        "client_steps": _mean(row["client_steps"]),
        "wall_s": _mean(row["wall_s"]),
        "best": row["best"],
    }


def _mean_scores(first: str, row: Mapping[str, Any]) -> dict[str, float | None]:
    columns: dict[str, float | None] = {}
    for name, values in row["scores"].items():
        columns |= {f"{name}_mean": _mean(values), f"{name}_sd": _sd(values)}
        if name == first:
            columns[f"{name}_worst_class"] = _mean([value for value in row["worst_class"] if value is not None])
    return columns


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# --- claims ---------------------------------------------------------------------------------------


def _checked(check: Check, lines: Sequence[Line]) -> dict[str, Any]:
    """A claim and what the runs say of it: every paired difference, and all of them together."""
    differences, by_seed = [], []
    others = list(check.than or [check.equal[1]])
    measure = check.measure or primary(lines[0].better)
    one = check.equal[0] if check.equal else check.better
    for line in lines:
        if line.setting[check.axis] != one or any(line.setting[k] != v for k, v in check.where.items()):
            continue
        for other in others:
            twin = next(t for t in lines if t.setting == {**line.setting, check.axis: other})
            found = _difference(line, twin, measure)
            rest = {k: v for k, v in line.setting.items() if k != check.axis}
            differences.append(
                {
                    "setting": {**rest, check.axis: f"{one} against {other}"},
                    **_judged(found, twin.values(measure), check),
                }
            )
            by_seed.append(found)
    together = [mean(values) for values in zip(*by_seed, strict=True)]
    whole = _judged(together, None, check)
    # a claim about several is none about their average
    verdicts = {d["verdict"] for d in differences}
    verdict = next(iter(verdicts)) if len(verdicts) == 1 else "fails" if "fails" in verdicts else "undecided"
    return {"claim": check.claim, "measure": measure, **whole, "verdict": verdict, "differences": differences}


def _difference(line: Line, twin: Line, score: str) -> list[float]:
    """By how much a setting does better than its twin, seed by seed."""
    sign = 1 if line.better[score] == "higher" else -1
    pairs = zip(line.values(score), twin.values(score), strict=True)
    return [sign * (ours - theirs) for ours, theirs in pairs]


def _judged(found: Sequence[float], reference: Sequence[float] | None, check: Check) -> dict[str, Any]:
    """Mean, standard error and verdict of paired differences. A run that diverged leaves it undecided.

    Args:
        reference: the reference's scores, seed by seed; None where several pairs are taken together.
    """
    if any(math.isnan(value) for value in found) or len(found) < 2:
        alone = len(found) == 1 and math.isfinite(found[0])
        return {"mean": found[0] if alone else None, "se": None, "verdict": "undecided"}
    level, error = mean(found), stdev(found) / math.sqrt(len(found))
    limit = _T95.get(len(found) - 1, 1.83) * error
    if check.equal:
        within = max(reference) - min(reference) if reference else limit
        verdict = "holds" if abs(level) <= within else "fails" if abs(level) > limit else "undecided"
    else:
        verdict = "holds" if level > limit else "fails" if level < -limit else "undecided"
    return {"mean": level, "se": error, "verdict": verdict}


# --- the terminal ---------------------------------------------------------------------------------


def table(held: Mapping[str, Any], bold: bool = False) -> str:
    """A comparison as text: one table a study, its score as mean and standard deviation, the best in bold or starred.

    Means are over the runs that did not diverge; a setting with one that did is never the best.
    """
    parts = []
    for study in held["studies"]:
        body = [_cells(row, study["score"]) for row in study["rows"]]
        head = list(body[0])
        widths = [max(len(name), *(len(line[name]) for line in body)) for name in head]
        parts.append(f"{study['name']}: {study['title']}" if study["title"] else study["name"])
        parts.append("  " + "  ".join(word.ljust(width) for word, width in zip(head, widths, strict=True)).rstrip())
        for row, line in zip(study["rows"], body, strict=True):
            text = "  ".join(word.ljust(width) for word, width in zip(line.values(), widths, strict=True)).rstrip()
            mark = "* " if row["best"] else "  "
            parts.append(f"\033[1m{mark}{text}\033[0m" if bold and row["best"] else mark + text)
        for check in study["checks"]:
            parts.append(f"  {check['verdict']:>9}: {check['claim']}{_signed(check)}")
        parts.append("")
    return "\n".join(parts).rstrip()


def _cells(row: Mapping[str, Any], score: str) -> dict[str, str]:
    values = row["scores"][score]
    found = f"{mean(values):.3f}" if values else "diverged"
    if len(values) > 1:
        found += f" +- {stdev(values):.3f}"
    if values and row["diverged"]:
        found += f" ({len(row['diverged'])} of {len(row['seeds']) + len(row['diverged'])} diverged)"
    return {
        **{name: str(value) for name, value in spelled(row["setting"]).items()},
        score: found,
        **({} if score == "loss" else {"loss": f"{mean(row['loss']):.3f}" if row["loss"] else ""}),
        "lr": f"{row['lr']:g}",
        "rounds": str(row["rounds"]),
        "bytes up a client": f"{row['payload_bytes_up_per_client']:,.0f}",
        "seconds": f"{mean(row['wall_s']):.0f}" if row["wall_s"] else "",
    }


def _signed(check: Mapping[str, Any]) -> str:
    if check["mean"] is None:
        return ""
    error = "" if check["se"] is None else f" +- {check['se']:.3f}"
    return f" ({check['mean']:+.3f}{error})"
