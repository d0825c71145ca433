"""Meerkat: sparse zeroth-order federated fine-tuning of language models."""

from meerkat.calibration import close_calibration, open_calibration
from meerkat.client import local_steps
from meerkat.directions import Directions
from meerkat.engines.local import LocalEngine
from meerkat.errors import Diverged, MeerkatError, RunFailed
from meerkat.mask import SparseMask
from meerkat.optimizers import ServerOptimizer
from meerkat.rounds import Reply, RoundPlan, RoundRecord
from meerkat.selection import Selection, Vpcs, select
from meerkat.sensitivity import full_mask, magnitude_mask, random_mask, sensitivity_mask
from meerkat.server import ServerConfig, ServerState, close_round, open_round
from meerkat.zeroth_order import MaskedModel, projected_gradient

__version__ = "0.1.0"

__all__ = [
    "Directions",
    "Diverged",
    "LocalEngine",
    "MaskedModel",
    "MeerkatError",
    "Reply",
    "RoundPlan",
    "RoundRecord",
    "RunFailed",
    "Selection",
    "ServerConfig",
    "ServerOptimizer",
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
