"""The sections of a run's page on its clients: their data, their signals, who was stopped, where updates point."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

import meerkat.report.client_figures as draw
from meerkat.algorithm.alignment import Alignment, alignments
from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.directions import Directions, run_key
from meerkat.algorithm.gradip import gradip, magnitude
from meerkat.algorithm.rounds import RoundRecord
from meerkat.report.clients import binned, groups, how_drawn, running_mean
from meerkat.report.page import Page, absent, paragraph
from meerkat.report.run_facts import Story
from meerkat.report.sentences import found_out

_ENTRIES = 3e8
"""So many entries of directions are made, at most, to see how updates align."""
_LOOKED_AT = 240
"""At most so many rounds are looked at for it."""


def split_section(page: Page, story: Story) -> None:
    """Who holds which labels."""
    page.section("Data", "data")
    if story.split is None:
        page.add(absent("Who holds which labels is not noted in this run's metrics; a server would not know it."))
        return
    labels, counts = story.split
    extreme = story.extreme or ()
    sizes = counts.sum(1)
    held = f"{sizes.min():,}" if sizes.min() == sizes.max() else f"{sizes.min():,} to {sizes.max():,}"
    each = " each" if len(counts) > 1 else ""
    page.add(
        paragraph(
            f"{len(counts):,} client{'s hold' if each else ' holds'} {held} rows{each}, split as "
            f"'{story.config.partition}'. A simulation knows this; a server does not."
        )
    )
    figure = draw.split(labels, counts, extreme)
    if figure.get_figwidth() > 6:
        said = "One column a client, one row a label: the stronger the blue, the larger the label's share of its rows."
    else:
        said = (
            "One bar a client, one colour a label: the more one colour fills a bar, the more skewed that client's data."
        )
        said += " Clients in bold orange hold one label alone." if extreme else ""
    page.figures(("split", figure, "Labels of each client", said))


def calibration_section(page: Page, story: Story) -> None:
    """What calibration saw, and whom it stopped."""
    if _stops(story) == "none" and not story.records.calibrations:
        return
    page.section("Calibration", "calibration")
    if not story.records.calibrations:
        page.add(absent("No calibration stands in rounds.log."))
        return
    held = story.records.calibrations
    if len(held) > 2:
        page.add(paragraph(f"{len(held)} calibrations were made; shown are the first and the last.", "note"))
    for record in dict.fromkeys((0, len(held) - 1)):
        _calibration(page, story, held[record])


def _stops(story: Story) -> str:
    chosen = story.config.early_stop
    return story.config.recipe.early_stop if chosen == "by-method" else chosen


def _calibration(page: Page, story: Story, record: CalibrationRecord) -> None:
    when = record.plan.round
    page.add(paragraph(found_out(record.early_stopped, len(record.scalars), story.extreme, when)))
    clients = list(record.scalars)
    if not clients:
        page.add(absent("No client answered in full."))
        return
    kinds = groups(clients, record.early_stopped, story.extreme)
    steps = record.plan.steps[clients[0]]
    width = max(1, steps // 10)
    x = np.arange(1, steps + 1)
    size = np.stack([magnitude(record.scalars[k]) for k in clients])
    how = f"means over {width} steps around each; {how_drawn(kinds)}"
    named = f"calibration-{when}"
    shown = []
    if len(record.inner):
        along = np.stack([np.abs(gradip(record.scalars[k], record.inner)) for k in clients])
        figure = draw.signal(
            x, running_mean(along, width), clients, kinds, x_name="local step of calibration", y_name="|GradIP|"
        )
        said = (
            f"How far each step points along the pre-training gradient, on a log scale; {how}. Where one falls far "
            "below the others, that client has little left to learn."
        )
        shown.append((f"{named}-gradip", figure, "GradIP while calibrating", said))
    else:
        page.add(absent("No GradIP: this run's mask has no pre-training gradient; |g| shows the same with less noise."))
    figure = draw.signal(x, running_mean(size, width), clients, kinds, x_name="local step of calibration", y_name="|g|")
    said = f"Size of each client's projected gradient, on a log scale: GradIP's signal without its noise; {how}."
    shown.append((f"{named}-g", figure, "|g| while calibrating", said))
    automatic = story.config.vpcs_rule == "automatic"
    figure = draw.rho_plane(record, story.extreme, automatic)
    if automatic:
        rule = (
            "right of the upright dashed line it decayed more than chance explains, under the level one it was quiet, "
            "above the slanting one it began louder than the others"
        )
    else:
        rule = "it lies to the right of the upright and above the level dashed line"
    picked = " This method then stops as many at random." if _stops(story) == "random" else ""
    said = f"One mark a client. On the shaded ground a client is taken for extreme: {rule}.{picked}"
    shown.append((f"{named}-rho", figure, "The decision", said))
    page.figures(*shown)


def signal_section(page: Page, story: Story) -> None:
    """GradIP and |g| over training."""
    page.section("Signals in training", "signals")
    if story.first_order:
        page.add(absent("No GradIP and no |g|: in a first-order run clients send weights, not projected gradients."))
        return
    paths = story.records.trajectories()
    if not paths:
        hidden = "No GradIP and no |g|: in a run that hides its clients no scalar of theirs is kept."
        page.add(absent(hidden if story.config.dp == "client" else "No signals: no round was closed yet."))
        return
    clients = list(paths)
    kinds = groups(clients, story.stopped, story.extreme)
    steps = [paths[k].steps for k in clients]
    total = max(int(part[-1]) for part in steps) + 1
    bins = min(draw.POINTS, math.ceil(total / max(5, story.config.local_steps)))
    x, size = binned(steps, [paths[k].abs_g for k in clients], bins)
    each = f"means over {total / bins:.3g} steps; {how_drawn(kinds)}"
    shown = []
    if np.isfinite(paths[clients[0]].gradip).any():
        _, along = binned(steps, [np.abs(paths[k].gradip) for k in clients], bins)
        figure = draw.signal(x, along, clients, kinds, x_name="local step", y_name="|GradIP|")
        said = "How far each client's steps point along the pre-training gradient, on a log scale"
        shown.append(("training-gradip", figure, "GradIP in training", f"{said}; {each}."))
    else:
        page.add(absent("No GradIP: this run's mask has no pre-training gradient; |g| shows the same with less noise."))
    figure = draw.signal(x, size, clients, kinds, x_name="local step", y_name="|g|")
    said = "Size of each client's projected gradient, on a log scale: how steep its own loss still is"
    shown.append(("training-g", figure, "|g| in training", f"{said}; {each}."))
    page.figures(*shown)


def alignment_section(page: Page, story: Story) -> None:
    """Where clients' updates point, beside the federation's."""
    page.section("Do clients agree?", "alignment")
    if story.first_order:
        page.add(absent("How updates align follows from scalars, and a first-order run has none."))
        return
    if story.mask is None or not story.records.rounds:
        page.add(absent("No updates to compare: no round was closed yet."))
        return
    if story.config.clients == 1:
        page.add(absent("There is one client alone: its update is the federation's."))
        return
    if story.config.dp == "client":
        page.add(absent("Updates cannot be compared: in a run that hides its clients no scalar of theirs is kept."))
        return
    answered = [record for record in story.records.rounds if record.scalars]
    chosen = _rounds_to_look_at(answered, len(story.mask)) if answered else []
    if not chosen:
        page.add(
            absent(
                "How updates align is left out: so many directions of so many entries would take too long; "
                "meerkat.record.history.updates gives them."
            )
        )
        return
    looked = f"{len(chosen):,} of {story.rounds:,} rounds" if len(chosen) < story.rounds else "every round"
    if all(max(r.plan.steps.values()) * r.plan.directions == 1 for r in chosen):
        _agreement(page, chosen, looked)
        return
    z = Directions(run_key(story.config.seed), len(story.mask))
    found = [(record.plan.round, alignments(record, z)) for record in chosen]
    _aligned(page, story, found, looked)


def _rounds_to_look_at(rounds: Sequence[RoundRecord], entries: int) -> list[RoundRecord]:
    """Evenly spaced rounds, as many as can be looked at in a few seconds."""
    if max(r.plan.steps[k] for r in rounds for k in r.plan.steps) * rounds[0].plan.directions == 1:
        return list(rounds)  # signs alone: no direction is made
    cost = max(max(r.plan.steps.values()) for r in rounds) * rounds[0].plan.directions * entries
    count = min(len(rounds), _LOOKED_AT, int(_ENTRIES / cost))
    return [rounds[i] for i in np.unique(np.linspace(0, len(rounds) - 1, count).round().astype(int))]


def _agreement(page: Page, rounds: Sequence[RoundRecord], looked: str) -> None:
    shares = np.array(
        [np.mean([np.sign(g[0, 0]) == np.sign(r.aggregate[0, 0]) for g in r.scalars.values()]) for r in rounds]
    )
    bins = min(len(shares), draw.POINTS)
    at = np.array([r.plan.round + 1 for r in rounds])
    x = np.array([part.mean() for part in np.array_split(at, bins)])
    y = np.array([part.mean() for part in np.array_split(shares, bins)])
    page.add(
        paragraph(
            "With one step and one direction a round every update lies on the same line, so clients either push the "
            f"same way as the federation or the other way: on average {shares.mean():.0%} push the same way."
        )
    )
    page.figures(
        (
            "agreement",
            draw.agreement(x, y),
            "Clients that agree",
            f"Share of clients whose update has the federation's sign ({looked}, in up to {draw.POINTS} means); "
            "the dashed line is what chance alone would give, at least.",
        )
    )


def _aligned(page: Page, story: Story, found: Sequence[tuple[int, Mapping[int, Alignment]]], looked: str) -> None:
    clients = sorted({client for _, held in found for client in held})
    kinds = groups(clients, story.stopped, story.extreme)
    if len(found) > draw.POINTS:
        looked += f", in {draw.POINTS} means"
    page.figures(
        (
            "alignment-cosine",
            draw.cosines(found, kinds, "cosine", "cosine with the federation's update"),
            "Direction of each client's update",
            f"1 points exactly where the federation goes, 0 across it, -1 against it ({looked}); {how_drawn(kinds)}.",
        ),
        (
            "alignment-norm",
            draw.cosines(found, kinds, "norm", "length of the update"),
            "Length of each client's update",
            f"How far each client moves in a round, in theta's units, on a log scale ({looked}); {how_drawn(kinds)}.",
        ),
    )
