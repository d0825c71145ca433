"""Taking a run's model away: merged into a Hugging Face folder, or as a sparse delta beside the base model."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from meerkat.algorithm.zeroth_order import MaskedModel
from meerkat.errors import DAMAGE, MeerkatError, in_short
from meerkat.export.model_card import CARD_FILE, Content, model_card
from meerkat.masks.lora import merge_lora_, save_adapter
from meerkat.masks.sparse_mask import SparseMask, fingerprint
from meerkat.record.run_folder import RunFolder, explain_disk_errors
from meerkat.run.evaluate import load_run
from meerkat.run.metrics import without_budget

Form = Literal["merged", "delta"]
DELTA_FILE = "delta.safetensors"
DELTA_VERSION = 1


def export(root: Path, to: Path, form: Form = "merged") -> Path:
    """Write a run's model to a new or empty folder, and a model card beside it.

    Args:
        form: "merged" is a whole model that `AutoModelForCausalLM.from_pretrained` loads, tokenizer
            included; "delta" is one safetensors file with the moving entries and their values, for
            `apply_delta`, or, of a LoRA run, the adapters as `peft.PeftModel.from_pretrained` reads them.

    Returns:
        What was written: the folder, or the file in it.

    Raises:
        MeerkatError: the folder is taken; RunFailed: the run is damaged, or the disk full.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise MeerkatError(f"'{to}': is not an empty folder; give a new or empty one as --to")
    run, workplace = load_run(root)
    folder = RunFolder(root)
    metrics, events = folder.metrics(), folder.events()
    shown_out = sorted({event["client"] for event in events if event.get("event") == "shown out" and "client" in event})
    to = to.resolve()
    part = to.with_name(to.name + ".part")
    with explain_disk_errors(to, "make room, or give another --to"):
        shutil.rmtree(part, ignore_errors=True)  # what a killed export left
        try:
            part.mkdir(parents=True)
            of_adapters = run.config.recipe.moves == "lora"
            model: Any = workplace.model
            content: Content = "model" if form == "merged" else "adapters" if of_adapters else "delta"
            if content == "model":
                model = merge_lora_(model) if of_adapters else model
                model.save_pretrained(part)
                workplace.tokenizer.save_pretrained(part)
            elif content == "adapters":
                save_adapter(model, part, run.config.model)
            else:
                _save_delta(part / DELTA_FILE, run.mask, run.theta)
            weights = "" if content == "adapters" else fingerprint(model)
            told = model_card(run, workplace.task, metrics, content, weights, shown_out, without_budget(folder))
            (part / CARD_FILE).write_text(told, encoding="utf-8")
            if to.exists():
                to.rmdir()
            part.rename(to)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return to if form == "merged" or of_adapters else to / DELTA_FILE


def _save_delta(path: Path, mask: SparseMask, theta: Tensor) -> None:
    tensors = {f"indices/{name}": at for name, at in mask.entries.items() if at is not None}
    values = dict(zip(mask.entries, theta.split([count for _, count in mask.counts()]), strict=True))
    tensors |= {f"values/{name}": held.clone() for name, held in values.items()}
    metadata = {
        "format": "meerkat-delta",
        "format_version": str(DELTA_VERSION),
        "model_fingerprint": mask.fingerprint,
        "parameters_total": str(mask.total),
        "shapes": json.dumps({name: list(shape) for name, shape in mask.shapes.items()}),
    }
    save_file(tensors, path, metadata=metadata)


def apply_delta(model: nn.Module, path: Path) -> nn.Module:
    """Set a base model's weights to those of the run that a sparse delta was exported from, in place.

    Raises:
        MeerkatError: the file is no delta, or one of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != "meerkat-delta" or meta["format_version"] != str(DELTA_VERSION):
                raise MeerkatError(
                    f"'{path}': not a delta of this version; make one with 'meerkat export --form delta'"
                )
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            mask = _delta(meta, held)
    except (OSError, SafetensorError, *DAMAGE) as error:
        raise MeerkatError(
            f"'{path}': cannot be read as a delta ({in_short(error)}); make one with 'meerkat export --form delta'"
        ) from None
    mask.check_fits(model)
    target = MaskedModel(model, mask)
    with torch.no_grad():
        target.write_(cast(Tensor, mask.theta_0).to(target.device))
    return model


def _delta(meta: Mapping[str, str], held: Mapping[str, Tensor]) -> SparseMask:
    """A delta's entries, and in the place of base values the run's. One of DAMAGE says that it is none."""
    shapes = {name: tuple(shape) for name, shape in json.loads(meta["shapes"]).items()}
    mask = SparseMask(
        entries={name: held.get(f"indices/{name}") for name in shapes},
        shapes=shapes,
        fingerprint=meta["model_fingerprint"],
        total=int(meta["parameters_total"]),
        theta_0=torch.cat([held[f"values/{name}"].reshape(-1) for name in shapes]),
    )
    mask.check_form()
    if any(held[f"values/{name}"].shape != (count,) for name, count in mask.counts()):
        raise ValueError("values that are not as many as their tensor's entries")
    return replace(mask, entries={name: None if at is None else at.long() for name, at in mask.entries.items()})
