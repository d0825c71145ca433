"""A run from beginning to end: the only round loop there is.

A fresh run and a resumed one go the same way: settle the settings, replay what the log already holds,
and go on from there.
"""

import json
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from meerkat import models, path, server
from meerkat.config import RunConfig
from meerkat.directions import Directions, run_key
from meerkat.engines.local import LocalEngine, LossesOf
from meerkat.errors import MeerkatError, RunFailed
from meerkat.mask import SparseMask
from meerkat.partition import ClientRows
from meerkat.progress import say, track
from meerkat.record import Opening, file_digest, gradient_digest, replay_log
from meerkat.runfolder import Metric, RunFolder, write_whole
from meerkat.runlog import LogReader, RunLog
from meerkat.workplace import Split, Workplace, check_model, default_lr, make_mask, open_workplace, resolve
from meerkat.zeroth_order import Loss, MaskedModel


def simulate(config: RunConfig, out: Path) -> dict[str, Any]:
    """Run a federation from the start, in a new folder. Returns the summary.

    Raises:
        MeerkatError: the settings cannot be met; RunFailed: the run went wrong on the way.
    """
    RunFolder.check_free(out)
    config = resolve(config)
    workplace = open_workplace(config)
    split = Split.of(workplace)
    mask = make_mask(config, workplace.model, workplace.tokenizer)
    # what config.toml says is what runs: a given mask's own density, and the rate that fits its size
    rate = config.lr or default_lr(config.method, len(mask))
    workplace = replace(workplace, config=config.model_copy(update={"density": mask.density, "lr": rate}))
    # nothing is written before everything that was asked for is known to be possible
    folder = RunFolder.create(out, workplace.config)
    _store_mask(folder, mask, workplace)
    return _carry_on(folder, workplace, split)


def resume(root: Path) -> dict[str, Any]:
    """Go on with a run where its log ends. A finished one is left as it is.

    Raises:
        MeerkatError: there is no run, or what it rests on was changed; RunFailed: its record is damaged.
    """
    folder = RunFolder.open(root)
    try:
        summary = folder.summary()
    except ValueError:
        summary = None  # made again from log and metrics
    if summary is not None and _is_closed(folder) and folder.metrics():
        say(f"{root}: the run is finished, after {summary['rounds']} rounds")
        return summary
    workplace = open_workplace(folder.config())
    return _carry_on(folder, workplace, Split.of(workplace))


def _is_closed(folder: RunFolder) -> bool:
    """Whether the log's last sound record is the closing one."""
    last = deque(LogReader(folder.log_path), maxlen=1)
    return bool(last) and last[0].get("kind") == "close"


class _Timer:
    """Seconds spent in forward passes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, losses_of: LossesOf) -> LossesOf:
        def timed_losses_of(rows: Sequence[np.ndarray]) -> Loss:
            losses = losses_of(rows)

            def timed() -> Tensor:
                began = time.perf_counter()
                try:
                    return losses()
                finally:
                    self.seconds += time.perf_counter() - began

            return timed

        return timed_losses_of


def _store_mask(folder: RunFolder, mask: SparseMask, workplace: Workplace) -> None:
    """Put the mask into the run's folder, with the moving entries' base values."""
    theta_0 = MaskedModel(workplace.model, mask).read().cpu()
    write_whole(folder.mask_path, replace(mask, theta_0=theta_0).save, folder.cure)


def _settled_mask(folder: RunFolder, workplace: Workplace) -> SparseMask:
    """The mask in the run's folder; a run that was killed before it was there makes it again."""
    if not folder.mask_path.exists():
        _store_mask(folder, make_mask(workplace.config, workplace.model, workplace.tokenizer), workplace)
    mask = folder.mask()
    check_model(folder, mask, workplace)
    theta_0 = MaskedModel(workplace.model, mask).read()
    if mask.theta_0 is None or path.digest(mask.theta_0) != path.digest(theta_0):
        raise RunFailed(
            f"{folder.mask_path}: its base values are not the model's; delete it, and 'meerkat resume' makes it again"
        )
    return mask


