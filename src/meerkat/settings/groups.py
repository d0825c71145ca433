"""A run's settings in groups. The class that declares a setting is its group; its docstring is its help text.

`config.RunConfig` puts the groups together, flat: what a group is called stands in no flag, key or attribute.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from meerkat.algorithm.attacks import Attack
from meerkat.algorithm.extreme_clients import EarlyStop, Rule
from meerkat.algorithm.robust import Clipping, MissingSteps, Mixing
from meerkat.algorithm.robust import Rule as AggregationRule
from meerkat.algorithm.schedules import Schedule
from meerkat.masks.kinds import Exclusion, Scope
from meerkat.privacy.mechanism import Level, Relation
from meerkat.problems.tasks import Objective
from meerkat.settings.auto import AUTO, Auto
from meerkat.settings.methods import Method
from meerkat.settings.validation import Settings

EMBEDDED = "embedded"
CLASSIFICATION = "classification"
"""The built-in problem."""

_Positive = Annotated[float, Field(gt=0)]


def _split_commas(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return [] if value == "none" else value.split(",")


class ModelAndData(Settings):
    """What is learned, from which rows, and who holds them."""

    model: str = EMBEDDED
    """pre-trained causal LM: a local folder, a GGUF file or a hub name; embedded is the demo model"""
    task: str = ""
    """sst2, ag_news, yelp_polarity, boolq, rte, wsc, wic, or a TOML file of your own; with the embedded model topics
    [its default] or reviews"""
    data: str = ""
    """folder with train.jsonl and validation.jsonl, or, with the extra hub, .parquet or .csv files or a hub data set
    (NAME or NAME:CONFIGURATION) [default: the embedded task's]"""
    text: str = ""
    """pre-training text for mask and GradIP: .jsonl with 'text' fields, plain text, or a hub data set [default: the
    embedded model's]"""
    problem: str = CLASSIFICATION
    """what is learned: classification by the words that stand for the labels, or an extension's problem"""
    objective: Objective = "classification"
    """cross-entropy over the labels' scores, or over the whole vocabulary"""
    max_length: int = Field(2048, ge=2)
    """tokens of a prompt with its label, at most; longer ones are cut on the left"""
    chat_template: Literal["off", "on"] = "off"
    """on puts the prompt into the model's chat template as the user's message, and the label begins the reply"""
    text_sequences: int = Field(256, ge=1, lt=2**31)
    """sequences of pre-training text that the mask is made from"""
    text_length: int = Field(256, ge=2, lt=2**31)
    """tokens of a pre-training sequence, at most"""
    partition: str = "dirichlet:0.5"
    """which client holds which rows: iid, dirichlet:A, single-label, mixed:N, column:NAME"""
    held_back: float = Field(0.0, ge=0, lt=1)
    """share of the training rows held back and evaluated on in place of the validation set, to choose settings with"""

    max_eval_samples: int = Field(0, ge=0)
    """rows that the model is evaluated on, at most, taken evenly from the validation set, or from the rows held back; 0
    for all"""


class MethodSettings(Settings):
    """What moves, and how clients and server step."""

    method: Method = "meerkat"
    """what moves, how clients step and who stops early"""
    density: float = Field(1e-3, gt=0, le=1)
    """u: share of all parameters that move"""
    mask: str = ""
    """file that 'meerkat mask' wrote: the parameters that move, in place of new ones"""
    mask_scope: Scope = "global"
    """take the most sensitive of all parameters, or the same share of each tensor"""
    exclude: Annotated[tuple[Exclusion, ...], BeforeValidator(_split_commas)] = ("embeddings",)
    """parameters that a sparse mask leaves out: embeddings, norms, both with a comma, or none; a model learns faster
    without its embeddings in the mask, and their updates would show which tokens a site has [default: embeddings]"""
    local_steps: int = Field(1, ge=1, lt=2**31)
    """T: local steps a round"""
    batch_size: int = Field(16, ge=1, lt=2**31)
    """rows in a local step's batch"""
    estimator: str = "plain"
    """how a step's slopes are estimated; plain is the paper's: two-sided, along normal directions"""
    directions: int = Field(1, ge=1, lt=2**31)
    """P: directions a step, averaged"""
    eps: Annotated[float, Field(ge=1e-6)] | Auto = AUTO
    """size of a perturbation; auto is the one of smallest error on public text, measured when the run starts"""
    lr: _Positive | Auto = AUTO
    """eta: learning rate; auto fits it to the curvature of the task's loss on public text"""
    lr_schedule: Schedule = "linear"
    """learning rate over the rounds"""
    update_rule: str = "sgd"
    """what the server makes of a round's update: sgd (FedAvg), momentum (FedAvgM) or adam (FedAdam)"""
    server_lr: _Positive | Auto = AUTO
    """eta_s: the server's rate under momentum and adam; adam's step is eta_s times lr; auto lets a round count
    as much as under sgd: 1 - server_beta1 for momentum, for adam by the slopes on public text; 1 for other rules"""
    server_beta1: float = Field(0.9, ge=0, lt=1)
    """first decay of momentum and adam"""
    server_beta2: float = Field(0.99, ge=0, lt=1)
    """second decay of adam"""
    server_tau: _Positive = 1e-9
    """added to adam's root"""
    feddyn_alpha: _Positive = 1e-3
    """alpha of method feddyn"""


class FederationSettings(Settings):
    """How many clients take part, for how long, and how much each counts."""

    clients: int = Field(10, ge=1)
    """K: clients in the federation"""
    clients_per_round: int = Field(0, ge=0)
    """clients that take part in a round, drawn anew each time; 0 for all"""
    rounds: int = Field(200, ge=1, lt=2**32)
    """R: rounds"""
    weights: Literal["examples", "equal"] = "examples"
    """p_k: clients count by their number of rows, or equally; every aggregation but mean counts equally"""
    eval_every: int = Field(20, ge=0)
    """rounds between evaluations; 0 for the first and last only"""
    seed: int = Field(0, ge=0)
    """seed of the split, the batches, the sampling and the directions"""


class PrivacySettings(Settings):
    """Differential privacy: whose presence noise hides, and how well."""

    dp: Level = "none"
    """differential privacy: of each example, with noise from its client; of whole clients, with noise from the server;
    or none"""
    dp_epsilon: float = Field(0.0, ge=0)
    """epsilon that each client may spend over the whole run: a smaller one hides more; 0 sets no budget, and
    dp_noise_multiplier says how much noise there is"""
    dp_delta: float = Field(1e-5, gt=0, lt=1)
    """delta that goes with epsilon; choose it well below one over the number of rows"""
    dp_clip: _Positive = 1.0
    """C: longest L2 norm of an example's slopes (dp example) or a client's reply (dp client), in nats a unit of weight,
    as scalars are; longer ones are scaled down to it"""
    dp_noise_multiplier: _Positive | Auto = AUTO
    """sigma: standard deviation of the noise over dp_clip; auto is what dp_epsilon calls for"""
    dp_relation: Relation = "add-or-remove"
    """neighbouring data sets differ by one example or client that is added or removed, or replaced"""


class RobustnessSettings(Settings):
    """What the federation withstands, and, in a simulation, who attacks it."""

    aggregation: AggregationRule = "mean"
    """how replies become one: by their mean, or by a rule that a few of them cannot lead astray"""
    byzantine: int = Field(0, ge=0)
    """f: number of replies in a round that may be anything; trimmed-mean, krum, multi-krum and mixing need at least 1,
    and nothing else uses it"""
    mixing: Mixing = "none"
    """nearest-neighbour replaces each reply with the mean of those nearest to it, before a robust rule"""
    clipping: Clipping = "none"
    """scale long replies down: to the median of all lengths, or to clip_norm (fixed)"""
    clip_norm: float = Field(0.0, ge=0)
    """longest L2 norm of a client's reply under clipping fixed, which needs it above 0; in nats a unit of weight, as
    scalars are"""
    max_step_norm: _Positive = 100.0
    """a round's step is scaled down to at most this many times the norm of theta_0"""
    attack: Attack = "none"
    """what some clients do to the federation, in a simulation"""
    attackers: int = Field(0, ge=0)
    """number of clients that attack, drawn by the seed"""
    attack_scale: _Positive | Auto = AUTO
    """strength of the attack, as its source defines it; auto is the source's own"""


class CalibrationSettings(Settings):
    """Meerkat-vp: who is extreme, and makes one step a round from then on."""

    early_stop: Literal["by-method", EarlyStop] = "by-method"
    """who makes one local step a round after a calibration: the clients whose data is extremely skewed (vp), as many
    at random, or none"""
    vpcs_rule: Rule = "automatic"
    """how extreme clients are found: by comparing clients, or by thresholds (the paper's rule)"""
    calibration_steps: int = Field(100, ge=2, lt=2**31)
    """T_cali: uninterrupted local steps of a calibration"""
    initial_steps: int = Field(30, ge=1)
    """T_init: first steps of a calibration, compared with the last"""
    later_steps: int = Field(30, ge=1)
    """T_later: last steps of a calibration"""
    rho_later: _Positive = 2.0
    """rule thresholds: a client is extreme only if its ratio of initial to later mean |GradIP| is above this"""
    rho_quie: float = Field(0.5, ge=0, le=1)
    """rule thresholds: a client is extreme only if at least this share of its later steps is quiescent"""
    sigma: Annotated[float, Field(gt=0, le=1e6)] = 0.25
    """rule thresholds: a step is quiescent under this share of clients' median initial mean |GradIP|"""
    missing_steps: MissingSteps = "zero"
    """what a client counts in local steps that it does not make: zero, as in the paper, which averages the clients'
    weights, so that those steps are shorter; or left-out, so that the others share its weight"""
    gradip: Literal["on", "off"] = "on"
    """note every step's GradIP, for which the pre-training gradient is taken from the public text before the run; off
    saves that pass; rule thresholds needs it"""
    recalibrate_every: int = Field(0, ge=0)
    """rounds between calibrations; 0 for one, before the first round"""


class MachineSettings(Settings):
    """Where and how the passes are computed, and shown."""

    device: str = "auto"
    """cpu, cuda, cuda:N, or auto for the GPU where there is one"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = AUTO
    """type of the weights in forward passes; theta is always float32; auto is bfloat16 for a language model that is
    large enough, where the device multiplies it natively, and float32 otherwise"""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """freeze the weights that do not move in 8 or 4 bits: a large model's step then fits into little memory; takes the
    bitsandbytes package"""
    batching: Literal["auto", "off"] = "auto"
    """auto sends all clients' rows through the model together where each makes one step; off takes client by client"""
    micro_batch: int = Field(0, ge=0)
    """sequences in one forward pass, at most; 0 for any number"""
    tokens_per_pass: Annotated[int, Field(ge=1)] | Auto = AUTO
    """tokens in one forward pass, padded ones counted, at most; with batching off, of evaluations only; auto suits the
    device"""
    threads: Annotated[int, Field(ge=1, le=1024)] | Auto = AUTO
    """CPU threads of the forward passes; auto is torch's choice"""
    tracker: Literal["none", "tensorboard"] = "none"
    """where metrics are shown during the run, beside the run folder"""


GROUPS: dict[str, type[BaseModel]] = {
    "model and data": ModelAndData,
    "method": MethodSettings,
    "federation": FederationSettings,
    "privacy": PrivacySettings,
    "robustness": RobustnessSettings,
    "calibration": CalibrationSettings,
    "machine": MachineSettings,
}
