"""What a coordinator offers each node at the start: everything that a site needs to take part in a run.

It travels once, inside the control plane's own authenticated message, with the token for the node's first frame. The
paths of the run's files and the pre-training gradient stay on the coordinator.
"""

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from meerkat.errors import DAMAGE, MeerkatError
from meerkat.federation.frames import VERSION
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.tasks import Task, parse_task, read_task_file
from meerkat.record.opening import Opening
from meerkat.run.setup import BUILT_IN_TASKS, open_task
from meerkat.settings.config import CLASSIFICATION, RunConfig, make_config
from meerkat.settings.groups import MachineSettings

LOCAL_SETTINGS = (
    *("model", "data", "text", "mask", "device", "tokens_per_pass", "micro_batch", "held_back", "max_eval_samples"),
)
"""Settings of a run that each side chooses for itself."""


LONGEST_PATIENCE_S = 86_400.0
"""Seconds for which an offer may bind a site that its coordinator has left, at most: a day."""


@dataclass(frozen=True, config={"strict": True, "extra": "forbid"})
class Offer:
    """A run, as it is offered to a node."""

    run: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{16}$")]
    """The federation's id: 8 bytes, hexadecimal."""
    settings: dict[str, Any]
    """The run's settings, except `LOCAL_SETTINGS`."""
    task: Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f]*$", max_length=255)]
    """A task's name, or the name of its file."""
    task_text: str
    """The task file's text; empty for a built-in task."""
    theta: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
    """SHA-256 of theta_0."""
    mask: bytes
    """The mask's file, without pre-training gradient and theta_0."""
    token: Annotated[str, Field(pattern=r"^([0-9a-fA-F]{64})?$")]
    """For the node's first frame; serves once. 32 bytes, hexadecimal; empty before `encode`."""
    stream: str
    """host:port of the session stream, as the coordinator calls it; empty if frames travel in the control plane's
    messages. A site connects to the address in its own settings."""
    patience_s: Annotated[float, Field(ge=0, le=LONGEST_PATIENCE_S)]
    """Seconds for which a site tries to reconnect, before it is free for another run."""
    sign: bool = False
    """Whether replies without a signature are refused."""
    version: int = VERSION

    @classmethod
    def of(cls, config: RunConfig, mask: SparseMask, opening: Opening, stream: str, patience_s: float) -> "Offer":
        """A run's offer, without a token yet. Raises MeerkatError if the run's task cannot be read."""
        built_in = config.problem != CLASSIFICATION or config.task in BUILT_IN_TASKS
        settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in LOCAL_SETTINGS}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mask.safetensors"
            replace(mask, pretraining_gradient=None, theta_0=None).save(path)
            mask_bytes = path.read_bytes()
        return cls(
            run=opening.federation,
            settings={**settings, "task": ""},
            task=config.task if built_in else Path(config.task).name,
            task_text="" if built_in else read_task_file(config.task),
            theta=opening.theta,
            mask=mask_bytes,
            token="",
            stream=stream,
            patience_s=patience_s,
            sign=opening.signed,
        )

    def encode(self, token: str) -> tuple[str, bytes]:
        """The offer as JSON, with a token; and, separately, the mask's bytes."""
        fields = {**asdict(self), "token": token}
        return json.dumps({name: value for name, value in fields.items() if name != "mask"}), self.mask

    @classmethod
    def decode(cls, text: str, mask: bytes) -> "Offer":
        """The offer that `encode` wrote. Raises MeerkatError if it is malformed, or of another version."""
        try:
            fields = json.loads(text)
            if fields["version"] == VERSION:
                return cls(mask=mask, **fields)
            raise MeerkatError(
                f"the coordinator speaks frame format {fields['version']}, this site {VERSION}: "
                "use the same version of meerkat on both"
            )
        except DAMAGE:
            raise MeerkatError("the coordinator's offer cannot be read: use the same version of meerkat") from None

    def config(self, local: dict[str, Any]) -> RunConfig:
        """The run's settings, with a site's `LOCAL_SETTINGS`. Raises MeerkatError: one is unknown, or not allowed."""
        offered = {name: value for name, value in self.settings.items() if name not in LOCAL_SETTINGS}
        config = make_config({**offered, "task": self.task, **local}, where="the offered ")
        config.check_resolved("the offered ", but=MachineSettings.model_fields.keys() - {"dtype"})
        return config

    def load_task(self) -> Task:
        """The run's task. Raises MeerkatError if it is unknown here, or its text is malformed."""
        if self.task_text:
            task = parse_task(self.task_text, self.task)
            if task.name in BUILT_IN_TASKS:  # a site that accepts this name means the built-in task
                raise MeerkatError(f"task '{task.name}': is built in; give the task file another name")
            return task
        if self.task in BUILT_IN_TASKS:
            return open_task(self.task)
        raise MeerkatError(f"task '{self.task}': unknown here; use the same version of meerkat as the coordinator")

    def load_mask(self) -> SparseMask:
        """The run's mask. Raises MeerkatError if it is damaged."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mask.safetensors"
            path.write_bytes(self.mask)
            try:
                return SparseMask.load(path)
            except MeerkatError:  # its message names a temporary file
                raise MeerkatError("the offered mask is damaged; use the same version of meerkat on both") from None
