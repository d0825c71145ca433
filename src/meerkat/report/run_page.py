"""A run's page: what came out, how it went, what it cost, who did what, what moves, and on which settings."""

import json
from pathlib import Path

import numpy as np

import meerkat.report.run_figures as draw
from meerkat.errors import RunFailed
from meerkat.report.drawing import CYCLE, data_size
from meerkat.report.page import Page, absent, escape, folded, numbers, paragraph, table
from meerkat.report.run_clients import alignment_section, calibration_section, signal_section, split_section
from meerkat.report.run_facts import Story
from meerkat.report.sentences import in_digits, outcome, so_far, unfinished
from meerkat.run.sentences import budgets_in_words, defence_in_words
from meerkat.settings.config import SITES, RunConfig


def write_run_report(root: Path) -> Path:
    """Write a run's report.html and figures/ into its folder. Returns the page's path.

    Raises:
        MeerkatError: there is no run in the folder; RunFailed: something in it is damaged, or the disk refused.
    """
    try:
        return run_page(Story.read(Path(root))).write(Path(root))
    except (LookupError, TypeError) as error:
        raise RunFailed(f"run folder '{root}': a file in it is damaged ({error!r}); restore it from a copy") from None


def run_page(story: Story) -> Page:
    """The page of a run, as far as the run got."""
    config = story.config
    named = Path(config.model).name or config.model
    page = Page(
        f"{config.method} on {Path(config.task).stem or 'its task'}",
        f"{named} · {config.clients:,} client{'s' * (config.clients > 1)}, {config.partition} · "
        f"{config.rounds:,} rounds of {config.local_steps:,} local step{'s' * (config.local_steps > 1)} · "
        f"seed {config.seed}",
    )
    _outcome(page, story)
    _curves(page, story)
    _traffic(page, story)
    split_section(page, story)
    calibration_section(page, story)
    signal_section(page, story)
    alignment_section(page, story)
    _mask(page, story)
    _settings(page, story)
    return page


def _outcome(page: Page, story: Story) -> None:
    page.section("Outcome", "outcome")
    config, judged = story.config, story.evaluations
    if story.summary is not None:
        page.add(paragraph(outcome(story.summary, story.sent("up", "round"), story.sent("up", "calibration")), "lead"))
    else:
        page.add(paragraph(unfinished(story.rounds, config.rounds), "alert"))
        page.add(paragraph(so_far(judged), "lead"))
    if defence := defence_in_words(config):
        page.add(paragraph(f"{defence[:1].upper()}{defence[1:]}."))
    if story.without_budget:
        told = budgets_in_words(story.without_budget, config.clients)
        page.add(paragraph(f"{told[:1].upper()}{told[1:]}."))
    shown = []
    if judged:
        for name in ("accuracy", "loss"):
            if judged[-1][name] is not None:
                shown.append((name, in_digits(judged[-1][name]), f"{in_digits(judged[0][name])} before"))
    if story.mask is not None:
        moving, total = len(story.mask), story.mask.total
        shown.append(("parameters moved", f"{moving:,}", f"{draw.percent(moving / total)} of {total:,}"))
    steps = sum(m["steps"] for m in story.metrics if m["kind"] in ("round", "calibration"))
    shown.append(("rounds", f"{story.rounds:,}", f"{steps:,} local steps of all clients"))
    if story.metrics:
        counted = ", calibration counted" if story.of_kind("calibration") else ""
        shown.append(("payload a client", data_size(story.payload()), f"up and down{counted}"))
    if story.config.recipe.early_stop != "none" or story.stopped:
        known = "" if story.extreme is None else f"{len(story.extreme):,} hold one label"
        shown.append(
            ("stopped early", f"{len(story.stopped):,}", f"of {config.clients:,} clients; {known}".rstrip("; "))
        )
    if (wall := sum(m.get("wall_s", 0.0) for m in story.metrics)) > 0:
        shown.append(
            ("wall time", _time(wall), "over a network" if config.partition == SITES else "simulated on one machine")
        )
    page.add(numbers(shown))


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _per_class(before: dict[str, float], after: dict[str, float]) -> str:
    rows = [
        (
            *(escape(str(label)), f"{before.get(label, float('nan')):.3f}", f"{value:.3f}"),
            f'<span class="meter" aria-hidden="true"><i style="width:{100 * value:.0f}%"></i></span>',
        )
        for label, value in after.items()
    ]
    made = "<div>" + table(["class", "before", "after", ""], rows, caption="Accuracy of each class") + "</div>"
    return made if len(rows) <= 12 else folded(f"Accuracy of each of {len(rows)} classes", made)


