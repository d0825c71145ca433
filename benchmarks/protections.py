"""What the protections cost: their time over that of a local step of a 20M-parameter model, batch 16 x 64.

    python benchmarks/protections.py [--json]

A step is two forward passes and all around them, as in step_cost.py. Beside it, in turn in this process, the work that
a protection adds for one client and step, on the site and on the server together; a figure is the median of the ratios.

Under example-level privacy each row goes through the model alone: a whole step so, over one whose rows go together, is
a ratio of its own, on this model and on the embedded one.
"""

import functools
import json
import secrets
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from step_cost import EPS, LENGTH, LR, ROWS, asked, batch_loss, llama, local_step, seconds
from transformers import LlamaForCausalLM

from meerkat.algorithm.client import local_steps
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.replies import Scalars, check_reply
from meerkat.algorithm.robust import Aggregation
from meerkat.algorithm.rounds import RoundPlan
from meerkat.algorithm.server import aggregate
from meerkat.algorithm.zeroth_order import Loss, MaskedModel
from meerkat.federation.ledger import Ledger
from meerkat.federation.run_ledger import RunLedger
from meerkat.federation.site_settings import Accepts
from meerkat.masks.baselines import random_mask
from meerkat.privacy.mechanism import Mechanism
from meerkat.problems.classification import Classification
from meerkat.problems.problem import Problem, client_losses
from meerkat.problems.tasks import Candidate, Example
from meerkat.record.members import Member, Members
from meerkat.record.signatures import RunIdentity, Signer, SigningKey
from meerkat.run.setup import open_problem, resolve
from meerkat.settings.config import make_config

CLIENTS = 10
ROWS_HELD = 2_000


def main() -> None:
    arguments = asked(__doc__)
    model = llama()
    masked = MaskedModel(model, random_mask(model, 1e-3))
    step = local_step(masked, batch_loss(model))

    step(0)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.log")
        rounds = on_the_server()  # whose cost ten clients share
        added = {**rounds, **example_privacy(ledger), "signing": signing()}
        ratios: dict[str, list[float]] = {name: [] for name in added}
        for number in range(1, arguments.repeats + 1):
            whole = seconds(functools.partial(step, number))
            for name, work in added.items():
                ratios[name].append(seconds(work) / whole / (CLIENTS if name in rounds else 1))
        ledger.close()
    shares = {name: statistics.median(values) for name, values in ratios.items()}
    together = [name for name in shares if name not in ("client_privacy", "multi_krum")]
    result: dict[str, Any] = {
        "name": "protections",
        "share_percent": round(100 * sum(shares[name] for name in together), 3),
        "shares_percent": {name: round(100 * share, 4) for name, share in shares.items()},
        "together": together,
        "private_step_ratio": private_steps(model, arguments.repeats),
        "measured_on": f"random Llama, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(masked.mask):,} moving, batch {ROWS} x {LENGTH}, {CLIENTS} clients, {torch.get_num_threads()} threads, "
        f"{arguments.repeats} repeats",
    }
    if arguments.json:
        print(json.dumps(result))
        return
    for name, share in shares.items():
        print(f"{name.replace('_', ' '):24} {100 * share:.4f} % of a step")
    print(f"{' + '.join(together).replace('_', ' ')}: {result['share_percent']} %")
    for name, ratio in result["private_step_ratio"].items():
        print(f"a step under example-level privacy, {name}: {ratio} times one without")
    print(result["measured_on"])


def private_steps(model: LlamaForCausalLM, repeats: int) -> dict[str, float]:
    """The ratio on the random model, whose rows are as long as the step's, and on the embedded one."""
    rng = np.random.default_rng(0)
    candidates = tuple(Candidate(0, LENGTH - 1, np.array([token])) for token in (1, 2))
    drawn = rng.integers(0, model.config.vocab_size, (ROWS_HELD, LENGTH))
    embedded = open_problem(resolve(make_config({"device": "cpu"})))
    return {
        "random Llama": private_step(
            Classification(model), [Example((tokens,), candidates, 0) for tokens in drawn], repeats
        ),
        "embedded model": private_step(embedded, embedded.prepare(embedded.rows("train")), repeats),
    }


