"""Meerkat: sparse zeroth-order federated fine-tuning of language models."""

from meerkat.client import local_steps
from meerkat.directions import Directions
from meerkat.errors import MeerkatError, RunFailed
from meerkat.mask import SparseMask
from meerkat.rounds import Reply, RoundPlan, RoundRecord
from meerkat.sensitivity import full_mask, magnitude_mask, random_mask, sensitivity_mask
from meerkat.server import ServerConfig, ServerState, close_round, open_round
from meerkat.zeroth_order import MaskedModel, projected_gradient

__version__ = "0.1.0"

__all__ = [
    "Directions",
    "MaskedModel",
    "MeerkatError",
    "Reply",
    "RoundPlan",
    "RoundRecord",
    "RunFailed",
    "ServerConfig",
    "ServerState",
    "SparseMask",
    "close_round",
    "full_mask",
    "local_steps",
    "magnitude_mask",
    "open_round",
    "projected_gradient",
    "random_mask",
    "sensitivity_mask",
]
