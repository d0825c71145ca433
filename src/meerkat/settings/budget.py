"""A run's differential privacy as its settings have it: which mechanism, how much noise, how long budgets last.

Example-level: client k's step is one Gaussian mechanism on rows sampled at q_k = B / N_k, and its budget is its own.
Client-level: a round is one, on clients sampled at q = clients_per_round / K; all clients share one budget.
"""

import math
from collections.abc import Collection, Mapping, Sequence

from meerkat.algorithm.replies import LARGEST_LOSS
from meerkat.errors import MeerkatError
from meerkat.privacy.accounting import (
    LARGEST_EPSILON,
    LARGEST_NOISE,
    LONGEST,
    SMALLEST_DELTA,
    Charge,
    epsilon,
    noise_for,
    steps_within,
)
from meerkat.privacy.mechanism import Guarantee, Mechanism, Relation, sampling_rate
from meerkat.settings.auto import AUTO, number, number_or
from meerkat.settings.config import RunConfig


def mechanism(config: RunConfig) -> Mechanism | None:
    """What makes a noisy mean of vectors: of rows' slopes on a site, or of clients' replies on the server."""
    if config.dp == "none":
        return None
    return Mechanism(config.dp_clip, number(config.dp_noise_multiplier), _expected(config))


def _expected(config: RunConfig) -> float:
    """How many are sampled on average: rows of a batch, or clients of a round."""
    return float(config.batch_size if config.dp == "example" else config.clients_per_round or config.clients)


def uncountable(config: RunConfig) -> str:
    """What of a run's privacy asks too much of an accountant, in one line; empty if nothing does."""
    for name, asked, least, most in (
        ("dp_epsilon", config.dp_epsilon, 0.0, LARGEST_EPSILON),
        ("dp_delta", config.dp_delta, SMALLEST_DELTA, 1.0),
        ("dp_noise_multiplier", number_or(config.dp_noise_multiplier, 1.0), 0.0, LARGEST_NOISE),
        ("noisy steps", steps_asked(config), 0, LONGEST),
    ):
        if not least <= asked <= most:
            bound = f"at most {most:,g} can be accounted for; lower it"
            if asked < least:
                bound = f"at least {least:g} can be accounted for; raise it"
            return f"{name} {asked:,g}: {bound}"
    return ""


def check_countable(config: RunConfig) -> None:
    """Raise MeerkatError if a run's privacy asks too much of an accountant."""
    if config.dp != "none" and (why := uncountable(config)):
        raise MeerkatError(why)


def with_noise(config: RunConfig, sizes: Sequence[int]) -> RunConfig:
    """The settings with their noise multiplier; `auto` is the least that keeps every client within its budget.

    Args:
        sizes: rows of each client; empty where they are not known, in a federation.

    Raises:
        MeerkatError: more is asked than can be accounted for, no noise is enough, what is given lasts no client to the
            end, or the rows must be known.
    """
    check_countable(config)
    if config.dp == "none":
        return config
    asked = steps_asked(config)
    if config.dp_noise_multiplier == AUTO:
        if config.dp == "example" and not sizes:
            raise MeerkatError(
                "dp_noise_multiplier: needed in a federation with dp example, which does not know the sites' rows; "
                "each site counts its own epsilon from it"
            )
        rate = max(rates(config, sizes))
        noise = noise_for(config.dp_epsilon, config.dp_delta, rate, asked, config.dp_relation)
        config = config.model_copy(update={"dp_noise_multiplier": math.ceil(1e4 * noise) / 1e4})
    sigma = number(config.dp_noise_multiplier)
    noisy = config.dp_clip * (1 + 6 * sigma) / config.batch_size
    if config.dp == "example" and noisy > (most := LARGEST_LOSS / number(config.eps)):
        raise MeerkatError(
            f"dp_clip {config.dp_clip:g} with dp_noise_multiplier {sigma:g}: makes scalars of up "
            f"to {noisy:.3g}, where {most:.3g} is allowed; use less of one, or larger batches"
        )
    lasting = allowance(config, sizes)
    if lasting and max(lasting) < asked:
        what = "local steps" if config.dp == "example" else "rounds"
        raise MeerkatError(
            f"dp_noise_multiplier {sigma:g}: dp_epsilon {config.dp_epsilon:g} lasts no client for "
            f"more than {max(lasting)} of {asked} {what}; use more noise, a larger budget or fewer rounds"
        )
    return config


