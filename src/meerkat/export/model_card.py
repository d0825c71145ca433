"""A model card: README.md beside an exported model, as Hugging Face lays one out, from the run's record alone.

What the record does not hold, the card says is not known. The run's key stays in the run's folder: with it, anyone
could read the rounds' aggregates off the tuned weights.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import ModelCardData

from meerkat.algorithm import path
from meerkat.masks.sparse_mask import SparseMask
from meerkat.privacy.mechanism import Guarantee
from meerkat.problems.tasks import Task
from meerkat.progress import one_line
from meerkat.record.run_folder import Metric
from meerkat.record.verification import Replayed
from meerkat.run.metrics import clients_in_words
from meerkat.settings.config import EMBEDDED, RunConfig

Content = Literal["model", "delta", "adapters"]
"""What an exported folder holds beside its card."""

CARD_FILE = "README.md"
_LIBRARIES: dict[Content, str] = {"model": "transformers", "delta": "meerkat", "adapters": "peft"}
_LISTED = 20
"""Clients whose rows are told one by one, at most."""
_JUDGED_ON = {
    "coordinator": "the coordinator's own validation rows",
    "sites": "the sites' own validation rows",
    "held-back": "held-back training rows",
    "validation": "the validation rows",
}


def model_card(
    run: Replayed,
    task: Task,
    metrics: Sequence[Metric],
    holds: Content,
    weights: str = "",
    shown_out: Sequence[int] = (),
    without_budget: Sequence[int] = (),
) -> str:
    """The text of a card, YAML front matter and Markdown.

    Args:
        metrics: the run's, of which evaluations are told.
        weights: fingerprint of the tuned model, as `mask.fingerprint` gives it; empty to leave it out.
        shown_out: clients that the coordinator of a federation showed out.
        without_budget: clients whose privacy budget does not last to the end of the run.
    """
    config = run.config
    sections = {
        "Load it": _loading(config, task, holds),
        "How it was tuned": _tuning(run),
        "The mask": _mask(run.mask),
        "Data": _data(run, task),
        "Privacy": _privacy(run.guarantee, without_budget),
        "Clients": _clients(run, shown_out),
        "Evaluation": _evaluation(run, metrics),
        "Digests, and how to verify them": _digests(run, weights),
    }
    base, method = _base(config), one_line(config.method)
    what = {
        "model": "a whole model",
        "delta": "the entries that moved and their values, to be put into the base model",
        "adapters": "LoRA adapters, to be put on the base model",
    }[holds]
    opening = (
        f"# {base}, tuned for {_name(task.name)}\n\n"
        f"{base} (a causal language model), tuned for the task {_name(task.name)} by sparse zeroth-order federated "
        f"fine-tuning with [Meerkat](https://arxiv.org/abs/2506.03337), method `{method}`. This folder holds {what}. "
        f"Licence and languages: those of the base model and of the data, which the run's record does not tell."
    )
    body = "\n\n".join([opening, *(f"## {title}\n\n{text}" for title, text in sections.items())])
    return f"---\n{_front_matter(run, metrics, holds)}\n---\n\n{body}\n"


def _front_matter(run: Replayed, metrics: Sequence[Metric], holds: Content) -> str:
    config = run.config
    simulated_on_hub = config.data and not run.opening.federation and not _is_local(config.data)
    known = ModelCardData(
        base_model=config.model if config.model != EMBEDDED and not _is_local(config.model) else None,
        library_name=_LIBRARIES[holds],
        tags=["meerkat", "federated-learning", "zeroth-order-optimization", f"method:{config.method}"],
        datasets=[config.data.partition(":")[0]] if simulated_on_hub else None,
        metrics=["accuracy"] if any(metric["kind"] == "evaluation" for metric in metrics) else None,
    )
    return known.to_yaml(line_break="\n")


def _is_local(source: str) -> bool:
    """Whether a run's resolved setting is a path on the machine that it ran on: names of the hub stay as given."""
    return Path(source).is_absolute()


def _name(text: str) -> str:
    """Words that came from a file, as inline code that no table or fence takes for its own."""
    return f"`{one_line(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _base(config: RunConfig) -> str:
    if config.model == EMBEDDED:
        return "Meerkat's embedded model"
    return _name(Path(config.model).name if _is_local(config.model) else config.model)


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {told} |" for name, told in rows.items())])


