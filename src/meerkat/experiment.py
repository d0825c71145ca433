"""A run from beginning to end: the only round loop there is.

A fresh run and a resumed one go the same way: settle the settings, replay what the log already holds,
and go on from there.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meerkat import directions, models, path, runlog, server
from meerkat.config import RunConfig
from meerkat.directions import Directions
from meerkat.engines.local import LocalEngine
from meerkat.errors import MeerkatError, RunFailed
from meerkat.mask import SparseMask
from meerkat.partition import ClientRows
from meerkat.progress import say, track
from meerkat.rounds import RoundRecord
from meerkat.runfolder import Metric, RunFolder, write_whole
from meerkat.tasks import Example
from meerkat.workplace import Split, Workplace, default_lr, make_mask, open_workplace, resolve
from meerkat.zeroth_order import Loss, MaskedModel

LOG_FORMAT = 1


def simulate(config: RunConfig, out: Path) -> dict[str, Any]:
    """Run a federation from the start, in a new folder. Returns the summary.

    Raises:
        MeerkatError: the settings cannot be met; RunFailed: the run went wrong on the way.
    """
    RunFolder.check_free(out)
    config = resolve(config)
    workplace = open_workplace(config)
    split = Split.of(config, workplace)
    mask = make_mask(config, workplace.model, workplace.tokenizer)
    # nothing is written before everything that was asked for is known to be possible
    folder = RunFolder.create(out, config)
    _store_mask(folder, mask, workplace)
    return _carry_on(folder, config, workplace, split)


def resume(root: Path) -> dict[str, Any]:
    """Go on with a run where its log ends. A finished one is left as it is."""
    folder = RunFolder.open(root)
    summary = folder.summary()
    if summary is not None:
        say(f"{root}: the run is finished, after {summary['rounds']} rounds")
        return summary
    config = folder.config()
    workplace = open_workplace(config)
    return _carry_on(folder, config, workplace, Split.of(config, workplace))


class _Timer:
    """Seconds spent in forward passes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, loss: Loss) -> Loss:
        def timed() -> Tensor:
            began = time.perf_counter()
            try:
                return loss()
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def _losses_of(
    config: RunConfig, workplace: Workplace, examples: Sequence[Example], timer: _Timer
) -> Callable[[Sequence[np.ndarray]], Loss]:
    """How the engine gets losses: rows of each client -> the clients' mean losses at the present weights."""
    together = config.batching == "auto"

    def losses_of(rows: Sequence[np.ndarray]) -> Loss:
        batch = models.collate(
            [examples[row] for of_client in rows for row in of_client],
            workplace.device,
            sort=together,
            sequences_per_pass=config.micro_batch,
            tokens_per_pass=workplace.tokens_per_pass if together else 0,
        )
        counts = [len(of_client) for of_client in rows]

        def losses() -> Tensor:
            each = models.row_losses(workplace.model, batch, config.objective).double()
            return torch.stack([part.mean() for part in each.split(counts)])

        return timer.around(losses)

    return losses_of


def _store_mask(folder: RunFolder, mask: SparseMask, workplace: Workplace) -> None:
    """Put the mask into the run's folder, with the moving entries' base values."""
    theta_0 = MaskedModel(workplace.model, mask).read().cpu()
    write_whole(folder.mask_path, replace(mask, theta_0=theta_0).save)


def _settled_mask(folder: RunFolder, config: RunConfig, workplace: Workplace) -> SparseMask:
    """The mask in the run's folder; a run that was killed before it was there makes it again."""
    if not folder.mask_path.exists():
        _store_mask(folder, make_mask(config, workplace.model, workplace.tokenizer), workplace)
    mask = folder.mask()
    mask.check_fits(workplace.model)
    return mask


def _opening(config: RunConfig, mask: SparseMask, split: Split, key: int, theta: Tensor) -> dict[str, Any]:
    return {
        "kind": "open",
        "format": LOG_FORMAT,
        "run_key": f"{key:032x}",
        "config": config.digest(),
        "mask": mask.digest(),
        "data": split.digest,
        "entries": len(mask),
        "theta": path.digest(theta),
        "lr": config.lr or default_lr(len(mask)),
        "torch": torch.__version__,
        "threads": config.threads,
    }


def _check_opening(logged: dict[str, Any], now: dict[str, Any], folder: RunFolder) -> None:
    what = {
        "format": "the log's format is another version's",
        "config": "config.toml was changed",
        "mask": "mask.safetensors was changed",
        "data": "the data or its split is not the same any more",
        "theta": "the model's weights are not the same any more",
    }
    for name, trouble in what.items():
        if logged[name] != now[name]:
            raise MeerkatError(
                f"run folder '{folder.root}': {trouble} since the run began; restore it, or start a new run"
            )
    if logged["torch"] != now["torch"]:
        say(
            f"note: the run began with torch {logged['torch']}, this is {now['torch']}: "
            "losses may differ in their last bits"
        )


def _carry_on(folder: RunFolder, config: RunConfig, workplace: Workplace, split: Split) -> dict[str, Any]:
    contents = runlog.read(folder.log_path)
    log = runlog.RunLog(folder.log_path, contents)
    try:
        if contents.damage:
            say(f"note: {folder.log_path}: {contents.damage}; that record is dropped and its round is run again")
        return _run(folder, config, workplace, split, log, contents.records)
    finally:
        log.close()


