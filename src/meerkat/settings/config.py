"""One model of a run's settings: the source of TOML keys, flags, their help and their validation."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from meerkat.algorithm.attacks import Attack, attackers
from meerkat.algorithm.robust import Aggregation, Clipping, Mixing
from meerkat.algorithm.robust import Rule as AggregationRule
from meerkat.algorithm.selection import Rule
from meerkat.algorithm.server import EarlyStop, Schedule
from meerkat.errors import MeerkatError, in_short
from meerkat.masks.kinds import Exclusion, Scope
from meerkat.privacy.mechanism import Level, Relation
from meerkat.problems.causal_lm import Objective
from meerkat.settings.compatibility import check_aggregation, check_attack, check_privacy
from meerkat.settings.methods import METHODS, Method, Recipe

EMBEDDED = "embedded"
SITES = "sites"
"""The partition of a real federation, where every site holds its own rows."""


def _split_commas(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return [] if value == "none" else value.split(",")


class RunConfig(BaseModel):
    """Settings of one run. Left out, a setting takes the default that its help names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        EMBEDDED, description="pre-trained causal LM: a local folder or a hub name; embedded is the demo model"
    )
    task: str = Field(
        "",
        description="sst2, ag_news, yelp_polarity, boolq, rte, wsc, wic, or a TOML file of your own; "
        "with the embedded model topics [its default] or reviews",
    )
    data: str = Field(
        "",
        description="folder with train.jsonl and validation.jsonl, or a hub data set (NAME or NAME:CONFIGURATION) "
        "[default: the embedded task's]",
    )
    text: str = Field(
        "",
        description="pre-training text for mask and GradIP: .jsonl with 'text' fields, plain text, or a hub data set "
        "[default: the embedded model's]",
    )
    mask: str = Field("", description="a mask made before with 'meerkat mask', in place of making one")
    method: Method = Field("meerkat", description="what moves, how clients step and who stops early")

    density: float = Field(1e-3, gt=0, le=1, description="u: share of all parameters that moves")
    mask_scope: Scope = Field(
        "global", description="the most sensitive of all parameters, or the same share of each tensor"
    )
    exclude: Annotated[tuple[Exclusion, ...], BeforeValidator(_split_commas)] = Field(
        ("embeddings",),
        description="parameters that never move in a sparse mask: embeddings, norms, both with a comma, or none; "
        "excluding embeddings learns faster, and they would tell which tokens a site has [default: embeddings]",
    )
    text_sequences: int = Field(256, ge=1, description="sequences of pre-training text that the mask is made from")
    text_length: int = Field(256, ge=2, description="tokens of a pre-training sequence, at most")

    clients: int = Field(10, ge=1, description="K: clients in the federation")
    clients_per_round: int = Field(
        0, ge=0, description="clients that take part in a round, drawn anew each time; 0 for all"
    )
    partition: str = Field(
        "dirichlet:0.5", description="who holds which rows: iid, dirichlet:A, single-label, mixed:N, column:NAME"
    )
    weights: Literal["examples", "equal"] = Field(
        "examples",
        description="p_k: clients count by their number of rows, or equally; equally under every aggregation but mean",
    )

    rounds: int = Field(200, ge=1, lt=2**32, description="R: rounds")
    local_steps: int = Field(1, ge=1, lt=2**31, description="T: local steps a round")
    directions: int = Field(1, ge=1, description="P: directions a step, averaged")
    lr: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="eta: learning rate; 0 takes one that fits the number of moving parameters",
    )
    lr_schedule: Schedule = Field("constant", description="learning rate over the rounds")
    eps: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="perturbation size; 0 takes the method's: 1e-3, for LoRA 1e-2"
    )
    batch_size: int = Field(16, ge=1, description="rows of a local step's batch")
    micro_batch: int = Field(0, ge=0, description="sequences in one forward pass, at most; 0 for any number")
    tokens_per_pass: int = Field(
        0, ge=0, description="padded tokens in one forward pass, at most; 0 for a number that suits the device"
    )
    objective: Objective = Field(
        "classification", description="cross-entropy over the label strings' scores, or over the whole vocabulary"
    )
    max_length: int = Field(2048, ge=2, description="tokens of a prompt with its label, at most; cut on the left")

    early_stop: Literal["by-method", EarlyStop] = Field(
        "by-method",
        description="who makes one local step a round after a calibration: the clients whose data is extremely "
        "skewed (vp), as many at random, or none",
    )
    vpcs_rule: Rule = Field(
        "automatic",
        description="how extreme clients are found: by comparing clients, or by thresholds (the paper's rule)",
    )
    calibration_steps: int = Field(100, ge=2, description="T_cali: uninterrupted local steps of a calibration")
    initial_steps: int = Field(30, ge=1, description="T_init: first steps of a calibration, compared with the last")
    later_steps: int = Field(30, ge=1, description="T_later: last steps of a calibration")
    rho_later: float = Field(
        2.0,
        gt=0,
        description="rule thresholds: extreme above this initial over later mean |GradIP|",
        allow_inf_nan=False,
    )
    rho_quie: float = Field(
        0.5, ge=0, le=1, description="rule thresholds: extreme from this share of quiescent later steps on"
    )
    sigma: float = Field(
        0.25,
        gt=0,
        allow_inf_nan=False,
        description="rule thresholds: a step is quiescent under this share of clients' median initial mean |GradIP|",
    )
    recalibrate_every: int = Field(
        0, ge=0, description="rounds between calibrations; 0 for one, before the first round"
    )

    server_optimizer: Literal["sgd", "momentum", "adam"] = Field(
        "sgd", description="what the server makes of a round's update: FedAvg, FedAvgM or FedAdam"
    )
    server_lr: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="eta_s of momentum and adam; adam's step is eta_s times lr; 0 takes 1 for momentum, 1e-2 for adam",
    )
    server_beta1: float = Field(0.9, ge=0, lt=1, description="momentum's and adam's first decay")
    server_beta2: float = Field(0.99, ge=0, lt=1, description="adam's second decay")
    server_tau: float = Field(1e-9, gt=0, allow_inf_nan=False, description="added to adam's root")
    feddyn_alpha: float = Field(1e-3, gt=0, allow_inf_nan=False, description="alpha of method feddyn")

    dp: Level = Field(
        "none",
        description="differential privacy: of each example, noised by its client; of whole clients, noised by the "
        "server; or none",
    )
    dp_epsilon: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="epsilon that each client may spend over the whole run: the smaller, the more is hidden; 0 sets no "
        "budget, and dp_noise_multiplier says how much noise there is",
    )
    dp_delta: float = Field(1e-5, gt=0, lt=1, description="delta that goes with epsilon; well below one over the rows")
    dp_clip: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="C: longest L2 norm of an example's slopes (dp example) or a client's reply (dp client), in nats a "
        "unit of weight, as scalars are; what is longer is scaled down to it",
    )
    dp_noise_multiplier: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="sigma: noise over the clip; 0 for what dp_epsilon calls for"
    )
    dp_relation: Relation = Field(
        "add-or-remove", description="neighbouring data sets differ by one example or client more, or by another one"
    )

    aggregation: AggregationRule = Field(
        "mean", description="how replies become one: the mean, or a rule that some of them cannot lead astray"
    )
    byzantine: int = Field(
        0,
        ge=0,
        description="f: number of a round's replies that may be anything; trimmed-mean, krum, multi-krum and mixing "
        "need at least 1, and nothing else asks for it",
    )
    mixing: Mixing = Field(
        "none",
        description="nearest-neighbour replaces each reply with the mean of those nearest to it, before a robust rule",
    )
    clipping: Clipping = Field(
        "none",
        description="replies are scaled down to the median of their lengths (median), or to clip_norm (fixed)",
    )
    clip_norm: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="longest L2 norm of a client's reply under clipping fixed, which needs it above 0; in nats a unit "
        "of weight, as scalars are",
    )
    max_step_norm: float = Field(
        100.0,
        gt=0,
        allow_inf_nan=False,
        description="a round's step is scaled down to so many times the norm of theta_0, at most",
    )

    attack: Attack = Field("none", description="what some clients do to the federation, in a simulation")
    attackers: int = Field(0, ge=0, description="how many clients attack, drawn by the seed")
    attack_scale: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="strength of the attack, by its source's definition; 0 takes its own",
    )

    eval_every: int = Field(20, ge=0, description="rounds between evaluations; 0 for the first and last only")
    held_back: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training rows held back and evaluated on in place of the validation set, "
        "to choose settings with",
    )
    tracker: Literal["none", "tensorboard"] = Field(
        "none", description="where metrics are shown while the run goes on, beside the run folder"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:N, or auto for the GPU where there is one")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="type of the weights; theta is float32 always"
    )
    batching: Literal["auto", "off"] = Field(
        "auto",
        description="auto sends all clients' rows through the model together, sorted by length; "
        "off takes client by client",
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the forward passes; 0 for torch's choice")
    seed: int = Field(0, ge=0, description="seed of the split, the batches, the sampling and the directions")

    @model_validator(mode="after")
    def _together(self) -> "RunConfig":
        if self.clients_per_round > self.clients:
            raise ValueError(
                f"clients_per_round {self.clients_per_round}: must be at most clients, {self.clients}; 0 takes all"
            )
        recipe = self.recipe
        if self.mask and recipe.moves != "sensitivity":
            raise ValueError(f"method {self.method}: makes its own mask, so --mask cannot be given with it")
        if 0 < self.eps < 1e-6:
            raise ValueError(f"eps {self.eps:g}: must be at least 1e-6; 0 takes the method's")
        if recipe.update == "first-order" and self.early_stop in ("vp", "random"):
            raise ValueError(f"early_stop {self.early_stop}: needs scalars, and {self.method} sends none; use none")
        if recipe.update == "feddyn" and self.server_optimizer != "sgd":
            raise ValueError(f"server_optimizer {self.server_optimizer}: feddyn has its own server step; use sgd")
        if self.server_optimizer == "sgd" and self.server_lr not in (0, 1):
            raise ValueError(
                f"server_lr {self.server_lr:g}: sgd has none; use lr, or server_optimizer momentum or adam"
            )
        check_privacy(
            self.dp,
            self.dp_epsilon,
            self.dp_noise_multiplier,
            method=self.method,
            dtype=self.dtype,
            weights=self.weights,
            by=self.rule,
            stopping=self.stopping,
        )
        check_aggregation(self.rule, self.method, self.clients, self.clients_per_round)
        check_attack(
            self.attack,
            self.attackers,
            clients=self.clients,
            simulated=self.partition != SITES,
            method=self.method,
            stopping=self.stopping,
        )
        if self.stopping != "none" and self.initial_steps + self.later_steps > self.calibration_steps:
            raise ValueError(
                f"calibration_steps {self.calibration_steps}: must be at least initial_steps + later_steps, "
                f"{self.initial_steps + self.later_steps}"
            )
        return self

    @property
    def rule(self) -> Aggregation:
        """How replies become one."""
        return Aggregation(self.aggregation, self.byzantine, self.mixing, self.clipping, self.clip_norm)

    @property
    def recipe(self) -> Recipe:
        """What the method's name stands for."""
        return METHODS[self.method]

    @property
    def stopping(self) -> EarlyStop:
        """Who stops early: as set, or as the method has it."""
        return self.recipe.early_stop if self.early_stop == "by-method" else self.early_stop

    @property
    def attacking_clients(self) -> tuple[int, ...]:
        """The clients that attack, ascending; none where there is no attack."""
        return () if self.attack == "none" else attackers(self.attackers, self.clients, self.seed)

    def idle(self) -> dict[str, str]:
        """Settings that are not at their defaults and do nothing beside the others, each with a line that says so."""
        cures: dict[str, str] = {}
        if self.attack == "none":
            cures |= dict.fromkeys(("attackers", "attack_scale"), "attack none; say which attack, or leave it out")
        if self.dp == "none":
            names = ("dp_delta", "dp_clip", "dp_relation")
            cures |= dict.fromkeys(names, "dp none; use dp example or client, or leave it out")
        if not self.rule.needs_f:
            rules = "use trimmed-mean, krum, multi-krum or a mixing"
            cures["byzantine"] = f"aggregation {self.aggregation} and mixing none; {rules}, or leave it out"
        if self.clipping != "fixed":
            cures["clip_norm"] = f"clipping {self.clipping}; use clipping fixed, or leave it out"
        given = {name: getattr(self, name) for name in cures}
        return {
            name: f"{name} {value}: does nothing with {cures[name]}"
            for name, value in given.items()
            if value != RunConfig.model_fields[name].default
        }

    def check_none_idle(self) -> None:
        """Raise MeerkatError for a setting of a new run that does nothing. What was run with one can still be read."""
        for line in self.idle().values():
            raise MeerkatError(line)

    def to_toml(self) -> str:
        """The settings as TOML."""
        return tomli_w.dumps(self.model_dump(mode="json"))


def make_config(given: dict[str, Any], spell: str = "--") -> RunConfig:
    """Validate settings.

    Args:
        spell: what stands before a setting's name in a message: "--" for flags.

    Raises:
        MeerkatError: an unknown setting, or a value out of range; the first one, in one line.
    """
    try:
        return RunConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise MeerkatError(str(first["msg"]).removeprefix("Value error, ")) from None
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise _unknown(name) from None
        raise _refused(name, first["input"], first["msg"], spell) from None


def make_value(name: str, value: Any, spell: str = "--") -> Any:
    """Validate one setting by itself, without what settings ask of each other. Returns it as a run holds it.

    Raises:
        MeerkatError: an unknown setting, or a value out of range, in one line.
    """
    field = RunConfig.model_fields.get(name)
    if field is None:
        raise _unknown(name)
    alone: Any = Annotated[field.annotation, field]
    try:
        return TypeAdapter(alone).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise _refused(name, first["input"], first["msg"], spell) from None


def _unknown(name: str) -> MeerkatError:
    return MeerkatError(f"setting '{name}': unknown; must be one of {', '.join(RunConfig.model_fields)}")


def _refused(name: str, value: Any, said: str, spell: str) -> MeerkatError:
    flag = spell + (name.replace("_", "-") if spell == "--" else name)
    said = said.removeprefix("Input should be ").removeprefix("Value error, ")
    return MeerkatError(f"{flag} {value}: must be {said}; see 'meerkat simulate --help'")


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, not validated yet.

    Raises:
        MeerkatError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MeerkatError(f"config '{path}': {error.strerror}; give a TOML file with settings") from None
    except (ValueError, RecursionError) as error:  # among them TOMLDecodeError, and numbers too long for Python
        raise MeerkatError(f"config '{path}': not valid TOML ({in_short(error)})") from None
