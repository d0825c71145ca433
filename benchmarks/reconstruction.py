"""What an honest-but-curious server reads from a client's scalars, on the embedded model and task.

    python benchmarks/reconstruction.py [--json] [--plot FILE.png]

The server knows model, mask, every direction z and every theta, and is sent g = <grad f, z>. It may want

- the gradient of a client whose batch stays the same: the ridge solution of Z x = g, at a theta that stays as well
  and along the path of a federation, whose theta moves at the default rate (there also with the regulariser that
  is best for it). In theory the cosine with the truth is sqrt(t / n) after t scalars at a theta that stays;
- to know which of so many rows, or batches of 16, a client has: it computes each one's scalars and takes the nearest;
- to know which rows a client holds, by regression on the scalars of all candidates; and a row's label, by regression
  on rows of its own that are labelled.

With a sigma, each row's part of a scalar is clipped to +-C and noise of sigma C / B is added, as example-level
differential privacy does; C is the median |g| of single rows. The headline is the share of rows that one scalar tells.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meerkat.algorithm.directions import Directions, Place, run_key
from meerkat.algorithm.first_order import masked_gradient
from meerkat.algorithm.path import descend
from meerkat.algorithm.zeroth_order import MaskedModel, projected_gradient
from meerkat.problems.partition import ClientRows
from meerkat.problems.problem import client_losses
from meerkat.progress import say
from meerkat.run.curvature import with_rates
from meerkat.run.local_engine import LossesOf
from meerkat.run.mask import make_mask
from meerkat.run.precision import with_precision
from meerkat.run.setup import open_problem, resolve
from meerkat.run.split import training_and_evaluation_rows
from meerkat.settings.auto import number
from meerkat.settings.config import make_config

BATCH, SEED = 16, 0
SIGMAS = (None, 0.5, 1.0, 2.0)
RATIOS = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0)
"""t / n at which the gradient is looked at."""
REGULARISERS = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)
"""In n: the first gives the shortest solution; among all of them the best is taken along a path."""


@dataclass(frozen=True)
class Bench:
    """The federation that is attacked."""

    model: MaskedModel
    directions: Directions
    losses_of: LossesOf
    eps: float
    lr: float
    labels: np.ndarray
    """Of the candidates, which come first among the rows."""
    others: tuple[ClientRows, ...]
    """The clients that move theta; none of their rows is a candidate."""

    def path(self, steps: int, lr: float) -> Iterator[tuple[Tensor, Tensor]]:
        """theta and z of each round of one step."""
        theta = self.model.read()
        for step in range(steps):
            z = self.directions(Place("training", step, 0, 0))
            yield theta, z
            if lr:
                g = self.scalars(theta, z, [client.batch(step) for client in self.others])
                theta = descend(theta, np.float32(lr), np.float32(g.mean()), z)

    def scalars(self, theta: Tensor, z: Tensor, batches: list[np.ndarray]) -> np.ndarray:
        """What clients with these batches send: float32 [K]."""
        return projected_gradient(self.model, theta, z, self.eps, self.losses_of(batches)).g.numpy().astype("f4")

    def gradients(self, theta: Tensor, batches: list[np.ndarray]) -> np.ndarray:
        """The truth, by backpropagation: [K, n]."""
        losses = [self.losses_of([batch]) for batch in batches]
        each = [masked_gradient(self.model, theta, lambda of=of: of()[0])[0] for of in losses]
        self.model.write_(theta)
        return torch.stack(each).double().numpy()


def open_bench(candidates: int) -> Bench:
    """Load the embedded model and its rows, each text once."""
    config = resolve(make_config({"threads": 1}))
    problem = open_problem(config)
    config, mask = with_rates(config, problem, make_mask(config, problem))
    config, mask = with_precision(config, problem, mask)
    rows = list({row["text"]: row for row in training_and_evaluation_rows(config, problem.rows)[0]}.values())
    others = np.array_split(np.arange(candidates, len(rows)), 4)
    return Bench(
        MaskedModel(problem.model, mask),
        Directions(run_key(SEED), len(mask)),
        client_losses(problem, problem.prepare(rows)),
        number(config.eps),
        number(config.lr),
        np.array([row["label"] for row in rows[:candidates]]),
        tuple(ClientRows(k, of_client, BATCH, SEED) for k, of_client in enumerate(others)),
    )


# --- the gradient ---------------------------------------------------------------------------------


def ridge(known: np.ndarray, seen: np.ndarray, regulariser: float = 0.0) -> np.ndarray:
    """argmin |known x - seen|^2 + regulariser |x|^2, the shortest one: known [t, n], seen [t, K] -> [n, K]."""
    u, s, v = np.linalg.svd(known, full_matrices=False)
    kept = s > 1e-9 * s[0]
    scale = np.where(kept, s, 0) / np.where(kept, s * s + regulariser, 1)
    return v.T @ (scale[:, None] * (u.T @ seen))


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of columns with columns."""
    return (one * other).sum(0) / np.linalg.norm(one, axis=0) / np.linalg.norm(other, axis=0)


