"""A comparison's outcome: tables, claims checked on paired differences, and their files.

Differences are paired by seed: the same split on both sides and, where T, what moves and calibration agree, the same
batches and directions. A pair holds where the mean difference exceeds its one-sided 95% t limit, fails where it does
so the other way, and is undecided between; with three seeds that takes a clear difference.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from meerkat.comparison.studies import Check, Comparison, Setting, Study, spelled
from meerkat.problems.problem import Better, primary
from meerkat.record.files import write_text
from meerkat.record.summary import worst_class

FILE = "compare.json"
FORMAT = 2

_T95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}
"""One-sided 95% quantiles of Student's t by degrees of freedom; 1.83 is used beyond."""


@dataclass(frozen=True)
class Line:
    """One setting of a study: the rate that was chosen for it, and its run of each seed."""

    study: Study
    setting: Setting
    rates: tuple[tuple[float, float], ...]
    """The search: (learning rate, held-back loss), ascending; nan where it diverged."""
    lrs: tuple[float, ...]
    """Each run's learning rate."""
    better: Mapping[str, Better]
    """The problem's scores, the first of which runs are compared by, and which values of them are better."""
    runs: tuple[Path, ...]
    """Run folders, one a seed, in the order of the comparison's seeds; one that evidence stands for need not exist."""
    summaries: tuple[dict[str, Any] | None, ...]
    """Each run's summary; None where it diverged."""

    @property
    def lr(self) -> float:
        """The first run's learning rate: that of all, unless each measures its own."""
        return self.lrs[0]

    def values(self, score: str) -> list[float]:
        """One score of each seed's run; nan where it diverged."""
        return [math.nan if summary is None else float(summary["scores"][score]) for summary in self.summaries]


def write_results(comparison: Comparison, lines: Sequence[Line], root: Path) -> dict[str, Any]:
    """Write results.csv (a line a run), table.csv (a line a setting) and compare.json, whose content it returns."""
    content = results(comparison, lines, root)
    write_text(root / FILE, json.dumps(content, indent=1) + "\n")
    write_text(root / "results.csv", _as_csv(_runs(lines, comparison.seeds, root)))
    table_rows = (_table_row(study, row) for study in content["studies"] for row in study["rows"])
    write_text(root / "table.csv", _as_csv(table_rows))
    return content


def results(comparison: Comparison, lines: Sequence[Line], root: Path) -> dict[str, Any]:
    """The content of compare.json. Studies without lines are left out, and so are pairs of which a line is missing."""
    studies: list[dict[str, Any]] = []
    for study in comparison.studies:
        if not (of_study := [line for line in lines if line.study is study]):
            continue
        better = of_study[0].better
        studies.append(
            {
                **study.model_dump(include={"name", "title", "note", "axes"}),
                "score": primary(better),
                "better": dict(better),
                "rows": _rows(of_study, comparison.seeds, root),
                "checks": [_checked(check, of_study) for check in study.check],
            }
        )
    return {
        "format": FORMAT,
        "title": comparison.title,
        "model": _shared(lines, "model"),
        "task": _shared(lines, "task") or _shared(lines, "problem"),
        "studies": studies,
    }


def _shared(lines: Sequence[Line], name: str) -> str:
    values = {str(summary[name]) for line in lines for summary in line.summaries if summary is not None}
    return ", ".join(sorted(Path(value).name for value in values))


def _rows(lines: Sequence[Line], seeds: Sequence[int], root: Path) -> list[dict[str, Any]]:
    """The lines as compare.json has them, the best marked; one with a run that diverged is never the best."""
    rows = [_row(line, seeds, root) for line in lines]
    score = primary(better := lines[0].better)
    means = [None if row["diverged"] else mean(row["scores"][score]) for row in rows]
    best_of = max if better[score] == "higher" else min
    best = best_of((value for value in means if value is not None), default=None)
    return [{**row, "best": value is not None and value == best} for row, value in zip(rows, means, strict=True)]


