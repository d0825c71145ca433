"""Which clients a round asks: a sample that follows from the seed, or a secret one where clients are hidden."""

from collections.abc import Collection

from meerkat import seeds
from meerkat.privacy.mechanism import Mechanism


def seeded_sample(available: Collection[int], count: int, seed: int, round: int) -> list[int]:
    """`count` of the clients available, or all where they are fewer, ascending: fresh in each round."""
    among = sorted(available)
    if count >= len(among):
        return among
    order = seeds.permutation(len(among), seed, "participants", round)
    return sorted(among[i] for i in order[:count])


def poisson_sample(mechanism: Mechanism, clients: int, available: Collection[int] | None) -> list[int]:
    """Each of all clients by chance, as far as it is available (None: all are). Nobody can foretell it."""
    sample = mechanism.sample(range(clients)).tolist()
    return [k for k in sample if available is None or k in available]
