"""A membership-inference audit of example-level privacy on the embedded model: epsilon measured, epsilon promised.

    python benchmarks/privacy_audit.py [--json] [--trials 10000]

A trial is a client that holds the canary, a row with a wrong label, or does not: all clients of one federation stand
at the same theta, so thousands of trials cost a few forward passes. The engine, the server, the mask, the directions
and the learning rate are a run's own. The number of a client's rows is public: a row that is not there counts as
nothing. The attacker knows every seed, theta in every round, each scalar sent, the canary and all other rows; not
which rows were sampled, nor the noise. Its score is the log-likelihood ratio of what a client sent over all rounds.

A lower bound on epsilon follows from how often a test on that score is right and wrong, by Clopper-Pearson at 95% in
all (Nasr et al. 2021): half of the trials choose the test, the other half judge it. It must stay under what the
accountant promises. The same audit must find more than was promised where the mechanism is broken: half the noise,
and noise or samples from a seed that all know. The headline is measured over promised, of the mechanism as it is.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

from meerkat import seeds
from meerkat.algorithm.client import slopes
from meerkat.algorithm.directions import Directions, run_key
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.server import ServerConfig, ServerState, close_round, open_round
from meerkat.algorithm.zeroth_order import Loss, MaskedModel
from meerkat.privacy.accounting import Charge, epsilon
from meerkat.privacy.mechanism import Mechanism, clipped
from meerkat.problems.problem import client_losses
from meerkat.run.local_engine import LocalEngine, LossesOf
from meerkat.run.mask import default_lr, make_mask
from meerkat.run.setup import open_problem, resolve
from meerkat.settings.config import make_config

ROUNDS, DIRECTIONS, SEED = 20, 2, 0
DELTA = 0.01
"""Below one over the rows. At a smaller one, what is promised lies where few trials fall."""
ROWS = 30
"""Rows that a client may hold; the canary is the first."""
MECHANISM = Mechanism(clip=0.05, noise_multiplier=1.0, expected=3.0)
"""The clip is small beside the canary's slopes, which are so at the clip: the largest effect it may have."""


class HalfNoise(Mechanism):
    """Broken: half of the noise that is counted."""

    def release(self, vectors: np.ndarray) -> np.ndarray:
        return Mechanism(self.clip, self.noise_multiplier / 2, self.expected).release(vectors)


@dataclass(frozen=True)
class SharedNoise(Mechanism):
    """Broken: noise of a generator that the attacker can make again."""

    shared: np.random.Generator

    def release(self, vectors: np.ndarray) -> np.ndarray:
        noise = self.noise_multiplier * self.clip * self.shared.standard_normal(vectors.shape[1])
        return (clipped(vectors, self.clip).sum(0) + noise) / self.expected