def _row(line: Line, seeds: Sequence[int], root: Path) -> dict[str, Any]:
    config = line.study.config(line.setting, seeds[0])
    summaries = [summary for summary in line.summaries if summary is not None]
    finished = {seed: run for seed, run, s in zip(seeds, line.runs, line.summaries, strict=True) if s is not None}
    accuracies = ("accuracy", "accuracy_worst_class", "accuracy_before") if "accuracy" in line.better else ()

    def each(name: str) -> list[Any]:
        return [summary[name] for summary in summaries]

    def per_client(name: str) -> float:
        return mean(each(name)) / config.clients if summaries else 0.0

    return {
        "setting": dict(line.setting),
        "lr": line.lr,
        "rates": [[rate, None if math.isnan(loss) else loss] for rate, loss in line.rates],
        "seeds": list(finished),
        "diverged": [seed for seed in seeds if seed not in finished],
        "scores": {name: [scores[name] for scores in each("scores")] for name in line.better},
        "scores_before": {name: [scores[name] for scores in each("scores_before")] for name in line.better},
        "worst_class": [worst_class(scores, line.better[primary(line.better)]) for scores in each("per_class")],
        **{name: [summary.get(name) for summary in summaries] for name in accuracies},
        "loss": each("loss"),
        "rounds": config.rounds,
        "local_steps": config.local_steps,
        "params_masked": summaries[0]["params_masked"] if summaries else 0,
        "payload_bytes_up_per_client": per_client("payload_bytes_up"),
        "payload_bytes_down_per_client": per_client("payload_bytes_down"),
        **{name: each(name) for name in ("client_steps", "calibration_steps", "wall_s")},
        "early_stopped": [len(clients) for clients in each("early_stopped_clients")],
        "runs": [run.relative_to(root).as_posix() for run in finished.values() if run.exists()],
    }


def _runs(lines: Sequence[Line], seeds: Sequence[int], root: Path) -> Iterator[dict[str, Any]]:
    """Lines of results.csv; what only a finished run has is None where it diverged."""
    for line in lines:
        first, *others = line.better
        for seed, summary, run, lr in zip(seeds, line.summaries, line.runs, line.lrs, strict=True):
            config, facts = line.study.config(line.setting, seed), summary or {}
            scores = facts.get("scores", {})
            yield {
                "study": line.study.name,
                **spelled(line.setting),
                "seed": seed,
                "outcome": "finished" if summary else "diverged",
                # an axis may have one of these names: what is known without a run stands there in any case
                "lr": lr,
                "rounds": config.rounds,
                "local_steps": config.local_steps,
                "params_masked": facts.get("params_masked"),
                f"{first}_before": facts.get("scores_before", {}).get(first),
                first: scores.get(first),
                f"{first}_worst_class": worst_class(facts.get("per_class", {}), line.better[first]),
                **{name: scores.get(name) for name in others},
                **{name: facts.get(name) for name in ("payload_bytes_up", "payload_bytes_down", "client_steps")},
                **{name: facts.get(name) for name in ("calibration_steps", "wall_s", "theta_digest")},
                "run": run.relative_to(root).as_posix() if run.exists() else "",
            }


