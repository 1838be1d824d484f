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
    """The learning rate of a stage: a linear warmup, then as `kind` says."""

    kind: ScheduleKind = ScheduleKind.WSD
    """After the warmup: warmup-stable-decay (constant, then a linear decay), cosine decay, or constant."""
    peak: PositiveFloat
    """The highest learning rate. Unit: AdamW's rate."""
    warmup_fraction: Fraction = 0.02
    """The part of the stage's steps in which the rate rises from 0 to the peak."""
    decay_fraction: Fraction = 0.2
    """With `kind = "wsd"`: the part of the stage's steps in which the rate falls, at the end."""
    final_fraction: Fraction = 0.1
    """The last rate, as a part of the peak."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.kind is ScheduleKind.WSD and self.warmup_fraction + self.decay_fraction > 1.0:
            raise ValueError("warmup_fraction + decay_fraction exceed 1")
        return self


class Trained(Choice):
    """The parameters that a stage trains: all, only those of the layers that expansion added, or only the
    rows of new tokens in embedding and head.
    """

    ALL = "all"
    NEW_LAYERS = "new_layers"
    NEW_ROWS = "new_rows"


class Stage(Settings):
    """One stage of a run: its budget (exactly one of `tokens` and `steps`), its schedule and its mixture."""

    name: FileName
    """The name of the stage."""
    result: FileName = Field(default_factory=lambda known: known["name"])
    """The name of the trained model in tables and files. Default: `name`."""
    tokens: Positive | None = None
    """The budget in tokens. Unit: tokens."""
    steps: Positive | None = None
    """The budget in steps. Unit: steps."""
    max_passes: PositiveFloat | None = None
    """Limits the budget to so many passes over all the prepared text, so that a small text is not
    memorized. Unit: passes.
    """
    train: Trained = Trained.ALL
    """Trains all parameters, only those of the layers that expansion added (`new_layers`), or only the rows
    of new tokens in embedding and head (`new_rows`).
    """
    schedule: Schedule
    """The learning rate."""
    mixture: MixtureSettings = MixtureSettings()
    """The shares of languages and kinds."""

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


class MatmulType(Choice):
    """A type of matrix products that is narrower than `compute_dtype`: each row of an operand has a scale of
    its own (Qwix).
    """

    INT8 = "int8"
    FLOAT8 = "float8"


class OptimizerRule(Settings):
    """A rule for some parameters. The first matching rule applies."""

    pattern: str
    """A regular expression; it is searched in the path of a parameter, such as
    model/layers/mlp/up_proj/weight.
    """
    rate: Annotated[float, Field(ge=0.0)] = 1.0
    """Multiplies the learning rate. Unit: factor."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay. Unit: part of the weight, times the rate."""
    freeze: bool = False
    """Leaves these parameters unchanged."""


class OptimizerSettings(Settings):
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019)."""

    b1: BelowOne = 0.9
    """The decay of the first moment m. Unit: none."""
    b2: BelowOne = 0.95
    """The decay of the second moment v. Unit: none."""
    eps: PositiveFloat = 1e-8
    """Added to the square root of v. Unit: as gradients."""
    clip_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm where theirs is larger. Unit: as gradients."""
    first_moment: ComputeType = ComputeType.FLOAT32
    """The type in which m is kept."""
    z_loss: Annotated[float, Field(ge=0.0)] = 0.0
    """The weight of log(Z)^2 in the loss, Z being the sum of the softmax; 0 leaves it out. Unit: factor."""
    new_layers_rate: Annotated[float, Field(ge=0.0)] = 1.0
    """Multiplies the rate of the layers that expansion added. Unit: factor."""
    rules: tuple[OptimizerRule, ...] = (
        OptimizerRule(pattern=r"(norm|bias)"),
        OptimizerRule(pattern=r"(embed_tokens|lm_head|_proj)/weight$", weight_decay=0.1),
    )
    """Rules for parameters, in order. Together they must cover every parameter. By default norms and
    biases have no weight decay, and all matrices have 0.1.
    """


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


