"""The model card: README.md beside an exported model, in Hugging Face's layout, from the run's record alone.

The card says so where the record does not hold a fact. It does not give the run key: with it, anyone could read the
rounds' aggregates off the tuned weights.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from huggingface_hub import ModelCardData

from meerkat.algorithm import path
from meerkat.errors import MeerkatError
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.classification import Classification
from meerkat.problems.models import Source, find_model
from meerkat.problems.problem import Problem
from meerkat.progress import number_of, one_line
from meerkat.record.run_folder import RunFolder
from meerkat.record.verification import VerifiedRun
from meerkat.run.metrics import EvaluationMetric
from meerkat.run.sentences import clients_in_words, rate_in_words
from meerkat.run.summary import without_budget
from meerkat.settings.config import CLASSIFICATION, EMBEDDED, RunConfig
from meerkat.settings.methods import Recipe

Content = Literal["model", "delta", "adapters"]
"""What an exported folder holds besides its card."""

CARD_FILE = "README.md"
_LIBRARIES: dict[Content, str] = {"model": "transformers", "delta": "meerkat", "adapters": "peft"}
_CONTENT_IN_WORDS: dict[Content, str] = {
    "model": "a whole model",
    "delta": "the entries that moved and their values, to be written into the base model",
    "adapters": "LoRA adapters, to be loaded on the base model",
}
_MOST_LISTED = 20
"""At most so many clients have their numbers of rows listed."""


def model_card(
    folder: RunFolder, run: VerifiedRun, problem: Problem, content: Content, tuned_fingerprint: str = ""
) -> str:
    """The text of a card, YAML front matter and Markdown.

    Args:
        folder: the run's, for its evaluations and events.
        tuned_fingerprint: of the tuned model, by `meerkat.masks.sparse_mask.fingerprint`; empty to leave it out.
    """
    evaluations = [one for one in EvaluationMetric.of_run(folder) if one.round <= run.rounds]
    base, task_name = _base(run.config), _code(problem.name)
    kind = "a causal language model" if isinstance(problem, Classification) else "a torch module"
    opening = (
        f"# {base}, tuned for {task_name}\n\n"
        f"{base} ({kind}), tuned for the task {task_name} by {_way(run.config.recipe)} with "
        f"[Meerkat](https://arxiv.org/abs/2506.03337), method {_code(run.config.method)}. "
        f"This folder holds {_CONTENT_IN_WORDS[content]}. "
        f"Licence and languages are those of the base model and of the data; the run's record does not state them."
    )
    sections = {
        "Load it": _loading(run.config, problem, content),
        "How it was tuned": _tuning(run),
        "The mask": _mask(run.mask),
        "Data": _data(run, problem),
        "Privacy": _privacy(folder, run),
        "Clients": _clients(folder, run),
        "Evaluation": _evaluation(run, evaluations),
        "Digests, and how to verify them": _digests(run, tuned_fingerprint),
    }
    body = "\n\n".join([opening, *(f"## {title}\n\n{text}" for title, text in sections.items())])
    return f"---\n{_front_matter(run, evaluations, content)}\n---\n\n{body}\n"


def _way(recipe: Recipe) -> str:
    """How a method tunes, in words."""
    if not recipe.sends_scalars:
        return "federated fine-tuning by backpropagation"
    what = {"full": "zeroth-order federated fine-tuning", "lora": "zeroth-order federated fine-tuning of LoRA adapters"}
    return what.get(recipe.moves, "sparse zeroth-order federated fine-tuning")


def _front_matter(run: VerifiedRun, evaluations: Sequence[EvaluationMetric], content: Content) -> str:
    config = run.config
    data = "" if run.opening.federation else config.data.partition(":")[0]
    model = config.model if config.problem == CLASSIFICATION and config.model != EMBEDDED else ""
    zeroth_order = ["zeroth-order-optimization"] if config.recipe.sends_scalars else []
    front_matter = ModelCardData(
        base_model=model if _is_hub_name(model) else None,
        library_name=_LIBRARIES[content],
        tags=[*("meerkat", "federated-learning"), *zeroth_order, f"method:{config.method}"],
        datasets=[data] if _is_hub_name(data) else None,
        metrics=[one_line(evaluations[0].score)] if evaluations else None,
    )
    return front_matter.to_yaml(line_break="\n")


def _is_hub_name(source: str) -> bool:
    """Whether this can be the name of a model or data set on the hub."""
    return bool(re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?", source))


def _is_local(source: str) -> bool:
    """Whether a resolved setting is a path on the run's machine; a name on the hub stays as it was given."""
    return Path(source).is_absolute()