def private_step(problem: Problem, examples: Sequence[Example], repeats: int) -> float:
    """A client's step under example-level privacy, each row a pass, over one without, on the same rows in turn."""
    masked = MaskedModel(problem.model, random_mask(problem.model, 1e-3))
    directions, theta, mechanism = Directions(1, len(masked.mask)), masked.read(), Mechanism(1.0, 1.0, float(ROWS))
    together, alone = client_losses(problem, examples), client_losses(problem, examples, "example")
    rng = np.random.default_rng(0)

    def step(number: int, loss: Callable[[int], Loss], private: Mechanism | None = None) -> None:
        plan = RoundPlan(number, LR, EPS, 1, {0: 1})
        local_steps(masked, theta, plan, 0, loss, directions, private=private)

    ratios = []
    for number in range(repeats + 1):
        rows = [rng.permutation(len(examples))[:ROWS]]
        plain = seconds(functools.partial(step, number, lambda _, rows=rows: mean_of(together(rows))))
        private = functools.partial(step, number, lambda _, rows=rows: alone(rows), mechanism)
        ratios.append(seconds(private) / plain)
    return round(statistics.median(ratios[1:]), 2)  # the first one warms up


def mean_of(losses: Loss) -> Loss:
    """The one client's mean."""
    return lambda: losses()[0]


def on_the_server() -> dict[str, Callable[[], object]]:
    """Rounds of ten clients: what is always on, held against the plain mean, and beside it what can be chosen."""
    plan = RoundPlan(0, LR, EPS, 1, dict.fromkeys(range(CLIENTS), 1))
    scalars = np.random.default_rng(0).normal(size=(CLIENTS, 1, 1)).astype(np.float32)
    replies = [Scalars(k, g) for k, g in enumerate(scalars)]
    weights = dict.fromkeys(range(CLIENTS), 1 / CLIENTS)
    noisy = Mechanism(1.0, 1.0, float(CLIENTS))

    def always_on() -> None:
        for reply in replies:
            check_reply(plan, reply.client, reply.scalars)
        aggregate(replies, weights, plan, limit=1e-9)  # scaled down: the longer way

    return {
        "always_on": always_on,
        "multi_krum": lambda: aggregate(replies, weights, plan, Aggregation("multi-krum", 2)),
        "client_privacy": lambda: noisy.release(scalars.reshape(CLIENTS, 1).astype(np.float64)),
    }


def example_privacy(ledger: Ledger) -> dict[str, Callable[[], object]]:
    """A sample of a client's rows, and noise on their slopes; the ledger's lines apart."""
    mechanism, rows = Mechanism(1.0, 1.0, float(ROWS)), np.arange(ROWS_HELD)
    slopes = np.random.default_rng(0).normal(size=(ROWS, 1))
    private = make_config({"dp": "example", "dp_noise_multiplier": 1.0, "batch_size": ROWS})
    of_run = RunLedger(ledger, private, Accepts.model_validate({}), secrets.token_hex(8), 0, ROWS_HELD)
    rounds = iter(range(10**9))

    def noted() -> None:
        of_run.answer("training", next(rounds), secrets.token_hex(32), secrets.token_hex(32), 1, lambda _: bytes(19))

    return {
        "example_privacy": lambda: (mechanism.sample(rows), mechanism.release(slopes)),
        "ledger": noted,
    }


def signing() -> Callable[[], object]:
    """A site signs a reply, and the server checks the signature."""
    key = SigningKey(Ed25519PrivateKey.generate())
    run, *digests = secrets.token_hex(8), *(secrets.token_hex(32) for _ in range(4))
    identity = RunIdentity(run, True, secrets.token_hex(16), *digests)
    signer, members = Signer(identity, 0, ROWS_HELD, "node", key, None), Members(identity)
    members.admit(Member(0, 0, ROWS_HELD, "node", signer.credentials["key"], signer.credentials["signature"]))
    plan, theta = RoundPlan(0, LR, EPS, 1, {0: 1}), secrets.token_bytes(32)
    scalars = np.ones((1, 1), np.float32)

    def signed() -> None:
        members.check_reply(0, plan, theta, 0, scalars, signer.sign(plan, theta, 0, scalars))

    return signed


if __name__ == "__main__":
    main()
