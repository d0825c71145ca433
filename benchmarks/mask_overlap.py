"""How much masks of one model agree: the share of entries that two move in common, beside what chance would give.

python benchmarks/mask_overlap.py [--json] MASK.safetensors MASK.safetensors ...
"""

import argparse
import json
from pathlib import Path

from meerkat.masks.sparse_mask import SparseMask


def main() -> None:
    """Compare every pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("masks", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    masks = {path.stem: SparseMask.load(path) for path in arguments.masks}
    pairs = [
        {"of": one, "in": other, "share": round(masks[one].overlap(masks[other]), 4)}
        for one in masks
        for other in masks
        if one < other
    ]
    first = next(iter(masks.values()))
    chance = len(first) / first.total
    if arguments.json:
        shares = [pair["share"] for pair in pairs]
        headline = {"name": "mask_overlap", "ratio": shares[0], "spread": [min(shares), max(shares)]}
        print(json.dumps({**headline, "pairs": pairs, "by_chance": chance, "measured_on": f"{len(first):,} entries"}))
        return
    for pair in pairs:
        print(f"{pair['share']:.3f} of {pair['of']} is in {pair['in']}")
    print(f"by chance: {chance:.4f}, were all {first.total:,} parameters alike")


if __name__ == "__main__":
    main()