@dataclass(frozen=True)
class SharedSample(Mechanism):
    """Broken: samples of a generator that the attacker can make again."""

    shared: np.random.Generator

    def sample(self, members: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.asarray(members)[self.shared.random(len(members)) < self.rate(len(members))]


@dataclass(frozen=True)
class Case:
    """One audit: a mechanism, what clients hold beside the canary, and what of it the attacker can draw again."""

    name: str
    mechanism: Mechanism
    others: bool = False
    """Whether clients hold the other rows too; without, it is the canary or nothing."""
    noise: np.random.Generator | None = None
    sample: np.random.Generator | None = None


def cases() -> tuple[Case, ...]:
    """The mechanism as it is, and broken."""
    as_it_is = MECHANISM.clip, MECHANISM.noise_multiplier, MECHANISM.expected

    def shared() -> np.random.Generator:
        return seeds.generator(SEED, "broken")

    return (
        Case("as it is: the canary or nothing", MECHANISM),
        Case(f"as it is: the canary among {ROWS - 1} rows", MECHANISM, others=True),
        Case("broken: half the noise", HalfNoise(*as_it_is)),
        Case("broken: noise from the shared seed", SharedNoise(*as_it_is, shared()), noise=shared()),
        Case("broken: samples from the shared seed", SharedSample(*as_it_is, shared()), sample=shared()),
    )


@dataclass(frozen=True)
class Ground:
    """What trials stand on: the model, directions, each row's loss (the canary's is row 0's), eta and eps."""

    model: MaskedModel
    directions: Directions
    losses_of: LossesOf
    lr: float
    eps: float


def embedded() -> Ground:
    """The embedded model, its mask and the first rows of the topics task, the first of them with a wrong label."""
    config = resolve(make_config({"task": "topics", "threads": 1, "device": "cpu"}))
    problem = open_problem(config)
    mask = make_mask(config, problem)
    rows = problem.rows("train")[:ROWS]
    rows[0] = {**rows[0], "label": (rows[0]["label"] + 2) % len(problem.labels)}
    losses_of = client_losses(problem, problem.prepare(rows), "example")
    z = Directions(run_key(SEED), len(mask))
    return Ground(MaskedModel(problem.model, mask), z, losses_of, default_lr("meerkat", len(mask)), config.eps)


def once(losses_of: LossesOf) -> LossesOf:
    """The same losses, each row's computed once, however many clients sampled it."""

    def of(rows: Sequence[np.ndarray]) -> Loss:
        distinct, back = np.unique(np.concatenate(rows), return_inverse=True)
        losses = losses_of([distinct])
        return lambda: losses()[back]

    return of


def scores(ground: Ground, case: Case, trials: int) -> np.ndarray:
    """The attacker's score of every client, float64 [2, trials]: of those that hold the canary, and of the rest."""
    mechanism, z = case.mechanism, ground.directions
    places = np.arange(ROWS if case.others else 1)
    held = np.isin(np.arange(ROWS), places) & np.ones((2 * trials, 1), bool)
    held[trials:, 0] = False

    def batch_of(client: int, _: int) -> np.ndarray:
        sampled = mechanism.sample(np.arange(ROWS))
        return sampled[held[client, sampled]]

    engine = LocalEngine(ground.model, z, batch_of, once(ground.losses_of), private=mechanism)
    server = ServerConfig(
        rounds=ROUNDS,
        local_steps=1,
        directions=DIRECTIONS,
        lr=ground.lr,
        eps=ground.eps,
        clients=len(held),
        clients_per_round=len(held),
        examples=dict.fromkeys(range(len(held)), ROWS),
    )
    state, found = ServerState(Replica(0, ground.model.read())), np.zeros(len(held))
    for _ in range(ROUNDS):
        plan = open_round(state, server)
        losses = ground.losses_of([places])
        of_rows, _ = slopes(ground.model, state.theta, plan, 0, losses, z)
        replies = engine.run(state, plan)
        sums = mechanism.expected * np.concatenate([reply.scalars for reply in replies]).astype(np.float64)
        spread, sampled = mechanism.noise_multiplier * mechanism.clip, np.full(len(held), mechanism.rate(ROWS))
        if case.noise:
            sums -= spread * case.noise.standard_normal(sums.shape)
            spread *= 1e-3  # far above what rounding leaves
        if case.sample:
            sampled = (case.sample.random((len(held), ROWS))[:, 0] < sampled).astype(np.float64)
        contributions = clipped(of_rows, mechanism.clip)
        found += evidence(sums, contributions[0], contributions[1:], mechanism.rate(ROWS), spread, sampled)
        state, _ = close_round(state, plan, replies, server, z)
    return found.reshape(2, trials)


def evidence(
    sums: np.ndarray,
    canary: np.ndarray,
    others: np.ndarray,
    rate: float,
    spread: float,
    sampled: np.ndarray,
) -> np.ndarray:
    """log p(sum | the canary is held) - log p(sum | it is not), float64 [K].

    Args:
        sums: noisy sums of clipped slopes, float64 [K, P].
        canary: its clipped slopes, float64 [P].
        others: those of the other rows, float64 [rows, P], each in a sum with probability `rate`: Gaussian to us.
        spread: the noise's standard deviation.
        sampled: the chance that the canary was sampled, if it is held: float64 [K].
    """
    covariance = spread**2 * np.eye(len(canary)) + rate * (1 - rate) * others.T @ others
    towards = np.linalg.solve(covariance, canary)
    ratio = (sums - rate * others.sum(0)) @ towards - canary @ towards / 2
    with np.errstate(divide="ignore"):  # a sample that is known
        found: np.ndarray = np.logaddexp(np.log1p(-sampled), np.log(sampled) + ratio)
    return found


def lower_bound(present: np.ndarray, absent: np.ndarray, delta: float, confidence: float = 0.95) -> float:
    """What epsilon is at least, at a delta and a confidence, by scores with the canary and without, float64 [trials].

    (epsilon, delta)-privacy has P(yes | one) <= e^epsilon P(yes | other) + delta for every test and both ways round.
    """
    half = len(present) // 2
    ways = ((present, absent), (-absent, -present))
    chosen = []
    for one, other in ways:
        met = np.sort(np.concatenate([one[:half], other[:half]]))
        thresholds = (met[1:] + met[:-1]) / 2
        hits, alarms = (half - np.searchsorted(np.sort(of[:half]), thresholds, "right") for of in (one, other))
        bounds = _bound(hits, alarms, half, delta, confidence)
        chosen.append((bounds.max(), thresholds[bounds.argmax()]))
    way = int(chosen[1][0] > chosen[0][0])
    hits, alarms = (np.sum(of[half:] > chosen[way][1]) for of in ways[way])
    return float(_bound(hits, alarms, len(present) - half, delta, confidence))


def _bound(hits: np.ndarray, alarms: np.ndarray, trials: int, delta: float, confidence: float) -> np.ndarray:
    """log((P(yes | one) - delta) / P(yes | other)) at the ends of Clopper-Pearson's intervals; zero if below."""
    wrong = (1 - confidence) / 2
    least = np.where(hits > 0, beta.ppf(wrong, np.maximum(hits, 1), trials - hits + 1), 0.0)
    most = np.where(alarms < trials, beta.ppf(1 - wrong, alarms + 1, np.maximum(trials - alarms, 1)), 1.0)
    bound: np.ndarray = np.log(np.maximum((least - delta) / most, 1.0))
    return bound


def promised() -> float:
    """The accountant's epsilon for all rounds."""
    return epsilon([Charge(MECHANISM.rate(ROWS), MECHANISM.noise_multiplier, ROUNDS)], DELTA, "add-or-remove")


def main() -> None:
    """Audit and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--trials", type=int, default=10_000, help="clients with the canary, and as many without")
    arguments = parser.parse_args()
    ground, most = embedded(), promised()
    measured = {case.name: lower_bound(*scores(ground, case, arguments.trials), DELTA) for case in cases()}
    result = {
        "name": "privacy_audit",
        "ratio": round(next(iter(measured.values())) / most, 4),
        "promised": round(most, 4),
        "measured": {name: round(found, 4) for name, found in measured.items()},
        "measured_on": f"the embedded model, topics, {ROUNDS} rounds of T = 1, P = {DIRECTIONS}, "
        f"q = {MECHANISM.rate(ROWS):g}, sigma {MECHANISM.noise_multiplier:g}, delta {DELTA:g}, "
        f"{arguments.trials} trials a side",
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"promised: epsilon at most {most:.2f}; measured: at least")
    for name, found in measured.items():
        print(f"  {name:<40}{found:.2f}")
    print(result["measured_on"])


if __name__ == "__main__":
    main()
