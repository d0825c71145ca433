"""Meerkat: sparse zeroth-order federated fine-tuning of language models.

What stands here loads when it is first used, so that importing the package takes no time.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meerkat import demo as demo
    from meerkat.algorithm.calibration import close_calibration, open_calibration
    from meerkat.algorithm.client import local_steps
    from meerkat.algorithm.directions import Directions
    from meerkat.algorithm.extreme_clients import Selection, Vpcs, select
    from meerkat.algorithm.replica import Replica
    from meerkat.algorithm.replies import Delta, Reply, Scalars
    from meerkat.algorithm.rounds import RoundPlan, RoundRecord
    from meerkat.algorithm.server import ServerConfig, ServerState, close_round, open_round
    from meerkat.algorithm.zeroth_order import MaskedModel, projected_gradient
    from meerkat.errors import Diverged, MeerkatError, RunFailed
    from meerkat.masks.baselines import full_mask, magnitude_mask, random_mask
    from meerkat.masks.sensitivity import sensitivity_mask
    from meerkat.masks.sparse_mask import SparseMask
    from meerkat.record import history as history
    from meerkat.run.local_engine import LocalEngine

if "OMP_WAIT_POLICY" not in os.environ:
    # Torch's threads wait for each other by spinning, for milliseconds. On a busy machine that takes the cores from
    # those that they wait for. Torch reads this when it is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"

_HOMES = {
    "algorithm.calibration": ("close_calibration", "open_calibration"),
    "algorithm.client": ("local_steps",),
    "algorithm.directions": ("Directions",),
    "algorithm.replica": ("Replica",),
    "algorithm.replies": ("Delta", "Reply", "Scalars"),
    "algorithm.rounds": ("RoundPlan", "RoundRecord"),
    "algorithm.extreme_clients": ("Selection", "Vpcs", "select"),
    "algorithm.server": ("ServerConfig", "ServerState", "close_round", "open_round"),
    "algorithm.zeroth_order": ("MaskedModel", "projected_gradient"),
    "errors": ("Diverged", "MeerkatError", "RunFailed"),
    "masks.baselines": ("full_mask", "magnitude_mask", "random_mask"),
    "masks.sensitivity": ("sensitivity_mask",),
    "masks.sparse_mask": ("SparseMask",),
    "run.local_engine": ("LocalEngine",),
}
"""Module -> the public names that it defines; the imports above are the same for type checkers."""
_MODULES = {"demo": "demo", "history": "record.history"}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Delta",
    "Directions",
    "Diverged",
    "LocalEngine",
    "MaskedModel",
    "MeerkatError",
    "Replica",
    "Reply",
    "RoundPlan",
    "RoundRecord",
    "RunFailed",
    "Scalars",
    "Selection",
    "ServerConfig",
    "ServerState",
    "SparseMask",
    "Vpcs",
    "close_calibration",
    "close_round",
    "full_mask",
    "local_steps",
    "magnitude_mask",
    "open_calibration",
    "open_round",
    "projected_gradient",
    "random_mask",
    "select",
    "sensitivity_mask",
]


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it (PEP 562)."""
    if name in _MODULES:
        return import_module(f"meerkat.{_MODULES[name]}")
    if name in _HOME_OF:
        return getattr(import_module(f"meerkat.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'meerkat' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
