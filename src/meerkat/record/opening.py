"""A run's opening record: everything that its rounds rest on, as digests, and what follows from it and the settings."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, FailFast, Field, ValidationError
from torch import Tensor

from meerkat.algorithm import path
from meerkat.algorithm.robust import RULES
from meerkat.algorithm.server import ServerConfig
from meerkat.errors import RunFailed
from meerkat.masks.sparse_mask import SparseMask
from meerkat.record.run_log import LogReader
from meerkat.record.signatures import RunIdentity, is_hex
from meerkat.settings.algorithm import server_config
from meerkat.settings.config import RunConfig
from meerkat.settings.validation import form_of

FORMAT = 7

_Key = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Counts = Annotated[list[Annotated[int, Field(ge=0)]], FailFast()]
_Version = Annotated[str, Field(pattern="^[0-9][0-9A-Za-z.+!_-]{0,63}$")]
"""A package's version, such as 2.13.0+cpu."""

MEANING = (
    *("method", "task", "objective", "max_length", "chat_template", "batch_size", "eps", "directions"),
    *("local_steps", "rounds", "dtype", "quantize", "seed", "estimator"),
    *("dp", "dp_epsilon", "dp_delta", "dp_clip", "dp_noise_multiplier", "dp_relation"),
)
"""Settings that say what a scalar is, and of how long a run: sites sign them with their joining."""


@dataclass(frozen=True)
class Opening:
    """The first record."""

    run_key: _Key
    """The directions' 128-bit key, hexadecimal."""
    config: _Digest
    """SHA-256 of config.toml as it was written."""
    model: _Digest
    """Fingerprint of the pre-trained weights."""
    mask: _Digest
    """SHA-256 of the moving entries."""
    about_mask: _Digest
    """SHA-256 of what the mask says of itself."""
    gradient: _Digest | Literal[""]
    """SHA-256 of the pre-training gradient at them; empty where there is none."""
    theta: _Digest
    """SHA-256 of their base values."""
    data: _Digest | Literal[""]
    """SHA-256 of the rows as the model sees them, and of who holds which."""
    examples: _Counts
    """Rows of each client, by id: the weights p_k follow from them. None in a federation, whose clients join."""
    torch: _Version
    transformers: _Version
    allowance: _Counts = field(default_factory=list)
    """Local steps that each client's privacy budget lasts for, by id; empty without one. Sites keep their own."""
    federation: str = ""
    """A real federation's own id, hexadecimal, drawn at random; empty in a simulation."""
    signed: bool = False
    """Whether every reply must be signed: nobody joins without a key."""
    format: int = FORMAT
    rule: str = "mean"
    """How replies are aggregated."""
    estimator: str = "plain"
    """How slopes were estimated."""
    update_rule: str = "sgd"
    """How theta follows from a round's aggregate."""

    # an instance is all that pydantic takes from Python where it is strict
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, revalidate_instances="always")

    @classmethod
    def from_json(cls, record: dict[str, Any], log: Path) -> "Opening":
        """Read the first record. Raises RunFailed if it is no opening, or names a rule that is unknown here."""
        check_format(record, log)
        if record.get("kind") != "open" or [*record] != ["kind", *(one.name for one in fields(cls))]:
            raise RunFailed(f"{log}: the first record is not an opening of this version; use the version that wrote it")
        values = {name: value for name, value in record.items() if name != "kind"}
        try:
            opening = form_of(cls).validate_python(cls(**values))
        except ValidationError as error:
            name = error.errors()[0]["loc"][0]
            raise RunFailed(f"{log}: {name} in the opening is not what any version writes; restore a copy") from None
        if opening.rule not in RULES:
            only = ", ".join(map(repr, RULES))
            raise RunFailed(f"{log}: rule {opening.rule!r} is not known, only {only}; use the version that wrote it")
        run = opening.federation
        if not (is_hex(run, 8) and (opening.data, opening.examples) == ("", []) if run else not opening.signed):
            raise RunFailed(f"{log}: the opening is neither a simulation's nor a federation's; restore a copy")
        return opening

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {"kind": "open", **asdict(self)}

    def settings(self, config: RunConfig, theta_0: Tensor) -> ServerConfig:
        """What the server opens every round from."""
        return server_config(config, theta_0, dict(enumerate(self.examples)), dict(enumerate(self.allowance)))

    def identity(self, config: RunConfig) -> RunIdentity:
        """What a federation's signatures are about."""
        digests = (self.run_key, self.model, self.mask, self.theta, meaning(config))
        return RunIdentity(self.federation, self.signed, *digests)


def check_format(first: Mapping[str, Any], log: Path) -> None:
    """Raise RunFailed where a log's first record says that the log is of another format than this version's."""
    if first.get("kind") == "open" and (version := first.get("format", FORMAT)) != FORMAT:
        raise RunFailed(f"{log}: format {version!r} is not known, only {FORMAT}; use the version that wrote it")


def meaning(config: RunConfig) -> str:
    """SHA-256 of the settings of `MEANING` as compact JSON in that order; of a task file only the name.

    Under FedDyn its alpha is among them: a scalar depends on it there.
    """
    of_method = ("feddyn_alpha",) if config.method == "feddyn" else ()
    settings = {name: getattr(config, name) for name in (*MEANING, *of_method)} | {"task": Path(config.task).name}
    return hashlib.sha256(json.dumps(settings, separators=(",", ":")).encode()).hexdigest()


def steps_by_rows(log: Path) -> Counter[tuple[int, int]]:
    """(client, its rows at the time) -> local steps that a log tells of: what privacy was spent on.

    A pointer that jumps tells of steps that did not count: their reply came too late. If the client's rows changed
    meanwhile, these steps count as made of the fewer: they cost more.
    """
    rows: dict[int, int] = {}
    counted: dict[int, tuple[int, int]] = {}  # of each client's last reply: rows at the time, steps after it
    made: Counter[tuple[int, int]] = Counter()
    for record in LogReader(log):
        if record["kind"] == "open":
            rows.update(enumerate(record["examples"]))
        elif record["kind"] == "join":
            rows[record["client"]] = record["examples"]
        elif record["kind"] in ("round", "calibration"):
            for k, steps, pointer in zip(record["clients"], record["made"], record["pointers"], strict=True):
                if steps:
                    before, after = counted.get(k, (rows[k], 0))
                    made[k, rows[k]] += steps
                    if pointer > after:
                        made[k, min(before, rows[k])] += pointer - after
                    counted[k] = rows[k], pointer + steps
    return made


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def gradient_digest(mask: SparseMask) -> str:
    """SHA-256 of a mask's pre-training gradient; empty where it has none."""
    return "" if mask.pretraining_gradient is None else path.digest(mask.pretraining_gradient)