def _code(text: str) -> str:
    """Somebody else's text as inline code, which is the only form that such text takes in a card's Markdown.

    Nothing can escape a backtick in code, or a pipe in a table whatever stands before it: others take their place.
    """
    inert = one_line(text).translate({ord("`"): "'", ord("|"): "\N{BROKEN BAR}"})
    return f"`{inert.strip() or ' '}`"


def _base(config: RunConfig) -> str:
    if config.problem != CLASSIFICATION:
        return f"the model of problem {_code(config.problem)}"
    if config.model == EMBEDDED:
        return "Meerkat's embedded model"
    return _code(Path(config.model).name if _is_local(config.model) else config.model)


def _table(rows: Mapping[str, str]) -> str:
    """Rows of name and value; those without a value are left out."""
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items() if value)])


def _loading(config: RunConfig, problem: Problem, content: Content) -> str:
    code = "\n".join(_loading_code(config, problem, content))
    if not isinstance(problem, Classification):
        return f"```python\n{code}\n```"
    labels = ", ".join(f"{index} {_code(json.dumps(label))}" for index, label in enumerate(problem.task.labels))
    chat = "\n\nas the user's message in its chat template, without the blanks around it, and answers" * problem.chat
    return (
        f"```python\n{code}\n```\n\n"
        f"The model reads a row as\n\n    {json.dumps(problem.task.template)}{chat}\n\n"
        f"with one of the labels ({labels}); the one whose tokens have the highest mean log-probability is the answer."
    )


def _loading_code(config: RunConfig, problem: Problem, content: Content) -> list[str]:
    with_delta = ["from pathlib import Path", "", "from meerkat.export.model import apply_delta"]
    if not isinstance(problem, Classification):
        model = f"model = ...  # the base model, as problem {json.dumps(config.problem)} builds it"
        return [*with_delta, "", model, 'apply_delta(model, Path("delta.safetensors"))']
    auto = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    folder = 'folder = "."  # where this card is'
    if content == "model":
        model = "model = AutoModelForCausalLM.from_pretrained(folder)"
        return [auto, "", folder, model, "tokenizer = AutoTokenizer.from_pretrained(folder)"]
    if content == "delta":
        imports, tuned = with_delta, 'apply_delta(model, Path(folder) / "delta.safetensors")'
    else:
        imports, tuned = ["from peft import PeftModel"], "model = PeftModel.from_pretrained(model, folder)"
    source = Source(config.model)
    if config.model != EMBEDDED:
        with suppress(MeerkatError):  # a card of another's run may name a model that is not here
            source = find_model(config.model)
    base = f"base = {json.dumps(source.place)}" + "  # its path on the run's machine" * _is_local(config.model)
    if config.model == EMBEDDED:
        imports, base = [*imports[:-1], "from meerkat import demo", imports[-1]], "base = demo.MODEL"
    named = f"base, gguf_file={json.dumps(source.gguf_file)}" if source.gguf_file else "base"
    model = f'model = AutoModelForCausalLM.from_pretrained({named}, dtype="float32")'
    return [*imports, auto, "", folder, base, model, tuned, f"tokenizer = AutoTokenizer.from_pretrained({named})"]


