"""How well extreme clients are found without labels: calibrations of many federations, and what each rule finds.

    python benchmarks/selection.py [--json] [--model M --task T --data D --text F] [SPLIT/CLIENTS/FIRST/LAST ...]

A federation is a split, a number of clients and a seed; `mixed:3/10/0/4` are four of them. Each client makes its
calibration path at the method's own learning rate, and its scalars are kept in --traces, so that a run that was
cut short goes on. The headline is the automatic rule's true positive rate over the mixed federations.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from meerkat.algorithm.calibration import open_calibration
from meerkat.algorithm.directions import Directions, run_key
from meerkat.algorithm.extreme_clients import Vpcs, select
from meerkat.algorithm.gradip import gradip, inner_products, magnitude
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.server import ServerConfig, ServerState
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.problems.partition import ClientRows, partition
from meerkat.problems.problem import client_losses
from meerkat.progress import say
from meerkat.run.curvature import with_rates
from meerkat.run.local_engine import LocalEngine
from meerkat.run.mask import make_mask
from meerkat.run.precision import with_precision
from meerkat.run.setup import open_problem, resolve
from meerkat.run.split import training_and_evaluation_rows
from meerkat.settings.auto import number
from meerkat.settings.config import make_config

DEFAULT = [f"mixed:{n}/10/{first}/{first + 8}" for first in (200, 300, 400) for n in (1, 3, 5)]
DEFAULT += [f"mixed:8/10/{first}/{first + 5}" for first in (200, 300, 400)]
DEFAULT += ["iid/10/200/230", "iid/10/300/330"]
DEFAULT += ["dirichlet:0.5/10/200/203", "dirichlet:0.1/10/200/203", "single-label/10/200/202"]


def calibrate(settings: dict[str, object], federations: Iterable[str], to: Path) -> list[Path]:
    """The scalars, inner products and truth of every federation, one file each."""
    config = resolve(make_config(settings))
    wanted = []
    for spec in federations:
        of_split, count_of_clients, first, last = spec.split("/")
        wanted += [(of_split, int(count_of_clients), seed) for seed in range(int(first), int(last))]
    files = {at: to / f"{config.task}-{at[0].replace(':', '')}-K{at[1]}-s{at[2]}.npz" for at in wanted}
    missing = [at for at in wanted if not files[at].exists()]
    if missing:
        to.mkdir(parents=True, exist_ok=True)
        problem = open_problem(config)
        config, mask = with_rates(config, problem, make_mask(config, problem))
        config, mask = with_precision(config, problem, mask)
        training, _ = training_and_evaluation_rows(config, problem.rows)
        losses_of = client_losses(problem, problem.prepare(training))
        model = MaskedModel(problem.model, mask)
        lr, theta = number(config.lr), model.read()
        labels = np.array([row["label"] for row in training])
    for count, at in enumerate(missing, 1):
        split, clients, seed = at
        dealt = partition(split, training, clients, seed)
        of_client = [ClientRows(k, rows, config.batch_size, seed) for k, rows in enumerate(dealt.rows)]
        z = Directions(run_key(seed), len(mask))
        server = ServerConfig(1, 1, 1, lr, number(config.eps), clients, clients, dict.fromkeys(range(clients), 1))
        state = ServerState(Replica(0, theta))
        plan = open_calibration(state, server)
        engine = LocalEngine(model, z, lambda k, t, rows=of_client: rows[k].batch(t), losses_of)
        scalars = np.stack([reply.scalars for reply in engine.run(state, plan)])
        np.savez(
            files[at],
            g=scalars[..., 0],
            c=inner_products(mask.pretraining_gradient, plan, z)[:, 0],
            extreme=np.array(dealt.extreme, dtype=int),
            dist=np.stack([np.bincount(labels[rows], minlength=len(problem.labels)) for rows in dealt.rows]),
        )
        say(f"{count} of {len(missing)}: {files[at].name}")
    return list(files.values())


def auc(extreme: list[float], others: list[float]) -> float:
    """Area under the ROC curve: the chance that an extreme client's signal is above another's."""
    mine, theirs = np.array(extreme)[:, None], np.array(others)[None]
    return float((mine > theirs).mean() + (mine == theirs).mean() / 2)


def judged(files: list[Path]) -> dict[str, Any]:
    """What both rules find, split by split, and the raw signals' areas."""
    rules = {"automatic": Vpcs(), "thresholds": Vpcs(rule="thresholds")}
    splits: dict[str, dict[str, Any]] = {}
    signals: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("rho of |g|", "rho of GradIP")}
    skew: list[tuple[bool, float]] = []
    for file in files:
        arrays = np.load(file)
        split = file.name.split("-K")[0].partition("-")[2]
        extreme, g = set(arrays["extreme"].tolist()), arrays["g"][..., None]
        traces = (
            {k: magnitude(row) for k, row in enumerate(g)},
            {k: gradip(row, arrays["c"][:, None]) for k, row in enumerate(g)},
        )
        line = splits.setdefault(split, {"federations": 0, "extreme": 0, "others": 0})
        line["federations"] += 1
        line["extreme"] += len(extreme)
        line["others"] += len(g) - len(extreme)
        for name, rule in rules.items():
            chosen = select(*traces, rule)
            flagged = set(chosen.extreme)
            line[f"{name}: found"] = line.get(f"{name}: found", 0) + len(flagged & extreme)
            line[f"{name}: wrongly"] = line.get(f"{name}: wrongly", 0) + len(flagged - extreme)
            if split.startswith("mixed") and len(extreme) < len(g):
                both = signals["rho of |g|" if name == "automatic" else "rho of GradIP"]
                for k, rho in zip(chosen.clients, chosen.rho_later, strict=True):
                    both[0 if k in extreme else 1].append(rho)
            if name == "automatic" and split.startswith("dirichlet"):
                most = arrays["dist"].max(1) / arrays["dist"].sum(1)
                skew += [(k in flagged, float(most[k])) for k in range(len(g))]
    return {
        "splits": splits,
        "auc": {name: round(auc(*both), 4) for name, both in signals.items() if both[0]},
        "dirichlet": {
            "flagged": sum(is_flagged for is_flagged, _ in skew),
            "clients": len(skew),
            "largest label's share, flagged": _mean([share for is_flagged, share in skew if is_flagged]),
            "largest label's share, others": _mean([share for is_flagged, share in skew if not is_flagged]),
        },
    }