def _loading(config: RunConfig, task: Task, holds: Content) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", 'folder = "."  # where this card is']
    if holds == "model":
        lines += ["model = AutoModelForCausalLM.from_pretrained(folder)"]
        lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
    else:
        if config.model == EMBEDDED:
            lines = ["from meerkat import demo", *lines, "base = demo.MODEL"]
        else:
            where = "  # where the run found it" if _is_local(config.model) else ""
            lines += [f"base = {json.dumps(config.model)}{where}"]
        lines += [f'model = AutoModelForCausalLM.from_pretrained(base, dtype="{config.dtype}")']
        if holds == "delta":
            lines = ["from pathlib import Path", "", *lines, 'apply_delta(model, Path(folder) / "delta.safetensors")']
            lines.insert(lines.index("") + 1, "from meerkat.export.model import apply_delta")
        else:
            lines = ["from peft import PeftModel", *lines, "model = PeftModel.from_pretrained(model, folder)"]
        lines += ["tokenizer = AutoTokenizer.from_pretrained(base)"]
    labels = ", ".join(f"{index} {json.dumps(label)}" for index, label in enumerate(task.labels))
    return (
        "```python\n" + "\n".join(lines) + "\n```\n\n"
        f"A row is put to the model as\n\n    {json.dumps(task.template)}\n\n"
        f"with one of the labels ({labels}); the one whose tokens have the highest mean log-probability is the answer."
    )


def _tuning(run: Replayed) -> str:
    config, recipe = run.config, run.config.recipe
    left = "" if run.finished else f" of {config.rounds:,}: the run is not finished"
    steps = "by backpropagation" if recipe.update == "first-order" else f"P = {config.directions} directions a step"
    server = config.update_rule if recipe.update != "feddyn" else f"feddyn, alpha {config.feddyn_alpha:g}"
    by_rows = config.weights == "examples" and config.aggregation == "mean"
    rule = f"{run.opening.rule} of the replies, clients weighted {'by their rows' if by_rows else 'equally'}"
    if config.rule.needs_f:
        rule += f", made for {config.byzantine} replies that may be anything"
    rule += f", {config.mixing} mixing" * (config.mixing != "none") + ", clipped" * (config.clipping != "none")
    seeds = "Philox4x64-10 counts by (run key, phase, round, step, direction); see `meerkat.algorithm.directions`"
    return _table(
        {
            "base model": f"{_base(config)}, fingerprint `{run.mask.fingerprint}`"
            + (", fresh adapters included" if recipe.moves == "lora" else ""),
            "rounds": f"{run.rounds:,}{left}",
            "local steps": f"T = {config.local_steps}, {steps}, batches of {config.batch_size}",
            "learning rate": f"{config.lr:g}, {config.lr_schedule}; perturbation {config.eps:g}",
            "weights' type": config.dtype,
            "clients": f"{config.clients}, {config.clients_per_round or config.clients} asked in a round",
            "aggregation": f"{rule}; server optimiser {server}",
            **({"attack": f"{config.attackers} clients, {config.attack}"} if config.attack != "none" else {}),
            "directions": "none"
            if recipe.update == "first-order"
            else f"{seeds}. The run key stays in the run's folder",
        }
    )


def _mask(mask: SparseMask) -> str:
    told = {"scope": "chosen over", "text": "pre-training text", "sequences": "sequences of it", "task": "task's rows"}
    excluded = mask.facts.get("excluded")
    if mask.kind == "lora":
        excluded = "everything but the adapters"
    return _table(
        {
            "entries": f"{len(mask):,} of {mask.total:,} parameters",
            "density": f"{mask.density:g}",
            "kind": _name(mask.kind),
            **{name: _name(mask.facts[fact]) for fact, name in told.items() if mask.facts.get(fact)},
            "never moved": "not known" if excluded is None else _name(excluded) if excluded else "nothing was excluded",
            "SHA-256": f"`{mask.digest()}`",
        }
    )