def _tuning(run: VerifiedRun) -> str:
    config, zeroth_order = run.config, run.config.recipe.sends_scalars
    steps = f"P = {number_of(config.directions, 'direction')} a step" if zeroth_order else "by backpropagation"
    adapters = ", with fresh adapters" if config.recipe.moves == "lora" else ""
    source = "Philox4x64-10, counting by (run key, phase, round, step, direction); see `meerkat.algorithm.directions`"
    return _table(
        {
            "base model": f"{_base(config)}, fingerprint `{run.mask.fingerprint}`{adapters}",
            "rounds": f"{run.rounds:,}" + ("" if run.finished else f" of {config.rounds:,}: the run is not finished"),
            "local steps": f"T = {config.local_steps}, {steps}, batches of {config.batch_size}",
            "learning rate": f"{rate_in_words(config)}, {config.lr_schedule}",
            "perturbation": f"{config.eps:g}" if zeroth_order else "",
            "weights' type": config.dtype,
            "frozen weights": ""
            if config.quantize == "none"
            else f"quantised in the run ({config.quantize}), not here",
            "clients": f"{config.clients}, {config.clients_per_round or config.clients} asked each round",
            "aggregation": _aggregation(run),
            "attack": f"{config.attackers} clients, {config.attack}" if config.attack != "none" else "",
            "directions": f"{source}. The run key stays in the run's folder" if zeroth_order else "none",
        }
    )


def _aggregation(run: VerifiedRun) -> str:
    config = run.config
    server = f"feddyn, alpha {config.feddyn_alpha:g}" if config.recipe.client == "feddyn" else config.update_rule
    by_rows = config.weights == "examples" and config.aggregation == "mean"
    parts = [
        f"{run.opening.rule} of the replies",
        f"clients weighted {'by their rows' if by_rows else 'equally'}",
        f"made to withstand {config.byzantine} arbitrary replies" if config.rule.needs_f else "",
        f"{config.mixing} mixing" if config.mixing != "none" else "",
        "clipped" if config.clipping != "none" else "",
    ]
    return f"{', '.join(filter(None, parts))}; server optimiser {server}"


def _mask(mask: SparseMask) -> str:
    names = {"scope": "chosen over", "text": "pre-training text", "sequences": "sequences of it", "task": "task's rows"}
    excluded = "everything but the adapters" if mask.kind == "lora" else mask.facts.get("excluded")
    return _table(
        {
            "entries": f"{len(mask):,} of {mask.total:,} parameters",
            "density": f"{mask.density:g}",
            "kind": _code(mask.kind),
            **{name: _code(mask.facts[fact]) for fact, name in names.items() if mask.facts.get(fact)},
            "never moved": "not known" if excluded is None else _code(excluded) if excluded else "nothing was excluded",
            "SHA-256": f"`{mask.digest()}`",
        }
    )


def _data(run: VerifiedRun, problem: Problem) -> str:
    config = run.config
    split = f"{_code(config.partition)}, clients simulated on one machine"
    if run.opening.federation:
        source = "each site's own, which never left the sites; their origin is not known; the sites gave the numbers"
        split = f"each site of federation `{run.opening.federation}` holds its own"
    elif config.problem != CLASSIFICATION:
        source = f"as problem {_code(config.problem)} makes or reads them"
    elif not config.data:
        source = f"Meerkat's embedded data {_code(config.task)}"
    elif _is_local(config.data):
        source = f"{_code(Path(config.data).name)}, a local folder; its origin is not known"
    else:
        source = f"{_code(config.data)}, a hub data set"
    if config.held_back and not run.opening.federation:
        source += f"; {config.held_back:g} of the training rows held back"
    digest = f"`{run.opening.data}`" if run.opening.data else "not known"
    return _table(
        {
            "task": _code(problem.name),
            "training rows": _numbers_of_rows(run),
            "source": source,
            "split": split,
            "SHA-256 of the rows and their split": "not given: it is a function of private rows"
            if run.guarantee
            else digest,
        }
    )


def _numbers_of_rows(run: VerifiedRun) -> str:
    counts = {client: run.examples[client] for client in sorted(run.examples)}
    if run.config.dp == "client":
        return "not given: clients are private"
    if not counts:
        return "not known: no client joined"
    total = f"{sum(counts.values()):,}"
    if len(counts) <= _MOST_LISTED:
        return f"{total}: " + ", ".join(f"client {client} {count:,}" for client, count in counts.items())
    return f"{total}: {min(counts.values()):,} to {max(counts.values()):,} at each of {len(counts)} clients"


