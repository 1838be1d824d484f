"""Every setting of the project: typed, validated and frozen. `config_file.load_config` reads them from TOML.

The resolved config (`Config.to_toml`) written into a run folder reproduces the run alone: its local paths are absolute.
"""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from babel_jax.files import write_text
from babel_jax.languages import language


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


LocalPath = Annotated[str, AfterValidator(_absolute)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Settings(BaseModel):
    """Base of all settings: frozen, strict about types, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# --- the model ---------------------------------------------------------------------------------------------------------------


class Family(StrEnum):
    """Supported architectures; the values are the `model_type` of config.json."""

    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    LLAMA = "llama"
    MISTRAL = "mistral"
    GEMMA2 = "gemma2"


class Activation(StrEnum):
    """The function on the gate of the MLP, named as in config.json; the second is GELU by its tanh approximation."""

    SILU = "silu"
    GELU = "gelu_pytorch_tanh"


class LayerType(StrEnum):
    """What a layer attends to; names as in the `layer_types` of config.json (transformers 5)."""

    FULL = "full_attention"
    SLIDING = "sliding_attention"


class RopeType(StrEnum):
    """Position scaling of rotary embeddings, named as in config.json."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"


class RopeScaling(Settings):
    """Rotary scaling; the frequency factors matter for `llama3` alone (Llama 3.1 report, section 3.4; key names of config.json)."""

    rope_type: RopeType = RopeType.DEFAULT
    factor: PositiveFloat = 1.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position_embeddings: Positive = 8192


def _gemma2(known: dict[str, Any]) -> bool:
    return known["family"] is Family.GEMMA2


class ModelConfig(Settings):
    """Shape and variant of a decoder; names are those of config.json. Hashable, so it may be a static argument of jit.

    What config.json leaves to the family has a name of ours: `qk_norm` (a norm on the queries and keys of each head), `post_norms` (a norm
    on what attention and MLP give), `norm_offset` (added to the weights of norms), `scaled_embeddings` (by sqrt(hidden_size)).
    Attention scores are scaled by 1 / sqrt(query_pre_attn_scalar), and x is soft-capped to cap * tanh(x / cap).
    """

    family: Family = Family.QWEN2
    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive = Field(default_factory=lambda known: known["num_attention_heads"])
    head_dim: Positive = Field(default_factory=lambda known: known["hidden_size"] // known["num_attention_heads"])
    max_position_embeddings: Positive = 32768
    rope_theta: PositiveFloat = 1_000_000.0
    rope_scaling: RopeScaling = RopeScaling()
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = Field(default_factory=lambda known: known["family"] is Family.QWEN2)
    qk_norm: bool = Field(default_factory=lambda known: known["family"] is Family.QWEN3)
    o_bias: bool = False
    mlp_bias: bool = False
    hidden_act: Activation = Field(default_factory=lambda known: Activation.GELU if _gemma2(known) else Activation.SILU)
    query_pre_attn_scalar: Positive = Field(default_factory=lambda known: known["head_dim"])
    attn_logit_softcapping: PositiveFloat | None = None
    final_logit_softcapping: PositiveFloat | None = None
    post_norms: bool = Field(default_factory=_gemma2)
    norm_offset: float = Field(default_factory=lambda known: 1.0 if _gemma2(known) else 0.0)
    scaled_embeddings: bool = Field(default_factory=_gemma2)
    sliding_window: Positive | None = None
    layer_types: tuple[LayerType, ...] = ()
    initializer_range: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not divisible by num_key_value_heads = {self.num_key_value_heads}; "
                f"valid num_key_value_heads: {_divisors(self.num_attention_heads)}"
            )
        if self.head_dim % 2 or self.head_dim < 2:
            raise ValueError(f"head_dim = {self.head_dim}; rotary positions need an even one of 2 or more")
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries; it needs one for each of num_hidden_layers = {self.num_hidden_layers}"
            )
        if LayerType.SLIDING in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types names sliding_attention and sliding_window is not set")
        return self

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer how many positions back it attends, itself included; None is all."""
        types = self.layer_types or (LayerType.FULL,) * self.num_hidden_layers
        return tuple(self.sliding_window if kind is LayerType.SLIDING else None for kind in types)

    def with_layers(self, source_layers: tuple[int, ...]) -> Self:
        """The config of the model whose layer i is this model's layer `source_layers[i]`."""
        types = tuple(self.layer_types[source] for source in source_layers) if self.layer_types else ()
        return self.model_copy(update={"num_hidden_layers": len(source_layers), "layer_types": types})