def _opening(folder: RunFolder, config: RunConfig, mask: SparseMask, split: Split, theta: Tensor) -> Opening:
    return Opening(
        run_key=f"{run_key(config.seed):032x}",
        config=file_digest(folder.config_path),
        model=mask.fingerprint,
        mask=mask.digest(),
        gradient=gradient_digest(mask),
        theta=path.digest(theta),
        data=split.digest,
        examples=[len(rows) for rows in split.partition.rows],
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def _check_opening(logged: Opening, now: Opening, folder: RunFolder) -> None:
    what = {
        "config": "config.toml was changed",
        "mask": "mask.safetensors was changed",
        "gradient": "mask.safetensors was changed",
        "data": "the data, its split, the task or the tokenizer is not the same any more",
        **dict.fromkeys(("run_key", "model", "theta", "examples"), "the log's opening was changed"),
    }
    for name, trouble in what.items():
        if getattr(logged, name) != getattr(now, name):
            raise MeerkatError(
                f"run folder '{folder.root}': {trouble} since the run began; restore it, or start a new run"
            )
    for name in ("torch", "transformers"):
        if (then := getattr(logged, name)) != (here := getattr(now, name)):
            say(f"note: the run began with {name} {then}, this is {here}: losses may differ in their last bits")


def _carry_on(folder: RunFolder, workplace: Workplace, split: Split) -> dict[str, Any]:
    log = RunLog(folder.log_path)
    try:
        if log.dropped:
            say(f"note: {folder.log_path}: {log.dropped}; that record is dropped and its round is run again")
        return _run(folder, workplace, split, log)
    finally:
        log.close()


def _run(folder: RunFolder, workplace: Workplace, split: Split, log: RunLog) -> dict[str, Any]:
    config = workplace.config
    mask = _settled_mask(folder, workplace)
    model = MaskedModel(workplace.model, mask)
    theta_0 = model.read()
    opening = _opening(folder, config, mask, split, theta_0)
    records: Iterator[dict[str, Any]] = iter(LogReader(folder.log_path))
    first = next(records, None)
    if first is None:
        log.append(opening.to_json())
    else:
        logged = Opening.from_json(first, folder.log_path)
        _check_opening(logged, opening, folder)
        opening = logged
    settings = opening.settings(config)
    z = Directions(int(opening.run_key, 16), len(mask), workplace.device)
    state, closed = replay_log(records, theta_0, settings, z, folder.log_path)

    metrics = folder.keep_metrics(
        lambda m: m["round"] < state.round if m["kind"] == "round" else m["round"] <= state.round
    )
    judged = {m["round"] for m in metrics if m["kind"] == "evaluation"}
    timer = _Timer()
    clients = [ClientRows(k, rows, config.batch_size, config.seed) for k, rows in enumerate(split.partition.rows)]
    losses_of = models.client_losses(workplace.model, split.examples, workplace.training_batch, config.objective)
    engine = LocalEngine(
        model=model,
        directions=z,
        batch_of=lambda client, step: clients[client].batch(step),
        losses_of=timer.around(losses_of),
        together=config.batching == "auto",
    )

    def judge(theta: Tensor, rounds: int) -> None:
        began = time.perf_counter()
        model.write_(theta)
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
        return rounds == config.rounds or bool(config.eval_every and rounds % config.eval_every == 0)

    if state.round:
        say(f"{folder.root}: going on after round {state.round} of {config.rounds}")
    else:
        say(_plan_in_words(config, mask, split))
    if 0 not in judged:
        judge(theta_0, 0)
    if state.round and due(state.round) and state.round not in judged:
        judge(state.theta, state.round)
    for number in track(range(state.round, config.rounds), "rounds"):
        began, timer.seconds = time.perf_counter(), 0.0
        plan = server.open_round(state, settings)
        try:
            replies = engine.run(state.theta, plan, state.steps_made)
        except RunFailed as error:
            raise RunFailed(f"round {number}: {error}") from None
        state, record = server.close_round(state, plan, replies, settings, z)
        z.prepare(replace(plan, round=state.round).place(0, 0))
        # noted before it is logged: what the log holds, the metrics hold too, whenever the run is killed
        folder.note(
            {
                "kind": "round",
                "round": number,
                "loss": sum(record.weights[reply.client] * reply.loss for reply in replies),
                "lr": plan.lr,
                "wall_s": time.perf_counter() - began,
                "forward_s": timer.seconds,
            }
        )
        log.append({"kind": "round", **record.to_json()})
        if due(state.round):
            judge(state.theta, state.round)
    theta_digest = path.digest(state.theta)
    if not closed:
        log.append({"kind": "close", "rounds": state.round, "theta": theta_digest})
    summary = _summary(config, mask, split, folder.metrics(), theta_digest)
    text = json.dumps(summary, indent=2) + "\n"
    write_whole(folder.summary_path, lambda part: part.write_text(text, encoding="utf-8"), folder.cure)
    return summary


def _plan_in_words(config: RunConfig, mask: SparseMask, split: Split) -> str:
    sizes = [len(rows) for rows in split.partition.rows]
    return (
        f"{config.method}: {len(mask):,} of {mask.total:,} parameters move, learning rate {config.lr:g}; "
        f"{config.clients} clients ({config.partition}) hold {min(sizes)} to {max(sizes)} rows; "
        f"{config.rounds} rounds of {config.local_steps} local step{'s' * (config.local_steps > 1)}"
    )


def _summary(
    config: RunConfig, mask: SparseMask, split: Split, metrics: Sequence[Metric], digest: str
) -> dict[str, Any]:
    judged = sorted((m for m in metrics if m["kind"] == "evaluation"), key=lambda m: m["round"])
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
        "lr": config.lr,
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