def _curves(page: Page, story: Story) -> None:
    page.section("Learning", "learning")
    judged = story.evaluations
    if not judged:
        page.add(absent("No curves: no evaluation was noted in metrics.jsonl."))
        return
    on = "held-back training rows" if story.config.held_back else "validation rows"
    on = "the sites' own validation rows" if "rows" in judged[-1] else on
    rounds = [m["round"] for m in judged]
    spent = [story.payload(m["round"]) for m in judged]
    accuracy, loss = [m["accuracy"] for m in judged], [m["loss"] for m in judged]
    worked = story.of_kind("round")
    losses = [m["loss"] for m in worked]
    told = any(value is not None for value in losses)
    training = ([m["round"] + 0.5 for m in worked], _smooth(losses)) if told else None
    calibration = story.payload(kinds=("calibration",)) if len(story.of_kind("calibration")) == 1 else 0.0
    shaded = "; the shaded stretch is what calibration cost before the first round" if calibration else ""
    pale = ", and in grey on the clients' own training batches, as a running mean" if told else ""
    shown = [
        (
            "accuracy-rounds",
            draw.curve(rounds, accuracy, "accuracy", over="round"),
            "Accuracy over rounds",
            f"Share of {on} that the shared model gets right; higher is better.",
        ),
        (
            "loss-rounds",
            draw.curve(rounds, loss, "loss", over="round", beside=training),
            "Loss over rounds",
            f"Mean loss on {on}{pale}; lower is better.",
        ),
        (
            "accuracy-bytes",
            draw.curve(spent, accuracy, "accuracy", over="bytes", spent=calibration),
            "Accuracy over payload",
            f"The same accuracy against the bytes a client has sent and received, on average{shaded}.",
        ),
        (
            "loss-bytes",
            draw.curve(spent, loss, "loss", over="bytes", spent=calibration),
            "Loss over payload",
            f"The same loss against the bytes a client has sent and received, on average{shaded}.",
        ),
    ]
    page.figures(*(each for each in shown if loss[-1] is not None or not each[0].startswith("loss")))
    classes = judged[-1].get("per_class") or {}
    if not classes:
        return
    beside = _per_class(judged[0]["per_class"], classes)
    if 2 <= len(classes) <= len(CYCLE):
        series = {str(label): [float(m["per_class"].get(label, np.nan)) for m in judged] for label in classes}
        page.figures(
            (
                "accuracy-classes",
                draw.by_class(rounds, series),
                "Accuracy by class",
                "One line a class: where some rise and others fall, the model moves from one favourite to another.",
            ),
            after=beside,
        )
    else:
        page.add(beside)


