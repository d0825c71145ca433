"""A comparison's page: for each study its claims, then the table, then the figures."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from meerkat.errors import DAMAGE, RunFailed, in_short
from meerkat.progress import number_of
from meerkat.report import comparison_figures as draw
from meerkat.report.facts import Row, Study, distinct_names, finite, mean, read_comparison, value_in_words
from meerkat.report.page import CaptionedFigure, Page, absent, escape, file_name, folded, paragraph, pill, table
from meerkat.report.sentences import data_size

_DASH, _TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
_FEW = 6
"""A claim with more paired differences has them folded away."""


def write_comparison_report(root: Path) -> Path:
    """Write a comparison's report.html and figures/ into its folder. Returns the page's path.

    Raises:
        MeerkatError: there is no comparison in the folder.
        RunFailed: compare.json is damaged, or a file cannot be written.
    """
    try:
        return comparison_page(Path(root)).write(Path(root))
    except (MemoryError, *DAMAGE) as error:
        raise RunFailed(f"comparison '{root}': a file in it is damaged ({in_short(error)}); compare again") from None


def comparison_page(root: Path) -> Page:
    """The page of a comparison."""
    content, studies = read_comparison(root)
    runs = sum(len(row["seeds"]) + len(row.get("diverged", [])) for study in studies for row in study.rows)
    model, task = str(content["model"]), str(content["task"])
    parts = [Path(model).name or model] if model else []
    parts += [Path(task).stem or task, f"{len(studies)} stud{'y' if len(studies) == 1 else 'ies'}"]
    parts.append(number_of(runs, "run"))
    page = Page(str(content["title"]) or "Comparison", " · ".join(parts))
    for place, study in enumerate(studies, 1):
        page.section(study.title or study.name, f"study-{place}-{study.stem}")
        if study.note:
            page.add(paragraph(study.note, "note"))
        if not study.rows:
            page.add(absent("Nothing to show: none of its runs has ended yet."))
            continue
        if study.checks:
            page.add("<h3>Claims</h3>")
        for number, claim in enumerate(study.checks, 1):
            _claim(page, claim, f"{study.stem}-check-{number}")
        page.add("<h3>Outcomes</h3>" + _outcomes(study))
        _figures(page, study)
    return page


def _claim(page: Page, claim: Mapping[str, Any], name: str) -> None:
    overall = ""
    if claim.get("mean") is not None:
        error = f" ± {_number(claim['se'])}" if finite([claim.get("se")]) else ""
        overall = f"<small>{escape(str(claim['measure']))} {_number(claim['mean'], '+.4f')}{error}</small>"
    verdict = pill(str(claim["verdict"]))
    page.add(f'<p class="claim">{verdict} <b>{escape(str(claim["claim"]))}</b> {overall}</p>')
    pairs, html = claim["differences"], _differences(claim["differences"])
    if len(finite([pair["mean"] for pair in pairs])) < 2:
        page.add(html)
        return
    caption = "One mark a setting, with its 90% interval (Student's t); where it reaches 0, there may be no difference."
    figure = CaptionedFigure(name, draw.differences(claim), "Differences", caption)
    page.figures(figure, before=f"<div>{html}</div>" if len(pairs) <= _FEW else "")
    if len(pairs) > _FEW:
        page.add(folded(f"{len(pairs)} paired differences", html))


def _differences(pairs: Sequence[Mapping[str, Any]]) -> str:
    if not pairs:
        return absent("No pair of runs to check it on.")
    rows = []
    for name, pair in zip(distinct_names([pair["setting"] for pair in pairs]), pairs, strict=True):
        verdict = escape(str(pair["verdict"]))
        verdict = f'<span class="{verdict}">{verdict}</span>'
        rows.append((escape(name), _number(pair["mean"], "+.4f"), _number(pair["se"]), verdict))
    caption = "Mean difference, paired over seeds, and its standard error"
    return table(["at", "difference", "s.e.", "verdict"], rows, caption=caption)


def _number(value: float | None, form: str = ".4f") -> str:
    """A number, or a dash where there is none."""
    return _DASH if value is None or not math.isfinite(value) else format(value, form)


def _outcomes(study: Study) -> str:
    fastest = min((mean(row["wall_s"]) for row in study.rows if finite(row["wall_s"])), default=math.nan)
    with_stops = any(any(row.get("early_stopped") or []) for row in study.rows)
    head = [
        *(axis.replace("_", " ") for axis in study.axes),
        *(study.score, "before", *(score for score in study.better if score != study.score)),
        *("rate", "rounds", "moving", "sent a client", "wall time"),
        *(["stopped early"] if with_stops else []),
    ]
    lines = [_outcome(study, row, fastest, with_stops) for row in study.rows]
    seeds = [len(row["seeds"]) for row in study.rows]
    fewest, most = min(seeds), max(seeds)
    over = f"{most}" if fewest == most else f"{fewest} to {most}"
    caption = (
        f"Mean{' ± standard deviation' if most > 1 else ''} over {over} seed{'s' * (most > 1)}; the best in "
        "bold; wall time as a multiple of the fastest in this table"
    )
    best = {i for i, row in enumerate(study.rows) if row.get("best")}
    return table(head, lines, text_columns=len(study.axes), caption=caption, bold=best)


def _outcome(study: Study, row: Row, fastest: float, with_stops: bool) -> list[str]:
    wall, scores = mean(row["wall_s"]), row["scores"]
    return [
        *(escape(_plain_value(axis, row["setting"].get(axis, ""))) for axis in study.axes),
        _mean_and_deviation(scores[study.score], len(row.get("diverged", []))),
        _number(mean(row["scores_before"][study.score]), ".3f"),
        *(_mean_and_deviation(scores[score]) for score in study.better if score != study.score),
        f"{row['lr']:g}",
        f"{row['rounds']:,}",
        f"{row['params_masked']:,}",
        data_size(row["payload_bytes_up_per_client"]),
        _DASH if math.isnan(wall) else f"{wall / fastest:.2f}{_TIMES} <small>{wall:,.1f} s</small>",
        *([_number(mean(row["early_stopped"]), ".3g")] if with_stops else []),
    ]


def _mean_and_deviation(values: Sequence[float | None], diverged: int = 0) -> str:
    numbers = finite(values)
    if not numbers:
        return "diverged"
    diverged += len(values) - len(numbers)
    deviation = f" <small>± {statistics.stdev(numbers):.3f}</small>" if len(numbers) > 1 else ""
    return f"{mean(numbers):.3f}{deviation}" + (f"<br><small>{diverged} diverged</small>" if diverged else "")


def _plain_value(axis: str, value: Any) -> str:
    """A value without its symbol, which the column's head gives."""
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if type(value) is int else value_in_words(axis, value)


