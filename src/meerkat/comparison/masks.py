"""The masks of a comparison, each made and measured once for all the runs that share it."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from meerkat.comparison.cells import settings_hash
from meerkat.comparison.processes import Pool
from meerkat.record.files import remove_leftovers, write_atomically
from meerkat.run.curvature import with_rates
from meerkat.run.mask import make_mask
from meerkat.run.precision import with_precision
from meerkat.run.setup import open_problem, resolve
from meerkat.settings.auto import AUTO
from meerkat.settings.config import RunConfig

OF_ITS_TEXT = ("text", "text_sequences", "text_length")
"""Settings that say which public text there is."""


def with_masks(
    cells: Mapping[Any, RunConfig], done: Collection[Any], unrated: Collection[Any], pool: Pool, folder: Path
) -> dict[Any, RunConfig]:
    """The settings with their masks as files, each made once for all the runs that share it.

    Args:
        done: those for which none is made: their runs are known already.
        unrated: those whose rate is another run's.
    """
    files = {key: _mask_file(config, folder) for key, config in cells.items()}
    makers: dict[Path, RunConfig] = {}
    for key, config in cells.items():
        file = files[key]
        if file is None or key in done:
            continue
        config = config.model_copy(update={"lr": 1.0}) if key in unrated else config
        if file not in makers or _measures(config) > _measures(makers[file]):
            makers[file] = config
    missing = {file: (write_mask, config, file) for file, config in makers.items() if not file.exists()}
    pool.map_unique("masks", missing, lambda file, _: f"{makers[file].method}, {file}")
    there = {key: str(file.resolve()) for key, file in files.items() if file is not None and file.exists()}
    return {key: config.model_copy(update={"mask": there.get(key, config.mask)}) for key, config in cells.items()}


def _measures(config: RunConfig) -> tuple[bool, bool]:
    """Whether making a run's mask measures eps, and what rates follow from."""
    opened = config.lr == AUTO or (config.update_rule == "adam" and config.server_lr == AUTO)
    return config.recipe.sends_scalars, opened


_OF_A_MASK = ("problem", "model", "objective", "density", "mask_scope", "exclude", "gradip", *OF_ITS_TEXT)


def _mask_file(config: RunConfig, folder: Path) -> Path | None:
    """Where a run's mask is shared with others; None for one that was given, or depends on the run's own rows."""
    moves = config.recipe.moves
    if config.mask or moves == "task":
        return None
    of = {name: value for name, value in config.model_dump(mode="json").items() if name in _OF_A_MASK}
    drawn = {"seed": config.seed} if moves in ("random", "lora") else {}
    return folder / f"{settings_hash({**of, 'moves': moves, **drawn})}.safetensors"


def write_mask(config: RunConfig, file: Path) -> None:
    """Make a run's mask, and note with it what the run's learning rates and eps follow from, unless they are given."""
    resolved = resolve(config)
    problem = open_problem(resolved)
    resolved, mask = with_rates(resolved, problem, make_mask(resolved, problem))
    _, mask = with_precision(resolved, problem, mask)
    remove_leftovers(file)
    write_atomically(file, mask.save)