def _smooth(values: list[float]) -> list[float]:
    from meerkat.report.clients import running_mean

    width = max(1, len(values) // 15)
    found: list[float] = running_mean(np.array(values, np.float64), width).tolist() if values else []
    return found


def _traffic(page: Page, story: Story) -> None:
    page.section("Bytes", "bytes")
    if not story.of_kind("round"):
        page.add(absent("No bytes to show: no round was closed yet."))
        return
    took_part = sum(len(m.get("clients") or range(story.config.clients_per_round)) for m in story.of_kind("round"))
    amounts = [("sent in rounds", story.sent("up", "round")), ("received in rounds", story.sent("down", "round"))]
    amounts.append(("sent to calibrate", story.sent("up", "calibration")))
    dense = "weights, sent and received"
    said = "Mean bytes of payload a client over the whole run; the scale is logarithmic."
    if story.mask is not None:
        whole = 2 * 4 * story.mask.total * took_part / story.config.clients
        amounts.append((dense, whole))
        times = whole / max(story.payload(), 1)
        said += (
            " The grey bar is what exchanging the model's weights in each of these rounds would have cost, "
            f"{f'{times:,.0f}' if times >= 100 else f'{times:.3g}'} times as much."
        )
    if story.summary is not None and "frame_bytes_up" in story.summary:
        for said_of, way in (("frames sent", "up"), ("frames received", "down")):
            amounts.insert(-1, (said_of, story.summary[f"frame_bytes_{way}"] / story.config.clients))
        said += " Frames are the payload with run, round and digest around it, and all that was said beside rounds."
    page.figures(("bytes", draw.traffic(amounts, dense), "Payload a client", said))


def _mask(page: Page, story: Story) -> None:
    page.section("What moves", "mask")
    mask = story.mask
    if mask is None:
        page.add(absent("No mask: the run ended before it had chosen one."))
        return
    size = {name: int(np.prod(shape)) for name, shape in mask.shapes.items()}
    counts = [(name, moving, size[name]) for name, moving in mask.counts()]
    page.add(paragraph(_mask_words(story, len(mask), mask.total, len(counts), mask.kind)))
    shown = []
    if all(moving == whole for _, moving, whole in counts):
        page.add(absent("No map of layers: every entry of these tensors moves."))
    elif (figure := draw.mask_map(counts)) is not None:
        shown.append(
            (
                "mask-layers",
                figure,
                "Where the moving entries sit",
                "One cell a tensor, layers downwards and kinds of tensor across; the stronger the blue, the larger the "
                "share of that tensor that moves, on a log scale. An empty cell has none.",
            )
        )
    points = json.loads(mask.facts.get("concentration", "[]"))
    if len(points) > 1:
        shown.append(
            (
                "concentration",
                draw.concentration(points, len(mask) / int(mask.facts.get("eligible", mask.total))),
                "Sensitivity is concentrated",
                "Share of all sensitivity that the most sensitive parameters hold, among those allowed to move; the "
                "further the curve stands above the dashed line, the less is lost by moving a few only.",
            )
        )
    if shown:
        page.figures(*shown)
    if len(points) <= 1:
        page.add(absent("No curve of sensitivity: this mask was not chosen by sensitivity, or does not say how."))
    page.add(folded(f"The {len(counts):,} tensors", _tensors(counts, len(mask))))


def _mask_words(story: Story, moving: int, total: int, tensors: int, kind: str) -> str:
    excluded = ", ".join(story.config.exclude) if kind != "full" else ""
    without = f" Never among them: {excluded}." if excluded and kind not in ("full", "lora") else ""
    return (
        f"{moving:,} of {total:,} parameters move ({draw.percent(moving / total)}), in {tensors:,} "
        f"tensor{'s' * (tensors > 1)}; chosen by: {kind}.{without}"
    )


def _tensors(counts: list[tuple[str, int, int]], moving: int) -> str:
    ordered = sorted(counts, key=lambda one: -one[1])
    rows = [
        (
            f"<code>{escape(name)}</code>",
            f"{held:,}",
            f"{size:,}",
            draw.percent(held / size),
            draw.percent(held / moving),
        )
        for name, held, size in ordered[:200]
    ]
    more = f"the first 200 of {len(ordered):,}, " if len(ordered) > 200 else ""
    head = ["tensor", "moving", "of", "of the tensor", "of the mask"]
    return table(head, rows, caption=f"{more}most moving entries first".capitalize())


def _settings(page: Page, story: Story) -> None:
    page.section("Settings", "settings")
    default = {name: field.default for name, field in RunConfig.model_fields.items()}
    rows = []
    for name, value in story.config.model_dump(mode="python").items():
        told = escape(_value(value))
        changed = value != default[name]
        told = f"<b>{told}</b>" if changed else told
        rows.append((f"<code>{escape(name)}</code>", told, escape(_value(default[name]))))
    held = table(["setting", "value", "default"], rows, text_columns=3, caption="In bold: not the default")
    page.add(folded("All settings", held))
    digests = []
    if story.mask is not None:
        digests += [("pre-trained model", story.mask.fingerprint), ("mask", story.mask.digest())]
    if story.summary is not None:
        digests.append(("theta after the run", str(story.summary["theta_digest"])))
    elif story.records.rounds:
        digests.append((f"theta after round {story.rounds}", story.records.rounds[-1].theta_digest))
    if not digests:
        page.add(absent("No digests: no round stands in rounds.log."))
        return
    lines = [(escape(what), f"<code>{escape(digest)}</code>") for what, digest in digests]
    page.add(folded("Digests", table(["SHA-256 of", ""], lines, text_columns=2)))
    page.add(paragraph("'meerkat verify' replays the run from its folder and compares every digest.", "note"))


def _value(value: object) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