def gradient_attack(bench: Bench, ratios: tuple[float, ...]) -> list[dict[str, float]]:
    """Cosine of the server's estimate with the truth, mean over victims: 8 rows alone, 2 batches of 16."""
    batches = [*np.arange(8).reshape(8, 1), *np.arange(2 * BATCH).reshape(2, BATCH)]
    size = len(bench.model.mask)
    counts = [max(1, round(ratio * size)) for ratio in ratios]
    lines = {t: {"ratio": t / size, "scalars": t, "theory": min(1.0, (t / size) ** 0.5)} for t in counts}
    for name, lr in (("stays", 0.0), ("moves", bench.lr)):
        known, seen, truths = [], [], []
        for step, (theta, z) in enumerate(bench.path(max(lines), lr), 1):
            if step == 1 or (lr and step % BATCH == 0):
                truths.append(bench.gradients(theta, batches))
            known.append(z.double().numpy())
            seen.append(bench.scalars(theta, z, batches))
            if step not in lines:
                continue
            # along a path the mean of the gradients on the way: one vector can tell no more of it
            truth = np.mean(truths, 0).T
            tried = [cosines(ridge(np.stack(known), np.stack(seen), size * by), truth) for by in REGULARISERS]
            kinds = {"": tried[0], ", best": np.max(tried, 0)} if lr else {"": tried[0]}
            for kind, per_victim in kinds.items():
                lines[step][f"{name}, 1 row{kind}"] = float(per_victim[:8].mean())
                lines[step][f"{name}, {BATCH} rows{kind}"] = float(per_victim[8:].mean())
        say(f"gradient, theta {name}: done")
    return list(lines.values())


# --- rows -----------------------------------------------------------------------------------------


def identified(heard: np.ndarray, predicted: np.ndarray, scalars: int) -> float:
    """The share of victims whose own candidate is the nearest, over all stretches of so many scalars.

    Args:
        heard: [t, victims]; predicted: [t, candidates], the victims' own first.
    """
    right = []
    for first in range(0, len(heard) - scalars + 1, scalars):
        mine, theirs = heard[first : first + scalars].T, predicted[first : first + scalars].T
        nearest = [((theirs - one) ** 2).sum(1).argmin() for one in mine]
        right.append(np.array(nearest) == np.arange(len(mine)))
    return float(np.mean(right))


