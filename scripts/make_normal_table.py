"""Make the table that turns 16 random bits into a normal value (see meerkat/algorithm/directions.py).

Entry i is the standard normal quantile at (i + 1/2) / 65536, scaled so that all have variance one. The
table ships as data because the last bit of a quantile function differs between math libraries. This
script shows how it was made; a test checks the shipped file against it to one unit in the last place.

    python scripts/make_normal_table.py src/meerkat/algorithm/normal_quantiles.npy
"""

import sys
from statistics import NormalDist

import numpy as np


def normal_table() -> np.ndarray:
    """The table: float32 [65536], ascending, antisymmetric, variance one."""
    quantile = NormalDist().inv_cdf
    lower = np.array([quantile((i + 0.5) / 65536) for i in range(32768)])
    table = np.concatenate([lower, -lower[::-1]])
    return (table / np.sqrt(np.mean(table**2))).astype("<f4")


if __name__ == "__main__":
    np.save(sys.argv[1], normal_table())
