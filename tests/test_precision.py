"""The weights' type and the size of perturbations: cast late, chosen once, followed by everybody."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from meerkat import seeds
from meerkat.algorithm.directions import Directions, Place
from meerkat.algorithm.estimators import PLAIN
from meerkat.algorithm.perturbation import SIZES, PerturbationCurve, perturbation_curve
from meerkat.algorithm.precision import cast_, types_in_passes, weights_as
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.cli import main
from meerkat.export.model import apply_delta
from meerkat.masks.baselines import magnitude_mask
from meerkat.masks.sparse_mask import CURVE, fingerprint
from meerkat.problems.causal_lm import language_modelling_loss
from meerkat.problems.classification import public_rows
from meerkat.problems.models import load_model
from meerkat.problems.tasks import TASKS
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import LogReader
from meerkat.run import precision
from meerkat.run.setup import open_problem

TOKENS = [torch.arange(3, 20), torch.arange(40, 60)]


@pytest.fixture
def simulate_arguments(simulate_arguments: list[str]) -> list[str]:
    """The same, with eps measured."""
    return [*simulate_arguments, "--eps", "auto"]


def simulated(arguments: list[str], out: Path, *options: str) -> dict[str, Any]:
    assert main([*arguments, "--out", str(out), *options]) == 0
    return json.loads((out / "summary.json").read_text())


def theta_of(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["theta_digest"])


def opening(run: Path) -> dict[str, Any]:
    return next(iter(LogReader(run / "rounds.log")))


# --- casting ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_multiply_in_the_type_and_all_else_is_float32(architecture: str) -> None:
    model, before = tiny_model(architecture), tiny_model(architecture)
    cast_(model, torch.bfloat16)
    head = {id(model.get_output_embeddings().weight), id(model.get_input_embeddings().weight)}
    for name, module in model.named_modules():
        narrow = type(module).__name__ in ("Linear", "Conv1D") and id(module.weight) not in head
        for part, parameter in module.named_parameters(recurse=False):
            original = before.get_parameter(f"{name}.{part}")
            assert torch.equal(parameter, original.bfloat16() if narrow else original)
            assert parameter.dtype == (torch.bfloat16 if narrow else torch.float32)
    for buffer, original in zip(model.buffers(), before.buffers(), strict=True):
        assert buffer.dtype == original.dtype
        assert torch.equal(buffer, original)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pass_is_autocast_but_for_its_logits(architecture: str) -> None:
    model = tiny_model(architecture)
    seen: dict[str, set[torch.dtype]] = {"head": set(), "layers": set()}
    for module in model.modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            where = "head" if module is model.get_output_embeddings() else "layers"
            module.register_forward_hook(lambda _, __, output, where=where: seen[where].add(output.dtype))
    with weights_as(model, torch.bfloat16):
        logits = model(input_ids=TOKENS[0][None]).logits
    assert seen == {"head": {torch.float32}, "layers": {torch.bfloat16}}
    assert logits.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    plain = model(input_ids=TOKENS[0][None]).logits
    assert 0 < (logits - plain).abs().max() < 0.05 * plain.abs().max()
    assert torch.equal(plain, tiny_model(architecture)(input_ids=TOKENS[0][None]).logits)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_the_output_layer_has_its_gradient_in_half_precision(architecture: str) -> None:
    """It is widened for each pass, and backpropagation goes through what it is widened to."""
    model = tiny_model(architecture).bfloat16()
    exact, narrow = dict[str, Tensor](), dict[str, Tensor]()
    for gradients, dtype in ((exact, torch.float32), (narrow, torch.bfloat16)):
        with weights_as(model, dtype):
            named = dict(model.named_parameters())
            for parameter in named.values():
                parameter.requires_grad_(True)
            model(input_ids=TOKENS[0][None]).logits.square().mean().backward()
            gradients.update(
                {name: parameter.grad.float() for name, parameter in named.items() if parameter.grad is not None}
            )
            model.zero_grad()
    assert exact.keys() == narrow.keys() == dict(model.named_parameters()).keys()
    for name, gradient in exact.items():
        assert torch.cosine_similarity(gradient.flatten(), narrow[name].flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_types_in_passes_are_those_after_a_cast(architecture: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(architecture)
        types = types_in_passes(model, dtype)
        cast_(model, dtype)
        assert types == {name: parameter.dtype for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tables_of_a_half_precision_checkpoint_stay_and_are_read_as_float32(architecture: str) -> None:
    model = tiny_model(architecture)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    wide = copy.deepcopy(model)
    for table in (wide.get_input_embeddings(), wide.get_output_embeddings()):
        table.weight.data = table.weight.data.float()
    for each in (model, wide):
        cast_(each, torch.bfloat16)
    logits, expected = (each(input_ids=TOKENS[0][None]).logits for each in (model, wide))
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert table.weight.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    if architecture == "gemma2":  # scales its embeddings in the type that they are stored in
        assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    else:
        assert torch.equal(logits, expected)


def test_a_pass_that_fails_leaves_autocast_as_it_was() -> None:
    model = tiny_model()
    cast_(model, torch.bfloat16)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    assert not torch.is_autocast_enabled("cpu")
    assert model(input_ids=TOKENS[0][None]).logits.isfinite().all()


def test_weights_come_back_bit_for_bit_whatever_happens() -> None:
    model, before = tiny_model(), list(tiny_model().parameters())
    kept = "model.layers.1.mlp.up_proj.weight"

    def fail_midway() -> None:
        with weights_as(model, torch.float16, keep=[kept]):
            types = {name: parameter.dtype for name, parameter in model.named_parameters()}
            assert types["model.layers.0.mlp.up_proj.weight"] == torch.float16
            assert types[kept] == torch.float32
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError):
        fail_midway()
    assert all(map(torch.equal, model.parameters(), before))


# --- the size of perturbations ---


def exact_gradients(model: Any, masked: MaskedModel) -> list[Tensor]:
    loss, gradients = language_modelling_loss(model), []
    for tokens in TOKENS:
        model.zero_grad()
        loss(tokens).backward()
        gradients.append(masked.gather([parameter.grad for parameter in masked.parameters()]))
    return gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_curve_is_the_literal_one(dtype: torch.dtype) -> None:
    model = tiny_model()
    mask = magnitude_mask(model, 0.05)
    gradients = exact_gradients(model, MaskedModel(model, mask))
    loss = language_modelling_loss(model)
    batches = [(gradient, lambda each=tokens: loss(each)) for gradient, tokens in zip(gradients, TOKENS, strict=True)]
    curve = perturbation_curve(model, mask, batches, dtype, PLAIN)

    literal, theta = tiny_model(), MaskedModel(model, mask).read()
    for layer in literal.model.modules():
        if type(layer) is torch.nn.Linear:
            layer.weight.data = layer.weight.data.to(dtype)
    weights = {name: parameter.detach().view(-1) for name, parameter in literal.named_parameters()}
    directions = Directions(seeds.key(0, "perturbation"), len(mask))

    def loss_at(point: Tensor, tokens: Tensor) -> float:
        for (name, at), values in zip(mask.entries.items(), point.split([n for _, n in mask.counts()]), strict=True):
            weights[name][at] = values.to(weights[name].dtype)
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                hidden = literal.model(input_ids=tokens[None]).last_hidden_state[0]
            return float(torch.nn.functional.cross_entropy(literal.lm_head(hidden)[:-1], tokens[1:]))

    for eps, error in zip(curve.eps, curve.error, strict=True):
        off, of_all = 0.0, 0.0
        for number, (gradient, tokens) in enumerate(zip(gradients, TOKENS, strict=True)):
            for p in range(4):
                z = directions(Place("training", number, 0, p))
                slope = float(gradient.double() @ z.double())
                g = (loss_at(theta + eps * z, tokens) - loss_at(theta - eps * z, tokens)) / (2 * eps)
                off, of_all = off + (g - slope) ** 2, of_all + slope**2
        assert error == pytest.approx(math.sqrt(off / of_all), rel=1e-3)
    assert fingerprint(model) == fingerprint(tiny_model())


def test_rounding_asks_for_a_larger_perturbation() -> None:
    model = tiny_model()
    mask = magnitude_mask(model, 0.05)
    gradients = exact_gradients(model, MaskedModel(model, mask))
    loss = language_modelling_loss(model)
    batches = [(gradient, lambda each=tokens: loss(each)) for gradient, tokens in zip(gradients, TOKENS, strict=True)]
    in_full, in_half = (perturbation_curve(model, mask, batches, t, PLAIN) for t in (torch.float32, torch.bfloat16))
    assert in_half.chosen(0.0) > in_full.chosen(0.0)
    assert min(in_half.error) > min(in_full.error)


@pytest.mark.parametrize(
    ("errors", "chosen"),
    [((0.5, 0.019, 0.001), 1e-3), ((0.5, 0.021, 0.001), 3e-3), ((0.5, 0.4, 0.5), 1e-3), ((0.3, 0.4, 0.5), 3e-4)],
)
def test_the_usual_size_stays_where_its_error_is_negligible(errors: tuple[float, ...], chosen: float) -> None:
    assert PerturbationCurve(SIZES[:3], errors).chosen(1e-3) == chosen


def test_public_text_becomes_rows_of_a_task(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It ends. Then not.\nNo end\nWhy? Because!\n")
    rows = public_rows(TASKS["boolq"], str(tmp_path / "text.txt"), 3)
    assert [row["question"] for row in rows] == ["It ends.", "No end", "Why?"]
    assert [row["passage"] for row in rows] == ["No end", "Why?", "It ends."]
    assert {row["label"] for row in rows} <= {0, 1}
    assert all(TASKS["boolq"].prompt(row) for row in rows)


# --- a run ---


def test_one_mask_serves_every_type(simulate_arguments: list[str], tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        simulated(simulate_arguments, tmp_path / dtype, "--dtype", dtype, "--eps", "3e-3")
    openings = [opening(tmp_path / dtype) for dtype in ("float32", "bfloat16", "float16")]
    for name in ("model", "mask", "theta", "gradient", "about_mask"):
        assert len({each[name] for each in openings}) == 1
    assert len({each["config"] for each in openings}) == 3
    mask = ["--mask", str(tmp_path / "float32" / "mask.safetensors"), "--dtype", "bfloat16", "--eps", "3e-3"]
    again = simulated(simulate_arguments, tmp_path / "again", *mask)
    assert again["theta_digest"] == json.loads((tmp_path / "bfloat16" / "summary.json").read_text())["theta_digest"]
    assert main(["verify", str(tmp_path / "again"), "--evaluate"]) == 0


def test_a_run_in_half_precision_leaves_the_run_s_own_theta(simulate_arguments: list[str], tmp_path: Path) -> None:
    """What is exported evaluates as the run did, and a delta applies to the base as its checkpoint has it."""
    summary = simulated(simulate_arguments, tmp_path / "run", "--dtype", "bfloat16", "--lr", "0.1")
    for form in ("merged", "delta"):
        assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / form), "--form", form]) == 0
    merged, _ = load_model(str(tmp_path / "merged"))
    config = RunFolder(tmp_path / "run").config()
    base, _ = load_model(config.model)
    apply_delta(base, tmp_path / "delta" / "delta.safetensors")
    assert all(map(torch.equal, base.parameters(), merged.parameters()))
    problem = open_problem(config.model_copy(update={"model": str(tmp_path / "merged")}))
    cast_(problem.model, torch.bfloat16)
    rows = problem.batch(problem.prepare(problem.rows("validation")), "evaluation")
    assert problem.evaluate(rows).scores == summary["scores"]


@pytest.mark.parametrize(("dtype", "exported"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_a_half_precision_checkpoint_is_exported_as_narrow_as_theta_allows(
    dtype: str, exported: torch.dtype, simulate_arguments: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    tiny_model().bfloat16().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    simulated(simulate_arguments, tmp_path / "run", "--model", str(tmp_path / "model"), "--dtype", dtype)
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "merged")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in model.parameters()} == {exported}


def test_a_half_precision_checkpoint_has_the_mask_of_its_float32_copy(
    simulate_arguments: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        folder = tmp_path / str(dtype)
        tiny_model().bfloat16().to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        simulated(simulate_arguments, tmp_path / f"run {dtype}", "--model", str(folder), "--dtype", "float32")
    runs = [tmp_path / f"run {dtype}" for dtype in (torch.bfloat16, torch.float32)]
    one, other = map(RunFolder, runs)
    assert one.mask().digest() == other.mask().digest()
    assert theta_of(runs[0]) == theta_of(runs[1])


def chosen(run: Path) -> tuple[str, float]:
    config = RunFolder(run).config()
    assert isinstance(config.eps, float)
    return config.dtype, config.eps


def test_auto_is_settled_once_and_resumed_with(
    simulate_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "WORTH_CASTING", 1)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda _: True)
    summary = simulated(simulate_arguments, tmp_path / "run")
    dtype, eps = chosen(tmp_path / "run")
    assert dtype == "bfloat16"
    fact = json.loads(RunFolder(tmp_path / "run").mask().facts[CURVE])
    assert PerturbationCurve(fact["eps"], fact["error"]).chosen(3e-3) == eps
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "How large a perturbation" in (tmp_path / "run" / "report.html").read_text()

    log = tmp_path / "run" / "rounds.log"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda _: False)  # a slower machine follows
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert theta_of(tmp_path / "run") == summary["theta_digest"]
    assert chosen(tmp_path / "run") == (dtype, eps)


def test_a_mask_that_says_what_was_measured_alike_is_believed(
    simulate_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated(simulate_arguments, tmp_path / "run")
    file = tmp_path / "run" / "mask.safetensors"
    monkeypatch.setattr(precision, "perturbation_curve", None)  # whoever measures fails
    simulated(simulate_arguments, tmp_path / "again", "--mask", str(file))
    assert chosen(tmp_path / "again") == chosen(tmp_path / "run")
    assert RunFolder(tmp_path / "again").mask().facts[CURVE] == RunFolder(tmp_path / "run").mask().facts[CURVE]
    with pytest.raises(TypeError):
        simulated(simulate_arguments, tmp_path / "other", "--mask", str(file), "--batch-size", "3")


@pytest.mark.parametrize("change", [{"eps": [0.5]}, {"error": [math.nan]}, {"error": []}, {"of": 7}, None])
def test_what_a_mask_cannot_have_measured_is_measured_again(
    simulate_arguments: list[str], tmp_path: Path, change: dict[str, Any] | None
) -> None:
    simulated(simulate_arguments, tmp_path / "run")
    mask = RunFolder(tmp_path / "run").mask()
    fact = "[]" if change is None else json.dumps(json.loads(mask.facts[CURVE]) | change)
    replace(mask, facts={**mask.facts, CURVE: fact}).save(tmp_path / "mask.safetensors")
    simulated(simulate_arguments, tmp_path / "again", "--mask", str(tmp_path / "mask.safetensors"))
    assert RunFolder(tmp_path / "again").mask().facts == mask.facts


@pytest.mark.parametrize(
    ("native", "worth", "options"), [(False, 1, []), (True, 10**9, []), (True, 1, ["--dtype", "float32"])]
)
def test_float32_where_bfloat16_gains_nothing(
    native: bool,
    worth: int,
    options: list[str],
    simulate_arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "WORTH_CASTING", worth)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda _: native)
    simulated(simulate_arguments, tmp_path / "run", "--rounds", "1", *options)
    assert chosen(tmp_path / "run") == ("float32", 1e-3)


def test_a_batch_larger_than_all_rows_is_all_rows(
    simulate_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def counted(_: Any, mask: Any, examples: list[Any], *__: Any) -> torch.Tensor:
        rows.append(len(examples))
        return torch.ones(len(mask))

    monkeypatch.setattr(precision, "pretraining_gradient", counted)
    simulated(simulate_arguments, tmp_path / "run", "--rounds", "1", "--batch-size", "1000", "--eps", "auto")
    assert rows == [4, 4]


def test_without_public_text_eps_is_the_usual_one(simulate_arguments: list[str], tmp_path: Path) -> None:
    at = simulate_arguments.index("--text")
    arguments = [*simulate_arguments[:at], *simulate_arguments[at + 2 :], "--method", "random-mask", "--rounds", "1"]
    for dtype, eps in (("float32", 1e-3), ("bfloat16", 3e-3)):
        simulated(arguments, tmp_path / dtype, "--dtype", dtype)
        assert chosen(tmp_path / dtype) == (dtype, eps)
        assert CURVE not in RunFolder(tmp_path / dtype).mask().facts


@pytest.mark.parametrize("method", ["lora-fedzo", "full-fedzo", "fo-fedavg", "feddyn", "task-mask"])
def test_every_method_runs_in_half_precision(method: str, simulate_arguments: list[str], tmp_path: Path) -> None:
    options = ["--method", method, "--dtype", "bfloat16", "--rounds", "2", "--lr", "1e-3"]
    simulated(simulate_arguments, tmp_path / "run", *options)
    assert main(["verify", str(tmp_path / "run"), "--evaluate"]) == 0


def test_a_mask_that_was_deleted_is_made_again_without_its_curve(simulate_arguments: list[str], tmp_path: Path) -> None:
    summary = simulated(simulate_arguments, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert CURVE in run.mask().facts
    log = tmp_path / "run" / "rounds.log"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    run.summary_path.unlink()
    run.mask_path.unlink()
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert theta_of(tmp_path / "run") == summary["theta_digest"]
