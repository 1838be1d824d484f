"""Hugging Face's config.json to `ModelConfig` and back, in the forms of transformers 4 and 5.

transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`; transformers 5 writes `rope_parameters`,
`dtype` and `layer_types`.
"""

from typing import Any

from babel_jax.config import Family, LayerType, ModelConfig
from babel_jax.config.file import parse_settings
from babel_jax.config.model import MOST_LAYERS
from babel_jax.errors import BadInput
from babel_jax.model_folders.hf_families import FAMILIES, Biases, Traits, Windows
from babel_jax.model_folders.hf_rope import completed_tables, read_rope, write_rope

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
# transformers' defaults if the key is missing; null means no cap.
_SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_SLIDING_WINDOW = 4096  # transformers' default if the key is missing; null means no window
_SPELLED_TWICE = ("rope_theta", "rope_scaling", "rope_parameters", "torch_dtype", "dtype")
# transformers 5 refuses a config in which these are integers.
_FLOATS = (
    "rms_norm_eps",
    "initializer_range",
)
# Ministral is Mistral with layer_types; transformers reads a mistral with this key as one.
_MINISTRAL = ("ministral", "MinistralForCausalLM")

# Keys that change the computation or the cache of transformers in a model of any type, and that this decoder
# does not support.
_NOT_SUPPORTED = {
    "quantization_config": "quantized weights are not supported; give bfloat16, float16 or float32",
    "use_bidirectional_attention": "not supported; this is a causal decoder",
    "per_layer_config": "layers that differ from each other are not supported",
    "attention_chunk_size": "attention in chunks is not supported",
    "kv_sharing_modes": "keys and values that layers share are not supported",
    "attribute_map": "other names for keys are not supported; write the values under their own names",
    "is_encoder_decoder": "not supported; this is a decoder alone",
    **dict.fromkeys(
        ("text_config", "text_encoder", "decoder", "generator"),
        "a model of several parts is not supported; give the text model alone",
    ),
}


def read_hf_config(hf: dict[str, Any], location: str) -> ModelConfig:
    """The model of a config.json; messages name `location` (its path).

    Keys without effect on the decoder's computation are ignored. Raises BadInput for another architecture, a
    missing key, and any key with which transformers would compute something else than this decoder
    (quantization, other activations or rotary types).
    """
    family = _family(hf, location)
    traits = FAMILIES[family]
    # transformers' defaults for these two are arbitrary sizes, so they must be given. Only Llama's default is
    # general: one key head for each query head.
    needed = {
        Family.LLAMA: _NEEDED,
        Family.QWEN3: (*_NEEDED, "num_key_value_heads", "head_dim"),
        Family.GEMMA2: (*_NEEDED, "num_key_value_heads", "head_dim", "query_pre_attn_scalar"),
    }.get(family, (*_NEEDED, "num_key_value_heads"))
    _check_keys(hf, needed, location)
    # The decoder has one activation for each family.
    if hf.get(traits.activation_key, traits.activation) != traits.activation:
        given = f"{traits.activation_key} = {hf[traits.activation_key]!r}"
        raise BadInput(
            f"{location}: {given} is not supported in a model of type {family}; supported: "
            f"{traits.activation}"
        )
    theta, scaling = read_rope(hf, location)
    window, layer_types = _windows(hf, traits.windows, location)
    biases = traits.biases is Biases.ATTENTION_BIAS and hf.get("attention_bias", False)
    shape_keys = (*_NEEDED, "num_key_value_heads", "head_dim", "initializer_range")
    # Keys that are null or missing get the defaults of `ModelConfig`.
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
        location,
    )