class ModelSource(Settings):
    """Where a run's model comes from: a model folder of either format, or `shape` with random initial weights."""

    folder: LocalPath | None = None
    shape: ModelConfig | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.folder is None) == (self.shape is None):
            raise ValueError("give exactly one of folder (a model folder) and shape (a table of the model's sizes)")
        return self


# --- expansion ---------------------------------------------------------------------------------------------------------------


class Init(StrEnum):
    """How a new layer begins. The first three are those of the Babel report: an exact copy of its source, the copy plus Gaussian noise,
    all zeros.

    Beyond it: `average` is the mean of its source and the layer behind that; `identity` a copy that adds nothing at first, as its output
    projections are zero (LLaMA Pro, Wu et al. 2024); `scaled` a copy that shares the residual update with its source, each giving half.
    """

    COPY = "copy"
    NOISE = "noise"
    ZERO = "zero"
    AVERAGE = "average"
    IDENTITY = "identity"
    SCALED = "scaled"


class ExpansionSettings(Settings):
    """The plan of new layers: one of `preset`, `insert_after`, `append` and `plan` (a plan file)."""

    preset: str | None = None
    insert_after: tuple[NonNegative, ...] = ()
    append: NonNegative = 0
    plan: LocalPath | None = None
    init: Init = Init.COPY
    noise_mean: float = 0.0001
    noise_std: Annotated[float, Field(ge=0.0)] = 0.0001
    seed: Seed = 0

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("preset", "insert_after", "append", "plan") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of preset, insert_after, append and plan; given: {', '.join(given) or 'none'}")
        return self


# --- data --------------------------------------------------------------------------------------------------------------------


class BadRows(StrEnum):
    """What to do with a text row that cannot be read: stop at it, or count it and go on."""

    REFUSE = "refuse"
    SKIP = "skip"


class Source(Settings):
    """Text rows of one language: files (`path`, globs allowed) or a TFDS dataset by name.

    Files: .jsonl or .txt (plain or .gz or .zst) and .parquet. `kind` holds for rows that have no `kind` of their own.
    """

    language: str
    path: LocalPath | None = None
    tfds: str | None = None
    tfds_split: str = "train"
    tfds_folder: LocalPath | None = None
    kind: str = "web"
    text_key: str = "text"
    id_key: str = "id"

    @field_validator("language")
    @classmethod
    def _known(cls, code: str) -> str:
        return language(code).code

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.path is None) == (self.tfds is None):
            raise ValueError("give exactly one of path and tfds")
        return self


class DataSettings(Settings):
    """The prepared datasets: where they are, and how `babel prepare` makes them.

    `tokenizer` is a model folder, a tokenizer.json or a SentencePiece .model file; without it the run's model folder has it.
    """

    folder: LocalPath
    tokenizer: LocalPath | None = None
    seq_len: Positive = 4096
    bad_rows: BadRows = BadRows.REFUSE
    heldout_fraction: Fraction = 0.02
    heldout_bytes: Positive = 200_000
    sources: tuple[Source, ...] = ()


class Strategy(StrEnum):
    """How a mixture shares its tokens among languages: as equal as supply allows (water-filling), in proportion to
    supply ** (1 / temperature), or by explicit weights."""

    EQUAL = "equal"
    TEMPERATURE = "temperature"
    WEIGHTS = "weights"


class MixtureSettings(Settings):
    """Shares of a stage, in tokens.

    languages: those that take part; empty means all that have data. `weights` maps a language to its weight (strategy `weights`).
    max_epochs: cap on passes over one dataset; the surplus goes to the others. `curated` maps a language to the share of the whole
    that its `curated` kind (else its `textbook` kind, else any) gets on top of its own. The multipliers raise the weight of
    low-resource languages, and of the kind `textbook` within every language.
    """

    strategy: Strategy = Strategy.EQUAL
    temperature: PositiveFloat = 1.0
    languages: tuple[str, ...] = ()
    weights: dict[str, PositiveFloat] = {}
    max_epochs: PositiveFloat = 4.0
    curated: dict[str, Fraction] = {}
    low_resource_multiplier: PositiveFloat = 1.0
    textbook_multiplier: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for code in (*self.languages, *self.weights, *self.curated):
            language(code)
        if (self.strategy is Strategy.WEIGHTS) != bool(self.weights):
            raise ValueError('strategy = "weights" and a table of weights go together')
        if sum(self.curated.values()) >= 1.0:
            raise ValueError(f"the shares of curated add up to {sum(self.curated.values()):g}; they must stay below 1")
        return self


# --- training ----------------------------------------------------------------------------------------------------------------


class ScheduleKind(StrEnum):
    """Learning-rate schedules: warmup-stable-decay, cosine decay, constant; each after a linear warmup."""

    WSD = "wsd"
    COSINE = "cosine"
    CONSTANT = "constant"


