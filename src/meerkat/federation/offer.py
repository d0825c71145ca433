"""What a coordinator offers each node at the start: all of a run that a site needs to take part in it.

It travels once, inside the control plane's own authenticated message, with the token that the node's first
frame shows. Where the run's files lie on the coordinator, and its pre-training gradient, stay there.
"""

import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from meerkat import demo
from meerkat.errors import DAMAGE, MeerkatError
from meerkat.federation.frames import VERSION
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.tasks import TASKS, Task, parse_task, read_task_file
from meerkat.settings.config import RunConfig, make_config
from meerkat.settings.groups import MachineSettings

HERE = ("model", "data", "text", "mask", "device", "tokens_per_pass", "micro_batch", "held_back")
"""Settings of a run that each side has of its own."""


@dataclass(frozen=True)
class Offer:
    """A run, as a node is told of it."""

    run: str
    """The federation's id: 8 bytes, hexadecimal."""
    settings: dict[str, Any]
    """The run's settings, without those of `HERE`."""
    task: str
    """A task's name, or its file's."""
    task_text: str
    """The task file's text; empty for a task that every meerkat knows."""
    theta: str
    """SHA-256 of theta_0."""
    mask: bytes
    """The mask's file, without gradient and base values."""
    token: str
    """For the node's first frame, once: 32 bytes, hexadecimal."""
    stream: str
    """host:port of the session stream; empty where frames travel in the control plane's messages."""
    patience_s: float
    """Seconds for which a site tries to come back after the stream broke, before it is free for another run."""
    sign: bool = False
    """Whether replies without a signature are refused."""
    version: int = VERSION

    @classmethod
    def of(
        cls,
        config: RunConfig,
        mask: SparseMask,
        theta: str,
        run: str,
        stream: str,
        patience_s: float,
        sign: bool = False,
    ) -> "Offer":
        """The offer of a run, without a token yet.

        Raises:
            MeerkatError: the run's task cannot be read.
        """
        known = config.task in TASKS or config.task in demo.TASKS
        settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in HERE}
        return cls(
            run=run,
            settings={**settings, "task": ""},
            task=config.task if known else Path(config.task).name,
            task_text="" if known else read_task_file(config.task),
            theta=theta,
            mask=_bytes_of(replace(mask, pretraining_gradient=None, theta_0=None)),
            token="",
            stream=stream,
            patience_s=patience_s,
            sign=sign,
        )

    def encode(self, token: str) -> tuple[str, bytes]:
        """The offer as JSON, with a token in it, and the mask's bytes apart."""
        held = {**asdict(self), "token": token}
        mask = held.pop("mask")
        return json.dumps(held), mask

    @classmethod
    def decode(cls, text: str, mask: bytes) -> "Offer":
        """The offer that `encode` wrote.

        Raises:
            MeerkatError: it is none, or of another version.
        """
        try:
            held = json.loads(text)
            if held["version"] != VERSION:
                raise MeerkatError(
                    f"the coordinator speaks frame format {held['version']}, this site {VERSION}: "
                    "use the same version of meerkat on both"
                )
            offer = cls(mask=mask, **held)
            offer._check()
            return offer
        except DAMAGE:
            raise MeerkatError("the coordinator's offer cannot be read: use the same version of meerkat") from None

    def _check(self) -> None:
        """Raise TypeError or ValueError unless every part is of its kind."""
        for text, size in ((self.run, 8), (self.token, 32), (self.theta, 32)):
            if len(bytes.fromhex(text)) != size:
                raise ValueError(f"{text!r}: not {size} bytes")
        if not isinstance(self.settings, dict) or not all(
            isinstance(text, str) for text in (self.task, self.task_text, self.stream)
        ):
            raise TypeError("settings, task or stream of another kind")
        if not 0 <= float(self.patience_s) < float("inf"):
            raise ValueError(f"{self.patience_s} seconds")

    def config(self, own: dict[str, Any]) -> RunConfig:
        """The run's settings, with a site's own.

        Raises:
            MeerkatError: a setting is not known, or not allowed.
        """
        offered = {name: value for name, value in self.settings.items() if name not in HERE}
        config = make_config({**offered, "task": self.task, **own}, spell="the offered ")
        config.check_resolved("the offered ", but=MachineSettings.model_fields.keys())
        return config

    def load_task(self) -> Task:
        """The run's task.

        Raises:
            MeerkatError: it is not known here, or its text describes none.
        """
        if self.task_text:
            task = parse_task(self.task_text, self.task)
            if task.name in TASKS or task.name in demo.TASKS:  # a site that accepts the name means its own text
                raise MeerkatError(
                    f"task '{task.name}': is one that every meerkat knows; give the task file another name"
                )
            return task
        if self.task in demo.TASKS:
            return demo.load_task(self.task)
        if self.task in TASKS:
            return TASKS[self.task]
        raise MeerkatError(f"task '{self.task}': not known here; use the same version of meerkat as the coordinator")

    def load_mask(self) -> SparseMask:
        """The run's mask.

        Raises:
            MeerkatError: the bytes are no mask.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mask.safetensors"
            path.write_bytes(self.mask)
            try:
                return SparseMask.load(path)
            except MeerkatError:  # which names a file that nobody knows
                raise MeerkatError("the offered mask is damaged, or no mask") from None


def _bytes_of(mask: SparseMask) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.safetensors"
        mask.save(path)
        return path.read_bytes()
