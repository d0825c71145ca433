"""A site's side of a federation, its site.toml: what it brings, and the limits of what it agrees to.

The site's operator writes it, and no coordinator can override it. A run that asks for more is refused before a row of
data is read, in one line that both sides see.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from meerkat import extensions
from meerkat.algorithm.live_entries import count_live
from meerkat.errors import MeerkatError, RunFailed, in_short
from meerkat.federation.address import host_and_port
from meerkat.masks.eligible import eligible_parameters
from meerkat.masks.sparse_mask import SparseMask
from meerkat.privacy.accounting import SMALLEST_DELTA
from meerkat.privacy.mechanism import Relation
from meerkat.problems.tasks import Task
from meerkat.progress import say
from meerkat.record.signatures import SigningKey
from meerkat.run.setup import BUILT_IN_TASKS, open_task
from meerkat.settings import budget
from meerkat.settings.auto import number
from meerkat.settings.config import CLASSIFICATION, EMBEDDED, RunConfig, read_toml
from meerkat.settings.validation import Settings, existing_path, validate


class Refused(MeerkatError):
    """A run asks for something that the site does not agree to, or a coordinator refuses the site."""


class Accepts(Settings):
    """The limits of the runs that a site takes part in: table [accepts] of its site.toml."""

    extensions: tuple[str, ...] = Field((), description="extensions that a run may use: modules, or .py files")
    task: str = Field("", description="the only task: a built-in's name, a file of the site's own, or another's name")
    task_digest: str = Field(
        "",
        pattern=r"^([0-9a-f]{64})?$",
        description="SHA-256 of the only task's template and labels, as doctor prints it; with an epsilon, a task "
        "that is not built in needs this, or the site's own file of it",
    )
    model: str = Field("", description="fingerprint of the only model accepted; empty for whatever model the site has")
    mask: str = Field("", description="SHA-256 of the only mask accepted; empty for any")
    mask_minimum: int = Field(100, ge=1, description="fewest parameters that may move and matter: fewer reveal more")
    embeddings: bool = Field(False, description="whether embeddings may move: they reveal which tokens a site has")
    eps_minimum: float = Field(1e-4, gt=0, description="smallest perturbation size: below it, slopes are rounding")
    eps_maximum: float = Field(1e-1, gt=0, description="largest perturbation size")
    batch_minimum: int = Field(1, ge=1, description="fewest rows of a batch")
    batch_maximum: int = Field(10_000, ge=1, description="most rows of a batch: a step takes time and memory for each")
    rounds: int = Field(100_000, ge=1, description="most rounds of a run")
    directions: int = Field(100, ge=1, description="most directions of a step: each reveals one number about its batch")
    local_steps: int = Field(1_000, ge=1, description="most local steps of a round or a calibration")
    scalars: int = Field(
        1_000_000, ge=0, description="most scalars that leave the site, over all runs in its ledger; 0 for any number"
    )
    epsilon: float = Field(
        0.0,
        ge=0,
        description="privacy budget of the site's rows over all runs in its ledger; runs must then have dp example, "
        "and the site leaves before it is exceeded; 0 for none",
    )
    delta: float = Field(
        1e-5, ge=SMALLEST_DELTA, lt=1, description="delta of that budget, and the largest dp_delta of a run"
    )
    relation: Relation = Field("add-or-remove", description="which data sets are neighbours, as in a run's dp_relation")
    dp_clip_minimum: float = Field(1e-3, gt=0, description="smallest dp_clip of a run with dp example")
    dp_clip_maximum: float = Field(1e3, gt=0, description="largest dp_clip of a run with dp example")


class SiteConfig(Settings):
    """A site's side of a federation."""

    client: int = Field(ge=0, lt=2**32, description="the site's number among the federation's clients, from 0")
    data: str = Field(description="folder with the site's rows: train.jsonl, .csv or .parquet")
    model: str = Field(EMBEDDED, description="the pre-trained model: a local folder, a GGUF file or a hub name")
    device: str = Field("auto", description="cpu, cuda, cuda:N, or auto")
    coordinator: str = Field("", description="host:port of the coordinator's stream; needed for the stream")
    certificate_authority: str = Field("", description="the federation's CA certificate, PEM; needed for the stream")
    ledger: str = Field(
        "", description="file of what the site answered, and of the privacy spent on its rows [default: site.ledger]"
    )
    signing_key: str = Field("", description="private key to sign replies with, OpenSSH Ed25519; empty for none")
    signing_key_before: str = Field("", description="the previous signing key, which hands over to the new one")
    evaluate: bool = Field(False, description="whether it evaluates on its validation rows; never in a run with dp")
    accepts: Accepts = Accepts.model_validate({})

    @classmethod
    def load(cls, path: Path) -> "SiteConfig":
        """Read a site.toml; relative paths in it are relative to its folder.

        Raises:
            MeerkatError: no such file, an unknown key or a value that is not allowed.
        """
        config = validate(cls, read_toml(path), f"{path}: ")
        if config.coordinator:
            host_and_port(config.coordinator, f"{path}: coordinator")
        names = ("data", "model", "certificate_authority", "signing_key", "signing_key_before")
        paths = {name: _local_path(path, getattr(config, name)) for name in names}
        ledger = str((path.parent / (config.ledger or f"{path.stem}.ledger")).resolve())  # may not exist yet
        accepts = config.accepts
        extensions = tuple(_local_path(path, name) for name in accepts.extensions)
        task = existing_path(path, accepts.task) if accepts.task.endswith(".toml") else accepts.task
        accepts = accepts.model_copy(update={"extensions": extensions, "task": task})
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

    def check_settings(self, run: RunConfig, task: str) -> None:
        """Raise Refused unless the site agrees to a run's settings."""
        accepts, eps, private = self.accepts, number(run.eps), run.dp == "example"
        steps = max(run.local_steps, run.calibration_steps if run.stopping != "none" else 0)
        _require("method", run.method, "methods that send scalars", run.recipe.sends_scalars)
        for name, kind in (("estimator", "ESTIMATORS"), ("update_rule", "UPDATE_RULES"), ("problem", "PROBLEMS")):
            known, named = extensions.BUILT_IN[kind], getattr(run, name)
            known |= extensions.defined_by(accepts.extensions, kind)
            _require(name, named, ", ".join(sorted(known)), named in known)
        by_words = accepts.task.endswith(".toml") and run.problem == CLASSIFICATION  # see `check_task`
        _require("task", task, accepts.task, by_words or accepts.task in ("", task))
        limits = [
            ("eps", eps, accepts.eps_minimum, accepts.eps_maximum),
            ("batch_size", run.batch_size, accepts.batch_minimum, accepts.batch_maximum),
            ("directions", run.directions, 0, accepts.directions),
            ("rounds", run.rounds, 0, accepts.rounds),
            ("local_steps", steps, 0, accepts.local_steps),
        ]
        if private:
            limits.append(("dp_clip", run.dp_clip, accepts.dp_clip_minimum, accepts.dp_clip_maximum))
            limits.append(("dp_delta", run.dp_delta, 0, accepts.delta))
        for name, asked, least, most in limits:
            _require(name, asked, f"at least {least}", asked >= least)
            _require(name, asked, f"at most {most}", asked <= most)
        budgeted = "dp example only, as it has a budget of epsilon"
        _require("dp", f"dp {run.dp}", budgeted, private or not accepts.epsilon)
        if private and (why := budget.uncountable(run)):
            raise Refused(why)

    def check_task(self, task: Task, built_in: bool) -> None:
        """Raise Refused unless the site agrees to how a task shows its rows to the model.

        Args:
            built_in: whether the task came with the site's own meerkat, and not with the offer.
        """
        accepts, digest = self.accepts, task.digest()
        with details_in_own_log("the site's own task file cannot be used"):
            own = self.known_task()
        only = accepts.task_digest or (own.digest() if own else "")
        _require("task_digest", digest, only, only in ("", digest))
        agreed = bool(only) or built_in or not accepts.epsilon
        named = "with an epsilon only built-in ones, and the one that task_digest or a task file names"
        _require("task_digest", f"a task of its own, of digest {digest}", named, agreed)

    def known_task(self) -> Task | None:
        """The only task accepted, where the site has its text: a built-in one, or a file of its own.

        Raises:
            MeerkatError: the file cannot be read, or is no task's.
        """
        name = self.accepts.task
        return open_task(name) if name in BUILT_IN_TASKS or name.endswith(".toml") else None

    def check_mask(self, mask: SparseMask, model: nn.Module) -> None:
        """Raise Refused unless the site agrees to what would move in its model."""
        accepts, count = self.accepts, len(mask)
        _require("model", mask.fingerprint, accepts.model, accepts.model in ("", mask.fingerprint))
        _require("mask", mask.digest(), accepts.mask, accepts.mask in ("", mask.digest()))
        _require("mask_minimum", count, f"at least {accepts.mask_minimum}", count >= accepts.mask_minimum)
        embeddings = sorted(mask.entries.keys() - eligible_parameters(model, ["embeddings"]))
        if embeddings and not accepts.embeddings:
            _require("embeddings", f"entries of '{embeddings[0]}' to move", "no embeddings in the mask", False)

    def check_live_entries(
        self, mask: SparseMask, moving: SparseMask, model: nn.Module, outputs: Callable[[], Tensor] | None
    ) -> None:
        """Raise Refused unless so many entries as the site demands move, and move the outputs on public inputs.

        Args:
            moving: the part of the mask that a perturbation of the run's size changes.
            outputs: at the model's present weights; None where nothing is public, and entries are taken as they are.
        """
        least = self.accepts.mask_minimum
        if outputs is None:
            say("note: mask_minimum counts entries whether they move a loss or not: the problem has no public inputs")
        live = len(moving) if outputs is None else count_live(model, moving, outputs, least)
        asked = f"{len(mask):,} parameters to move, of which {live} were seen to change the model's output"
        _require("mask_minimum", asked, f"at least {least} that do", live >= least)


def _local_path(file: Path, value: str) -> str:
    return value if value == EMBEDDED else existing_path(file, value)


def _require(name: str, asked: Any, allowed: Any, agreed: bool) -> None:
    if not agreed:
        raise Refused(f"{name}: the run asks for {asked}, the site accepts {allowed} (its site.toml, [accepts])")


@contextmanager
def details_in_own_log(problem: str, kinds: type[Exception] = MeerkatError) -> Iterator[None]:
    """Show an error only here, as it may name the site's files or quote a row; the coordinator gets `problem`.

    Args:
        kinds: the errors that are dealt with so.
    """
    try:
        yield
    except kinds as error:
        say(f"meerkat: {error if isinstance(error, MeerkatError) else in_short(error)}")
        kind = RunFailed if isinstance(error, RunFailed) else MeerkatError
        raise kind(f"{problem}; its own log says why") from None
