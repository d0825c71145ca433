"""A run's settings in groups. The class that declares a setting is its group; its description is its help text.

`config.RunConfig` puts the groups together, flat: what a group is called stands in no flag, key or attribute.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from meerkat.algorithm.attacks import Attack
from meerkat.algorithm.robust import Clipping, Mixing
from meerkat.algorithm.robust import Rule as AggregationRule
from meerkat.algorithm.schedules import Schedule
from meerkat.algorithm.selection import EarlyStop, Rule
from meerkat.masks.kinds import Exclusion, Scope
from meerkat.privacy.mechanism import Level, Relation
from meerkat.problems.tasks import Objective
from meerkat.settings.auto import AUTO, Auto
from meerkat.settings.methods import Method

EMBEDDED = "embedded"
CLASSIFICATION = "classification"
"""The built-in problem."""

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _split_commas(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return [] if value == "none" else value.split(",")


class ModelAndData(BaseModel):
    """What is learned, from which rows, and who holds them."""

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
    problem: str = Field(
        CLASSIFICATION,
        description="what is learned: classification by the words that stand for the labels, or an extension's problem",
    )
    objective: Objective = Field(
        "classification", description="cross-entropy over the labels' scores, or over the whole vocabulary"
    )
    max_length: int = Field(
        2048, ge=2, description="tokens of a prompt with its label, at most; longer ones are cut on the left"
    )
    text_sequences: int = Field(256, ge=1, description="sequences of pre-training text that the mask is made from")
    text_length: int = Field(256, ge=2, description="tokens of a pre-training sequence, at most")
    partition: str = Field(
        "dirichlet:0.5",
        description="which client holds which rows: iid, dirichlet:A, single-label, mixed:N, column:NAME",
    )
    held_back: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training rows held back and evaluated on in place of the validation set, "
        "to choose settings with",
    )


class MethodSettings(BaseModel):
    """What moves, and how clients and server step."""

    method: Method = Field("meerkat", description="what moves, how clients step and who stops early")
    density: float = Field(1e-3, gt=0, le=1, description="u: share of all parameters that move")
    mask: str = Field("", description="file that 'meerkat mask' wrote: the parameters that move, in place of new ones")
    mask_scope: Scope = Field(
        "global", description="take the most sensitive of all parameters, or the same share of each tensor"
    )
    exclude: Annotated[tuple[Exclusion, ...], BeforeValidator(_split_commas)] = Field(
        ("embeddings",),
        description="parameters that a sparse mask leaves out: embeddings, norms, both with a comma, or none; "
        "a model learns faster without its embeddings in the mask, and their updates would show which tokens a site "
        "has [default: embeddings]",
    )
    local_steps: int = Field(1, ge=1, lt=2**31, description="T: local steps a round")
    batch_size: int = Field(16, ge=1, description="rows in a local step's batch")
    estimator: str = Field(
        "plain",
        description="how a step's slopes are estimated; plain is the paper's: two-sided, along normal directions",
    )
    directions: int = Field(1, ge=1, description="P: directions a step, averaged")
    eps: Annotated[float, Field(ge=1e-6, allow_inf_nan=False)] | Auto = Field(
        AUTO, description="size of a perturbation; auto is the method's: 1e-3, for LoRA 1e-2"
    )
    lr: _Positive | Auto = Field(
        AUTO, description="eta: learning rate; auto fits it to the number of parameters that move"
    )
    lr_schedule: Schedule = Field("constant", description="learning rate over the rounds")
    update_rule: str = Field(
        "sgd",
        description="what the server makes of a round's update: sgd (FedAvg), momentum (FedAvgM) or adam (FedAdam)",
    )
    server_lr: _Positive | Auto = Field(
        AUTO,
        description="eta_s: the server's rate under momentum and adam; adam's step is eta_s times lr; "
        "auto is 1 for momentum, 1e-2 for adam",
    )
    server_beta1: float = Field(0.9, ge=0, lt=1, description="first decay of momentum and adam")
    server_beta2: float = Field(0.99, ge=0, lt=1, description="second decay of adam")
    server_tau: float = Field(1e-9, gt=0, allow_inf_nan=False, description="added to adam's root")
    feddyn_alpha: float = Field(1e-3, gt=0, allow_inf_nan=False, description="alpha of method feddyn")


class FederationSettings(BaseModel):
    """How many clients take part, for how long, and how much each counts."""

    clients: int = Field(10, ge=1, description="K: clients in the federation")
    clients_per_round: int = Field(
        0, ge=0, description="clients that take part in a round, drawn anew each time; 0 for all"
    )
    rounds: int = Field(200, ge=1, lt=2**32, description="R: rounds")
    weights: Literal["examples", "equal"] = Field(
        "examples",
        description="p_k: clients count by their number of rows, or equally; every aggregation but mean counts equally",
    )
    eval_every: int = Field(20, ge=0, description="rounds between evaluations; 0 for the first and last only")
    seed: int = Field(0, ge=0, description="seed of the split, the batches, the sampling and the directions")


class PrivacySettings(BaseModel):
    """Differential privacy: whose presence noise hides, and how well."""

    dp: Level = Field(
        "none",
        description="differential privacy: of each example, with noise from its client; of whole clients, with noise "
        "from the server; or none",
    )
    dp_epsilon: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="epsilon that each client may spend over the whole run: a smaller one hides more; 0 sets no "
        "budget, and dp_noise_multiplier says how much noise there is",
    )
    dp_delta: float = Field(
        1e-5, gt=0, lt=1, description="delta that goes with epsilon; choose it well below one over the number of rows"
    )
    dp_clip: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="C: longest L2 norm of an example's slopes (dp example) or a client's reply (dp client), in nats a "
        "unit of weight, as scalars are; longer ones are scaled down to it",
    )
    dp_noise_multiplier: _Positive | Auto = Field(
        AUTO, description="sigma: standard deviation of the noise over dp_clip; auto is what dp_epsilon calls for"
    )
    dp_relation: Relation = Field(
        "add-or-remove",
        description="neighbouring data sets differ by one example or client that is added or removed, or replaced",
    )


class RobustnessSettings(BaseModel):
    """What the federation withstands, and, in a simulation, who attacks it."""

    aggregation: AggregationRule = Field(
        "mean", description="how replies become one: by their mean, or by a rule that a few of them cannot lead astray"
    )
    byzantine: int = Field(
        0,
        ge=0,
        description="f: number of replies in a round that may be anything; trimmed-mean, krum, multi-krum and mixing "
        "need at least 1, and nothing else uses it",
    )
    mixing: Mixing = Field(
        "none",
        description="nearest-neighbour replaces each reply with the mean of those nearest to it, before a robust rule",
    )
    clipping: Clipping = Field(
        "none",
        description="scale long replies down: to the median of all lengths, or to clip_norm (fixed)",
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
        description="a round's step is scaled down to at most this many times the norm of theta_0",
    )
    attack: Attack = Field("none", description="what some clients do to the federation, in a simulation")
    attackers: int = Field(0, ge=0, description="number of clients that attack, drawn by the seed")
    attack_scale: _Positive | Auto = Field(
        AUTO, description="strength of the attack, as its source defines it; auto is the source's own"
    )


class CalibrationSettings(BaseModel):
    """Meerkat-vp: who is extreme, and makes one step a round from then on."""

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
        allow_inf_nan=False,
        description="rule thresholds: a client is extreme above this initial over later mean |GradIP|",
    )
    rho_quie: float = Field(
        0.5, ge=0, le=1, description="rule thresholds: and from this share of quiescent later steps on"
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


class MachineSettings(BaseModel):
    """Where and how the passes are computed, and shown."""

    device: str = Field("auto", description="cpu, cuda, cuda:N, or auto for the GPU where there is one")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="type of the weights; theta is always float32"
    )
    batching: Literal["auto", "off"] = Field(
        "auto",
        description="auto sends all clients' rows through the model together, sorted by length; "
        "off takes client by client",
    )
    micro_batch: int = Field(0, ge=0, description="sequences in one forward pass, at most; 0 for any number")
    tokens_per_pass: Annotated[int, Field(ge=1)] | Auto = Field(
        AUTO, description="padded tokens in one forward pass, at most; auto suits the device"
    )
    threads: Annotated[int, Field(ge=1, le=1024)] | Auto = Field(
        AUTO, description="CPU threads of the forward passes; auto is torch's choice"
    )
    tracker: Literal["none", "tensorboard"] = Field(
        "none", description="where metrics are shown during the run, beside the run folder"
    )


GROUPS: dict[str, type[BaseModel]] = {
    "model and data": ModelAndData,
    "method": MethodSettings,
    "federation": FederationSettings,
    "privacy": PrivacySettings,
    "robustness": RobustnessSettings,
    "calibration": CalibrationSettings,
    "machine": MachineSettings,
}