# Settings that do not change the program of a step, and may differ when a run is resumed.
BESIDE_THE_STEP = (
    "recheck_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "keep_every",
    "local_checkpoints",
    "local_checkpoint_every",
    "compilation_cache",
)

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
    "compiler_options",
    *BESIDE_THE_STEP,
)


class TrainingSettings(Settings):
    """The computation of a step, and checkpoints."""

    global_batch_size: Positive = 8
    """The windows of one step, over all devices. Unit: windows."""
    gradient_accumulation: Positive = 1
    """A step is computed in so many parts, one after the other, to need less memory. It must divide
    `global_batch_size`. Unit: parts.
    """
    compute_dtype: ComputeType = ComputeType.BFLOAT16
    """The type of activations and of weights in products. Weights are gathered and gradients scattered in
    this type; sums over data are float32.
    """
    matmul_dtype: MatmulType | None = None
    """The type of the products with weights inside layers, forward and backward, if it is narrower than
    `compute_dtype`. Weights, moments, activations, attention and the output table are as they are without
    it.
    """
    remat: Remat = Remat.MLP
    """The outputs of a layer that are kept for the backward pass; all others are computed again, which
    needs less memory and more time. The values are explained below the table.
    """
    scan_layers: bool = True
    """A layer is compiled once and run in a loop. Without it, compile time grows with depth, but kept
    outputs need not be copied into stacks over layers, which takes time on GPUs.
    """
    offload_optimizer_state: bool = False
    """The moments of Adam stay in host memory; at the end of the step they are on the devices a few
    parameters at a time (all at once when a run is deepened).
    """
    attention: AttentionKernel = AttentionKernel.AUTO
    """The implementation of attention."""
    mesh: dict[str, int] = {"fsdp": -1}
    """The sizes of mesh axes, -1 for the rest: `data` (replicas; by default one for each slice of a pod),
    `fsdp` (windows, and parameters), `context` (parts of each window, and parameters), `tensor`
    (features). Unit: devices.
    """
    max_skipped_steps: Positive = 10
    """An update whose loss or gradient is not finite is left out; after so many in a row the run stops.
    Unit: steps.
    """
    skip_spikes: PositiveFloat | None = None
    """An update is also left out if its loss or gradient norm is more than so many standard deviations
    above the mean of the last 128 steps (6 is usual). Unit: standard deviations.
    """
    recheck_every: Positive | None = None
    """One step in so many computes its gradients twice; the run stops if they differ in a bit, because a
    chip is faulty. Unit: steps.
    """
    checkpoint_every: Positive = 500
    """A checkpoint is saved after so many steps, and also at the end of a stage and when the run is
    stopped. Unit: steps.
    """
    checkpoint_minutes: PositiveFloat | None = None
    """A checkpoint is also saved after so many minutes. Unit: minutes."""
    keep_checkpoints: Positive = 2
    """The newest so many checkpoints are kept. Unit: checkpoints."""
    keep_every: Positive | None = None
    """Checkpoints whose step this number divides are kept too. It must be a multiple of
    `checkpoint_every`. Unit: steps.
    """
    local_checkpoints: LocalPath | None = None
    """A folder on the disk (or in the memory) of each host, for additional checkpoints; see [local
    checkpoints](../pods/local-checkpoints.md).
    """
    local_checkpoint_every: Positive = 50
    """A local checkpoint is saved after so many steps. Unit: steps."""
    compilation_cache: bool = True
    """Compiled programs are kept in the run folder, unless JAX_COMPILATION_CACHE_DIR names another, so
    that a resumed run compiles nothing again (except programs for several CPU devices).
    """

    compiler_options: dict[str, bool | int | float | str] = {}
    """Options of XLA's compiler for the train step, such as
    `{ xla_tpu_overlap_compute_collective_tc = false }`. On TPUs they are added to our own, with which
    gathers of weights run beside products and, on v5p and v6e, scatters of gradients too, on the SparseCore.
    """

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