def rates(config: RunConfig, sizes: Sequence[int]) -> list[float]:
    """Each client's sampling rate q_k; under client-level privacy the one rate of all."""
    counts = sizes if config.dp == "example" else [config.clients]
    return [sampling_rate(_expected(config), count) for count in counts]


def steps_asked(config: RunConfig) -> int:
    """How often a client's rows can be asked in a run: its local steps, calibrations included; of clients, rounds."""
    if config.dp == "client":
        return config.rounds
    calibrations = 0
    if config.stopping != "none" and config.local_steps > 1:
        every = config.recalibrate_every
        calibrations = -(-config.rounds // every) if every else 1
    return config.rounds * config.local_steps + calibrations * config.calibration_steps


def allowance(config: RunConfig, sizes: Sequence[int]) -> list[int]:
    """Local steps that each client's budget lasts for, by id; under client-level privacy rounds, the same for all.

    Counted up to `steps_asked`; empty without a budget.
    """
    if config.dp == "none" or not config.dp_epsilon:
        return []
    target, sigma, most = config.dp_epsilon, number(config.dp_noise_multiplier), steps_asked(config)
    lasting = {
        rate: steps_within(target, config.dp_delta, rate, sigma, config.dp_relation, most)
        for rate in {*rates(config, sizes)}
    }
    return [lasting[rate] for rate in rates(config, sizes)]


def ending_early(config: RunConfig, lasting: Sequence[int]) -> list[int]:
    """Clients whose budgets may not last to the end of the run, of a simulation's allowance: if all rounds ask them."""
    asked = steps_asked(config)
    return [client for client, steps in enumerate(lasting) if steps < asked]


def not_lasting(
    config: RunConfig, lasting: Sequence[int], made: Mapping[int, int], early_stopped: Collection[int], rounds: int
) -> list[int]:
    """Those of them whose budgets do not last for the rounds that are left, or, after the last, for one more.

    Args:
        made: local steps that each client has made, by id.
        early_stopped: clients that make one step a round.
        rounds: how many are closed.
    """
    left = max(config.rounds - rounds, 1)
    wanted = {k: left * (1 if k in early_stopped else config.local_steps) for k in range(len(lasting))}
    return [k for k in ending_early(config, lasting) if made.get(k, 0) + wanted[k] > lasting[k]]


def spent(config: RunConfig, made: Mapping[tuple[int, int], int], rounds: int, relation: Relation) -> list[float]:
    """The epsilon that each client of a run has spent, at the run's delta; under client-level privacy one for all.

    Args:
        made: (client, its rows at the time) -> local steps that it made of them.
        rounds: rounds closed, which are what all clients share under client-level privacy.
    """
    noisy = mechanism(config)
    if noisy is None:
        return []
    charges: dict[int, list[Charge]] = {}
    steps_of = [((0, config.clients), rounds)] if config.dp == "client" else [*made.items()]
    for (client, count), steps in steps_of:
        charges.setdefault(client, []).append(Charge(noisy.rate(count), noisy.noise_multiplier, steps))
    return [epsilon(charges[client], config.dp_delta, relation) for client in sorted(charges)]


def guarantee(config: RunConfig, made: Mapping[tuple[int, int], int], rounds: int) -> Guarantee | None:
    """What a run promises so far, to the client that it promises least; None without differential privacy.

    Arguments as in `spent`. In a federation it is what the log shows: a site's own ledger also has replies that came
    after the last one that counted.
    """
    if config.dp == "none":
        return None
    this: Relation = config.dp_relation
    other: Relation = "replace" if this == "add-or-remove" else "add-or-remove"
    epsilons = [max(spent(config, made, rounds, relation), default=0.0) for relation in (this, other)]
    rows: dict[int, int] = {}
    for client, count in made:
        rows[client] = max(count, rows.get(client, 0))
    return Guarantee(
        level=config.dp,
        relation=this,
        epsilon=epsilons[0],
        otherwise=epsilons[1],
        delta=config.dp_delta,
        clip=config.dp_clip,
        noise_multiplier=number(config.dp_noise_multiplier),
        among=sum(rows.values()) if config.dp == "example" else config.clients,
    )
