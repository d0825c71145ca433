"""Export of a run's model: as a whole Hugging Face folder, or as a sparse delta for the base model."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.errors import DAMAGE, MeerkatError, RunFailed, in_short
from meerkat.export.model_card import CARD_FILE, Content, model_card
from meerkat.masks.lora import merge_lora_, save_adapter
from meerkat.masks.sparse_mask import SparseMask, fingerprint
from meerkat.problems.classification import Classification
from meerkat.record.files import explain_disk_errors
from meerkat.record.run_folder import RunFolder
from meerkat.run.evaluate import load_run
from meerkat.settings.validation import check_new_folder

Form = Literal["merged", "delta"]
DELTA_FILE = "delta.safetensors"
DELTA_VERSION = 1


def export(root: Path, to: Path, form: Form = "merged") -> Path:
    """Write a run's model and its model card to a new or empty folder, whole or not at all.

    Args:
        form: "merged" is a whole model that `AutoModelForCausalLM.from_pretrained` loads, tokenizer included, its
            weights those of the checkpoint where nothing moved, quantised or not in the run. It is as wide as what
            the run computed with: float32 where the checkpoint's type would round what moved in a float32 run, or
            what LoRA's adapters add. "delta" is one
            safetensors file with the moving entries and their values, for `apply_delta`, or, of a LoRA run, the
            adapters that `peft.PeftModel.from_pretrained` loads.

    Returns:
        The folder, or the delta's file in it.

    Raises:
        MeerkatError: the folder is not empty.
        RunFailed: the run is damaged, or a file cannot be written.
    """
    check_new_folder(to)
    run, problem = load_run(root, as_stored=True)
    if form == "merged" and not isinstance(problem, Classification):
        raise MeerkatError(
            f"--form merged: writes a Hugging Face model, and that of problem '{run.config.problem}' is none; "
            "use --form delta"
        )
    lora = run.config.recipe.moves == "lora"
    content: Content = "model" if form == "merged" else "adapters" if lora else "delta"
    to = to.resolve()
    with explain_disk_errors(to, "make room, or give another --to"):
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{to.name}.", suffix=".part", dir=to.parent) as private:
            part = Path(private) / to.name
            part.mkdir()
            model: Any = problem.model
            if content == "model":
                if lora:
                    model.float()  # what a merge adds is smaller than the steps of a narrow type
                    model = merge_lora_(model)
                elif run.config.dtype == "float32":
                    _write_exactly(model, run.mask, run.theta)
                model.save_pretrained(part)
                cast(Classification, problem).tokenizer.save_pretrained(part)
            elif content == "adapters":
                save_adapter(model, part, run.config.model)
            else:
                _save_delta(part / DELTA_FILE, run.mask, run.theta)
            tuned_fingerprint = "" if content == "adapters" else fingerprint(model)
            try:
                card = model_card(RunFolder(root), run, problem, content, tuned_fingerprint)
            except (MemoryError, *DAMAGE) as error:
                reason = in_short(error)
                raise RunFailed(f"run folder '{root}': a file in it is damaged ({reason}); restore a copy") from None
            (part / CARD_FILE).write_text(card, encoding="utf-8")
            for file in part.rglob("*"):  # a model is for sharing: whoever may list the folder may read what is in it
                file.chmod(part.stat().st_mode & (0o777 if file.is_dir() else 0o666))
            part.rename(to)
    return to / DELTA_FILE if content == "delta" else to


@torch.no_grad()
def _write_exactly(model: nn.Module, mask: SparseMask, theta: Tensor) -> None:
    """Set the weights at a mask, after widening the model to float32 if its type would round them."""
    target = MaskedModel(model, mask)
    theta = theta.to(target.device)
    target.write_(theta)
    if not torch.equal(target.read(), theta):
        MaskedModel(model.float(), mask).write_(theta)


def _save_delta(path: Path, mask: SparseMask, theta: Tensor) -> None:
    tensors = {f"indices/{name}": at for name, at in mask.entries.items() if at is not None}
    values = dict(zip(mask.entries, theta.split([count for _, count in mask.counts()]), strict=True))
    tensors |= {f"values/{name}": of_tensor.clone() for name, of_tensor in values.items()}
    metadata = {
        "format": "meerkat-delta",
        "format_version": str(DELTA_VERSION),
        "model_fingerprint": mask.fingerprint,
        "parameters_total": str(mask.total),
        "shapes": json.dumps({name: list(shape) for name, shape in mask.shapes.items()}),
    }
    save_file(tensors, path, metadata=metadata)


def apply_delta(model: nn.Module, path: Path) -> nn.Module:
    """Set a base model's weights, in place, to those of the run that a delta was exported from. Returns the model.

    They are float32: load the base in float32, or they are rounded to its type.

    Raises:
        MeerkatError: the file is not a delta, or its base is another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("format_version")) != ("meerkat-delta", str(DELTA_VERSION)):
                raise ValueError("it is not a delta of this version")
            delta = _delta(metadata, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, *DAMAGE) as error:
        raise MeerkatError(
            f"'{path}': cannot be read as a delta ({in_short(error)}); make one with 'meerkat export --form delta'"
        ) from None
    delta.check_fits(model)
    target = MaskedModel(model, delta)
    with torch.no_grad():
        target.write_(cast(Tensor, delta.theta_0).to(target.device))
    return model


def _delta(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> SparseMask:
    """A delta as a mask whose theta_0 is the run's theta.

    Raises:
        One of DAMAGE: the content is malformed.
    """
    shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
    delta = SparseMask(
        entries={name: tensors.get(f"indices/{name}") for name in shapes},
        shapes=shapes,
        fingerprint=metadata["model_fingerprint"],
        total=int(metadata["parameters_total"]),
        theta_0=torch.cat([tensors[f"values/{name}"].reshape(-1) for name in shapes]),
    )
    delta.check_form()
    if any(tensors[f"values/{name}"].shape != (count,) for name, count in delta.counts()):
        raise ValueError("a tensor has more or fewer values than entries")
    return replace(delta, entries={name: None if at is None else at.long() for name, at in delta.entries.items()})