def _figures(page: Page, study: Study) -> None:
    curves = [_curves(study, panel, score) for panel in range(len(study.panels)) for score in study.better]
    caption = "One line a setting, one dot a seed, the upright stroke their mean; the best in bold blue."
    page.figures(
        *(figure for figure in curves if figure is not None),
        CaptionedFigure(f"{study.stem}-final", draw.final(study), f"Final {study.score}", caption),
        *_loss_along(study, "density", "Loss by share that moves"),
        *_loss_along(study, "local_steps", "Loss by local steps a round"),
        *_rate_searches(study),
    )
    if None in curves:
        page.add(absent("Some curves are left out: their run folders are not here."))


def _curves(study: Study, panel: int, score: str) -> CaptionedFigure | None:
    """A score over local steps in one panel; None where its run folders are not there."""
    name, rows = study.panels[panel]
    if (figure := draw.curves(study, rows, score)) is None:
        return None
    several = max(len(row.get("runs", [])) for row in rows) > 1
    drawn = "lines are means over seeds, bands reach from the lowest to the highest" if several else "one run each"
    caption = f"{score.capitalize()} against rounds times T, without calibration: {drawn}."
    if any(len(curve[1]) < len(row["seeds"]) for row in rows if (curve := study.curves(row, score)) is not None):
        caption += " Some seeds are not drawn: their run folders are not here."
    title = _titled(f"{score.capitalize()} over local steps", name)
    return CaptionedFigure(f"{study.stem}-{file_name(score)}-{panel + 1}", figure, title, caption)


def _loss_along(study: Study, axis: str, title: str) -> Iterator[CaptionedFigure]:
    """Loss along a numeric axis: one figure, or one for each value of the first axis where lines would be many."""
    if not study.has_log_scale(axis):
        return
    caption = "Final loss, on log scales: lines join means over seeds, small dots are seeds; lower is better."
    by_panel = len(study.axes) > 2 and axis != next(iter(study.axes))
    for i, (name, rows) in enumerate(study.panels if by_panel else [("", study.rows)], 1):
        if (figure := draw.loss_along(study, rows, axis, by_panel)) is not None:
            yield CaptionedFigure(f"{study.stem}-{axis.replace('_', '-')}-{i}", figure, _titled(title, name), caption)


def _rate_searches(study: Study) -> Iterator[CaptionedFigure]:
    for i, (name, rows) in enumerate(study.panels, 1):
        if (figure := draw.rate_search(study, rows)) is not None:
            diverged = any(not finite([loss]) for row in rows for _, loss in row.get("rates", []))
            caption = (
                "Loss on held-back training rows by learning rate, on log scales; a ring marks the rate that was chosen"
                f"{', a cross one that diverged' if diverged else ''}."
            )
            yield CaptionedFigure(f"{study.stem}-rates-{i}", figure, _titled("Learning-rate search", name), caption)


def _titled(title: str, panel: str) -> str:
    return f"{title}, {panel}" if panel else title
