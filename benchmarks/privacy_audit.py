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

Then a search: a coordinator picks eps, clip, mask, directions and rows, within what a site accepts by default, so that
slopes are mostly rounding. Of two data sets that differ by a row, it compares the clipped sums without noise, and one
noisy answer each in many trials; the confidence is shared among all settings, and an excess counts if fresh trials show
it too. The attack must find more than was promised where rows share a forward pass: that is the last broken mechanism.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import beta

from meerkat import seeds
from meerkat.algorithm.client import slopes
from meerkat.algorithm.directions import Directions, run_key
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.server import ServerConfig, ServerState, close_round, open_round
from meerkat.algorithm.zeroth_order import Loss, MaskedModel
from meerkat.federation.site_settings import Accepts
from meerkat.masks.eligible import eligible_parameters
from meerkat.masks.sparse_mask import SparseMask, fingerprint
from meerkat.privacy.accounting import Charge, epsilon, noise_for
from meerkat.privacy.mechanism import Mechanism, Relation, clipped
from meerkat.problems.data import Row
from meerkat.problems.problem import Problem, client_losses
from meerkat.run.curvature import with_rates
from meerkat.run.local_engine import LocalEngine, LossesOf
from meerkat.run.mask import make_mask
from meerkat.run.precision import with_precision
from meerkat.run.setup import open_problem, resolve
from meerkat.settings.auto import number
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
    config, mask = with_rates(config, problem, make_mask(config, problem))
    config, mask = with_precision(config, problem, mask)
    rows = problem.rows("train")[:ROWS]
    rows[0] = {**rows[0], "label": (rows[0]["label"] + 2) % len(problem.labels)}
    losses_of = client_losses(problem, problem.prepare(rows), "example")
    z = Directions(run_key(SEED), len(mask))
    return Ground(MaskedModel(problem.model, mask), z, losses_of, number(config.lr), number(config.eps))


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
    holds = np.isin(np.arange(ROWS), places) & np.ones((2 * trials, 1), bool)
    holds[trials:, 0] = False

    def batch_of(client: int, _: int) -> np.ndarray:
        sampled = mechanism.sample(np.arange(ROWS))
        return sampled[holds[client, sampled]]

    engine = LocalEngine(ground.model, z, batch_of, once(ground.losses_of), private=mechanism)
    server = ServerConfig(
        rounds=ROUNDS,
        local_steps=1,
        directions=DIRECTIONS,
        lr=ground.lr,
        eps=ground.eps,
        clients=len(holds),
        clients_per_round=len(holds),
        examples=dict.fromkeys(range(len(holds)), ROWS),
    )
    state, log_ratios = ServerState(Replica(0, ground.model.read())), np.zeros(len(holds))
    for _ in range(ROUNDS):
        plan = open_round(state, server)
        losses = ground.losses_of([places])
        of_rows, _ = slopes(ground.model, state.theta, plan, 0, losses, z)
        replies = engine.run(state, plan)
        sums = mechanism.expected * np.concatenate([reply.scalars for reply in replies]).astype(np.float64)
        spread, sampled = mechanism.noise_multiplier * mechanism.clip, np.full(len(holds), mechanism.rate(ROWS))
        if case.noise:
            sums -= spread * case.noise.standard_normal(sums.shape)
            spread *= 1e-3  # far above what rounding leaves
        if case.sample:
            sampled = (case.sample.random((len(holds), ROWS))[:, 0] < sampled).astype(np.float64)
        contributions = clipped(of_rows, mechanism.clip)
        log_ratios += evidence(sums, contributions[0], contributions[1:], mechanism.rate(ROWS), spread, sampled)
        state, _ = close_round(state, plan, replies, server, z)
    return log_ratios.reshape(2, trials)


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
        log_ratios: np.ndarray = np.logaddexp(np.log1p(-sampled), np.log(sampled) + ratio)
    return log_ratios


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


# --- the search ---

BUDGET, BUDGET_DELTA = 1.0, 1e-5
"""What one answer may cost: a site's whole budget, at its default delta."""
HELD = 32
"""Rows that a client holds. All are in every sample: q = 1, so that nothing hides which rows are in a sum."""
Neighbour = Literal["left out", "long, left out", "replaced", "replaced by a long one"]
NEIGHBOURS: tuple[Neighbour, ...] = ("left out", "long, left out", "replaced", "replaced by a long one")
MASKS = ("100 of an attention", "all but embeddings", "sensitivity")
LossesOfRows = Callable[[Problem, Sequence[Any]], LossesOf]


@dataclass(frozen=True)
class Setting:
    """What a coordinator chooses, and how two data sets differ."""

    mask: str
    eps: float
    clip: float
    directions: int
    neighbour: Neighbour
    seed: int
    alike: bool = False
    """Whether all other rows are one row: what moves one of them then moves all of them, the same way."""

    @property
    def relation(self) -> Relation:
        """Which neighbours they are."""
        return "replace" if "replaced" in self.neighbour else "add-or-remove"


