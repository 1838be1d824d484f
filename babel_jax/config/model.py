"""The model: its shape and variant, and its source in a run."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from babel_jax.config.settings import (
    Choice,
    ModelPath,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Settings,
    divisors,
)

# Bounds on the numbers of a config.json, far above any model of these families. They are checked before any
# array or list of such a size is made.
MOST_LAYERS = 2_000
MOST_HEADS = 2**14
MOST_FEATURES = 2**20  # hidden_size, head_dim
MOST_INNER = 2**22  # intermediate_size
MOST_TOKENS = 2**24  # vocab_size
MOST_POSITIONS = 2**31 - 1

Layers = Annotated[int, Field(gt=0, le=MOST_LAYERS)]
Heads = Annotated[int, Field(gt=0, le=MOST_HEADS)]
Features = Annotated[int, Field(gt=0, le=MOST_FEATURES)]
Inner = Annotated[int, Field(gt=0, le=MOST_INNER)]
Tokens = Annotated[int, Field(gt=0, le=MOST_TOKENS)]
Positions = Annotated[int, Field(gt=0, le=MOST_POSITIONS)]


class Family(Choice):
    """Supported architectures; the values are the `model_type` of config.json."""

    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    LLAMA = "llama"
    MISTRAL = "mistral"
    GEMMA2 = "gemma2"


class Activation(Choice):
    """The activation of the MLP's gate, named as in config.json; the second is GELU in its tanh
    approximation.
    """

    SILU = "silu"
    GELU = "gelu_pytorch_tanh"


class LayerType(Choice):
    """The attention of a layer; names as in `layer_types` of config.json (transformers 5)."""

    FULL = "full_attention"
    SLIDING = "sliding_attention"


class RopeType(Choice):
    """Position scaling of rotary embeddings, named as in config.json."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"