def _run(
    folder: RunFolder,
    config: RunConfig,
    workplace: Workplace,
    split: Split,
    log: runlog.RunLog,
    records: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    mask = _settled_mask(folder, config, workplace)
    model = MaskedModel(workplace.model, mask)
    theta = model.read()
    key = directions.run_key(config.seed)
    opening = _opening(config, mask, split, key, theta)
    if records:
        _check_opening(records[0], opening, folder)
        opening = records[0]
    else:
        log.append(opening)
    z = Directions(key, len(mask), workplace.device)
    settings = server.ServerConfig(
        rounds=config.rounds,
        local_steps=config.local_steps,
        directions=config.directions,
        lr=opening["lr"],
        eps=config.eps,
        clients=config.clients,
        clients_per_round=config.clients_per_round,
        examples={k: len(rows) for k, rows in enumerate(split.partition.rows)},
        weights=config.weights,
        lr_schedule=config.lr_schedule,
        seed=config.seed,
    )
    timer = _Timer()
    clients = [ClientRows(k, rows, config.batch_size, config.seed) for k, rows in enumerate(split.partition.rows)]
    engine = LocalEngine(
        model=model,
        directions=z,
        batch_of=lambda client, step: clients[client].batch(step),
        losses_of=_losses_of(config, workplace, split.examples, timer),
        together=config.batching == "auto",
    )

    state = server.ServerState(0, theta)
    for record in records[1:]:
        if record["kind"] == "round":
            state = server.replay(state, RoundRecord.from_json(record), z)
    metrics = folder.keep_metrics(
        lambda m: m["round"] < state.round if m["kind"] == "round" else m["round"] <= state.round
    )
    if state.round:
        say(f"{folder.root}: going on after round {state.round} of {config.rounds}")
    else:
        say(_plan_in_words(config, mask, split, opening["lr"]))

    def judge(rounds: int) -> None:
        began = time.perf_counter()
        model.write_(state.theta)
        found = models.evaluate(workplace.model, split.evaluation, workplace.task.labels)
        folder.note(
            {
                "kind": "evaluation",
                "round": rounds,
                "accuracy": found.accuracy,
                "loss": found.loss,
                "per_class": found.per_class,
                "wall_s": time.perf_counter() - began,
            }
        )
        say(f"round {rounds:>4} of {config.rounds}: accuracy {found.accuracy:.3f}, loss {found.loss:.3f}")

    def due(rounds: int) -> bool:
        return rounds in (0, config.rounds) or bool(config.eval_every and rounds % config.eval_every == 0)

    if due(state.round) and not any(m["kind"] == "evaluation" and m["round"] == state.round for m in metrics):
        judge(state.round)
    for number in track(range(state.round, config.rounds), "rounds") if state.round < config.rounds else ():
        began, timer.seconds = time.perf_counter(), 0.0
        plan = server.open_round(state, settings)
        try:
            replies = engine.run(state.theta, plan, state.steps_made)
        except RunFailed as error:
            raise RunFailed(f"round {number}: {error}") from None
        state, closed = server.close_round(state, plan, replies, settings, z)
        z.prepare(replace(plan, round=state.round).place(0, 0))
        # noted before it is logged: what the log holds, the metrics hold too, whenever the run is killed
        folder.note(
            {
                "kind": "round",
                "round": number,
                "loss": sum(closed.weights[reply.client] * reply.loss for reply in replies),
                "lr": plan.lr,
                "wall_s": time.perf_counter() - began,
                "forward_s": timer.seconds,
            }
        )
        log.append({"kind": "round", **closed.to_json()})
        if due(state.round):
            judge(state.round)
    if not (records and records[-1]["kind"] == "close"):
        log.append({"kind": "close", "rounds": config.rounds, "theta": path.digest(state.theta)})
    summary = _summary(config, opening, mask, split, folder.metrics(), path.digest(state.theta))
    write_whole(folder.summary_path, lambda part: part.write_text(json.dumps(summary, indent=2) + "\n"))
    return summary


def _plan_in_words(config: RunConfig, mask: SparseMask, split: Split, lr: float) -> str:
    sizes = [len(rows) for rows in split.partition.rows]
    return (
        f"{config.method}: {len(mask):,} of {mask.total:,} parameters move, learning rate {lr:g}; "
        f"{config.clients} clients ({config.partition}) hold {min(sizes)} to {max(sizes)} rows; "
        f"{config.rounds} rounds of {config.local_steps} local step{'s' * (config.local_steps > 1)}"
    )


def _summary(
    config: RunConfig, opening: dict[str, Any], mask: SparseMask, split: Split, metrics: Sequence[Metric], digest: str
) -> dict[str, Any]:
    judged = [m for m in metrics if m["kind"] == "evaluation"]
    rounds = [m for m in metrics if m["kind"] == "round"]
    payload = 4 * config.local_steps * config.directions
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {
        "method": config.method,
        "model": config.model,
        "task": config.task,
        "seed": config.seed,
        "rounds": config.rounds,
        "local_steps": config.local_steps,
        "directions": config.directions,
        "clients": config.clients,
        "clients_per_round": config.clients_per_round,
        "partition": config.partition,
        "lr": opening["lr"],
        "eps": config.eps,
        "params_total": mask.total,
        "params_masked": len(mask),
        "evaluated_on": "held-back" if config.held_back else "validation",
        "accuracy_before": judged[0]["accuracy"],
        "accuracy": judged[-1]["accuracy"],
        "loss_before": judged[0]["loss"],
        "loss": judged[-1]["loss"],
        "per_class": judged[-1]["per_class"],
        "payload_bytes_up_per_client_round": payload,
        "payload_bytes_down_per_client_round": payload,
        "dense_bytes_per_client_round": 4 * mask.total,
        "extreme_clients": list(split.partition.extreme),
        "early_stopped_clients": [],
        "theta_digest": digest,
        "wall_s": sum(m["wall_s"] for m in metrics),
        "forward_s": sum(m["forward_s"] for m in rounds),
        "peak_rss_mb": peak,
    }
