"""A run in sentences, for the terminal, the report and the model card."""

from collections.abc import Mapping, Sequence

from meerkat.masks.sparse_mask import SparseMask
from meerkat.progress import number_of
from meerkat.run.metrics import EvaluationMetric
from meerkat.settings.config import RunConfig


def budgets_in_words(clients: Sequence[int], of: int, do: str = "do") -> str:
    """Whose privacy budgets do not last, of so many clients, or `do` "may" not; at most ten are named."""
    named = f"{clients_in_words(clients)} ({len(clients)} of {of})"
    return f"privacy budgets that {do} not last to the end of the run: {named}"


def defence_in_words(config: RunConfig) -> str:
    """Who attacks, and how replies become one, where it is not plainly the mean; else empty."""
    by, words = config.rule, []
    if config.attack != "none":
        words.append(f"attack {config.attack} by {clients_in_words(config.attacking_clients)}")
    if config.attack != "none" or by.rule != "mean":
        words.append(f"aggregation {by.rule}" + f" with f = {by.byzantine}" * by.needs_f)
    if by.mixing != "none":
        words.append(f"mixing {by.mixing}")
    if by.clipping != "none":
        words.append(f"clipping {by.clipping}" + f" at {by.clip_norm:g}" * (by.clipping == "fixed"))
    return ", ".join(words)


def scores_in_words(scores: Mapping[str, float | None]) -> str:
    """Scores with three digits; those that are not known are left out."""
    known = [f"{name} {value:.3f}" for name, value in scores.items() if value is not None]
    return ", ".join(known) or "not evaluated by any site"


def evaluation_in_words(metric: EvaluationMetric, rounds: int) -> str:
    """How the model stands, of so many rounds in all."""
    return f"round {metric.round:>4} of {rounds}: {scores_in_words(metric.scores)}"


def rate_in_words(config: RunConfig) -> str:
    """A run's learning rate, and the server's where its update rule has one: 0.3, or 0.3, adam at 0.2."""
    ruled = config.recipe.update_rule or config.update_rule == "sgd"
    return f"{config.lr:g}" + ("" if ruled else f", {config.update_rule} at {config.server_lr:g}")


def plan_in_words(config: RunConfig, mask: SparseMask, sizes: Sequence[int]) -> str:
    """What is about to run; sizes are the clients' numbers of rows."""
    most, alone = number_of(max(sizes), "row"), config.clients == 1
    rows = f"{min(sizes)} to {most}" if min(sizes) < max(sizes) else most if alone else f"{most} each"
    return (
        f"{config.method}: {len(mask):,} of {mask.total:,} parameters move, learning rate {rate_in_words(config)}; "
        f"{number_of(config.clients, 'client')} ({config.partition}) hold{'s' * alone} {rows}; "
        f"{number_of(config.rounds, 'round')} of {number_of(config.local_steps, 'local step')}"
    )


def clients_in_words(clients: Sequence[int]) -> str:
    """Clients by their numbers; at most ten are named."""
    return f"client{'s' * (len(clients) > 1)} {_named(clients)}"


def stopped_in_words(early_stopped: Sequence[int], clients: int) -> str:
    """What a calibration decided; at most ten clients are named."""
    named = _named(early_stopped)
    count = f"{len(early_stopped)} of {clients} clients make one local step a round from now on"
    return f"{count}: {named}" if named else count


def _named(clients: Sequence[int]) -> str:
    return ", ".join(map(str, clients[:10])) + (", ..." if len(clients) > 10 else "")