QUIET = 1e-6, 1e-4
"""An eps and a clip at which slopes are rounding, below what a site accepts by default: what the attack is best at."""


def chosen(count: int) -> list[Setting]:
    """The quietest settings that a site accepts by default, a quieter one below, then any that it accepts."""
    limits, rng = Accepts.model_validate({}), seeds.generator(SEED, "search")
    eps, clip = (limits.eps_minimum, limits.eps_maximum), (limits.dp_clip_minimum, limits.dp_clip_maximum)
    corners = itertools.product(MASKS, NEIGHBOURS, (QUIET, (eps[0], clip[0]), (eps[0], 1.0)))
    settings = [Setting(mask, *of, 1, neighbour, number) for number, (mask, neighbour, of) in enumerate(corners)]
    while len(settings) < count:
        number = len(settings)
        between = [math.exp(rng.uniform(math.log(low), math.log(high))) for low, high in (eps, clip)]
        mask, neighbour = MASKS[rng.integers(len(MASKS))], NEIGHBOURS[number % len(NEIGHBOURS)]
        settings.append(
            Setting(mask, between[0], between[1], (1, 2, 5)[number % 3], neighbour, number, number % 2 == 0)
        )
    return settings[:count]


class Searched:
    """The embedded model under several masks, and rows of all lengths made of the topics task's words."""

    def __init__(self, dtype: str = "float32", text_sequences: int = 256) -> None:
        """With weights of a type, and a sensitivity mask made from so many texts."""
        given = {"task": "topics", "threads": 1, "device": "cpu", "dtype": dtype, "text_sequences": text_sequences}
        config = resolve(make_config(given))
        self.problem = open_problem(config)
        self.masks = masks(self.problem.model, make_mask(config, self.problem))
        self._words = " ".join(str(row["text"]) for row in self.problem.rows("train")).split()

    def rows(self, setting: Setting) -> tuple[list[Row], list[Row], int]:
        """Two data sets that differ by a row, and that row's number."""
        rng = seeds.generator(setting.seed, "rows")
        made = [self._row(rng, int(rng.integers(4, 114))) for _ in range(HELD)]
        rows = [made[0]] * HELD if setting.alike else sorted(made, key=lambda row: len(row["text"]))
        at = int(rng.integers(HELD))
        another = self._row(rng, 200 if "long" in setting.neighbour else 30)
        if setting.relation == "replace":
            return rows, [*rows[:at], another, *rows[at + 1 :]], at
        whole = [*rows[:at], another, *rows[at:]]
        return whole, rows, at

    def _row(self, rng: np.random.Generator, words: int) -> Row:
        first = int(rng.integers(len(self._words) - words))
        return {"text": " ".join(self._words[first : first + words]), "label": int(rng.integers(4))}

    def slopes(self, setting: Setting, rows: Sequence[Row], losses: LossesOfRows) -> np.ndarray:
        """Each row's slopes, float64 [rows, P]."""
        model = MaskedModel(self.problem.model, self.masks[setting.mask])
        loss = losses(self.problem, self.problem.prepare(rows))([np.arange(len(rows))])
        plan = RoundPlan(0, 0.0, setting.eps, setting.directions, {0: 1})
        g, _ = slopes(model, model.read(), plan, 0, loss, Directions(run_key(setting.seed), len(model.mask)))
        return g


def masks(model: torch.nn.Module, sensitivity: SparseMask) -> Mapping[str, SparseMask]:
    """A mask whose entries hardly move a loss, one that moves everything but embeddings, and a run's own."""
    parameters = eligible_parameters(model, ["embeddings"])
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    quiet = next(name for name in parameters if "layers.1.self_attn.q_proj" in name)
    total = sum(parameter.numel() for parameter in model.parameters())
    made = [
        SparseMask({quiet: torch.arange(100)}, {quiet: shapes[quiet]}, fingerprint(model), total),
        SparseMask(dict.fromkeys(parameters), shapes, fingerprint(model), total),
        replace(sensitivity, pretraining_gradient=None, theta_0=None),
    ]
    return dict(zip(MASKS, made, strict=True))


def alone(problem: Problem, examples: Sequence[Any]) -> LossesOf:
    """As it is: each row goes through the model by itself."""
    return client_losses(problem, examples, "example")


def sharing(problem: Problem, examples: Sequence[Any]) -> LossesOf:
    """Broken: rows share forward passes, so that a loss' rounding depends on the others."""

    def of(rows: Sequence[np.ndarray]) -> Loss:
        batch = problem.batch([examples[row] for row in np.concatenate(rows)])
        return lambda: problem.row_losses(batch).double()

    return of


@dataclass(frozen=True)
class Found:
    """What a coordinator sees of one row at a setting."""

    setting: Setting
    movement: float
    """How far the clipped sum moves, in clips: at most 1 is promised, and 2 where a row is replaced."""
    others: float
    """The most that any other row's slope moves."""
    measured: float
    """What epsilon is at least; 0 without trials."""


