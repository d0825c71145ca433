"""A site's side of a federation, its site.toml: what it brings, and the limits of what it agrees to.

The site's operator writes it, and no coordinator can override it. A run that asks for more is refused before a row of
data is read, in one line that both sides see.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from meerkat import extensions
from meerkat.errors import MeerkatError
from meerkat.masks.eligible import eligible_parameters
from meerkat.masks.sparse_mask import SparseMask
from meerkat.privacy.mechanism import Relation
from meerkat.record.signatures import SigningKey
from meerkat.settings.auto import number
from meerkat.settings.config import EMBEDDED, RunConfig, read_toml
from meerkat.settings.validation import existing_path, validate


class Refused(MeerkatError):
    """A run asks for something that the site does not agree to, or a coordinator refuses the site."""


class Accepts(BaseModel):
    """The limits of the runs that a site takes part in: table [accepts] of its site.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    extensions: tuple[str, ...] = Field(
        (), description="extensions whose estimators, update rules and problems a run may use: modules, or .py files"
    )
    task: str = Field("", description="the only task accepted, by name; empty for any")
    model: str = Field("", description="fingerprint of the only model accepted; empty for whatever model the site has")
    mask: str = Field("", description="SHA-256 of the only mask accepted; empty for any")
    mask_minimum: int = Field(
        100, ge=1, description="fewest parameters that may move: the fewer, the more scalars reveal of the rows"
    )
    embeddings: bool = Field(False, description="whether embeddings may move: they reveal which tokens a site has")
    eps_minimum: float = Field(1e-6, gt=0, description="smallest perturbation size")
    eps_maximum: float = Field(1e-1, gt=0, description="largest perturbation size")
    batch_minimum: int = Field(1, ge=1, description="fewest rows of a batch")
    rounds: int = Field(100_000, ge=1, description="most rounds of a run")
    directions: int = Field(100, ge=1, description="most directions of a step: each reveals one number about its batch")
    local_steps: int = Field(1_000, ge=1, description="most local steps of a round or a calibration")
    epsilon: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="privacy budget of the site's rows over all runs in its ledger; runs must then have dp example, "
        "and the site leaves before it is exceeded; 0 for none",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="delta of that budget")
    relation: Relation = Field("add-or-remove", description="which data sets are neighbours, as in a run's dp_relation")


class SiteConfig(BaseModel):
    """A site's side of a federation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    client: int = Field(ge=0, description="the site's number among the federation's clients, from 0")
    data: str = Field(description="folder with the site's rows: train.jsonl, .csv or .parquet")
    model: str = Field(EMBEDDED, description="the pre-trained model: a local folder or a hub name")
    device: str = Field("auto", description="cpu, cuda, cuda:N, or auto")
    certificate_authority: str = Field("", description="the federation's CA certificate, PEM; needed for the stream")
    ledger: str = Field(
        "", description="file that records the privacy spent on the site's rows; needed with dp example"
    )
    signing_key: str = Field("", description="private key to sign replies with, OpenSSH Ed25519; empty for none")
    signing_key_before: str = Field("", description="the previous signing key, which hands over to the new one")
    evaluate: bool = Field(
        False,
        description="whether the site evaluates on its own validation rows; never in a run with dp",
    )
    accepts: Accepts = Field(default_factory=lambda: Accepts.model_validate({}))

    @classmethod
    def load(cls, path: Path) -> "SiteConfig":
        """Read a site.toml; relative paths in it are relative to its folder.

        Raises:
            MeerkatError: no such file, an unknown key or a value that is not allowed.
        """
        config = validate(cls, read_toml(path), f"{path}: ")
        paths = {name: _local_path(path, getattr(config, name)) for name in _EXISTING_PATHS}
        ledger = str((path.parent / config.ledger).resolve()) if config.ledger else ""  # may not exist yet
        named = tuple(_local_path(path, name) for name in config.accepts.extensions)
        accepts = config.accepts.model_copy(update={"extensions": named})
        return config.model_copy(update={**paths, "ledger": ledger, "accepts": accepts})

    def signing_keys(self) -> tuple[SigningKey | None, SigningKey | None]:
        """The key that replies are signed with, and the previous one; None where there is none.

        Raises:
            MeerkatError: one cannot be read, or only the previous one is given.
        """
        if self.signing_key_before and not self.signing_key:
            raise MeerkatError("signing_key_before: hands over to signing_key, which is not given; give both")
        key = SigningKey.load(self.signing_key) if self.signing_key else None
        before = SigningKey.load(self.signing_key_before, "signing_key_before") if self.signing_key_before else None
        return key, before

    def check_settings(self, asked: RunConfig, task: str) -> None:
        """Raise Refused unless the site agrees to a run's settings."""
        bounds = self.accepts
        steps = max(asked.local_steps, asked.calibration_steps if asked.stopping != "none" else 0)
        _require("method", asked.method, "methods that send scalars", asked.recipe.sends_scalars)
        kinds = {"estimator": "ESTIMATORS", "update_rule": "UPDATE_RULES", "problem": "PROBLEMS"}
        for setting, kind in kinds.items():
            known = extensions.BUILT_IN[kind] | extensions.defined_by(bounds.extensions, kind)
            name = getattr(asked, setting)
            _require(setting, name, ", ".join(sorted(known)), name in known)
        _require("task", task, bounds.task or task, task == (bounds.task or task))
        eps = number(asked.eps)
        _require("eps", eps, f"at least {bounds.eps_minimum:g}", eps >= bounds.eps_minimum)
        _require("eps", eps, f"at most {bounds.eps_maximum:g}", eps <= bounds.eps_maximum)
        _require(
            "batch_size", asked.batch_size, f"at least {bounds.batch_minimum}", asked.batch_size >= bounds.batch_minimum
        )
        _require("directions", asked.directions, f"at most {bounds.directions}", asked.directions <= bounds.directions)
        _require("rounds", asked.rounds, f"at most {bounds.rounds}", asked.rounds <= bounds.rounds)
        private = "dp example only, as it has a budget of epsilon"
        _require("dp", f"dp {asked.dp}", private, asked.dp == "example" or not bounds.epsilon)
        charged = "them only with a ledger to charge: set 'ledger'"
        _require("ledger", "noisy replies", charged, asked.dp != "example" or bool(self.ledger))
        _require("local_steps", steps, f"at most {bounds.local_steps}", steps <= bounds.local_steps)

    def check_mask(self, mask: SparseMask, model: nn.Module) -> None:
        """Raise Refused unless the site agrees to what would move in its model."""
        bounds = self.accepts
        _require("model", mask.fingerprint, bounds.model, mask.fingerprint == (bounds.model or mask.fingerprint))
        _require("mask", mask.digest(), bounds.mask, mask.digest() == (bounds.mask or mask.digest()))
        _require("mask_minimum", len(mask), f"at least {bounds.mask_minimum}", len(mask) >= bounds.mask_minimum)
        if not bounds.embeddings:
            hit = sorted(mask.entries.keys() - eligible_parameters(model, ["embeddings"]))
            _require(
                "embeddings", f"entries of '{hit[0]}' to move" if hit else "", "no embeddings in the mask", not hit
            )


_EXISTING_PATHS = ("data", "model", "certificate_authority", "signing_key", "signing_key_before")


def _local_path(file: Path, value: str) -> str:
    return value if value == EMBEDDED else existing_path(file, value)


def _require(name: str, asked: Any, allowed: Any, agreed: bool) -> None:
    if not agreed:
        raise Refused(f"{name}: the run asks for {asked}, the site accepts {allowed} (its site.toml, [accepts])")
