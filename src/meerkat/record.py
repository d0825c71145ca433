"""A run as its record tells it: the opening, then the rounds, each checked against what it must be.

Resuming and auditing replay through the same function, so neither goes on from anything that the other
would refuse.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from meerkat import path
from meerkat.config import RunConfig
from meerkat.directions import Directions
from meerkat.errors import RunFailed
from meerkat.mask import SparseMask
from meerkat.rounds import Reply, RoundRecord
from meerkat.server import ServerConfig, ServerState, aggregate, client_weights, open_round, replay

FORMAT = 1


@dataclass(frozen=True)
class Opening:
    """The first record: everything that the rounds rest on."""

    run_key: str
    """The directions' 128-bit key, hexadecimal."""
    config: str
    """SHA-256 of config.toml as it was written."""
    model: str
    """Fingerprint of the pre-trained weights."""
    mask: str
    """SHA-256 of the moving entries."""
    gradient: str
    """SHA-256 of the pre-training gradient at them; empty where there is none."""
    theta: str
    """SHA-256 of their base values."""
    data: str
    """SHA-256 of the rows as the model sees them, and of who holds which."""
    examples: list[int]
    """Rows of each client, by id: the weights p_k follow from them."""
    torch: str
    transformers: str
    format: int = FORMAT
    rule: str = "mean"
    """How replies are aggregated."""
    optimizer: str = "sgd"
    """The server's step in theta space."""

    @classmethod
    def from_json(cls, held: dict[str, Any], log: Path) -> "Opening":
        """Read the first record.

        Raises:
            RunFailed: it is no opening, or asks for something that this version does not know.
        """
        known = {field.name for field in fields(cls)}
        if held.get("kind") != "open" or held.keys() - {"kind"} != known:
            raise RunFailed(f"{log}: the first record is not an opening of this version; use the version that wrote it")
        opening = cls(**{name: held[name] for name in known})
        for name, allowed in (("format", FORMAT), ("rule", "mean"), ("optimizer", "sgd")):
            if (found := getattr(opening, name)) != allowed:
                raise RunFailed(
                    f"{log}: {name} {found!r} is not known, only {allowed!r}; use the version that wrote it"
                )
        return opening

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {"kind": "open", **asdict(self)}

    def settings(self, config: RunConfig) -> ServerConfig:
        """What the server opens every round from."""
        return ServerConfig(
            rounds=config.rounds,
            local_steps=config.local_steps,
            directions=config.directions,
            lr=config.lr,
            eps=config.eps,
            clients=config.clients,
            clients_per_round=config.clients_per_round,
            examples=dict(enumerate(self.examples)),
            weights=config.weights,
            lr_schedule=config.lr_schedule,
            seed=config.seed,
        )


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def gradient_digest(mask: SparseMask) -> str:
    """SHA-256 of a mask's pre-training gradient; empty where it has none."""
    return "" if mask.pretraining_gradient is None else path.digest(mask.pretraining_gradient)


def replay_log(
    records: Iterable[dict[str, Any]], theta: Tensor, settings: ServerConfig, directions: Directions, log: Path
) -> tuple[ServerState, bool]:
    """Go through a log's records after the opening, from theta_0: the last state, and whether the run was closed.

    Every plan is compared with what the settings call for, and every weight, aggregate and digest of
    theta is computed anew.

    Raises:
        RunFailed: a record is not what it must be.
    """
    try:
        return _replay_log(records, theta, settings, directions, log)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise RunFailed(f"{log}: a record is damaged ({error}); restore the file from a copy") from None


def _replay_log(
    records: Iterable[dict[str, Any]], theta: Tensor, settings: ServerConfig, directions: Directions, log: Path
) -> tuple[ServerState, bool]:
    state, closed = ServerState(0, theta), False
    for held in records:
        where = f"round {state.round}"
        if closed:
            raise RunFailed(f"{log}: records follow the closing one; the run is damaged")
        if held.get("kind") == "close":
            closed = True
            agree(log, "the number of rounds", str(held["rounds"]), str(state.round))
            agree(log, "the number of rounds", str(settings.rounds), str(state.round))
            agree(log, "the last theta", held["theta"], path.digest(state.theta))
        elif held.get("kind") == "round":
            if state.round == settings.rounds:
                raise RunFailed(f"{log}: holds more rounds than config.toml asks for; restore the folder from a copy")
            record = RoundRecord.from_json(held)
            agree(log, f"the plan of {where}", str(record.plan), str(open_round(state, settings)))
            agree(log, f"the weights of {where}", str(record.weights), str(client_weights(settings, [*record.scalars])))
            replies = [Reply(k, g) for k, g in record.scalars.items()]
            again = aggregate(replies, record.weights, record.plan)
            agree(log, f"the aggregate of {where}", _hex(record.aggregate), _hex(again))
            state = replay(state, record, directions)
            agree(log, f"theta after {where}", record.theta_digest, path.digest(state.theta))
        else:
            raise RunFailed(f"{log}: a record of unknown kind {held.get('kind')!r}; use the version that wrote it")
    return state, closed


def _hex(values: np.ndarray) -> str:
    return values.astype("<f4").tobytes().hex()


def agree(file: Path, what: str, recorded: str, found: str) -> None:
    """Raise RunFailed unless what a file records is what was found."""
    if recorded != found:
        shorter = min(len(recorded), len(found))
        at = next((i for i, (a, b) in enumerate(zip(recorded, found, strict=False)) if a != b), shorter)
        then, now = (text[max(0, at - 16) : at + 24] for text in (recorded, found))
        raise RunFailed(
            f"{file}: {what}: recorded '{then}', found '{now}'; the run is damaged: restore its folder from a copy"
        )
