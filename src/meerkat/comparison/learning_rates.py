"""A setting's learning rate, searched on held-back training rows by the same rule for every setting."""

import math
from collections.abc import Callable, Sequence

from meerkat.comparison.evidence import Outcome
from meerkat.comparison.studies import Search
from meerkat.errors import RunFailed
from meerkat.settings.auto import AUTO, Auto
from meerkat.settings.config import RunConfig


def search_rates(
    config: RunConfig, search: Search, outcome_of: Callable[[RunConfig], Outcome]
) -> list[tuple[float, float]]:
    """Held-back loss by learning rate, ascending; nan where it diverged. The rule is the same for every setting."""
    rounds = max(1, round(search.rounds * config.rounds))
    trial = config.model_copy(update={"held_back": search.held_back, "rounds": rounds, "eval_every": 0})

    def tried(lr: float | Auto) -> tuple[float, float]:
        outcome = outcome_of(trial.model_copy(update={"lr": lr}))
        return outcome.lr, math.inf if outcome.summary is None else float(outcome.summary["loss"])

    start, first = tried(AUTO)  # measured, or the method's own

    def rate(place: int) -> float:
        return float(f"{start * search.factor**place:.3g}")

    losses = search_lowest(lambda place: tried(rate(place))[1] if place else first, search.trials)
    return [(rate(place), loss if math.isfinite(loss) else math.nan) for place, loss in sorted(losses.items())]


def search_lowest(loss_at: Callable[[int], float], trials: int) -> dict[int, float]:
    """Losses at neighbouring places, from 0 on, until both neighbours of the best are known, or trials run out.

    The lower neighbour is tried first, and of equally good places the lower is the best: where all have diverged
    (an infinite loss), the search goes down.
    """
    losses = {0: loss_at(0)}
    while len(losses) < trials:
        best = min(losses, key=lambda place: (losses[place], place))
        unknown = [place for place in (best - 1, best + 1) if place not in losses]
        if not unknown:
            break
        losses[unknown[0]] = loss_at(unknown[0])
    return losses


def best_rate(rates: Sequence[tuple[float, float]], config: RunConfig) -> float:
    """The rate of the lowest loss, of equal ones the lower. Raises RunFailed: every rate diverged."""
    converged = [(loss, rate) for rate, loss in rates if not math.isnan(loss)]
    if not converged:
        raise RunFailed(
            f"{config.method}: diverged at every learning rate tried, {rates[0][0]:g} to {rates[-1][0]:g}; "
            "give lr, or let the search try more (search.trials)"
        )
    return min(converged)[1]


def rate_in_words(rates: Sequence[tuple[float, float]], config: RunConfig) -> str:
    """The best rate, and whether it is the lowest or the highest that was tried."""
    best = best_rate(rates, config)
    end = {rates[0][0]: "lowest", rates[-1][0]: "highest"}.get(best)
    edge = f", the {end} of {len(rates)} tried: a search with more trials may find a better one" if end else ""
    return f"learning rate {best:g}{edge}"
