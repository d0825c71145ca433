"""A comparison's page: for each study its checks first, then the table, then the figures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import meerkat.report.study_figures as draw
from meerkat.errors import RunFailed
from meerkat.report.drawing import data_size
from meerkat.report.page import Page, Shown, absent, escape, folded, paragraph, pill, table
from meerkat.report.study_facts import Study, finite, mean, numeric, read_studies, spread, told_apart, value_words

Row = Mapping[str, Any]
_NONE, _TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
_FEW = 6
"""A claim with more paired differences has them folded away."""


def write_comparison_report(root: Path) -> Path:
    """Write a comparison's report.html and figures/ into its folder. Returns the page's path.

    Raises:
        MeerkatError: there is no comparison in the folder; RunFailed: it is damaged, or the disk refused.
    """
    try:
        return comparison_page(Path(root)).write(Path(root))
    except (LookupError, TypeError) as error:
        raise RunFailed(f"comparison '{root}': compare.json is damaged ({error!r}); compare again") from None


def comparison_page(root: Path) -> Page:
    """The page of a comparison."""
    held, studies = read_studies(root)
    runs = sum(len(row["seeds"]) for study in studies for row in study.rows)
    model, task = Path(str(held["model"])).name or str(held["model"]), Path(str(held["task"])).stem or str(held["task"])
    page = Page(
        str(held["title"]) or "Comparison",
        f"{model} · {task} · {len(studies)} stud{'y' if len(studies) == 1 else 'ies'}, {runs:,} runs",
    )
    for number, study in enumerate(studies):
        page.section(str(study.held["title"] or study.held["name"]), f"study-{number + 1}-{study.name}")
        if study.held.get("note"):
            page.add(paragraph(str(study.held["note"]), "note"))
        if not study.rows:
            page.add(absent("Nothing to show: none of its runs has ended yet."))
            continue
        _checks(page, study)
        page.add(_table(study))
        _figures(page, study)
    return page


def _checks(page: Page, study: Study) -> None:
    checks = study.held.get("checks", [])
    if checks:
        page.add("<h3>Claims</h3>")
    for i, check in enumerate(checks):
        page.add(
            f'<p class="claim">{pill(str(check["verdict"]))} <b>{escape(str(check["claim"]))}</b> {_overall(check)}</p>'
        )
        held, pairs = _differences(check), check["differences"]
        if sum(bool(finite([one["mean"]])) for one in pairs) < 2:
            page.add(held)
            continue
        said = "A mark a setting, two standard errors either way; where that reaches 0, the pair shows no difference."
        figure = draw.differences(check)
        if len(pairs) <= _FEW:
            page.figures((f"{study.name}-check-{i + 1}", figure, "Differences", said), before=f"<div>{held}</div>")
        else:
            page.figures((f"{study.name}-check-{i + 1}", figure, "Differences", said))
            page.add(folded(f"{len(pairs)} paired differences", held))


def _overall(check: Mapping[str, Any]) -> str:
    """All of a claim's differences together, where they were judged so."""
    if check.get("mean") is None:
        return ""
    error = f" ± {number(check['se'])}" if finite([check.get("se")]) else ""
    return f"<small>{escape(str(check.get('measure', 'accuracy')))} {_signed(check['mean'])}{error}</small>"


def _differences(check: Mapping[str, Any]) -> str:
    pairs = check["differences"]
    if not pairs:
        return absent("No pair of runs to hold it against.")
    rows = [
        (
            escape(name),
            _signed(one["mean"]),
            number(one["se"]),
            f'<span class="{escape(str(one["verdict"]), quote=True)}">{escape(str(one["verdict"]))}</span>',
        )
        for name, one in zip(told_apart([one["setting"] for one in pairs]), pairs, strict=True)
    ]
    said = "Mean difference paired over seeds, its standard error"
    return table(["at", "difference", "s.e.", "verdict"], rows, caption=said)


def _signed(value: float | None) -> str:
    return _NONE if value is None or not math.isfinite(value) else f"{value:+.4f}"


def number(value: float | None, form: str = ".4f") -> str:
    """A number, or a dash where there is none."""
    return _NONE if value is None or not math.isfinite(value) else format(value, form)


def _plus_minus(values: Sequence[float | None], lost: int = 0) -> str:
    if not finite(values):
        return "diverged"
    lost += len(values) - len(finite(values))
    said = f"{mean(values):.3f}"
    if not math.isnan(spread(values)):
        said += f" <small>± {spread(values):.3f}</small>"
    return said + (f"<br><small>{lost} diverged</small>" if lost else "")


