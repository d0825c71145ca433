"""What a site brings to a federation, and what it agrees to: its site.toml.

The site's operator writes it, and nothing that a coordinator says overrides it. A run that asks for more is
refused before a row of data is read, in one line that both sides see.
"""

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from meerkat.errors import MeerkatError
from meerkat.masks.eligible import eligible_parameters
from meerkat.masks.sparse_mask import SparseMask
from meerkat.privacy.mechanism import Relation
from meerkat.record.signatures import SigningKey
from meerkat.settings.auto import number
from meerkat.settings.config import CLASSIFICATION, EMBEDDED, RunConfig, read_toml


class Refused(MeerkatError):
    """A run asks for what the site has not agreed to, or a coordinator will not have the site."""


class Accepts(BaseModel):
    """The bounds of what a site takes part in: table [accepts] of its site.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    problems: tuple[str, ...] = Field((CLASSIFICATION,), description="what may be learned, by name")
    task: str = Field("", description="the only task, by its name; empty for any")
    model: str = Field("", description="fingerprint of the only model; empty for any that is the site's own")
    mask: str = Field("", description="SHA-256 of the only mask; empty for any")
    mask_minimum: int = Field(100, ge=1, description="parameters that must move, at least: few would tell much of rows")
    embeddings: bool = Field(False, description="whether embeddings may move: they tell which tokens a site has")
    eps_minimum: float = Field(1e-6, gt=0, description="perturbation size, at least")
    eps_maximum: float = Field(1e-1, gt=0, description="perturbation size, at most")
    batch_minimum: int = Field(1, ge=1, description="rows of a batch, at least")
    rounds: int = Field(100_000, ge=1, description="rounds of a run, at most")
    directions: int = Field(100, ge=1, description="directions of a step, at most: each tells one number of its batch")
    local_steps: int = Field(1_000, ge=1, description="local steps of a round or a calibration, at most")
    epsilon: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="privacy budget of the site's rows over all runs in its ledger; runs must then have dp example, "
        "and the site leaves before it is passed; 0 for none",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="delta that goes with epsilon")
    relation: Relation = Field("add-or-remove", description="neighbouring data sets, as in dp_relation of a run")


class SiteConfig(BaseModel):
    """A site's side of a federation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    client: int = Field(ge=0, description="the site's number among the federation's clients, from 0")
    data: str = Field(description="folder with the site's rows: train.jsonl, .csv or .parquet")
    model: str = Field(EMBEDDED, description="the pre-trained model: a local folder or a hub name")
    device: str = Field("auto", description="cpu, cuda, cuda:N, or auto")
    certificate_authority: str = Field("", description="the federation's CA certificate, PEM; needed for the stream")
    ledger: str = Field("", description="file that keeps what the site's rows were charged; needed with dp example")
    signing_key: str = Field("", description="the site's private key that its replies are signed with, OpenSSH Ed25519")
    signing_key_before: str = Field("", description="the one it signed with until now, to hand over to a new one")
    evaluate: bool = Field(
        False,
        description="whether the site counts right answers on its own validation rows; never in a run with dp",
    )
    accepts: Accepts = Field(default_factory=lambda: Accepts.model_validate({}))

    @classmethod
    def load(cls, path: Path) -> "SiteConfig":
        """Read a site.toml; relative paths in it are relative to its folder.

        Raises:
            MeerkatError: no such file, an unknown key or a value that is not allowed.
        """
        held = read_toml(path)
        try:
            config = cls(**held)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            allowed = ", ".join((Accepts if where.startswith("accepts.") else cls).model_fields)
            said = f"unknown; must be one of {allowed}" if first["type"] == "extra_forbidden" else first["msg"]
            raise MeerkatError(f"{path}: {where}: {said}") from None
        found = {name: _found(path, getattr(config, name)) for name in _PATHS}
        return config.model_copy(update={**found, "ledger": _beside(path, config.ledger)})

    def signing_keys(self) -> tuple[SigningKey | None, SigningKey | None]:
        """The key that replies are signed with, and the one before it; None where there is none.

        Raises:
            MeerkatError: one cannot be read, or there is but the one before.
        """
        if self.signing_key_before and not self.signing_key:
            raise MeerkatError("signing_key_before: hands over to signing_key, which is not given; give that too")
        key = SigningKey.load(self.signing_key) if self.signing_key else None
        before = SigningKey.load(self.signing_key_before, "signing_key_before") if self.signing_key_before else None
        return key, before

    def check_settings(self, asked: RunConfig, task: str) -> None:
        """Raise Refused unless the site agrees to a run's settings."""
        bounds = self.accepts
        steps = max(asked.local_steps, asked.calibration_steps if asked.stopping != "none" else 0)
        _hold("method", asked.method, "methods that send scalars", asked.recipe.update != "first-order")
        allowed = ", ".join(bounds.problems) or "none"
        _hold("problems", asked.problem, allowed, asked.problem in bounds.problems)
        _hold("task", task, bounds.task or task, task == (bounds.task or task))
        eps = number(asked.eps)
        _hold("eps", eps, f"at least {bounds.eps_minimum:g}", eps >= bounds.eps_minimum)
        _hold("eps", eps, f"at most {bounds.eps_maximum:g}", eps <= bounds.eps_maximum)
        _hold(
            "batch_size", asked.batch_size, f"at least {bounds.batch_minimum}", asked.batch_size >= bounds.batch_minimum
        )
        _hold("directions", asked.directions, f"at most {bounds.directions}", asked.directions <= bounds.directions)
        _hold("rounds", asked.rounds, f"at most {bounds.rounds}", asked.rounds <= bounds.rounds)
        private = "dp example: the site has a budget of epsilon"
        _hold("dp", f"dp {asked.dp}", private, asked.dp == "example" or not bounds.epsilon)
        noised = "a ledger for what it costs: set 'ledger' in site.toml"
        _hold("ledger", "noisy replies without", noised, asked.dp != "example" or bool(self.ledger))
        _hold("local_steps", steps, f"at most {bounds.local_steps}", steps <= bounds.local_steps)

    def check_mask(self, mask: SparseMask, model: nn.Module) -> None:
        """Raise Refused unless the site agrees to what would move in its model."""
        bounds = self.accepts
        _hold("model", mask.fingerprint, bounds.model, mask.fingerprint == (bounds.model or mask.fingerprint))
        _hold("mask", mask.digest(), bounds.mask, mask.digest() == (bounds.mask or mask.digest()))
        _hold("mask_minimum", len(mask), f"at least {bounds.mask_minimum}", len(mask) >= bounds.mask_minimum)
        if not bounds.embeddings:
            hit = sorted(mask.entries.keys() - eligible_parameters(model, ["embeddings"]))
            _hold("embeddings", f"entries of '{hit[0]}' to move" if hit else "", "no embeddings in the mask", not hit)


_PATHS = ("data", "model", "certificate_authority", "signing_key", "signing_key_before")


def _beside(file: Path, value: str) -> str:
    """A path of the site's own that need not be there yet, beside the file."""
    return str((file.parent / value).resolve()) if value else ""


def _found(file: Path, value: str) -> str:
    """A path beside the file, where there is one; a hub's name is left as it is."""
    beside = file.parent / value
    found = value and value != EMBEDDED and os.path.exists(beside)  # a name too long is none
    return str(beside.resolve()) if found else value


def _hold(name: str, asked: Any, allowed: Any, agreed: bool) -> None:
    if not agreed:
        raise Refused(f"{name}: the run asks for {asked}, the site accepts {allowed} (its site.toml, [accepts])")
