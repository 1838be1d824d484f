"""The settings of stages, of the optimizer, and of the computation of a step."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from babel_jax.config.data import MixtureSettings
from babel_jax.config.settings import (
    BelowOne,
    Choice,
    FileName,
    Fraction,
    LocalPath,
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
    """The learning rate of a stage.

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
    """The parameters that a stage trains: all, or only those of the layers that expansion added."""

    ALL = "all"
    NEW_LAYERS = "new_layers"


class Stage(Settings):
    """One stage of a run: its budget in `tokens` or in `steps`, its schedule and its mixture. `result` names
    the trained model in tables.

    `max_passes` limits the budget to so many passes over all the prepared text, so that a small text is not
    memorized.
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
    """A floating-point type. As compute_dtype, it is the type of activations and of weights in matrix
    products; master weights, norms, softmax and loss are always float32.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class OptimizerRule(Settings):
    """A rule for the parameters whose path (such as model/layers/mlp/up_proj/weight) the regular expression
    `pattern` matches; the first matching rule applies.
    """

    pattern: str
    rate: Annotated[float, Field(ge=0.0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    freeze: bool = False


class OptimizerSettings(Settings):
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019). The rules are ordered and must cover
    every parameter.

    `new_layers_rate` multiplies the rate of the layers that expansion added. `first_moment` is the dtype of
    m.
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
    """The outputs of a layer that are kept for the backward pass, beside the residual stream; all others are
    computed again. From the least recomputation to the most:

    - none: keeps all
    - dots: keeps the products with weights
    - mlp (default): keeps queries, keys, values (of whole windows, if `context` splits them), the output of
      attention, the stream between attention and MLP, and both inner parts of the MLP. So no product with
      weights is computed twice (except where heads or layer outputs are normalized: Qwen3, Gemma 2), and
      nothing of windows is gathered twice
    - gate: keeps the gate projection's output, recomputes the up projection; keeps keys and values of this
      device's part only
    - projections: as gate, but recomputes both inner parts
    - attention: keeps the output of attention
    - full: keeps nothing
    """

    NONE = "none"
    DOTS = "dots"
    MLP = "mlp"
    GATE = "gate"
    PROJECTIONS = "projections"
    ATTENTION = "attention"
    FULL = "full"


class AttentionKernel(Choice):
    """The implementation of attention in training: `auto` is splash attention on TPU, cuDNN on GPU if it can,
    XLA elsewhere.
    """

    AUTO = "auto"
    XLA = "xla"
    SPLASH = "splash"
    CUDNN = "cudnn"


# Settings that may differ when a run is resumed. They change its results at most by rounding. An exception is
# `skip_spikes`, which leaves out updates: one may want to set it after a spike.
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
    "local_checkpoints",
    "local_checkpoint_every",
    "compilation_cache",
)


class TrainingSettings(Settings):
    """The computation of a step. `global_batch_size` counts windows.

    - mesh: the sizes of mesh axes, -1 for the rest: data (replicas; by default one for each slice of a pod),
      fsdp (windows, and parameters), context (parts of each window, and parameters), tensor (features); see
      training.mesh
    - compute_dtype: weights are gathered and gradients scattered in this dtype; sums over data are float32
    - offload_optimizer_state: the moments of Adam stay in host memory; at the end of the step they are on the
      devices a few parameters at a time (all at once when a run is deepened)
    - scan_layers: a layer is compiled once and run in a loop. Without it, compile time grows with depth, but
      kept outputs need not be copied into stacks over layers, which takes time on GPUs
    - max_skipped_steps: an update whose loss or gradient is not finite is left out; after so many in a row
      the run stops
    - skip_spikes: an update is also left out if its loss or gradient norm is more than so many standard
      deviations above the mean of the last 128 steps (6 is usual)
    - recheck_every: one step in so many computes its gradients twice; the run stops if they differ in a bit,
      because a chip is faulty
    - checkpoint_every, checkpoint_minutes: checkpoints are saved after so many steps, after so many minutes,
      at the end of a stage, and when the run is stopped
    - keep_checkpoints, keep_every: the newest ones are kept, and those whose step `keep_every` divides
    - local_checkpoints, local_checkpoint_every: a folder on the disk (or in the memory) of each host, for
      additional checkpoints after so many steps; see docs/pods/local-checkpoints.md
    - compilation_cache: compiled programs are kept in the run folder, unless JAX_COMPILATION_CACHE_DIR names
      another, so that a resumed run compiles nothing again (except programs for several CPU devices)
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
    local_checkpoints: LocalPath | None = None
    local_checkpoint_every: Positive = 50
    compilation_cache: bool = True

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.global_batch_size % self.gradient_accumulation:
            raise ValueError(
                f"global_batch_size = {self.global_batch_size} is not divisible by gradient_accumulation = "
                f"{self.gradient_accumulation}; valid: {divisors(self.global_batch_size)}"
            )
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every = {self.keep_every} is not a multiple of checkpoint_every = "
                f"{self.checkpoint_every}"
            )
        if self.local_checkpoints is not None:
            self._check_local(self.local_checkpoints)
        return self

    def _check_local(self, folder: str) -> None:
        if "://" in folder:
            raise ValueError(f"local_checkpoints = {folder} must be a folder on the disk of each host")
        if self.offload_optimizer_state:
            raise ValueError(
                "local_checkpoints and offload_optimizer_state exclude each other: Orbax restores local "
                "checkpoints into device memory; leave one out"
            )
        if self.local_checkpoint_every >= self.checkpoint_every:
            raise ValueError(
                f"local_checkpoint_every = {self.local_checkpoint_every} is not less than checkpoint_every = "
                f"{self.checkpoint_every}; give fewer steps, or leave local_checkpoints out"
            )
