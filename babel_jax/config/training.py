"""Stages, optimizer, and how a step is computed."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from babel_jax.config.data import MixtureSettings
from babel_jax.config.settings import (
    BelowOne,
    Choice,
    FileName,
    Fraction,
    Positive,
    PositiveFloat,
    Settings,
    divisors,
)


class ScheduleKind(Choice):
    """Learning-rate schedules: warmup-stable-decay, cosine decay, constant; each after a linear warmup."""

    WSD = "wsd"
    COSINE = "cosine"
    CONSTANT = "constant"


class Schedule(Settings):
    """Learning rate of a stage.

    Warmup and decay are fractions of the stage's steps; the final rate is a fraction of the peak.
    """

    kind: ScheduleKind = ScheduleKind.WSD
    peak: PositiveFloat
    warmup_fraction: Fraction = 0.02
    decay_fraction: Fraction = 0.2
    final_fraction: Fraction = 0.1

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.kind is ScheduleKind.WSD and self.warmup_fraction + self.decay_fraction > 1.0:
            raise ValueError("warmup_fraction + decay_fraction exceed 1")
        return self


class Trained(Choice):
    """What a stage trains: all parameters, or those of the layers that expansion added (so that the others
    stay as they are).
    """

    ALL = "all"
    NEW_LAYERS = "new_layers"


class Stage(Settings):
    """One stage of a run: its budget in `tokens` or in `steps`, its rate and its mixture. `result` names the
    model after it in tables.

    `max_passes` cuts the budget to so many passes over all the prepared text, so that little text is not
    learned by heart.
    """

    name: FileName
    result: FileName = Field(default_factory=lambda known: known["name"])
    tokens: Positive | None = None
    steps: Positive | None = None
    max_passes: PositiveFloat | None = None
    train: Trained = Trained.ALL
    schedule: Schedule
    mixture: MixtureSettings = MixtureSettings()

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("give exactly one of tokens and steps")
        return self


class ComputeType(Choice):
    """A floating-point type. That of computing is the type of activations and of the weights in matrix
    products; master weights, norms, softmax and loss are float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class OptimizerRule(Settings):
    """The first rule wins whose `pattern`, a regular expression, is found in the parameter's path
    (model/layers/mlp/up_proj/weight).
    """

    pattern: str
    rate: Annotated[float, Field(ge=0.0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    freeze: bool = False


class OptimizerSettings(Settings):
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019). The rules are ordered and must cover
    every parameter.

    `new_layers_rate` is a factor on the rate of the layers that expansion added. `first_moment` is the type
    that m is kept in.
    """

    b1: BelowOne = 0.9
    b2: BelowOne = 0.95
    eps: PositiveFloat = 1e-8
    clip_norm: PositiveFloat = 1.0
    first_moment: ComputeType = ComputeType.FLOAT32
    z_loss: Annotated[float, Field(ge=0.0)] = 0.0
    new_layers_rate: Annotated[float, Field(ge=0.0)] = 1.0
    rules: tuple[OptimizerRule, ...] = (
        OptimizerRule(pattern=r"(norm|bias)"),
        OptimizerRule(pattern=r"(embed_tokens|lm_head|_proj)/weight$", weight_decay=0.1),
    )


class Remat(Choice):
    """What the backward pass computes again, from the least to the most; what it keeps of a layer, beside the
    residual stream:

    none: all. dots: the products with weights. mlp, the default: queries, keys, values (of whole windows,
    where `context` cuts them), what attention gives, the stream between attention and MLP, and both inner
    parts of the MLP, so that no product with weights is done twice (but where heads or what layers give are
    normalized: Qwen3, Gemma 2) and nothing of windows is gathered twice. gate: of the inner parts one, and
    keys and values of this device's part. projections: none of the two. attention: what attention gives.
    full: nothing.
    """

    NONE = "none"
    DOTS = "dots"
    MLP = "mlp"
    GATE = "gate"
    PROJECTIONS = "projections"
    ATTENTION = "attention"
    FULL = "full"


class AttentionKernel(Choice):
    """What computes attention in training: `auto` is splash attention on TPU, cuDNN on GPU where it can, XLA
    elsewhere.
    """

    AUTO = "auto"
    XLA = "xla"
    SPLASH = "splash"
    CUDNN = "cudnn"


# Settings of TrainingSettings that a run may be resumed with others of. They change its results by rounding
# at most; `skip_spikes` changes which updates are left out, and is what someone switches on after a spike.
CHANGEABLE = (
    "mesh",
    "gradient_accumulation",
    "remat",
    "scan_layers",
    "attention",
    "offload_optimizer_state",
    "skip_spikes",
    "recheck_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "keep_every",
    "compilation_cache",
)


class TrainingSettings(Settings):
    """How a step is computed. `global_batch_size` counts windows.

    `mesh` gives sizes of mesh axes, -1 for what is left: data (replicas; not named, one for each slice of a
    pod), fsdp (windows, and parameters), context (parts of each window, and parameters), tensor (features);
    see training.mesh. Weights are gathered, and gradients scattered, in `compute_dtype`; sums over data are
    float32. With `offload_optimizer_state` the moments of Adam stay in the memory of the hosts, and are on
    the devices a few parameters at a time, at the end of the step; all at once where a run is deepened. With
    `scan_layers` a layer is compiled once and run in a loop; without, compile time grows with depth, and what
    remat keeps need not be copied into stacks over layers, which GPUs spend time on.

    An update whose loss or gradient is not finite is left out. With `skip_spikes` so is one whose loss or
    gradient norm is more than so many standard deviations above the mean of the last 128 steps (6 is usual).
    After `max_skipped_steps` of them in a row the run stops. With `recheck_every` one step in so many
    computes its gradients twice, and the run stops where they differ in a bit: a chip is faulty.

    Checkpoints are saved after every `checkpoint_every` steps, when `checkpoint_minutes` have gone by, at the
    end of a stage, and where the run is stopped. The newest `keep_checkpoints` stay, and those whose step
    `keep_every` divides. `compilation_cache` keeps compiled programs in the run folder, unless
    JAX_COMPILATION_CACHE_DIR names another, so that a run which goes on compiles nothing again (but not those
    for several CPU devices).
    """

    global_batch_size: Positive = 8
    gradient_accumulation: Positive = 1
    compute_dtype: ComputeType = ComputeType.BFLOAT16
    remat: Remat = Remat.MLP
    scan_layers: bool = True
    offload_optimizer_state: bool = False
    attention: AttentionKernel = AttentionKernel.AUTO
    mesh: dict[str, int] = {"fsdp": -1}
    max_skipped_steps: Positive = 10
    skip_spikes: PositiveFloat | None = None
    recheck_every: Positive | None = None
    checkpoint_every: Positive = 500
    checkpoint_minutes: PositiveFloat | None = None
    keep_checkpoints: Positive = 2
    keep_every: Positive | None = None
    compilation_cache: bool = True

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.global_batch_size % self.gradient_accumulation:
            raise ValueError(
                f"global_batch_size = {self.global_batch_size} is not divisible by gradient_accumulation = "
                f"{self.gradient_accumulation}; "
                f"valid: {divisors(self.global_batch_size)}"
            )
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every = {self.keep_every} is not a multiple of checkpoint_every = "
                f"{self.checkpoint_every}"
            )
        return self
