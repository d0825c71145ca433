"""A run's mask: made as its method says, kept in its folder, and checked against the model."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from meerkat import seeds
from meerkat.algorithm import path
from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.errors import MeerkatError, RunFailed
from meerkat.masks.baselines import full_mask, magnitude_mask, random_mask
from meerkat.masks.kinds import Exclusion, Scope
from meerkat.masks.lora import lora_mask
from meerkat.masks.sensitivity import pretraining_gradient, sensitivity_mask
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.problem import Problem
from meerkat.progress import track
from meerkat.record.files import write_atomically
from meerkat.record.run_folder import RunFolder
from meerkat.run.precision import for_gradients
from meerkat.run.split import training_rows
from meerkat.settings.config import CLASSIFICATION, RunConfig


def make_mask(config: RunConfig, problem: Problem) -> SparseMask:
    """The mask that the method calls for, on the problem's model. See `precision.for_gradients`.

    Raises:
        MeerkatError: a mask that was given does not fit, or one cannot be made.
    """
    model, density, kind = problem.model, config.density, config.recipe.moves
    given: dict[str, Any] = {"scope": config.mask_scope, "exclude": config.exclude}
    with for_gradients(model):
        if config.mask:
            mask = given_mask(config, model)
        elif kind in ("sensitivity", "task"):
            mask = _sensitivity_mask(config, problem)
        elif kind == "magnitude":
            mask = magnitude_mask(model, density, **given)
        elif kind == "random":
            mask = random_mask(model, density, config.seed, **given)
        else:
            mask = lora_mask(model) if kind == "lora" else full_mask(model)
        if config.gradip == "off":
            return replace(mask, pretraining_gradient=None)
        if mask.pretraining_gradient is not None or (public := problem.public()) is None:
            return mask
        # not part of the method's choice, but GradIP needs it
        gradient = pretraining_gradient(model, mask, track(public.examples, "pre-training gradient"), public.loss)
        return replace(mask, pretraining_gradient=gradient)


def given_mask(config: RunConfig, model: nn.Module) -> SparseMask:
    """The mask that the settings name. A method that chooses by sensitivity takes any, others one of their own kind.

    Raises:
        MeerkatError: there is no such file, or its mask is of another kind or model than the run's, or was
            chosen otherwise than asked.
    """
    mask, kind, density = SparseMask.load(Path(config.mask)), config.recipe.moves, config.density
    if kind not in ("sensitivity", mask.kind):
        moving = f"its kind is {mask.kind}, and method {config.method} moves entries of kind {kind}"
        raise MeerkatError(f"mask '{config.mask}': {moving}; leave it out, or use method meerkat")
    mask.check_fits(model)
    if kind not in ("full", "lora") and density not in (mask.density, RunConfig.model_fields["density"].default):
        raise MeerkatError(
            f"density {density:g}: mask '{config.mask}' has density {mask.density:g}; leave one of them out"
        )
    for name, chosen in chosen_by(mask).items():
        given = getattr(config, name)
        if given != RunConfig.model_fields[name].default and not _alike(given, chosen):
            asked, has = _spelled(given), _spelled(chosen)
            raise MeerkatError(f"{name} {asked}: mask '{config.mask}' was made with {has}; leave one of them out")
    return mask


def chosen_by(mask: SparseMask) -> dict[str, Any]:
    """The settings `exclude` and `mask_scope` that a mask was made with, as far as it says so."""
    if mask.kind in ("full", "lora"):
        return {}
    excluded, scope = mask.facts.get("excluded"), mask.facts.get("scope")
    without = None if excluded is None else tuple(filter(None, excluded.split(",")))
    chosen: dict[str, Any] = {}
    if without is not None and {*without} <= {*get_args(Exclusion)}:
        chosen["exclude"] = without
    if scope in get_args(Scope):
        chosen["mask_scope"] = scope
    return chosen


def _alike(given: str | tuple[str, ...], chosen: str | tuple[str, ...]) -> bool:
    return {*given} == {*chosen} if isinstance(given, tuple) else given == chosen


def _spelled(value: str | tuple[str, ...]) -> str:
    return value if isinstance(value, str) else ",".join(value) or "none"


def _sensitivity_mask(config: RunConfig, problem: Problem) -> SparseMask:
    """The entries most sensitive on public data, or on as many of the clients' own rows, drawn at random."""
    options: dict[str, Any] = {"scope": config.mask_scope, "exclude": config.exclude, "track": track}
    options["with_gradient"] = config.gradip == "on"
    if config.recipe.moves == "task":
        training = training_rows(config, problem.rows)
        drawn = sorted(seeds.permutation(len(training), config.seed, "task mask")[: config.text_sequences])
        examples = problem.prepare([training[i] for i in drawn])
        options |= {"kind": "task", "facts": {"task": problem.name}}
        return sensitivity_mask(
            problem.model,
            examples,
            lambda example: problem.row_losses(problem.batch([example], "gradient"))[0],
            config.density,
            **options,
        )
    if (public := problem.public()) is None:
        raise MeerkatError(
            f"method {config.method}: makes its mask from public data, and problem '{config.problem}' has none; "
            "give a --mask, or use another method, such as weight-magnitude"
        )
    return sensitivity_mask(problem.model, public.examples, public.loss, config.density, facts=public.facts, **options)


def store_mask(folder: RunFolder, mask: SparseMask, problem: Problem) -> None:
    """Put the mask into the run's folder, with the moving entries' base values."""
    theta_0 = MaskedModel(problem.model, mask).read().cpu()
    write_atomically(folder.mask_path, replace(mask, theta_0=theta_0).save, folder.cure)


def load_mask(folder: RunFolder, config: RunConfig, problem: Problem) -> SparseMask:
    """The mask in the run's folder; a run that was killed before it was there makes it again."""
    if not folder.mask_path.exists():
        store_mask(folder, make_mask(config, problem), problem)
    mask = folder.mask()
    check_model(folder, mask, config, problem)
    theta_0 = MaskedModel(problem.model, mask).read()
    if mask.theta_0 is None or path.digest(mask.theta_0) != path.digest(theta_0):
        raise RunFailed(
            f"{folder.mask_path}: its base values are not the model's; "
            f"to make it again delete it, then {folder.resumption}"
        )
    return mask


def check_model(folder: RunFolder, mask: SparseMask, config: RunConfig, problem: Problem) -> None:
    """Raise MeerkatError unless the problem's model is the one that a run began with."""
    try:
        mask.check_fits(problem.model)
    except MeerkatError:
        name = config.model if config.problem == CLASSIFICATION else config.problem
        raise MeerkatError(
            f"run folder '{folder.root}': the model '{name}' is not the one the run began with; "
            "restore it, or start a new run"
        ) from None