def compare(ground: Searched, setting: Setting, losses: LossesOfRows, trials: int, confidence: float) -> Found:
    """Compare the answers about two data sets that differ by a row."""
    whole, other, at = ground.rows(setting)
    of_whole, of_other = (ground.slopes(setting, rows, losses) for rows in (whole, other))
    same = np.delete(of_whole, at, 0), np.delete(of_other, at, 0) if setting.relation == "replace" else of_other
    towards = clipped(of_whole, setting.clip).sum(0) - clipped(of_other, setting.clip).sum(0)
    mechanism = Mechanism(setting.clip, noise_of(setting.relation), float(HELD))

    def answers(vectors: np.ndarray) -> np.ndarray:
        released = np.stack([mechanism.release(vectors) for _ in range(trials)])
        along: np.ndarray = released.astype(np.float32).astype(np.float64) @ towards
        return along

    measured = 0.0
    for _ in range(2 if trials else 0):  # an excess must show in fresh trials too
        measured = lower_bound(answers(of_whole), answers(of_other), BUDGET_DELTA, confidence)
        if measured <= BUDGET:
            break
    moved = float(np.linalg.norm(towards)) / setting.clip
    return Found(setting, moved, float(np.abs(same[0] - same[1]).max()), measured)


def noise_of(relation: Relation) -> float:
    """The noise whose one answer costs the whole budget."""
    return noise_for(BUDGET, BUDGET_DELTA, 1.0, 1, relation)


def search(ground: Searched, settings: Sequence[Setting], trials: int) -> list[Found]:
    """The mechanism as it is at all settings, which share the 5% by which a bound may be wrong."""
    return [compare(ground, setting, alone, trials, 1 - 0.05 / len(settings)) for setting in settings]


def attack_on_sharing(ground: Searched, tries: int, trials: int) -> Found:
    """Where rows share a pass: the quiet setting whose sum moves farthest when a row is left out, and fresh trials."""
    settings = [Setting(MASKS[0], *QUIET, 1, NEIGHBOURS[seed % 2], seed) for seed in range(tries)]
    farthest = max(settings, key=lambda setting: compare(ground, setting, sharing, 0, 0.95).movement)
    return compare(ground, farthest, sharing, trials, 0.95)


def summed_up(seen: Sequence[Found]) -> dict[str, Any]:
    """A search as one JSON object."""
    return {
        "settings": len(seen),
        "promised": BUDGET,
        "measured": round(max(each.measured for each in seen), 4),
        "exceeding": sum(each.measured > BUDGET for each in seen),
        "movement": {
            relation: max((each.movement for each in seen if each.setting.relation == relation), default=0.0)
            for relation in ("add-or-remove", "replace")
        },
        "others_moved": max(each.others for each in seen),
    }


def main() -> None:
    """Audit and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--trials", type=int, default=10_000, help="clients with the canary, and as many without")
    parser.add_argument("--settings", type=int, default=72, help="settings that the search tries")
    arguments = parser.parse_args()
    ground, most = embedded(), promised()
    measured = {}
    for case in cases():
        with_canary, without = scores(ground, case, arguments.trials)
        measured[case.name] = lower_bound(with_canary, without, DELTA)
    searched, settings = Searched(), chosen(arguments.settings)
    summary = summed_up(search(searched, settings, arguments.trials // 2))
    broken = attack_on_sharing(searched, arguments.settings, arguments.trials)
    measured["broken: rows share a pass"] = broken.measured
    result = {
        "name": "privacy_audit",
        "ratio": round(next(iter(measured.values())) / most, 4),
        "promised": round(most, 4),
        "measured": {name: round(bound, 4) for name, bound in measured.items()},
        "search": summary,
        "sharing": {"movement": broken.movement, "others_moved": broken.others, "measured": round(broken.measured, 4)},
        "measured_on": f"the embedded model, topics, {ROUNDS} rounds of T = 1, P = {DIRECTIONS}, "
        f"q = {MECHANISM.rate(ROWS):g}, sigma {MECHANISM.noise_multiplier:g}, delta {DELTA:g}, "
        f"{arguments.trials} trials a side",
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"promised: epsilon at most {most:.2f}; measured: at least")
    for name, bound in measured.items():
        print(f"  {name:<40}{bound:.2f}")
    print(
        f"searched: {summary['settings']} settings that a site accepts, one answer each, promised at most {BUDGET:g}; "
        f"measured: at most {summary['measured']:.2f}, {summary['exceeding']} exceed it; the clipped sum moves by "
        f"at most {summary['movement']['add-or-remove']:.4f} clips (a row left out) and "
        f"{summary['movement']['replace']:.4f} (replaced), other rows by {summary['others_moved']:g}"
    )
    print(f"where rows share a pass: the sum moves by {broken.movement:.2f} clips; {broken.setting}")
    print(result["measured_on"])


if __name__ == "__main__":
    main()
