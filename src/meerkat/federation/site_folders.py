"""A simulated split written as one data folder per client, for sites that train on their own."""

import json
from functools import partial
from pathlib import Path

from meerkat.errors import MeerkatError
from meerkat.problems.partition import partition
from meerkat.record.files import filling, make_folder, write_text
from meerkat.run.setup import load_split, resolve
from meerkat.run.split import training_rows
from meerkat.settings.config import CLASSIFICATION, RunConfig
from meerkat.settings.validation import check_new_folder


def site_folder(out: Path, client: int) -> Path:
    """The data folder of one client."""
    return out / f"site-{client}"


def write_sites(config: RunConfig, out: Path) -> list[int]:
    """Write `out`/site-0/train.jsonl, ...: the rows that each client of a simulation with these settings holds.

    They are in the training set's order, so a site sees the same batches as that client in the simulation.

    Args:
        config: only `task`, `data`, `held_back`, `partition`, `clients` and `seed` matter.
        out: new or empty; created if it does not exist.

    Returns:
        Rows of each client, [K].

    Raises:
        MeerkatError: the folder is not empty, or the rows cannot be loaded or split this way.
        RunFailed: the disk refused it; nothing is left there.
    """
    check_new_folder(out)
    if config.problem != CLASSIFICATION:
        raise MeerkatError(f"problem '{config.problem}': only {CLASSIFICATION}'s rows can be written to folders")
    config = resolve(config)
    training = training_rows(config, partial(load_split, config))
    split = partition(config.partition, training, config.clients, config.seed)
    with filling(out, "make room, or give another --out"):
        make_folder(out)
        for client, rows in enumerate(split.rows):
            folder = site_folder(out, client)
            make_folder(folder)
            lines = "".join(json.dumps(training[row]) + "\n" for row in rows)
            write_text(folder / "train.jsonl", lines)
    return [len(rows) for rows in split.rows]