def _data(run: Replayed, task: Task) -> str:
    config, examples = run.config, run.examples
    counts = [examples[client] for client in sorted(examples)]
    if run.config.dp == "client":
        rows = "not told: clients are private"
    elif not counts:
        rows = "not known: no client joined"
    elif len(counts) <= _LISTED:
        rows = f"{sum(counts):,}: " + ", ".join(f"client {k} {examples[k]:,}" for k in sorted(examples))
    else:
        rows = f"{sum(counts):,}: {min(counts):,} to {max(counts):,} at each of {len(counts)} clients"
    if run.opening.federation:
        source = "each site's own. They never left the sites, and their origin is not known; numbers are as sites told"
        held = f"by the sites of federation `{run.opening.federation}`"
    else:
        here = config.data and _name(Path(config.data).name if _is_local(config.data) else config.data)
        kind = "a local folder; its origin is not known" if _is_local(config.data) else "a hub data set"
        source = f"{here}, {kind}" if here else f"Meerkat's embedded data `{config.task}`"
        held = f"{_name(config.partition)}, clients simulated on one machine"
        if config.held_back:
            source += f"; {config.held_back:g} of the training rows held back"
    return _table(
        {
            "task": _name(task.name),
            "training rows": rows,
            "where they came from": source,
            "who held which": held,
            "SHA-256 of the rows and who held them": "not told: it is a function of private rows"
            if run.guarantee
            else f"`{run.opening.data}`"
            if run.opening.data
            else "not known",
        }
    )


def _privacy(guarantee: Guarantee | None, without_budget: Sequence[int]) -> str:
    if guarantee is None:
        return (
            "No differential privacy: nothing bounds what the weights, or the scalars that clients sent, tell of a row."
        )
    return _table(
        {
            "differential privacy": guarantee.in_words(),
            "mechanism": f"clip {guarantee.clip:g}, noise multiplier {guarantee.noise_multiplier:g}",
            **({"budget does not last to the end": _whom(without_budget)} if without_budget else {}),
        }
    )


def _clients(run: Replayed, shown_out: Sequence[int]) -> str:
    found = run.calibration
    replies = f"{sum(run.answered.values()):,} came of {run.asked:,} that rounds asked for"
    silent = sorted(run.examples.keys() - run.answered.keys())
    return _table(
        {
            "flagged as extremely skewed": _whom(found.selection.extreme)
            if found
            else "not known: none was calibrated",
            "stopped early": _whom(found.early_stopped if found else ()),
            "excluded": _whom(shown_out) + (" (shown out by the coordinator)" if shown_out else ""),
            **({} if run.config.dp == "client" else {"in no round": _whom(silent), "replies": replies}),
        }
    )


def _whom(clients: Sequence[int]) -> str:
    return clients_in_words(clients) if clients else "none"


def _evaluation(run: Replayed, metrics: Sequence[Metric]) -> str:
    judged = sorted(
        (metric for metric in metrics if metric["kind"] == "evaluation" and metric["round"] <= run.rounds),
        key=lambda metric: metric["round"],
    )
    if not judged:
        return "Not known: the run's folder has no evaluation."
    lines = ["| after round | accuracy | loss |", "| --- | --- | --- |"]
    for found in (judged[0], judged[-1])[: len(judged)]:
        told = ("not known" if found[name] is None else f"{found[name]:.3f}" for name in ("accuracy", "loss"))
        lines.append(f"| {found['round']:,} | {' | '.join(told)} |")
    on = "sites" if "rows" in judged[-1] else "held-back" if run.config.held_back else "validation"
    on = "coordinator" if on == "validation" and run.opening.federation else on
    model = "" if judged[-1]["round"] == run.rounds else f" The model here stands after round {run.rounds:,}."
    return f"On {_JUDGED_ON[on]}; round 0 is the base model.{model}\n\n" + "\n".join(lines)


def _digests(run: Replayed, weights: str) -> str:
    theta = path.digest(run.theta)
    # A simulation's log holds the hash of its rows, and a log of hidden clients who was drawn. Whoever can work out the
    # rest of it, from theta and the seed, could check a guess at these by the chain's hash, which no noise covers. What
    # a federation with noisy replies logs is noisy, or public.
    covered = run.guarantee is None or (run.guarantee.level == "example" and not run.opening.data)
    table = _table(
        {
            "theta, the moving entries' values": f"`{theta}`",
            "theta_0, their base values": f"`{run.opening.theta}`",
            "mask": f"`{run.opening.mask}`",
            "config.toml": f"`{run.opening.config}`",
            "rounds.log, last hash of its chain": f"`{run.log_hash}`"
            if covered
            else "not told: the log holds what no noise covers",
            **({"fingerprint of the tuned model": f"`{weights}`"} if weights else {}),
            "versions": f"torch {one_line(run.opening.torch)}, transformers {one_line(run.opening.transformers)}",
        }
    )
    loaded = " What you loaded has its fingerprint by `meerkat.masks.fingerprint(model)`." if weights else ""
    return (
        f"{table}\n\nAll are SHA-256. On the run's folder, `meerkat verify --json RUN` replays every round and prints "
        f"theta's.{loaded}"
    )
