"""The sections of a run's page on its clients: their data, calibration, signals and directions."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from meerkat.algorithm.alignment import Alignment, alignments
from meerkat.algorithm.calibration import CalibrationRecord
from meerkat.algorithm.gradip import gradip, magnitude
from meerkat.algorithm.rounds import RoundRecord
from meerkat.errors import UnknownName
from meerkat.record.history import Trajectory
from meerkat.report import client_figures as draw
from meerkat.report.client_figures import POINTS, grouped, lines_or_bands, running_mean
from meerkat.report.facts import RunFacts
from meerkat.report.page import CaptionedFigure, Page, absent, paragraph
from meerkat.report.sentences import calibration_outcome
from meerkat.settings.algorithm import directions

_MOST_ENTRIES = 3e8
"""So many entries of directions are made, at most, to compare updates."""
_MOST_ROUNDS = 240
"""Updates of so many rounds are compared, at most."""
_NO_GRADIP = "No GradIP: this run's mask has no pre-training gradient; |g| shows the same with less noise."
_LENGTH_OF_G = "Size of each client's projected gradient, on a log scale"


def _data(page: Page, run: RunFacts) -> None:
    """Which labels each client holds."""
    page.section("Data", "data")
    if run.split is None:
        page.add(
            absent("No labels by client: metrics.jsonl has none, and the server of a federation does not know them.")
        )
        return
    labels, counts = run.split
    sizes = counts.sum(1)
    rows = f"{sizes.min():,}" if sizes.min() == sizes.max() else f"{sizes.min():,} to {sizes.max():,}"
    holders = f"{len(counts):,} clients hold {rows} rows each" if len(counts) > 1 else f"1 client holds {rows} rows"
    page.add(paragraph(f"{holders}, split as '{run.config.partition}'. A simulation knows this; a server does not."))
    figure = draw.split(labels, counts, run.extreme or ())
    if figure.get_figwidth() > 6:
        caption = "One column a client, one row a label: the stronger the blue, the more of its rows have that label."
    else:
        caption = "One bar a client, one colour a label: the more one colour fills a bar, the more skewed its data."
        if run.extreme:
            caption += " Clients in bold orange have only one label."
    page.figures(CaptionedFigure("split", figure, "Labels of each client", caption))


def _calibrations(page: Page, run: RunFacts) -> None:
    """What the first and the last calibration measured, and which clients they stopped."""
    calibrations = run.records.calibrations
    if run.config.stopping == "none" and not calibrations:
        return
    page.section("Calibration", "calibration")
    if not calibrations:
        page.add(absent("rounds.log has no calibration."))
    if len(calibrations) > 2:
        page.add(paragraph(f"The run calibrated {len(calibrations)} times; the first and the last are shown.", "note"))
    for record in calibrations[:1] + calibrations[1:][-1:]:
        _calibration(page, run, record)


def _calibration(page: Page, run: RunFacts, record: CalibrationRecord) -> None:
    scalars, name = record.scalars, f"calibration-{record.plan.round}"
    page.add(paragraph(calibration_outcome(record.early_stopped, len(scalars), run.extreme, record.plan.round)))
    if not scalars:
        page.add(absent("No client answered in full."))
        return
    groups = grouped(list(scalars), record.early_stopped, run.extreme)
    steps, width = record.plan.longest, max(1, record.plan.longest // 10)
    how = f"means over {width} steps around each; {lines_or_bands(groups)}"

    def drawn(signal: str, values: Iterable[np.ndarray]) -> Figure:
        means = running_mean(np.stack(list(values)), width)
        by_client = dict(zip(scalars, means, strict=True))
        return draw.signal(np.arange(1, steps + 1), by_client, groups, "local step of calibration", signal)

    figures = []
    if len(record.inner):
        figure = drawn("|GradIP|", (np.abs(gradip(g, record.inner)) for g in scalars.values()))
        caption = (
            f"How far each step points along the pre-training gradient, on a log scale; {how}. A client that falls far "
            "below the others has little left to learn."
        )
        figures.append(CaptionedFigure(f"{name}-gradip", figure, "GradIP while calibrating", caption))
    else:
        page.add(absent(_NO_GRADIP))
    caption = f"{_LENGTH_OF_G}: GradIP's signal without its noise; {how}."
    figure = drawn("|g|", map(magnitude, scalars.values()))
    figures.append(CaptionedFigure(f"{name}-g", figure, "|g| while calibrating", caption))
    page.figures(*figures, _decision(run, record))


def _decision(run: RunFacts, record: CalibrationRecord) -> CaptionedFigure:
    automatic = run.config.vpcs_rule == "automatic"
    rule = "it lies right of the upright dashed line and above the level one"
    if automatic:
        rule = (
            "right of the upright dashed line it decayed more than chance explains, below the level one it was quiet, "
            "above the slanting one it began louder than the others"
        )
    caption = f"One mark a client. On the shaded ground a client counts as extreme: {rule}."
    if run.config.stopping == "random":
        caption += " This method then stops as many clients at random."
    figure = draw.decision(record, run.extreme, automatic)
    return CaptionedFigure(f"calibration-{record.plan.round}-rho", figure, "The decision", caption)


def _training(page: Page, run: RunFacts) -> None:
    """GradIP and |g| over training."""
    page.section("Signals in training", "signals")
    trajectories = run.records.trajectories()
    if not run.config.recipe.sends_scalars:
        page.add(absent("No GradIP and no |g|: in a first-order run clients send weights, not projected gradients."))
    elif trajectories:
        _signals(page, run, trajectories)
    elif run.config.dp == "client":
        page.add(absent("No GradIP and no |g|: a run that hides its clients keeps no scalars of a single one."))
    else:
        page.add(absent("No signals: no round has closed yet."))


def _signals(page: Page, run: RunFacts, trajectories: Mapping[int, Trajectory]) -> None:
    groups = grouped(list(trajectories), run.stopped, run.extreme)
    steps = [trajectory.steps for trajectory in trajectories.values()]
    total = max(int(of_client[-1]) for of_client in steps) + 1
    bins = min(POINTS, math.ceil(total / max(5, run.config.local_steps)))
    how = f"means over {total / bins:.3g} steps; {lines_or_bands(groups)}"

    def figure(signal: str, values: Sequence[np.ndarray]) -> Figure:
        x, means = draw.binned(steps, values, bins)
        return draw.signal(x, dict(zip(trajectories, means, strict=True)), groups, "local step", signal)

    figures = []
    gradips = [np.abs(trajectory.gradip) for trajectory in trajectories.values()]
    if np.isfinite(gradips[0]).any():
        caption = f"How far each client's steps point along the pre-training gradient, on a log scale; {how}."
        figures.append(CaptionedFigure("training-gradip", figure("|GradIP|", gradips), "GradIP in training", caption))
    else:
        page.add(absent(_NO_GRADIP))
    drawn = figure("|g|", [trajectory.abs_g for trajectory in trajectories.values()])
    caption = f"{_LENGTH_OF_G}: how steep its own loss still is; {how}."
    page.figures(*figures, CaptionedFigure("training-g", drawn, "|g| in training", caption))


def _agreements(page: Page, run: RunFacts) -> None:
    """Where clients' updates point, compared with the federation's."""
    page.section("Do clients agree?", "alignment")
    if reason := _no_alignment(run):
        page.add(absent(reason))
        return
    assert run.mask is not None
    rounds = _rounds_to_compare([record for record in run.records.rounds if record.scalars], len(run.mask))
    if not rounds:
        reason = "making so many directions of so many entries would take too long"
        page.add(absent(f"Updates are not compared here: {reason}; meerkat.record.history.updates compares them."))
        return
    which = "every round" if len(rounds) == run.rounds else f"{len(rounds):,} of {run.rounds:,} rounds"
    if _one_scalar_each(rounds):
        _agreement(page, rounds, which)
    else:
        try:
            z = directions(run.config, len(run.mask))
        except UnknownName as error:
            page.add(absent(f"Updates are not compared here: {error}."))
            return
        _alignment(page, run, [(record.plan.round, alignments(record, z)) for record in rounds], which)


def _no_alignment(run: RunFacts) -> str:
    """Why updates cannot be compared; empty where they can."""
    if not run.config.recipe.sends_scalars:
        return "Updates are compared through their scalars, and a first-order run has none."
    if run.mask is None or not run.records.rounds:
        return "No updates to compare: no round has closed yet."
    if run.config.clients == 1:
        return "There is only one client: its update is the federation's."
    if run.config.dp == "client":
        return "Updates cannot be compared: a run that hides its clients keeps no scalars of a single one."
    return ""


def _one_scalar_each(rounds: Sequence[RoundRecord]) -> bool:
    """Whether each client sent one scalar a round, so that its update has a sign and no direction of its own."""
    return all(record.plan.longest * record.plan.directions == 1 for record in rounds)


def _rounds_to_compare(rounds: Sequence[RoundRecord], entries: int) -> list[RoundRecord]:
    """Evenly spaced rounds, as many as can be compared in a few seconds."""
    if not rounds or _one_scalar_each(rounds):  # signs alone: no direction is made
        return list(rounds)
    cost = max(record.plan.longest for record in rounds) * rounds[0].plan.directions * entries
    count = min(len(rounds), _MOST_ROUNDS, int(_MOST_ENTRIES / cost))
    return [rounds[i] for i in np.unique(np.linspace(0, len(rounds) - 1, count).round().astype(int))]


def _agreement(page: Page, rounds: Sequence[RoundRecord], which: str) -> None:
    shares = np.array(
        [np.mean([np.sign(g[0, 0]) == np.sign(r.aggregate[0, 0]) for g in r.scalars.values()]) for r in rounds]
    )
    x, (y,) = draw.thinned(np.array([record.plan.round + 1 for record in rounds]), shares[None], POINTS)
    text = (
        "With one step and one direction a round all updates lie on one line, so a client pushes either the same "
        f"way as the federation or the other way: on average {shares.mean():.0%} push the same way."
    )
    page.add(paragraph(text))
    caption = (
        f"Share of clients whose update has the federation's sign ({which}, in up to {POINTS} means); the dashed line "
        "is the least that chance alone gives on average."
    )
    page.figures(CaptionedFigure("agreement", draw.agreement(x, y), "Clients that agree", caption))


def _alignment(page: Page, run: RunFacts, rounds: Sequence[tuple[int, Mapping[int, Alignment]]], which: str) -> None:
    clients = sorted({client for _, updates in rounds for client in updates})
    groups = grouped(clients, run.stopped, run.extreme)
    means = f", in {POINTS} means" if len(rounds) > POINTS else ""
    how = f"({which}{means}); {lines_or_bands(groups)}."
    cosine = draw.alignment(rounds, groups, "cosine", "cosine with the federation's update")
    caption = f"1 is the direction of the federation's update, 0 is across it, -1 is against it {how}"
    moved = f"How far each client moves in a round, in theta's units, on a log scale {how}"
    norm = draw.alignment(rounds, groups, "norm", "length of the update")
    page.figures(
        CaptionedFigure("alignment-cosine", cosine, "Direction of each client's update", caption),
        CaptionedFigure("alignment-norm", norm, "Length of each client's update", moved),
    )


CLIENT_SECTIONS = (_data, _calibrations, _training, _agreements)
"""In the order of the page."""