class Schedule(Settings):
    """Learning rate of a stage. Warmup and decay are fractions of the stage's steps; the final rate is a fraction of the peak."""

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


class Trained(StrEnum):
    """What a stage trains: all parameters, or those of the layers that expansion added (so that the others stay as they are)."""

    ALL = "all"
    NEW_LAYERS = "new_layers"


class Stage(Settings):
    """One stage of a run: its budget in `tokens` or in `steps`, its rate and its mixture. `result` names the model after it in tables.

    `max_passes` cuts the budget to so many passes over all the prepared text, so that little text is not learned by heart.
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


class OptimizerRule(Settings):
    """The first rule wins whose `pattern`, a regular expression, is found in the parameter's path (model/layers/mlp/up_proj/weight)."""

    pattern: str
    rate: Annotated[float, Field(ge=0.0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    freeze: bool = False


class OptimizerSettings(Settings):
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019). The rules are ordered and must cover every parameter.

    `new_layers_rate` is a factor on the rate of the layers that expansion added.
    """

    b1: BelowOne = 0.9
    b2: BelowOne = 0.95
    eps: PositiveFloat = 1e-8
    clip_norm: PositiveFloat = 1.0
    z_loss: Annotated[float, Field(ge=0.0)] = 0.0
    new_layers_rate: Annotated[float, Field(ge=0.0)] = 1.0
    rules: tuple[OptimizerRule, ...] = (
        OptimizerRule(pattern=r"(norm|bias)"),
        OptimizerRule(pattern=r"(embed_tokens|lm_head|_proj)/weight$", weight_decay=0.1),
    )


class Remat(StrEnum):
    """What the backward pass computes again: nothing, what is not a matrix product with weights, or whole layers."""

    NONE = "none"
    DOTS = "dots"
    FULL = "full"


class ComputeType(StrEnum):
    """Type of activations and of the weights in matrix products; master weights, norms, softmax and loss are float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class TrainingSettings(Settings):
    """How a step is computed. `global_batch_size` counts windows; `mesh` gives sizes of mesh axes, -1 for what is left."""

    global_batch_size: Positive = 8
    gradient_accumulation: Positive = 1
    compute_dtype: ComputeType = ComputeType.BFLOAT16
    remat: Remat = Remat.NONE
    mesh: dict[str, int] = {"data": 1, "fsdp": -1, "tensor": 1}
    max_skipped_steps: Positive = 10
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.global_batch_size % self.gradient_accumulation:
            raise ValueError(
                f"global_batch_size = {self.global_batch_size} is not divisible by gradient_accumulation = {self.gradient_accumulation}; "
                f"valid: {_divisors(self.global_batch_size)}"
            )
        return self


class EvaluationSettings(Settings):
    """Bits per byte on held-out text: windows a batch, and the most bytes of text for each language."""

    batch_size: Positive = 8
    max_bytes: Positive = 200_000


class Config(Settings):
    """One run. `out` is the run folder. Relative paths are taken from the working directory."""

    out: LocalPath
    seed: Seed = 0
    model: ModelSource
    expansion: ExpansionSettings | None = None
    data: DataSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    export_dtype: ComputeType = ComputeType.BFLOAT16
    stages: tuple[Stage, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.model.shape is not None and self.data.seq_len > (longest := self.model.shape.max_position_embeddings):
            raise ValueError(f"data.seq_len = {self.data.seq_len} exceeds model.shape.max_position_embeddings = {longest}")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: names must differ; given {', '.join(names)}")
        points = [*(("base", "expanded") if self.model.folder is not None else ()), *(stage.result for stage in self.stages)]
        if len(set(points)) != len(points):
            raise ValueError(f"stages: results must differ, also from base and expanded; given {', '.join(s.result for s in self.stages)}")
        with_sources = {source.language for source in self.data.sources}
        for stage in self.stages:
            named = (*stage.mixture.languages, *stage.mixture.weights, *stage.mixture.curated)
            missing = [code for code in named if with_sources and code not in with_sources]
            if missing:
                raise ValueError(
                    f"stages: the mixture of {stage.name!r} names {', '.join(missing)}, which data.sources has no source for; "
                    f"there are sources for {' '.join(sorted(with_sources))}"
                )
        return self

    def to_toml(self) -> str:
        """The resolved config as TOML; `load_config` on it gives this config back."""
        return tomli_w.dumps(json.loads(self.model_dump_json(exclude_none=True)))

    def save(self, path: Path) -> None:
        """Writes `to_toml` to `path` in one step."""
        write_text(path, self.to_toml())