class RopeScaling(Settings):
    """Rotary scaling. The frequency factors are used by `llama3` alone (Llama 3.1 report, section 3.4; names
    as in config.json).
    """

    rope_type: RopeType = RopeType.DEFAULT
    """The kind of scaling."""
    factor: PositiveFloat = 1.0
    """How much longer windows may be than those of the first training. Unit: factor."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths above the original length over this are scaled. Unit: factor."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths below the original length over this are unchanged. Unit: factor."""
    original_max_position_embeddings: Positions = 8192
    """The length of the first training. Unit: tokens."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.rope_type is RopeType.LLAMA3 and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor = {self.high_freq_factor} must be greater than low_freq_factor = "
                f"{self.low_freq_factor}"
            )
        return self


def _gemma2(known: dict[str, Any]) -> bool:
    return known["family"] is Family.GEMMA2


class ModelConfig(Settings):
    """Shape and variant of a decoder; names are those of config.json. It is hashable, so it may be a static
    argument of jit. Properties that config.json implies by the family have our names.
    """

    family: Family = Family.QWEN2
    """The architecture."""
    vocab_size: Tokens
    """Rows of the embedding. Unit: tokens."""
    hidden_size: Features
    """The width of the residual stream. Unit: features."""
    intermediate_size: Inner
    """The inner width of the MLP. Unit: features."""
    num_hidden_layers: Layers
    """The depth. Unit: layers."""
    num_attention_heads: Heads
    """Heads of queries. Unit: heads."""
    num_key_value_heads: Heads = Field(default_factory=lambda known: known["num_attention_heads"])
    """Heads of keys and values. Default: `num_attention_heads`. Unit: heads."""
    head_dim: Features = Field(
        default_factory=lambda known: known["hidden_size"] // known["num_attention_heads"]
    )
    """The width of a head. Default: `hidden_size` / `num_attention_heads`. Unit: features."""
    max_position_embeddings: Positions = 32768
    """The longest window. Unit: tokens."""
    rope_theta: PositiveFloat = 1_000_000.0
    """The base of the rotary wavelengths. Unit: none."""
    rope_scaling: RopeScaling = RopeScaling()
    """Rotary scaling."""
    rms_norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in norms. Unit: none."""
    tie_word_embeddings: bool = False
    """The head is the embedding."""
    qkv_bias: bool = Field(default_factory=lambda known: known["family"] is Family.QWEN2)
    """Biases of queries, keys and values. Default: only for `qwen2`."""
    qk_norm: bool = Field(default_factory=lambda known: known["family"] is Family.QWEN3)
    """A norm on the queries and keys of each head. Default: only for `qwen3`."""
    o_bias: bool = False
    """A bias of the output of attention."""
    mlp_bias: bool = False
    """Biases of the MLP."""
    hidden_act: Activation = Field(
        default_factory=lambda known: Activation.GELU if _gemma2(known) else Activation.SILU
    )
    """The activation of the MLP's gate. Default: as the family."""
    query_pre_attn_scalar: Positive = Field(default_factory=lambda known: known["head_dim"])
    """Attention scores are multiplied by 1 / sqrt of this. Default: `head_dim`. Unit: features."""
    attn_logit_softcapping: PositiveFloat | None = None
    """The cap of attention scores: cap * tanh(x / cap). Unit: as the scores."""
    final_logit_softcapping: PositiveFloat | None = None
    """The cap of the logits. Unit: as the logits."""
    post_norms: bool = Field(default_factory=_gemma2)
    """A norm on the output of attention and MLP. Default: only for `gemma2`."""
    norm_offset: float = Field(default_factory=lambda known: 1.0 if _gemma2(known) else 0.0)
    """Added to the weights of norms. Default: 1 for `gemma2`, else 0. Unit: as the weights."""
    scaled_embeddings: bool = Field(default_factory=_gemma2)
    """Embeddings are multiplied by sqrt(hidden_size). Default: only for `gemma2`."""
    sliding_window: Positions | None = None
    """The positions that a layer of `sliding_attention` attends to, itself included. Unit: tokens."""
    layer_types: tuple[LayerType, ...] = ()
    """The attention of each layer. Default: full attention."""
    initializer_range: NonNegativeFloat = 0.02
    """The standard deviation of random initial weights. Unit: as the weights."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"= {self.num_key_value_heads}; valid num_key_value_heads: "
                f"{divisors(self.num_attention_heads)}"
            )
        if self.head_dim % 2 or self.head_dim < 2:
            raise ValueError(f"head_dim = {self.head_dim}; rotary positions need an even one of 2 or more")
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries; it needs one for each of "
                f"num_hidden_layers = {self.num_hidden_layers}"
            )
        if LayerType.SLIDING in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types names sliding_attention and sliding_window is not set")
        if self.sliding_window is not None and LayerType.SLIDING not in self.layer_types:
            raise ValueError(
                f"sliding_window = {self.sliding_window} is of no layer; layer_types says which are "
                "sliding_attention"
            )
        return self

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer, the number of positions that it attends to, itself included; None means all."""
        types = self.layer_types or (LayerType.FULL,) * self.num_hidden_layers
        return tuple(self.sliding_window if kind is LayerType.SLIDING else None for kind in types)

    def with_layers(self, source_layers: tuple[int, ...]) -> Self:
        """The config of a model whose layer i is layer `source_layers[i]` of this model."""
        types = tuple(self.layer_types[source] for source in source_layers) if self.layer_types else ()
        return self.model_copy(update={"num_hidden_layers": len(source_layers), "layer_types": types})


class ModelSource(Settings):
    """The model that a run begins with: exactly one of `folder` and `shape`."""

    folder: ModelPath | None = None
    """A model folder, Hugging Face or Orbax, on disk or in a bucket; or a model on the hub, such as
    `Qwen/Qwen2.5-7B` or `Qwen/Qwen2.5-7B@REVISION`. The run keeps the commit that it began with.
    """
    shape: ModelConfig | None = None
    """The sizes of a model with random initial weights."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.folder is None) == (self.shape is None):
            raise ValueError(
                "give exactly one of folder (a model folder) and shape (a table of the model's sizes)"
            )
        return self
