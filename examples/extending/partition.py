"""A partition: clients whose numbers of rows differ by a power law, as those of real federations do.

    meerkat simulate --extension examples/extending/partition.py --partition power-law:1.5

Client k gets a share of the rows in proportion to (k + 1)^-A, and one row at least; which rows is chance.
"""

from collections.abc import Sequence

import numpy as np

from meerkat import seeds
from meerkat.errors import MeerkatError
from meerkat.problems.data import Row
from meerkat.problems.partition import Partition


def power_law(argument: str, rows: Sequence[Row], clients: int, seed: int) -> Partition:
    """Split rows over clients; the argument is what follows the colon."""
    try:
        exponent = float(argument or 1)
    except ValueError:
        exponent = -1.0
    if not 0 <= exponent < 100:  # not NaN either
        raise MeerkatError(f"partition 'power-law:{argument}': must be a number from 0 to 100, such as power-law:1.5")
    shares = np.arange(1, clients + 1) ** -exponent
    cuts = np.cumsum(shares / shares.sum() * (len(rows) - clients)).round().astype(int) + np.arange(1, clients + 1)
    order = seeds.permutation(len(rows), seed, "power law")
    return Partition(tuple(np.sort(part) for part in np.split(order, cuts[:-1])))


PARTITIONERS = {"power-law": power_law}