def _mean(values: list[float]) -> float | None:
    return round(float(np.mean(values)), 3) if values else None


def rate(splits: dict[str, dict[str, float]], kind: str, what: str, of: str) -> float | None:
    """A share over all splits whose name begins with `kind`."""
    mine = [line for name, line in splits.items() if name.startswith(kind)]
    total = sum(line[of] for line in mine)
    return round(sum(line[what] for line in mine) / total, 4) if total else None


def main() -> None:
    """Calibrate, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("federations", nargs="*", default=DEFAULT)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--traces", type=Path, default=Path("runs/selection"))
    for name in ("model", "task", "data", "text", "mask", "threads"):
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    federations, traces = arguments.pop("federations"), arguments.pop("traces")
    as_json = arguments.pop("json")
    figures = judged(calibrate(arguments, federations, traces))
    splits = figures["splits"]
    result: dict[str, Any] = {
        "name": "selection",
        "ratio": rate(splits, "mixed", "automatic: found", "extreme"),
        "iid_flagged": rate(splits, "iid", "automatic: wrongly", "others"),
        "thresholds_found": rate(splits, "mixed", "thresholds: found", "extreme"),
        "thresholds_iid_flagged": rate(splits, "iid", "thresholds: wrongly", "others"),
        **figures,
        "measured_on": f"{arguments.get('model', 'the embedded model')}, {len(splits)} kinds of split",
    }
    if as_json:
        print(json.dumps(result))
        return
    print(f"single-label clients found, of those in mixed federations: {result['ratio']}")
    print(f"clients wrongly flagged, of those in IID federations:      {result['iid_flagged']}")
    print(f"the paper's rule at its defaults: {result['thresholds_found']} and {result['thresholds_iid_flagged']}")
    print(f"area under the ROC curve, all mixed federations together: {figures['auc']}")
    for name, line in splits.items():
        print(
            f"  {name:>14}, {line['federations']:>2} federations: automatic {line['automatic: found']} of "
            f"{line['extreme']} found, {line['automatic: wrongly']} of {line['others']} others flagged; thresholds "
            f"{line['thresholds: found']} and {line['thresholds: wrongly']}"
        )
    print(f"  under Dirichlet splits: {figures['dirichlet']}")


if __name__ == "__main__":
    main()