def _privacy(folder: RunFolder, run: VerifiedRun) -> str:
    if (guarantee := run.guarantee) is None:
        return "No differential privacy: nothing bounds what the weights, or the clients' scalars, reveal about a row."
    spent = without_budget(folder)
    return _table(
        {
            "differential privacy": guarantee.in_words(),
            "mechanism": f"clip {guarantee.clip:g}, noise multiplier {guarantee.noise_multiplier:g}",
            "budget does not last to the end": clients_in_words(spent) if spent else "",
        }
    )


def _clients(folder: RunFolder, run: VerifiedRun) -> str:
    calibration = run.calibration
    gone = [event.get("client") for event in folder.events() if event.get("event") == "shown out"]
    removed = {client for client in gone if type(client) is int}
    facts = {
        "flagged as extremely skewed": _listed(calibration.selection.extreme)
        if calibration
        else "not known: there was no calibration",
        "stopped early": _listed(calibration.early_stopped if calibration else ()),
        "removed by the coordinator": _listed(sorted(removed)),
    }
    if run.config.dp != "client":
        facts["in no round"] = _listed(sorted(run.examples.keys() - run.answered.keys()))
        facts["replies"] = f"{sum(run.answered.values()):,} of the {run.asked:,} that rounds asked for"
    return _table(facts)


def _listed(clients: Sequence[int]) -> str:
    return clients_in_words(clients) if clients else "none"


def _evaluation(run: VerifiedRun, evaluations: Sequence[EvaluationMetric]) -> str:
    if not evaluations:
        return "Not known: the run's folder has no evaluation."
    last = evaluations[-1]
    lines = [f"| after round | {' | '.join(map(_code, last.better))} |", "| --- " * (1 + len(last.better)) + "|"]
    for metric in [*evaluations[:1], *evaluations[1:][-1:]]:
        values = [metric.scores.get(name) for name in last.better]
        scores = ["not known" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"| {metric.round:,} | {' | '.join(scores)} |")
    rows = "the coordinator's own validation rows" if run.opening.federation else "the validation rows"
    rows = "held-back training rows" if run.config.held_back else rows
    rows = f"at most {most:,} of {rows}, evenly taken" if (most := run.config.max_eval_samples) else rows
    rows = "the sites' own validation rows" if last.rows is not None else rows
    exported = "" if last.round == run.rounds else f" The model here is the one after round {run.rounds:,}."
    source = "The run's folder says so; `meerkat verify --evaluate` computes the scores anew."
    return f"On {rows}; round 0 is the base model.{_computed(run.config)}{exported} {source}\n\n" + "\n".join(lines)


def _computed(config: RunConfig) -> str:
    """What the scores are of, where the run computed with other weights, or otherwise, than the exported model has."""
    how = [f"quantised to {config.quantize}"] * (config.quantize != "none")
    how += [f"multiplied in {config.dtype}"] * (config.dtype != "float32")
    measured = f" Measured in the run, with weights {' and '.join(how)}; the model here may score otherwise."
    return measured if how else ""


def _digests(run: VerifiedRun, tuned_fingerprint: str) -> str:
    # A simulation's log holds the hash of its rows, and a log of hidden clients which of them were drawn. Anyone who
    # can work out the rest of it, from theta and the seed, could check a guess at these against the chain's hash, which
    # no noise covers. A federation with noisy replies logs only what is noisy or public.
    covered = run.guarantee is None or (run.guarantee.level == "example" and not run.opening.data)
    table = _table(
        {
            "theta, the moving entries' values": f"`{path.digest(run.theta)}`",
            "theta_0, their base values": f"`{run.opening.theta}`",
            "mask": f"`{run.opening.mask}`",
            "config.toml": f"`{run.opening.config}`",
            "rounds.log, last hash of its chain": f"`{run.log_hash}`"
            if covered
            else "not given: no noise covers all that the log holds",
            "fingerprint of the tuned model": f"`{tuned_fingerprint}`" if tuned_fingerprint else "",
            "versions": f"torch {_code(run.opening.torch)}, transformers {_code(run.opening.transformers)}",
        }
    )
    again = " `meerkat.masks.sparse_mask.fingerprint(model)` gives the loaded model's fingerprint."
    return (
        f"{table}\n\nAll are SHA-256. In the run's folder, `meerkat verify --json .` replays every round and prints "
        f"theta's digest.{again if tuned_fingerprint else ''}"
    )
