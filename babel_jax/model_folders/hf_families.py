"""The differences between the families of models in Hugging Face's config.json: one table."""

from enum import Enum
from typing import NamedTuple

from babel_jax.config import Activation, Family


class Biases(Enum):
    """The attention projections with biases: q, k and v; all four if `attention_bias` is true; none."""

    QKV = "qkv"
    ATTENTION_BIAS = "attention_bias"
    NONE = "none"


class Windows(Enum):
    """The layers with the sliding window.

    - BY_LAYER: those that `layer_types` names, or with `use_sliding_window` those from `max_window_layers` on
    - ALTERNATING: those that `layer_types` names; without this key, layers 0, 2, 4, ...
    - ALL: those that `layer_types` names; without this key, all (Mistral; with the key it is Ministral)
    - NONE: none
    """

    BY_LAYER = "by layer"
    ALTERNATING = "alternating"
    ALL = "all"
    NONE = "none"


class Traits(NamedTuple):
    """The differences between the config.json of families. All other keys are the same in all families."""

    architecture: str
    biases: Biases
    windows: Windows
    mlp_bias: bool = False  # True if there is such a key
    qk_norm: bool = False
    activation_key: str = "hidden_act"
    activation: Activation = Activation.SILU
    tied: bool = False  # the default of tie_word_embeddings
    # Soft caps, norms after attention and MLP, norm weights around 0, scaled embeddings.
    gemma2: bool = False


FAMILIES = {
    Family.QWEN2: Traits("Qwen2ForCausalLM", Biases.QKV, Windows.BY_LAYER),
    Family.QWEN3: Traits("Qwen3ForCausalLM", Biases.ATTENTION_BIAS, Windows.BY_LAYER, qk_norm=True),
    Family.LLAMA: Traits("LlamaForCausalLM", Biases.ATTENTION_BIAS, Windows.NONE, mlp_bias=True),
    Family.MISTRAL: Traits("MistralForCausalLM", Biases.NONE, Windows.ALL),
    Family.GEMMA2: Traits(
        "Gemma2ForCausalLM",
        Biases.ATTENTION_BIAS,
        Windows.ALTERNATING,
        activation_key="hidden_activation",
        activation=Activation.GELU,
        tied=True,
        gemma2=True,
    ),
}