def _table(study: Study) -> str:
    rows, axes = study.rows, list(study.axes)
    fastest = min((mean(row["wall_s"]) for row in rows if finite(row["wall_s"])), default=float("nan"))
    stops = any(any(row.get("early_stopped") or []) for row in rows)
    head = [
        *(axis.replace("_", " ") for axis in axes),
        *("accuracy", "before", "loss", "rate", "rounds", "moving", "sent a client", "wall time"),
        *(["stopped early"] if stops else []),
    ]
    lines = []
    for row in rows:
        wall = mean(row["wall_s"])
        lines.append(
            [
                *(escape(_plain(axis, row["setting"].get(axis, ""))) for axis in axes),
                _plus_minus(row["accuracy"], len(row.get("diverged", []))),
                number(mean(row["accuracy_before"]), ".3f"),
                _plus_minus(row["loss"]),
                f"{row['lr']:g}",
                f"{row['rounds']:,}",
                f"{row['params_masked']:,}",
                escape(data_size(row["payload_bytes_up_per_client"])),
                _NONE if math.isnan(wall) else f"{wall / fastest:.2f}{_TIMES} <small>{wall:,.1f} s</small>",
                *([number(mean(row["early_stopped"]), ".3g")] if stops else []),
            ]
        )
    seeds = sorted({len(row["seeds"]) for row in rows})
    over = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    said = (
        f"Mean{' ± deviation' if seeds[-1] > 1 else ''} over {over} seed{'s' * (seeds[-1] > 1)}; the best in bold; "
        "wall time beside the fastest of this table"
    )
    best = {i for i, row in enumerate(rows) if row.get("best")}
    return "<h3>Outcomes</h3>" + table(head, lines, text_columns=len(axes), caption=said, strong=best)


def _plain(axis: str, value: Any) -> str:
    """A value under its axis' name, which the column says."""
    return (
        f"{value:g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else value_words(axis, value)
    )


def _figures(page: Page, study: Study) -> None:
    shown: list[Shown] = []
    missing = False
    for i, (name, rows) in enumerate(study.panels):
        for what in ("accuracy", "loss"):
            figure = draw.curves(study, rows, what)
            missing = missing or figure is None
            if figure is not None:
                many = max(len(row.get("runs", [])) for row in rows) > 1
                said = f"{what.capitalize()} against rounds times T, calibration not counted: "
                said += (
                    "lines are means over seeds, bands reach from the lowest to the highest."
                    if many
                    else "one run each."
                )
                title = _titled(f"{what.capitalize()} over local steps", name)
                shown.append((f"{study.name}-{what}-{i + 1}", figure, title, said))
    said = "One line a setting, one dot a seed, the upright stroke their mean; the best in bold blue."
    shown.append((f"{study.name}-final", draw.final(study), "Final accuracy", said))
    for axis in ("density", "local_steps"):
        if numeric(study.axes.get(axis, [])):
            shown += _along(study, axis)
    for i, (name, rows) in enumerate(study.panels):
        if (figure := draw.rates(study, rows)) is not None:
            said = (
                "Loss on held-back training rows by learning rate, on log scales; a ring marks the rate that was taken"
            )
            diverged = any(not finite([loss]) for row in rows for _, loss in row.get("rates", []))
            said += ", a cross one that diverged." if diverged else "."
            shown.append((f"{study.name}-rates-{i + 1}", figure, _titled("Learning-rate search", name), said))
    page.figures(*shown)
    if missing:
        page.add(absent("Some curves are left out: their run folders are not here."))


def _along(study: Study, axis: str) -> list[Shown]:
    """Loss along a numeric axis: one figure, or one for each value of the first axis where lines would be many."""
    said = "Loss at the end, on log scales: lines join means over seeds, small dots are seeds; lower is better."
    title = {"density": "Loss by share that moves", "local_steps": "Loss by local steps a round"}[axis]
    parted = len(study.axes) > 2 and axis != next(iter(study.axes))
    found: list[Shown] = []
    for i, (name, rows) in enumerate(study.panels if parted else [("", study.rows)]):
        if (figure := draw.along(study, rows, axis, parted)) is not None:
            found.append((f"{study.name}-{axis.replace('_', '-')}-{i + 1}", figure, _titled(title, name), said))
    return found


def _titled(title: str, name: str) -> str:
    return f"{title}, {name}" if name else title


__all__ = ["comparison_page", "write_comparison_report"]