def auc(of: np.ndarray, others: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a member's score is above another's."""
    ranks = np.concatenate([of, others]).argsort().argsort()[: len(of)]
    return float((ranks.mean() - (len(of) - 1) / 2) / len(others))


def found_rows(
    table: np.ndarray, rows_each: int, noise: float, scalars: int, draws: np.random.Generator
) -> tuple[float, float]:
    """AUC of membership, and the share of members among the `rows_each` best scores; means over 20 clients.

    Each client holds `rows_each` of the candidates and takes 16 of them a step: all, or afresh each time.
    """
    table, rows = table[:scalars], table.shape[1]
    members = [draws.permutation(rows)[:rows_each] for _ in range(20)]
    taken = np.stack([[draws.permutation(mine)[:BATCH] for mine in members] for _ in table])
    seen = np.take_along_axis(table[:, None], taken, 2).mean(2) + noise * draws.normal(size=(scalars, len(members)))
    middle = table.mean(1)[:, None]
    # the regulariser of who knows how many rows are held: variance of the noise over that of a row's weight
    spread = table.var(1).mean() * (1 / BATCH - 1 / rows_each) + noise**2 + 1e-9
    scores = ridge(table - middle, seen - middle, spread * rows_each * rows).T
    areas = [auc(score[mine], np.delete(score, mine)) for score, mine in zip(scores, members, strict=True)]
    shares = [np.isin(np.argsort(-score)[:rows_each], mine).mean() for score, mine in zip(scores, members, strict=True)]
    return float(np.mean(areas)), float(np.mean(shares))


def labels_told(table: np.ndarray, labels: np.ndarray, noise: float, scalars: int, draws: np.random.Generator) -> float:
    """The share of right labels for the first fifth of the rows, the server having the rest with their labels."""
    rows = (table[:scalars] - table[:scalars].mean(1)[:, None]).T
    wanted, victims = np.eye(labels.max() + 1)[labels], len(rows) // 5
    regulariser = (noise**2 + 0.01 * rows.var()) * (len(rows) - victims)
    weights = ridge(rows[victims:], wanted[victims:] - wanted.mean(0), regulariser)
    seen = rows[:victims] + noise * draws.normal(size=(victims, scalars))
    return float(((seen @ weights + wanted.mean(0)).argmax(1) == labels[:victims]).mean())


def row_attacks(bench: Bench, steps: int) -> dict[str, Any]:
    """Everything that candidates' own scalars allow, along a path."""
    draws, count = np.random.default_rng(SEED), len(bench.labels)
    each = [np.array([row]) for row in range(count)]
    mixed = np.stack([draws.permutation(count)[:BATCH] for _ in range(count)])
    table, sent = np.zeros((steps, count)), []
    for step, (theta, z) in enumerate(bench.path(steps, bench.lr)):
        table[step] = bench.scalars(theta, z, each)
        if step < 8:  # what the clients themselves send, in a pass of its own: other last bits
            sent.append(bench.scalars(theta, z, [*each[:100], *mixed[:20]]))
        if step % 64 == 63:
            say(f"candidates: {step + 1} of {steps} steps")
    clip = float(np.median(np.abs(table)))
    counts = [2**i for i in range(steps.bit_length()) if 2**i <= steps]
    attacks: dict[str, Any] = {"clip": clip, "identified": [], "members": [], "labels": []}
    for sigma in SIGMAS:
        noise = (sigma or 0) * clip
        rows = table if sigma is None else table.clip(-clip, clip)
        batches = rows[:, mixed].mean(-1)
        for size, predicted, exact in ((1, rows, np.stack(sent)[:, :100]), (BATCH, batches, np.stack(sent)[:, 100:])):
            victims = predicted[:, : exact.shape[1]]
            heard = exact if sigma is None else victims + noise / size * draws.normal(size=victims.shape)
            told = {t: identified(heard, predicted[: len(heard)], t) for t in counts if t <= len(heard)}
            attacks["identified"].append({"rows": size, "sigma": sigma, "found": told})
        for rows_each in (BATCH, min(10 * BATCH, count // 4)):
            both = {t: found_rows(rows, rows_each, noise / BATCH, t, draws) for t in counts}
            attacks["members"].append({"rows": rows_each, "sigma": sigma, "found": both})
        told = {t: labels_told(rows, bench.labels, noise, t, draws) for t in counts}
        attacks["labels"].append({"rows": 1, "sigma": sigma, "found": told})
    attacks["label_by_chance"] = float(np.bincount(bench.labels).max() / count)
    return attacks


def plot(result: dict[str, Any], to: Path) -> None:
    """The gradient; which row, which batch; whose rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    gradient, which, whose = figure.subplots(1, 3)
    ratios = [line["ratio"] for line in result["gradient"]]
    for name in [name for name in result["gradient"][0] if name not in ("ratio", "scalars")]:
        style = "k:" if name == "theory" else "--" if "moves" in name else "-"
        gradient.semilogx(ratios, [line[name] for line in result["gradient"]], style, marker=".", label=name)
    gradient.set(xlabel="scalars over mask size, t / n", ylabel="cosine with the truth", title="the client's gradient")
    for axis, kind in ((which, "identified"), (whose, "members")):
        for line in result["rows"][kind]:
            first = line["rows"] == result["rows"][kind][0]["rows"]
            name = "as sent" if line["sigma"] is None else f"sigma {line['sigma']:g}"
            drawn = {"color": f"C{SIGMAS.index(line['sigma'])}", "marker": ".", "label": name if first else ""}
            heights = [np.atleast_1d(value)[0] for value in line["found"].values()]
            axis.plot([*line["found"]], heights, "-" if first else "--", **drawn)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("scalars")
    which.set(
        ylabel="share found",
        title=f"which of {result['candidates']:,}? 1 row (-), 16 (--)",
        ylim=(-0.02, 1.05),
    )
    whose.set(
        ylabel="area under the ROC curve", title="is a row one of the client's 16 (-), 160 (--)?", ylim=(0.45, 1.02)
    )
    for axis in (gradient, which, whose):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(to, dpi=150)


def main() -> None:
    """Attack, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=256, help="scalars of each candidate")
    parser.add_argument("--ratio", type=float, default=RATIOS[-1], help="the highest t / n")
    given = parser.parse_args()
    bench = open_bench(given.candidates)
    rows = row_attacks(bench, given.steps)
    result = {
        "name": "reconstruction",
        "ratio": rows["identified"][0]["found"][1],
        "gradient": gradient_attack(bench, tuple(ratio for ratio in RATIOS if ratio <= given.ratio)),
        "rows": rows,
        "candidates": given.candidates,
        "measured_on": f"the embedded model, n = {len(bench.model.mask)}, {given.candidates:,} candidate rows of "
        f"topics, lr {bench.lr:g}",
    }
    if given.plot:
        plot(result, given.plot)
    if given.json:
        print(json.dumps(result))
        return
    print("cosine of the estimated gradient with the client's")
    for line in result["gradient"]:
        print("  " + ", ".join(f"{name} {value:.3g}" for name, value in line.items()))
    for kind, means in (
        ("identified", "share of victims found among the candidates"),
        ("members", "area under the ROC curve, and share of members among as many best scores as are held"),
        ("labels", f"share of right labels; by chance {rows['label_by_chance']:.3f}"),
    ):
        print(f"{kind}, after so many scalars: {means}")
        for line in rows[kind]:
            told = ", ".join(f"{t}: {' '.join(f'{x:.3f}' for x in np.atleast_1d(v))}" for t, v in line["found"].items())
            print(f"  {line['rows']:>3} rows, sigma {line['sigma']} | {told}")
    print(f"{result['measured_on']}; C = {rows['clip']:.3f}")


if __name__ == "__main__":
    main()
