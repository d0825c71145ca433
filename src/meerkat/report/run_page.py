"""A run's page: its outcome, learning, bytes, clients, mask and settings."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from meerkat.errors import DAMAGE, RunFailed, in_short
from meerkat.masks.sparse_mask import CURVATURE, CURVE, SparseMask
from meerkat.problems.problem import RANGES
from meerkat.progress import number_of
from meerkat.report import run_figures as draw
from meerkat.report import sentences
from meerkat.report.client_figures import running_mean
from meerkat.report.clients import CLIENT_SECTIONS
from meerkat.report.facts import RunFacts
from meerkat.report.page import CaptionedFigure, Page, absent, escape, file_name, folded, key_numbers, paragraph, table
from meerkat.report.sentences import as_sentence, data_size, duration, percent, three_decimals
from meerkat.report.style import CYCLE
from meerkat.run.metrics import EvaluationMetric
from meerkat.run.sentences import budgets_in_words, defence_in_words, rate_in_words
from meerkat.settings.auto import number
from meerkat.settings.config import CLASSIFICATION, SITES, RunConfig


def write_run_report(root: Path) -> Path:
    """Write a run's report.html and figures/ into its folder. Returns the page's path.

    Raises:
        MeerkatError: there is no run in the folder.
        RunFailed: a file in it is damaged, or one cannot be written.
    """
    try:
        return run_page(RunFacts.read(Path(root))).write(Path(root))
    except (MemoryError, *DAMAGE) as error:
        reason = in_short(error)
        raise RunFailed(f"run folder '{root}': a file in it is damaged ({reason}); restore it from a copy") from None


def run_page(run: RunFacts) -> Page:
    """The page of a run, as far as the run got."""
    config = run.config
    parts = [Path(config.model).name or config.model] if config.problem == CLASSIFICATION else []
    parts += [
        f"{number_of(config.clients, 'client')}, {config.partition}",
        f"{number_of(config.rounds, 'round')} of {number_of(config.local_steps, 'local step')}",
        f"seed {config.seed}",
    ]
    page = Page(f"{config.method} on {Path(config.task).stem or config.problem}", " · ".join(parts))
    for section in (_outcome, _learning, _bytes, *CLIENT_SECTIONS, _mask, _settings):
        section(page, run)
    return page


def _outcome(page: Page, run: RunFacts) -> None:
    page.section("Outcome", "outcome")
    if run.summary is not None:
        sent = run.payload(("round",), ("up",)), run.payload(("calibration",), ("up",))
        page.add(paragraph(sentences.outcome(run.summary, *sent), "lead"))
    else:
        why = "".join(m.get("why", "it does not say how") for m in run.of_kind("diverged")[-1:])
        page.add(paragraph(sentences.unfinished(run.rounds, run.config.rounds, why), "alert"))
        page.add(paragraph(sentences.score_so_far(run.evaluations), "lead"))
    if defence := defence_in_words(run.config):
        page.add(paragraph(as_sentence(defence)))
    if run.without_budget:
        page.add(paragraph(as_sentence(budgets_in_words(run.without_budget, run.config.clients))))
    page.add(key_numbers(_key_numbers(run)))


def _key_numbers(run: RunFacts) -> list[tuple[str, str, str]]:
    numbers = []
    if run.evaluations:
        before, after = run.evaluations[0].scores, run.evaluations[-1].scores
        remarks = {name: f"{three_decimals(before.get(name))} before" for name in after}
        if len(run.evaluations) == 1:
            remarks = dict.fromkeys(after, "before the first round")
        numbers = [(name, f"{value:.3f}", remarks[name]) for name, value in after.items() if value is not None]
    if run.mask is not None:
        moving, total = len(run.mask), run.mask.total
        numbers.append(("parameters moved", f"{moving:,}", f"{percent(moving / total)} of {total:,}"))
    steps = sum(m["steps"] for m in run.metrics if m["kind"] in ("round", "calibration"))
    numbers.append(("rounds", f"{run.rounds:,}", f"{steps:,} local steps of all clients"))
    if run.metrics:
        included = ", calibration included" if run.of_kind("calibration") else ""
        numbers.append(("payload a client", data_size(run.payload()), f"up and down{included}"))
    if run.config.recipe.early_stop != "none" or run.stopped:
        known = "" if run.extreme is None else f"; {len(run.extreme):,} hold{'s' * (len(run.extreme) == 1)} one label"
        remark = f"of {number_of(run.config.clients, 'client')}{known}"
        numbers.append(("stopped early", f"{len(run.stopped):,}", remark))
    walls = [m.get("wall_s", 0.0) for m in run.metrics if m["kind"] in ("round", "calibration", "evaluation")]
    if walls and all(walls):  # a round that was made again from the log has no time, or 0
        where = "over a network" if run.config.partition == SITES else "simulated on one machine"
        numbers.append(("wall time", duration(sum(walls)), where))
    return numbers


def _learning(page: Page, run: RunFacts) -> None:
    page.section("Learning", "learning")
    if not run.evaluations:
        page.add(absent("No curves: metrics.jsonl has no evaluation."))
        return
    scores = [score for score, value in run.evaluations[-1].scores.items() if value is not None]
    page.figures(*(_over_rounds(run, score) for score in scores), *(_over_bytes(run, score) for score in scores))
    _score_by_class(page, run.evaluations)


def _over_rounds(run: RunFacts, score: str) -> CaptionedFigure:
    last = run.evaluations[-1]
    rows = "held-back training rows" if run.config.held_back else "validation rows"
    rows = f"at most {most:,} {rows}" if (most := run.config.max_eval_samples) else rows
    rows = "the sites' own validation rows" if last.rows is not None else rows
    training = _training_loss(run) if score == "loss" else None
    grey = ", and in grey on the clients' own training batches, as a running mean" if training else ""
    caption = f"Mean {score} on {rows}{grey}; {last.better[score]} is better."
    if score == "accuracy":
        caption = f"Share of {rows} that the shared model gets right; higher is better."
    figure = draw.over_rounds([m.round for m in run.evaluations], _values(run, score), score, training)
    return CaptionedFigure(f"{file_name(score)}-rounds", figure, f"{score.capitalize()} over rounds", caption)


def _over_bytes(run: RunFacts, score: str) -> CaptionedFigure:
    calibration = run.payload(("calibration",)) if len(run.of_kind("calibration")) == 1 else 0.0
    shaded = "; the shaded part is what calibration cost before the first round" if calibration else ""
    caption = f"The same {score} against the bytes that a client has sent and received, on average{shaded}."
    sent = [run.payload(before=m.round) for m in run.evaluations]
    figure = draw.over_bytes(sent, _values(run, score), score, calibration)
    return CaptionedFigure(f"{file_name(score)}-bytes", figure, f"{score.capitalize()} over payload", caption)


def _values(run: RunFacts, score: str) -> list[float]:
    """The score in each evaluation; nan where it is not known."""
    values = [evaluation.scores.get(score) for evaluation in run.evaluations]
    return [np.nan if value is None else value for value in values]


def _training_loss(run: RunFacts) -> draw.Points | None:
    """The clients' mean training loss in each round, smoothed; None where no round has one.

    A round that was lost and made again from the log has none.
    """
    rounds = [m for m in run.of_kind("round") if m["loss"] is not None]
    if not rounds:
        return None
    losses = np.array([m["loss"] for m in rounds], np.float64)
    return [m["round"] + 0.5 for m in rounds], running_mean(losses, max(1, len(losses) // 15)).tolist()


def _score_by_class(page: Page, evaluations: Sequence[EvaluationMetric]) -> None:
    score, classes = evaluations[-1].score, evaluations[-1].per_class
    if not classes:
        return
    beside = _class_table(score, evaluations[0].per_class, classes)
    if not 2 <= len(classes) <= len(CYCLE):
        page.add(beside)
        return
    curves = {label: [float(m.per_class.get(label, np.nan)) for m in evaluations] for label in classes}
    figure = draw.by_class([m.round for m in evaluations], curves, score)
    caption = "One line a class: where some rise and others fall, the model moves from one favourite to another."
    name, title = f"{file_name(score)}-classes", f"{score.capitalize()} by class"
    page.figures(CaptionedFigure(name, figure, title, caption), after=beside)


def _class_table(score: str, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    most = max((RANGES.get(score) or (0.0, max(after.values())))[1], 1e-30)
    rows = [
        (
            *(escape(label), f"{before.get(label, float('nan')):.3f}", f"{value:.3f}"),
            f'<span class="meter" aria-hidden="true"><i style="width:{100 * value / most:.0f}%"></i></span>',
        )
        for label, value in after.items()
    ]
    html = table(["class", "before", "after", ""], rows, caption=f"{score.capitalize()} of each class")
    title = f"{score.capitalize()} of each of {len(rows)} classes"
    return f"<div>{html}</div>" if len(rows) <= 12 else folded(title, f"<div>{html}</div>")


def _bytes(page: Page, run: RunFacts) -> None:
    page.section("Bytes", "bytes")
    rounds, clients = run.of_kind("round"), run.config.clients
    if not rounds:
        page.add(absent("No bytes to show: no round has closed yet."))
        return
    dense = "weights, sent and received"
    amounts = {
        "sent in rounds": run.payload(("round",), ("up",)),
        "received in rounds": run.payload(("round",), ("down",)),
        "sent to calibrate": run.payload(("calibration",), ("up",)),
    }
    caption = "Mean payload of a client over the whole run, in bytes on a logarithmic scale."
    frames = {
        name: (run.summary or {}).get(f"frame_bytes_{way}") for name, way in (("sent", "up"), ("received", "down"))
    }
    amounts |= {f"frames {name}": count / clients for name, count in frames.items() if count is not None}
    if run.mask is not None:
        replies = sum(len(m.get("clients") or range(run.config.clients_per_round)) for m in rounds)
        amounts[dense] = 2 * 4 * run.mask.total * replies / clients
        times = amounts[dense] / max(run.payload(), 1)
        caption += (
            " The grey bar is what exchanging the model's weights in each of these rounds would have cost, "
            f"{f'{times:,.0f}' if times >= 100 else f'{times:.3g}'} times as much."
        )
    if "frames sent" in amounts:
        caption += " Frames are the payload with run, round and digest around it, and all messages outside rounds."
    page.figures(CaptionedFigure("bytes", draw.traffic(amounts, dense), "Payload a client", caption))


def _mask(page: Page, run: RunFacts) -> None:
    page.section("What moves", "mask")
    mask = run.mask
    if mask is None:
        page.add(absent("No mask: the run ended before it had chosen one."))
        return
    counts = [(name, moving, int(np.prod(mask.shapes[name]))) for name, moving in mask.counts()]
    page.add(paragraph(_mask_in_words(run.config, mask, len(counts))))
    if CURVATURE in mask.facts:
        page.add(paragraph(_rate_in_words(run.config, mask)))
    figures = []
    if all(moving == size for _, moving, size in counts):
        page.add(absent("No map of layers: every entry of these tensors moves."))
    elif (figure := draw.mask_map(counts)) is not None:
        caption = (
            "One cell a tensor, layers downwards and kinds of tensor across; the stronger the blue, the larger the "
            "share of that tensor that moves, on a log scale. In a cell without blue nothing moves."
        )
        figures.append(CaptionedFigure("mask-layers", figure, "Where the moving entries are", caption))
    points = json.loads(mask.facts.get("concentration", "[]"))
    if len(points) > 1:
        figure = draw.concentration(points, len(mask) / int(mask.facts.get("eligible", mask.total)))
        caption = (
            "Share of all sensitivity that the most sensitive parameters hold, among those allowed to move; the "
            "further the curve lies above the dashed line, the less is lost by moving only a few."
        )
        figures.append(CaptionedFigure("concentration", figure, "Sensitivity is concentrated", caption))
    figures += _perturbation(run, mask)
    if figures:
        page.figures(*figures)
    if len(points) <= 1:
        page.add(absent("No curve of sensitivity: this mask was not chosen by sensitivity, or does not say how."))
    page.add(folded(f"The {len(counts):,} tensors", _tensors(counts, len(mask))))


def _perturbation(run: RunFacts, mask: SparseMask) -> list[CaptionedFigure]:
    """How eps was chosen, where it was measured."""
    if CURVE not in mask.facts:
        return []
    curve = json.loads(mask.facts[CURVE])
    if not curve["eps"]:
        return []
    figure = draw.perturbation(curve["eps"], curve["error"], number(run.config.eps))
    caption = (
        f"How far projected gradients are from exact slopes on public data, computed in {run.config.dtype}, as a share "
        "of these slopes: small perturbations drown in rounding, large ones in the loss' curvature."
    )
    return [CaptionedFigure("perturbation", figure, "How large a perturbation", caption)]


def _rate_in_words(config: RunConfig, mask: SparseMask) -> str:
    known = json.loads(mask.facts[CURVATURE])
    return (
        f"On public text, the trace of the task's curvature is {known['trace']:.3g}, and its largest eigenvalue "
        f"{known['largest']:.3g}. A learning rate that is left to auto follows from these. "
        f"This run has learning rate {rate_in_words(config)}."
    )


def _mask_in_words(config: RunConfig, mask: SparseMask, tensors: int) -> str:
    excluded = ", ".join(config.exclude) if mask.kind not in ("full", "lora") else ""
    return (
        f"{len(mask):,} of {mask.total:,} parameters move ({percent(len(mask) / mask.total)}), in {tensors:,} "
        f"tensor{'s' * (tensors > 1)}; chosen by: {mask.kind}." + (f" Never chosen: {excluded}." if excluded else "")
    )


def _tensors(counts: Sequence[tuple[str, int, int]], total_moving: int) -> str:
    rows = []
    for name, moving, size in sorted(counts, key=lambda tensor: -tensor[1])[:200]:
        shares = percent(moving / size), percent(moving / total_moving)
        rows.append((f"<code>{escape(name)}</code>", f"{moving:,}", f"{size:,}", *shares))
    more = f"The first 200 of {len(counts):,}, most" if len(counts) > 200 else "Most"
    head = ["tensor", "moving", "of", "of the tensor", "of the mask"]
    return table(head, rows, caption=f"{more} moving entries first")


def _settings(page: Page, run: RunFacts) -> None:
    page.section("Settings", "settings")
    rows = []
    for name, value in run.config:
        default = RunConfig.model_fields[name].default
        text = escape(_value_in_words(value))
        text = text if value == default else f"<b>{text}</b>"
        rows.append((f"<code>{escape(name)}</code>", text, escape(_value_in_words(default))))
    settings = table(["setting", "value", "default"], rows, text_columns=3, caption="Bold: not the default")
    page.add(folded("All settings", settings))
    if not (digests := _digests(run)):
        page.add(absent("No digests: rounds.log has no round."))
        return
    lines = [(escape(name), f"<code>{escape(digest)}</code>") for name, digest in digests.items()]
    page.add(folded("Digests", table(["SHA-256 of", ""], lines, text_columns=2)))
    page.add(paragraph("'meerkat verify' replays the run from its folder and compares every digest.", "note"))


def _digests(run: RunFacts) -> dict[str, str]:
    digests = {}
    if run.mask is not None:
        digests = {"pre-trained model": run.mask.fingerprint, "mask": run.mask.digest()}
    if run.summary is not None:
        digests["theta after the run"] = str(run.summary["theta_digest"])
    elif run.records.rounds:
        digests[f"theta after round {run.rounds}"] = run.records.rounds[-1].theta_digest
    return digests


def _value_in_words(value: object) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
