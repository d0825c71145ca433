"""The method and the baselines of its section 8, each a small difference to the same engine."""

from dataclasses import dataclass
from typing import Literal

from meerkat.algorithm.extreme_clients import EarlyStop
from meerkat.masks.kinds import Kind

Method = Literal[
    "meerkat",
    "meerkat-vp",
    "full-fedzo",
    "lora-fedzo",
    "weight-magnitude",
    "random-mask",
    "task-mask",
    "random-early-stop",
    "feddyn",
    "fo-fedavg",
]


@dataclass(frozen=True)
class Recipe:
    """What a method's name stands for."""

    moves: Kind = "sensitivity"
    early_stop: EarlyStop = "none"
    client: Literal["zeroth-order", "feddyn", "first-order"] = "zeroth-order"
    """The client rule, by its name in `algorithm.CLIENT_RULES`."""
    update_rule: str = ""
    """The update rule that goes with it; empty where any does."""
    eps: float = 1e-3
    share_of_fastest: float = 0.45
    """The default learning rate over that of the fastest expected descent on public data: see docs/steps.md."""

    @property
    def sends_scalars(self) -> bool:
        """Whether clients reply with scalars, and not with a whole delta."""
        return self.client != "first-order"


METHODS: dict[Method, Recipe] = {
    "meerkat": Recipe(),
    "meerkat-vp": Recipe(early_stop="vp"),
    "full-fedzo": Recipe("full"),
    "lora-fedzo": Recipe("lora", eps=1e-2, share_of_fastest=0.08),  # B is 0 at first: A stiffens as it grows
    "weight-magnitude": Recipe("magnitude"),
    "random-mask": Recipe("random"),
    "task-mask": Recipe("task"),
    "random-early-stop": Recipe(early_stop="random"),
    "feddyn": Recipe(client="feddyn", update_rule="feddyn", share_of_fastest=0.04),
    "fo-fedavg": Recipe(client="first-order"),
}