def _check_keys(hf: dict[str, Any], needed: tuple[str, ...], location: str) -> None:
    """Raises BadInput for a key that is missing or is no number, and for keys that this decoder does not
    support.
    """
    missing = [key for key in needed if hf.get(key) is None]
    if missing:
        raise BadInput(f"{location}: missing {', '.join(missing)}; without it the model's shape is not known")
    wrong = [key for key in (*needed, "rope_theta") if not isinstance(hf.get(key, 0), int | float | None)]
    for key in ("num_hidden_layers", "max_window_layers"):
        if not isinstance(hf.get(key, 0), int | None):
            wrong.append(key)
    if wrong:
        raise BadInput(
            f"{location}: {', '.join(f'{key} = {hf[key]!r}' for key in wrong)}: not a number, or not "
            "a whole one"
        )
    # Checked before any list with one entry for each layer is made.
    if not 0 < hf["num_hidden_layers"] <= MOST_LAYERS:
        raise BadInput(
            f"{location}: num_hidden_layers = {hf['num_hidden_layers']}: 1 to {MOST_LAYERS} layers "
            "are supported"
        )

    # Token ids.
    ids = hf.get("eos_token_id")
    eos_ids = ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token, int | None) for token in eos_ids):
        raise BadInput(f"{location}: eos_token_id = {ids!r}: not a token id or a list of them")
    for key in ("bos_token_id", "pad_token_id"):
        if not isinstance(hf.get(key), int | None):
            raise BadInput(f"{location}: {key} = {hf[key]!r}: not a token id")
    pad = hf.get("pad_token_id")
    if isinstance(pad, int) and pad >= hf["vocab_size"]:
        raise BadInput(
            f"{location}: pad_token_id = {pad}: the embedding has rows 0 to {hf['vocab_size'] - 1}; "
            "transformers loads no such model"
        )
    for key, reason in _NOT_SUPPORTED.items():
        if hf.get(key):
            raise BadInput(f"{location}: {key} = {hf[key]!r}: {reason}")
    # For transformers, null, 0 and false all mean that tokens also attend to later ones.
    if not hf.get("is_causal", True):
        raise BadInput(
            f"{location}: is_causal = {hf['is_causal']!r} is not supported; this is a causal decoder"
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
    """A config.json that transformers 4 and 5 and vLLM read in the same way: keys that differ between
    versions are written in both forms.

    `base` keeps its other keys. A token id that is None is taken from `base`, and is null without one:
    transformers' own defaults (Llama: 1 and 2) are tokens that a tokenizer may use for something else.
    `dtype` is the type of the stored tensors. Raises BadInput for a model that its family cannot express in
    config.json.
    """
    hf = dict(base or {})
    given = {"eos_token_id": eos_token_id, "bos_token_id": bos_token_id, "pad_token_id": pad_token_id}
    hf |= {key: hf.get(key) if value is None else value for key, value in given.items()}
    # A padding token may have no row in the embedding; transformers refuses its id.
    if isinstance(hf["pad_token_id"], int) and hf["pad_token_id"] >= config.vocab_size:
        hf["pad_token_id"] = None
    shape_keys = (*_NEEDED, "num_key_value_heads", "head_dim", "initializer_range", "tie_word_embeddings")
    hf |= {key: getattr(config, key) for key in shape_keys}
    if not _is_ministral(hf, config.family):
        hf |= {"architectures": [FAMILIES[config.family].architecture], "model_type": str(config.family)}
    hf |= {"torch_dtype": dtype, "dtype": dtype, **write_rope(config)}

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
        hf |= {
            "use_sliding_window": sliding,
            "max_window_layers": types.index(LayerType.SLIDING) if sliding else len(types),
        }
        hf["layer_types"] = [str(kind) for kind in types]
    elif needs_layer_types(config) or "layer_types" in hf:
        hf["layer_types"] = [str(kind) for kind in types]
    return hf


def needs_layer_types(config: ModelConfig) -> bool:
    """True if transformers needs `layer_types` in the config.json of this model to know the layers with the
    window.
    """
    windows = FAMILIES[config.family].windows
    if windows is Windows.ALL:
        return len(set(config.layer_types)) > 1
    return windows is Windows.ALTERNATING or LayerType.SLIDING in config.layer_types


def _check_expressible(config: ModelConfig, traits: Traits, types: tuple[LayerType, ...]) -> None:
    attention = (config.qkv_bias, config.o_bias)
    possible = {
        Biases.QKV: ((True, False),),
        Biases.ATTENTION_BIAS: ((True, True), (False, False)),
        Biases.NONE: ((False, False),),
    }
    windows = {
        Windows.BY_LAYER: True,
        Windows.ALTERNATING: True,
        Windows.ALL: True,
        Windows.NONE: LayerType.SLIDING not in types,
    }
    # Gemma 2 has all three of these, every other family none.
    norms = {config.post_norms, config.scaled_embeddings, config.norm_offset == 1.0}
    is_expressible = {
        "qkv_bias, o_bias": attention in possible[traits.biases],
        "mlp_bias": traits.mlp_bias or not config.mlp_bias,
        "qk_norm": traits.qk_norm == config.qk_norm,
        "hidden_act": config.hidden_act is traits.activation,
        "norms": norms == {traits.gemma2},
        "soft caps": traits.gemma2 or not _has_softcaps(config),
        "layer_types": windows[traits.windows],
    }
    wrong = [name for name, expressible in is_expressible.items() if not expressible]
    if wrong:
        raise BadInput(f"a config.json of {config.family} cannot express this model's {', '.join(wrong)}")


def _has_softcaps(config: ModelConfig) -> bool:
    return (
        any(getattr(config, key) is not None for key in _SOFTCAPS)
        or config.query_pre_attn_scalar != config.head_dim
    )


def in_both_spellings(hf: dict[str, Any], location: str) -> dict[str, Any]:
    """The same config.json, with the keys that only transformers 4 or only 5 knows written in both forms; no
    value changes.

    Without this, transformers 4 reads a folder of transformers 5 with its default rotary theta, and
    transformers 5 fails on a Mistral with `layer_types` and without `head_dim`. Raises BadInput as
    `read_hf_config` does.
    """
    dtype = hf.get("dtype", hf.get("torch_dtype"))
    config = read_hf_config(hf, location)
    written = write_hf_config(config, hf, dtype)
    added = {key: written[key] for key in _SPELLED_TWICE if hf.get(key) is None and written[key] is not None}
    # transformers uses null as a value of these keys, and for a Ministral without head_dim it uses null.
    null = [key for key in ("head_dim", "max_window_layers", "use_sliding_window") if hf.get(key, 0) is None]
    if (
        config.family is Family.MISTRAL
        and ("layer_types" in hf or _is_ministral(hf, config.family))
        and "head_dim" not in hf
    ):
        null.append("head_dim")
    added |= {key: written[key] for key in null if key in written and written[key] is not None}
    floats = {key: float(hf[key]) for key in _FLOATS if isinstance(hf.get(key), int)}
    return {**hf, **added, **completed_tables(hf, config), **floats}


def stored_eos_token_ids(hf: dict[str, Any]) -> tuple[int, ...]:
    """The ids that end a text: config.json's `eos_token_id`, which is one id, a list of ids, or null."""
    ids = hf.get("eos_token_id")
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def _family(hf: dict[str, Any], location: str) -> Family:
    supported = ", ".join(f"{family} ({FAMILIES[family].architecture})" for family in Family)
    if not hf.get("model_type"):
        raise BadInput(f"{location}: missing model_type; supported: {supported}")
    if hf["model_type"] not in [*Family, _MINISTRAL[0]]:
        raise BadInput(
            f"{location}: model_type = {hf['model_type']!r} is not supported; supported: {supported}"
        )
    family = Family.MISTRAL if hf["model_type"] == _MINISTRAL[0] else Family(hf["model_type"])

    # Ministral is Mistral with another name.
    architectures = [[FAMILIES[family].architecture]] + (
        [[_MINISTRAL[1]]] if family is Family.MISTRAL else []
    )
    if hf.get("architectures") and hf["architectures"] not in architectures:
        raise BadInput(
            f"{location}: architectures = {hf['architectures']!r} is not supported; supported: {supported}"
        )
    return family


def _is_ministral(hf: dict[str, Any], family: Family) -> bool:
    return family is Family.MISTRAL and hf.get("model_type") == _MINISTRAL[0]


def _windows(hf: dict[str, Any], windows: Windows, location: str) -> tuple[int | None, list[str]]:
    """The sliding window and the type of each layer. If no layer uses the window, it is None and the types
    are empty.
    """
    layers = hf["num_hidden_layers"]
    types = hf.get("layer_types")
    if not isinstance(types, list | None):
        raise BadInput(f"{location}: layer_types must be a list with one entry for each layer")
    if types is not None and len(types) != layers:
        raise BadInput(
            f"{location}: layer_types has {len(types)} entries; it needs one for each of num_hidden_layers = "
            f"{layers}"
        )
    if windows is Windows.NONE:
        others = [kind for kind in types or () if kind != LayerType.FULL]
        if others:
            raise BadInput(
                f"{location}: layer_types names {others[0]!r}, which a {hf['model_type']} model does not have"
            )
        if types is None and hf.get("sliding_window") is not None:
            # transformers ignores it in the logits, but its cache drops keys by it.
            given = f"sliding_window = {hf['sliding_window']!r}"
            raise BadInput(
                f"{location}: {given}: a {hf['model_type']} model has no sliding window; set it to null"
            )
        return None, []
    # Qwen: the window holds only with use_sliding_window.
    used = windows is not Windows.BY_LAYER or hf.get("use_sliding_window", False)
    window = hf.get("sliding_window", _SLIDING_WINDOW) if used else None
    if types is None:
        types = _types_without_list(hf, windows, window, location)
    if all(kind == LayerType.FULL for kind in types):
        return None, []
    return window, types


def _types_without_list(hf: dict[str, Any], windows: Windows, window: int | None, location: str) -> list[str]:
    """The type of each layer where config.json has no layer_types; empty if no layer has the window."""
    layers = hf["num_hidden_layers"]
    full, sliding = str(LayerType.FULL), str(LayerType.SLIDING)
    # Gemma 2: every second layer has the window, beginning with the first.
    if windows is Windows.ALTERNATING:
        return [full if layer % 2 else sliding for layer in range(layers)]
    if window is None:
        return []
    # Mistral: all layers have the window.
    if windows is Windows.ALL:
        return [sliding] * layers
    # Qwen: the layers from max_window_layers on have the window.
    if hf.get("max_window_layers") is None:
        raise BadInput(f"{location}: missing max_window_layers, which use_sliding_window = true needs")
    before = min(hf["max_window_layers"], layers)
    return [full] * before + [sliding] * (layers - before)
