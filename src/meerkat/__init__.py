"""Meerkat: sparse zeroth-order federated fine-tuning of language models."""

from meerkat.algorithm.calibration import close_calibration, open_calibration
from meerkat.algorithm.client import local_steps
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import Delta, Reply, RoundPlan, RoundRecord, Scalars
from meerkat.algorithm.selection import Selection, Vpcs, select
from meerkat.algorithm.server import ServerConfig, ServerState, close_round, open_round
from meerkat.algorithm.zeroth_order import MaskedModel, projected_gradient
from meerkat.errors import Diverged, MeerkatError, RunFailed
from meerkat.masks.baselines import full_mask, magnitude_mask, random_mask
from meerkat.masks.sensitivity import sensitivity_mask
from meerkat.masks.sparse_mask import SparseMask
from meerkat.run.local_engine import LocalEngine

__version__ = "0.1.0"

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
