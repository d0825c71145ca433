"""The runs of a comparison: each an ordinary run folder, named by its settings."""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from meerkat.comparison.evidence import Evidence, Outcome
from meerkat.errors import Diverged, MeerkatError, RunFailed
from meerkat.masks.sparse_mask import SparseMask
from meerkat.record.files import write_text
from meerkat.record.run_folder import RunFolder
from meerkat.run.simulation import resume, simulate
from meerkat.settings.auto import number
from meerkat.settings.config import RunConfig


def cell_name(config: RunConfig) -> str:
    """A folder's name, a function of the settings: readable, and unique by their hash."""
    # where and how fast a run is made does not make it another run, nor does where its mask is stored
    settings = config.model_dump(mode="json", exclude={"device", "threads"})
    settings["mask"] = _mask_digest(config.mask) if config.mask else ""
    split = re.sub(r"[^\w.-]", "", config.partition)
    return f"{config.method}-{split}-T{config.local_steps}-s{config.seed}-{settings_hash(settings)}"


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits that tell settings apart."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


@lru_cache
def _mask_digest(path: str) -> str:
    return SparseMask.load(Path(path)).digest()


def run_cell(config: RunConfig, folder: Path, evidence: Evidence | None = None) -> Outcome:
    """What comes of a run: as the evidence has it, or once it is begun, resumed or seen to be finished.

    Raises:
        RunFailed: it failed other than by diverging, or the evidence cannot be written.
    """
    if evidence is not None and (known := evidence.outcome(config)) is not None:
        return known
    summary = _summary(config, folder)
    resolved = RunFolder.open(folder).config()
    outcome = Outcome(number(resolved.lr), summary)
    if evidence is not None:
        evidence.add(config, outcome, resolved)
    return outcome


def _summary(config: RunConfig, folder: Path) -> dict[str, Any] | None:
    diverged = folder.with_name(folder.name + ".diverged")
    if diverged.exists():
        return None
    begun = folder.exists()
    try:
        return resume(folder) if (folder / "config.toml").exists() else simulate(config, folder)
    except Diverged as error:
        write_text(diverged, f"{error}\n")
        return None
    except MeerkatError as error:
        if begun:
            raise RunFailed(f"{error}; or delete '{folder}', and the same command makes that run anew") from None
        raise
