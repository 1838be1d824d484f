"""config.json of Hugging Face to `ModelConfig` and back, in the spellings of transformers 4 and 5.

transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`; transformers 5 `rope_parameters`, `dtype` and `layer_types`.
"""

from enum import Enum
from typing import Any, NamedTuple

from babel_jax.config import Activation, Family, LayerType, ModelConfig, RopeScaling, RopeType
from babel_jax.config.file import parse_settings
from babel_jax.errors import BadInput


class Biases(Enum):
    """Which projections of attention have biases: q, k and v; all four where `attention_bias` says so; none."""

    QKV = "qkv"
    ATTENTION_BIAS = "attention_bias"
    NONE = "none"


class Windows(Enum):
    """Which layers have the sliding window: those that `use_sliding_window` and `layer_types` or `max_window_layers` name; those that
    `layer_types` names, or every other one from the first on; all; none."""

    BY_LAYER = "by layer"
    ALTERNATING = "alternating"
    ALL = "all"
    NONE = "none"


class Traits(NamedTuple):
    """How a family's config.json differs from another's. What is not here is the same in all."""

    architecture: str
    biases: Biases
    windows: Windows
    mlp_bias: bool = False  # whether there is such a key
    qk_norm: bool = False
    activation_key: str = "hidden_act"
    activation: Activation = Activation.SILU
    tied: bool = False  # where tie_word_embeddings is not there
    gemma2: bool = False  # soft caps, norms after attention and MLP, weights of norms around 0, scaled embeddings


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

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
# What transformers takes for each where the key is not there; null is no cap.
_SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_SLIDING_WINDOW = 4096  # the same of a window; null is none
_SPELLED_TWICE = ("rope_theta", "rope_scaling", "rope_parameters", "torch_dtype", "dtype")
_TRANSFORMERS_ROPE_THETA = 10000.0  # transformers' own default, which the first Llama files rely on
_ROPE_KEYS = {
    RopeType.DEFAULT: (),
    RopeType.LINEAR: ("factor",),
    RopeType.LLAMA3: ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_hf_config(hf: dict[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes; `where` (its path) stands in messages.

    Keys that say nothing about the decoder's computation are not looked at. Raises BadInput for another architecture, a missing key, and
    anything that would make the model compute something else than this decoder does (quantization, other activations or rotary types).
    """
    family = _family(hf, where)
    traits = FAMILIES[family]
    # transformers' defaults for these two are sizes of its own choice; Llama's default is one key head for each query head.
    needed = {
        Family.LLAMA: _NEEDED,
        Family.QWEN3: (*_NEEDED, "num_key_value_heads", "head_dim"),
        Family.GEMMA2: (*_NEEDED, "num_key_value_heads", "head_dim", "query_pre_attn_scalar"),
    }.get(family, (*_NEEDED, "num_key_value_heads"))
    missing = [key for key in needed if hf.get(key) is None]
    if missing:
        raise BadInput(f"{where}: missing {', '.join(missing)}; without it the model's shape is not known")
    wrong = [key for key in (*needed, "rope_theta") if not isinstance(hf.get(key, 0), int | float | None)]
    wrong += [key for key in ("num_hidden_layers", "max_window_layers") if not isinstance(hf.get(key, 0), int | None)]
    if wrong:
        raise BadInput(f"{where}: {', '.join(f'{key} = {hf[key]!r}' for key in wrong)}: not a number, or not a whole one")
    ids = hf.get("eos_token_id")
    if not all(isinstance(one, int) for one in (ids if isinstance(ids, list) else [ids]) if one is not None):
        raise BadInput(f"{where}: eos_token_id = {ids!r}: not a token id or a list of them")
    if hf.get("quantization_config"):
        raise BadInput(f"{where}: quantization_config: quantized weights are not supported; give the model in bfloat16, float16 or float32")
    if hf.get(traits.activation_key, traits.activation) != traits.activation:
        given = f"{traits.activation_key} = {hf[traits.activation_key]!r}"
        raise BadInput(f"{where}: {given} is not supported in a model of type {family}; supported: {traits.activation}")
    if hf.get("use_bidirectional_attention"):
        raise BadInput(f"{where}: use_bidirectional_attention is not supported; this is a causal decoder")
    theta, scaling = _rope(hf, where)
    window, layer_types = _windows(hf, traits.windows, where)
    biases = traits.biases is Biases.ATTENTION_BIAS and hf.get("attention_bias", False)
    shape_keys = (*_NEEDED, "num_key_value_heads", "head_dim", "initializer_range")
    values = {key: hf[key] for key in shape_keys if hf.get(key) is not None}
    if traits.gemma2:
        values |= {key: hf.get(key, default) for key, default in _SOFTCAPS.items()}
        values["query_pre_attn_scalar"] = hf["query_pre_attn_scalar"]
    return parse_settings(
        ModelConfig,
        {
            **values,
            "family": family,
            "rope_theta": theta,
            "rope_scaling": scaling.model_dump(mode="json"),
            "tie_word_embeddings": hf.get("tie_word_embeddings", traits.tied),
            "qkv_bias": traits.biases is Biases.QKV or biases,
            "qk_norm": traits.qk_norm,
            "o_bias": biases,
            "mlp_bias": traits.mlp_bias and hf.get("mlp_bias", False),
            "sliding_window": window,
            "layer_types": layer_types,
        },
        where,
    )


def write_hf_config(
    config: ModelConfig,
    base: dict[str, Any] | None = None,
    dtype: str | None = "float32",
    *,
    eos_token_id: int | list[int] | None = None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 and vLLM read alike: what the two spell differently stands in both spellings.

    `base` keeps its other keys. A token id that is not given is taken from `base`, and is null without one: transformers' own defaults
    (Llama: 1 and 2) name tokens that a tokenizer may use for something else. `dtype` names the type of the stored tensors.
    Raises BadInput for a model that its family cannot express in config.json.
    """
    hf = dict(base or {})
    given = {"eos_token_id": eos_token_id, "bos_token_id": bos_token_id, "pad_token_id": pad_token_id}
    hf |= {key: hf.get(key) if value is None else value for key, value in given.items()}
    shape_keys = (*_NEEDED, "num_key_value_heads", "head_dim", "initializer_range", "tie_word_embeddings")
    hf |= {key: getattr(config, key) for key in shape_keys}
    hf |= {"architectures": [FAMILIES[config.family].architecture], "model_type": str(config.family)}
    hf |= {"torch_dtype": dtype, "dtype": dtype}

    scaling = {key: getattr(config.rope_scaling, key) for key in _ROPE_KEYS[config.rope_scaling.rope_type]}
    typed = {"rope_type": str(config.rope_scaling.rope_type), **scaling}
    hf |= {"rope_theta": config.rope_theta, "rope_parameters": {**typed, "rope_theta": config.rope_theta}}
    hf["rope_scaling"] = {**typed, "type": typed["rope_type"]} if scaling else None

    traits = FAMILIES[config.family]
    hf[traits.activation_key] = str(config.hidden_act)
    if traits.gemma2:
        hf |= {key: getattr(config, key) for key in (*_SOFTCAPS, "query_pre_attn_scalar")}
    types = config.layer_types or (LayerType.FULL,) * config.num_hidden_layers
    sliding = LayerType.SLIDING in types
    _check_expressible(config, traits, types)
    if traits.biases is Biases.ATTENTION_BIAS:
        hf["attention_bias"] = config.qkv_bias
    if traits.mlp_bias:
        hf["mlp_bias"] = config.mlp_bias
    if traits.windows is not Windows.NONE:
        hf["sliding_window"] = config.sliding_window if sliding else None
    if traits.windows is Windows.BY_LAYER:
        hf |= {"use_sliding_window": sliding, "max_window_layers": types.index(LayerType.SLIDING) if sliding else len(types)}
        hf["layer_types"] = [str(kind) for kind in types]
    elif traits.windows is Windows.ALTERNATING or "layer_types" in hf:
        hf["layer_types"] = [str(kind) for kind in types]
    return hf


def _check_expressible(config: ModelConfig, traits: Traits, types: tuple[LayerType, ...]) -> None:
    attention = (config.qkv_bias, config.o_bias)
    possible = {Biases.QKV: ((True, False),), Biases.ATTENTION_BIAS: ((True, True), (False, False)), Biases.NONE: ((False, False),)}
    windows = {
        Windows.BY_LAYER: True,
        Windows.ALTERNATING: True,
        Windows.ALL: len(set(types)) == 1,
        Windows.NONE: LayerType.SLIDING not in types,
    }
    wrong = [
        *(() if attention in possible[traits.biases] else ("qkv_bias, o_bias",)),
        *(() if traits.mlp_bias or not config.mlp_bias else ("mlp_bias",)),
        *(() if traits.qk_norm == config.qk_norm else ("qk_norm",)),
        *(() if config.hidden_act is traits.activation else ("hidden_act",)),
        *(() if {config.post_norms, config.scaled_embeddings, config.norm_offset == 1.0} == {traits.gemma2} else ("norms",)),
        *(() if traits.gemma2 or not _has_softcaps(config) else ("soft caps",)),
        *(() if windows[traits.windows] else ("layer_types",)),
    ]
    if wrong:
        raise BadInput(f"a config.json of {config.family} cannot express this model's {', '.join(wrong)}")


def _has_softcaps(config: ModelConfig) -> bool:
    return any(getattr(config, key) is not None for key in _SOFTCAPS) or config.query_pre_attn_scalar != config.head_dim


def in_both_spellings(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """The same config.json with what only one of transformers 4 and 5 would find spelled for the other too; no value is changed.

    Without it transformers 4 reads a folder of transformers 5 with a rotary theta of its own. Raises BadInput as `read_hf_config` does.
    """
    dtype = hf.get("dtype", hf.get("torch_dtype"))
    written = write_hf_config(read_hf_config(hf, where), hf, dtype)
    return {**hf, **{key: written[key] for key in _SPELLED_TWICE if hf.get(key) is None and written[key] is not None}}


def stored_eos_token_ids(hf: dict[str, Any]) -> tuple[int, ...]:
    """The ids that end a text, from config.json's `eos_token_id`, which is one id, a list of ids, or null."""
    ids = hf.get("eos_token_id")
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def _family(hf: dict[str, Any], where: str) -> Family:
    supported = ", ".join(f"{family} ({FAMILIES[family].architecture})" for family in Family)
    if not hf.get("model_type"):
        raise BadInput(f"{where}: missing model_type; supported: {supported}")
    if hf["model_type"] not in list(Family):
        raise BadInput(f"{where}: model_type = {hf['model_type']!r} is not supported; supported: {supported}")
    family = Family(hf["model_type"])
    architectures = hf.get("architectures") or [FAMILIES[family].architecture]
    if architectures != [FAMILIES[family].architecture]:
        raise BadInput(f"{where}: architectures = {architectures} is not supported; supported: {supported}")
    return family


def _rope(hf: dict[str, Any], where: str) -> tuple[float, RopeScaling]:
    """Theta and scaling. Where both spellings stand they must agree, or which one holds would depend on the reader."""
    tables = {name: hf[name] for name in ("rope_scaling", "rope_parameters") if hf.get(name)}
    for name, table in tables.items():
        if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
            raise BadInput(f"{where}: {name} must be one table for all layers; rotary parameters by layer type are not supported")
    given = [table["rope_theta"] for table in (hf, *tables.values()) if table.get("rope_theta") is not None]
    if not all(isinstance(theta, int | float) for theta in given):
        raise BadInput(f"{where}: rope_theta = {given[0]!r}: not a number")
    thetas = set(given)
    if len(thetas) > 1:
        raise BadInput(f"{where}: rope_theta is given as {' and as '.join(sorted(map(str, thetas)))}; keep the one that holds")
    scalings = {_rope_scaling(table, name, hf, where) for name, table in tables.items()}
    if len(scalings) > 1:
        raise BadInput(f"{where}: rope_scaling and rope_parameters differ; keep the one that holds")
    return (thetas.pop() if thetas else _TRANSFORMERS_ROPE_THETA), (scalings.pop() if scalings else RopeScaling())


def _rope_scaling(table: dict[str, Any], name: str, hf: dict[str, Any], where: str) -> RopeScaling:
    rope_type = table.get("rope_type", table.get("type", "default"))
    if rope_type not in list(RopeType):
        raise BadInput(f"{where}: {name}: rope type {rope_type!r} is not supported; supported: {', '.join(RopeType)}")
    if (table.get("partial_rotary_factor") or 1.0) != 1.0:
        raise BadInput(f"{where}: {name}: partial_rotary_factor = {table['partial_rotary_factor']} is not supported; supported: 1.0")
    # transformers falls back on the model's own length for this key alone.
    known = {"original_max_position_embeddings": hf["max_position_embeddings"], **table}
    keys = _ROPE_KEYS[RopeType(rope_type)]
    missing = [key for key in keys if known.get(key) is None]
    if missing:
        raise BadInput(f"{where}: {name}: missing {', '.join(missing)}, which rope type {rope_type} needs")
    return parse_settings(RopeScaling, {"rope_type": rope_type, **{key: known[key] for key in keys}}, f"{where}: {name}")


def _windows(hf: dict[str, Any], windows: Windows, where: str) -> tuple[int | None, list[str]]:
    """The sliding window and the type of each layer; a window that no layer uses is None, and `layer_types` is then empty."""
    layers = hf["num_hidden_layers"]
    types = hf.get("layer_types")
    if not isinstance(types, list | None):
        raise BadInput(f"{where}: layer_types must be a list with one entry for each layer")
    if types is not None and len(types) != layers:
        raise BadInput(f"{where}: layer_types has {len(types)} entries; it needs one for each of num_hidden_layers = {layers}")
    if windows is Windows.NONE:
        if types and LayerType.SLIDING in types:
            raise BadInput(f"{where}: layer_types names {LayerType.SLIDING}, which a {hf['model_type']} model does not have")
        return None, []
    if windows is Windows.ALL:
        window = hf.get("sliding_window", _SLIDING_WINDOW)
        return (None, []) if window is None else (window, [str(LayerType.SLIDING)] * layers)
    if windows is Windows.ALTERNATING:
        types = types or [str(LayerType.FULL if layer % 2 else LayerType.SLIDING) for layer in range(layers)]
        return (hf.get("sliding_window", _SLIDING_WINDOW), types) if LayerType.SLIDING in types else (None, [])
    window = hf.get("sliding_window", _SLIDING_WINDOW) if hf.get("use_sliding_window", False) else None
    if types is None and window is not None:
        if hf.get("max_window_layers") is None:
            raise BadInput(f"{where}: missing max_window_layers, which use_sliding_window = true needs")
        full = min(hf["max_window_layers"], layers)
        types = [str(LayerType.FULL)] * full + [str(LayerType.SLIDING)] * (layers - full)
    if types is None or all(kind == LayerType.FULL for kind in types):
        return None, []
    return window, types