def _table_row(study: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    def mean_of(values: Sequence[float]) -> float | None:
        return mean(values) if values else None

    scores: dict[str, float | None] = {}
    for name, values in row["scores"].items():
        scores |= {f"{name}_mean": mean_of(values), f"{name}_sd": stdev(values) if len(values) > 1 else None}
        if name == study["score"]:
            scores[f"{name}_worst_class"] = mean_of([value for value in row["worst_class"] if value is not None])
    same = ("lr", "rounds", "params_masked", "payload_bytes_up_per_client", "payload_bytes_down_per_client")
    return {
        "study": study["name"],
        **spelled(row["setting"]),
        "seeds": len(row["seeds"]),
        "diverged": len(row["diverged"]),
        **scores,
        **{name: row[name] for name in same},
        "client_steps": mean_of(row["client_steps"]),
        "wall_s": mean_of(row["wall_s"]),
        "best": row["best"],
    }


def _as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    out, rows = io.StringIO(), list(rows)
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# --- claims ---------------------------------------------------------------------------------------


def _checked(check: Check, lines: Sequence[Line]) -> dict[str, Any]:
    """A claim and its verdict: every paired difference, and all of them together.

    A claim about several pairs holds where each does: it is not one about their average.
    """
    measure = check.measure or primary(lines[0].better)
    value, others = (check.equal[0], check.equal[1:]) if check.equal else (check.better, check.than)
    sign = 1 if lines[0].better[measure] == "higher" else -1
    differences, by_pair = [], []
    for line in lines:
        if line.setting[check.axis] != value or any(line.setting[k] != v for k, v in check.where.items()):
            continue
        for other in others:
            twins = (one.values(measure) for one in lines if one.setting == {**line.setting, check.axis: other})
            if (twin := next(twins, None)) is None:
                continue
            by_seed = [sign * (here - there) for here, there in zip(line.values(measure), twin, strict=True)]
            rest = {axis: fixed for axis, fixed in line.setting.items() if axis != check.axis}
            ours, theirs = (spelled({check.axis: one})[check.axis] for one in (value, other))
            setting = {**rest, check.axis: f"{ours} against {theirs}"}
            differences.append({"setting": setting, **_verdict(by_seed, twin, check)})
            by_pair.append(by_seed)
    together = _verdict([mean(values) for values in zip(*by_pair, strict=True)], None, check)
    verdicts = {difference["verdict"] for difference in differences}
    verdict = "fails" if "fails" in verdicts else "holds" if verdicts == {"holds"} else "undecided"
    return {"claim": check.claim, "measure": measure, **together, "verdict": verdict, "differences": differences}


def _verdict(differences: Sequence[float], reference: Sequence[float] | None, check: Check) -> dict[str, Any]:
    """Mean, standard error, half of the 90% interval, and verdict of paired differences.

    A run that diverged leaves it undecided.

    Args:
        reference: the reference's scores, seed by seed; None where several pairs are taken together.
    """
    if any(math.isnan(value) for value in differences) or len(differences) < 2:
        only = differences[0] if len(differences) == 1 and math.isfinite(differences[0]) else None
        return {"mean": only, "se": None, "limit": None, "verdict": "undecided"}
    level, error = mean(differences), stdev(differences) / math.sqrt(len(differences))
    limit = _T95.get(len(differences) - 1, 1.83) * error
    if check.equal:
        within = max(reference) - min(reference) if reference else limit
        verdict = "holds" if abs(level) <= within else "fails" if abs(level) > limit else "undecided"
    else:
        verdict = "holds" if level > limit else "fails" if level < -limit else "undecided"
    return {"mean": level, "se": error, "limit": limit, "verdict": verdict}


# --- the terminal ---------------------------------------------------------------------------------


def table(content: Mapping[str, Any], bold: bool = False) -> str:
    """A comparison as text: one table a study, its score as mean and standard deviation, the best in bold or starred.

    Means are over the runs that did not diverge; a setting with one that did is never the best.
    """
    parts = []
    for study in content["studies"]:
        cells = [_cells(row, study["score"]) for row in study["rows"]]
        widths = [max(len(name), *(len(line[name]) for line in cells)) for name in cells[0]]
        parts.append(f"{study['name']}: {study['title']}" if study["title"] else study["name"])
        parts.append("  " + _padded(cells[0], widths))
        for row, line in zip(study["rows"], cells, strict=True):
            text = ("* " if row["best"] else "  ") + _padded(line.values(), widths)
            parts.append(f"\033[1m{text}\033[0m" if bold and row["best"] else text)
        for check in study["checks"]:
            error = "" if check["se"] is None else f" +- {check['se']:.3f}"
            difference = "" if check["mean"] is None else f" ({check['mean']:+.3f}{error})"
            parts.append(f"  {check['verdict']:>9}: {check['claim']}{difference}")
        parts.append("")
    return "\n".join(parts).rstrip()


def _padded(words: Iterable[str], widths: Sequence[int]) -> str:
    return "  ".join(word.ljust(width) for word, width in zip(words, widths, strict=True)).rstrip()


def _cells(row: Mapping[str, Any], score: str) -> dict[str, str]:
    values, diverged = row["scores"][score], len(row["diverged"])
    outcome = f"{mean(values):.3f}" if values else "diverged"
    outcome += f" +- {stdev(values):.3f}" if len(values) > 1 else ""
    outcome += f" ({diverged} of {len(row['seeds']) + diverged} diverged)" if values and diverged else ""
    return {
        **{name: str(value) for name, value in spelled(row["setting"]).items()},
        score: outcome,
        **({} if score == "loss" else {"loss": f"{mean(row['loss']):.3f}" if row["loss"] else ""}),
        "lr": f"{row['lr']:g}",
        "rounds": str(row["rounds"]),
        "bytes up a client": f"{row['payload_bytes_up_per_client']:,.0f}",
        "seconds": f"{mean(row['wall_s']):.0f}" if row["wall_s"] else "",
    }
